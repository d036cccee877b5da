"""How the pair of a normalized kernel moves with the kernel: for the implicit gradient, and for second derivatives.

A converged pair is a fixed point of the training step at rest, so its derivative solves a linear system whose products
are derivatives of one step. An unbounded layer's frequency is part of the solution: the value of the pair is stationary
in it. Other layers have no frequencies, or the frequencies of a grid, which stay. The system is solved by GMRES
(`held.py`) inside `lax.custom_root` and `lax.custom_linear_solve`, which give both modes. The frozen gradient leaves
this derivative out, and its own derivative has it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.held import gmres, held, is_inexact, real_vector
from jaxsrn._tools.linalg import inner
from jaxsrn._tools.tolerances import kernel_tolerance
from jaxsrn.normalization.closed_form import over_weights
from jaxsrn.normalization.normalized import normalized
from jaxsrn.normalization.reverse_mode import in_reverse
from jaxsrn.operators.base import Operator
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.grid_certificate import degrees
from jaxsrn.spectra.circular.sites import on_grid
from jaxsrn.spectra.moving_pairs import with_free_frequency
from jaxsrn.spectra.pairs_by_kind import power_step, value_gradient
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "determined_pair",
    "moving_pair",
    "normalized_holding_pair",
]


def normalized_holding_pair(
    a: Float[Array, "..."], op: Operator, target, pair: Pair, is_used: Bool[Array, ""]
) -> Float[Array, "..."]:
    """`normalized`, with the derivative that holds the pair constant; its second derivative sees how the pair moves.

    Where the result is not used, the pair need not move.
    """
    if target is None:
        return normalized(a, op, None, pair)
    pair = with_free_frequency(pair, op, a.dtype)
    problem = a, target, lax.stop_gradient(is_used.astype(a.dtype))
    return held(functools.partial(_normalized, op), functools.partial(determined_pair, op), problem, pair)


def _normalized(op: Operator, problem, pair: Pair) -> Float[Array, "..."]:
    a, target, _ = problem
    return normalized(a, op, target, pair)


def determined_pair(op: Operator, problem, pair: Pair) -> Pair:
    """The move (`held.py`) of a pair whose `problem` is `(a, target, is_used)`: NaN where it is not determined.

    The kernel of such a pair has the lowest stable rank that the pair allows, and is nothing but the functional of it.
    Where `is_used` is 0, nothing depends on the pair, and it does not move instead: NaN times 0 would be NaN.
    """
    a, target, is_used = problem
    undetermined = jnp.where(is_used > 0, jnp.nan, 0.0)
    moved = moving_pair(a, op, target, pair, otherwise=undetermined)
    if op._normalization_keeps_pairs:
        return moved
    gradient = value_gradient(pair, op, a.shape)
    is_lowest = inner(gradient, over_weights(gradient, op)) * target <= 1 + kernel_tolerance(a.dtype)
    factor = jnp.where(is_lowest, 1 + undetermined, 1.0)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype) if is_inexact(leaf) else leaf, moved)


def moving_pair(a: Float[Array, "..."], op: Operator, target, pair: Pair, otherwise=0.0) -> Pair:
    """The pair as a function of the kernel: a fixed point of the step on the kernel normalized with the pair.

    Where its linear system is singular the derivative of the pair is `otherwise`; with 0 the gradient is the frozen
    one.
    """
    pair = with_free_frequency(pair, op, a.dtype)
    fixed, rebuild = real_vector(pair)

    def residual(op: Operator, vector):
        now = rebuild(vector)
        # A matrix has the same pair as its normalized form. It determines the pair where that form, of rank one, does
        # not.
        kernel = a if op._normalization_keeps_pairs else normalized(a, op, target, now)
        new = _aligned(power_step(kernel, op, now), pair)
        return vector - real_vector(_with_better_frequency(kernel, op, new))[0]

    def tangent_solve(matvec, rhs):
        backward = jax.vjp(functools.partial(residual, in_reverse(op)), fixed)[1]
        return _tangent_solve(matvec, lambda cotangent: backward(cotangent)[0], rhs, otherwise)

    return rebuild(lax.custom_root(functools.partial(residual, op), fixed, lambda _, vector: vector, tangent_solve))


def _with_better_frequency(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """A step uphill in the frequency, where that is free. The kernel has norm 1, so that the step has about its length.

    Along an axis of a single tap the value is constant, and the frequency is held.
    """
    if not isinstance(op, UnboundedConv):
        return pair

    def value(shift):
        moved = pair._replace(site=pair.site._replace(shift=shift))
        return inner(value_gradient(moved, op, kernel.shape), kernel)

    shift = pair.site.shift
    varies = jnp.asarray(degrees(on_grid(op, kernel.shape), kernel.shape)) > 0
    return pair._replace(site=pair.site._replace(shift=jnp.where(varies, shift + jax.grad(value)(shift), 0)))


def _aligned(pair: Pair, reference: Pair) -> Pair:
    """The pair in the phase of the reference: a common phase of both vectors leaves it the same pair."""
    overlap = jnp.vdot(pair.output, reference.output, precision=lax.Precision.HIGHEST)
    size = jnp.sqrt(jnp.where(overlap == 0, 1.0, overlap.real**2 + overlap.imag**2))
    phase = jnp.where(overlap == 0, 1.0, overlap / size.astype(overlap.dtype))
    return Pair(pair.site, pair.input * phase, pair.output * phase)


def _tangent_solve(matvec, transposed, rhs, otherwise):
    """`matvec^-1 rhs` by GMRES, and `otherwise` where that does not converge."""
    solve = functools.partial(gmres, otherwise=otherwise)
    return lax.custom_linear_solve(matvec, rhs, solve, transpose_solve=lambda _, rhs: solve(transposed, rhs))
