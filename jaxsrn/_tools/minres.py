"""Symmetric linear systems that need not be definite, by products alone: MINRES (Paige, Saunders 1975).

The conjugate gradients of `jax.scipy` are for definite systems. The second derivative of a singular value in its
vectors is definite for the largest value alone; for any other it has eigenvalues of both signs, and where values
coincide it is singular.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen
from jaxsrn._tools.linalg import ratio

__all__ = ["minres"]


class _Solution(NamedTuple):
    """An `x`, its residual up to the sign, and the norm of the matrix times the residual, known a step after `x`."""

    x: Float[Array, " n"]
    residual: Float[Array, ""]
    slope: Float[Array, ""]


class _State(NamedTuple):
    """The recurrences of Elman, Silvester, Wathen 2014, "Finite elements and fast iterative solvers", Algorithm 2.4.

    Attributes:
      x: the solution so far.
      vectors: the last two vectors of Lanczos, the latter not normalised yet.
      directions: the last two directions in which `x` moved.
      length: of the latter vector of Lanczos.
      cosines, sines: of the last two rotations.
      residual: that of `x`, up to its sign.
      size: an estimate of the matrix's norm.
      flattest: the solution with the least slope so far.
      count: steps so far.
    """

    x: Float[Array, " n"]
    vectors: tuple[Float[Array, " n"], Float[Array, " n"]]
    directions: tuple[Float[Array, " n"], Float[Array, " n"]]
    length: Float[Array, ""]
    cosines: tuple[Float[Array, ""], Float[Array, ""]]
    sines: tuple[Float[Array, ""], Float[Array, ""]]
    residual: Float[Array, ""]
    size: Float[Array, ""]
    flattest: _Solution
    count: Int[Array, ""]


def minres(matvec: Callable, rhs: Float[Array, " n"], *, tolerance: float, most_steps: int):
    """The shortest `x` of the smallest `||matvec(x) - rhs||`, for a symmetric `matvec`.

    Args:
      matvec: symmetric; definite or not, singular or not.
      rhs: the right-hand side.
      tolerance: the relative residual at which the loop ends.
      most_steps: a guard of the loop; the flattest `x` is returned where it ends there.

    Returns:
      `(x, outside)`: what of `rhs` is outside of the range of `matvec`, up to the root of rounding, and is left out.
    """

    norm = jnp.linalg.norm(rhs)

    def unfinished(state: _State):
        is_left = (jnp.abs(state.residual) > tolerance * norm) & ~_is_outside(state)
        return is_left & (state.length > 0) & (state.count < most_steps)

    nothing, zero, one = jnp.zeros_like(rhs), jnp.zeros_like(norm), jnp.ones_like(norm)
    start = _State(
        x=nothing,
        vectors=(nothing, rhs),
        directions=(nothing, nothing),
        length=norm,
        cosines=(one, one),
        sines=(zero, zero),
        residual=norm,
        size=zero,
        flattest=_Solution(nothing, norm, jnp.full_like(norm, jnp.inf)),
        count=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(unfinished, functools.partial(_step, matvec), start)
    is_solved = jnp.abs(last.residual) <= tolerance * norm
    x = jnp.where(is_solved, last.x, last.flattest.x)
    outside = jnp.where(~is_solved & _is_outside(last), rhs - matvec(x), 0.0)
    # The solution's part along it is arbitrary, and absent from the shortest one.
    return x - ratio(jnp.vdot(outside, x), jnp.vdot(outside, outside)) * outside, outside


def _step(matvec: Callable, state: _State) -> _State:
    (before, now), (older, old) = state.vectors, state.directions
    now = ratio(now, state.length)
    image = matvec(now)
    along = jnp.vdot(now, image)
    following = image - along * now - state.length * before
    length = jnp.linalg.norm(following)
    (c_before, c), (s_before, s) = state.cosines, state.sines
    diagonal = c * along - c_before * s * state.length
    pivot = jnp.hypot(diagonal, length)
    direction = now - s_before * state.length * older - (s * along + c_before * c * state.length) * old
    direction = ratio(direction, pivot)
    # Where the pivot is 0 nothing of the residual can go.
    cosine, sine = ratio(diagonal, pivot), jnp.where(pivot == 0, 1.0, ratio(length, pivot))
    here = _Solution(state.x, state.residual, jnp.abs(state.residual) * jnp.hypot(diagonal, c * length))
    return _State(
        x=state.x + cosine * state.residual * direction,
        vectors=(now, following),
        directions=(old, direction),
        length=length,
        cosines=(c, cosine),
        sines=(s, sine),
        residual=-sine * state.residual,
        size=jnp.maximum(state.size, jnp.hypot(along, length)),
        flattest=chosen(here.slope < state.flattest.slope, here, state.flattest),
        count=state.count + 1,
    )


def _is_outside(state: _State) -> Bool[Array, ""]:
    """Whether the residual of the flattest solution is outside of the range of the matrix, up to rounding.

    Few residuals come closer to it than the root of rounding, and after that they grow.
    """
    _, residual, slope = state.flattest
    closest = 2 * math.sqrt(jnp.finfo(slope.dtype).eps)
    return slope <= closest * state.size * jnp.abs(residual)
