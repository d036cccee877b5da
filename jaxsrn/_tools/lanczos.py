"""The Lanczos method with thick restarts, for the leading singular vectors of a map that is known by its products.

The method builds an orthonormal basis of the Krylov space of `T^T T`, with full reorthogonalisation. This is the side
of the inputs in the bidiagonalization of Golub and Kahan 1965. A full basis is restarted from its leading Ritz vectors
(thick restart, Wu and Simon 2000).

It differs from `jax.experimental.sparse.linalg.lobpcg_standard` in three ways. That function asks for more than five
rows for each vector; this one takes maps of any size. That one remembers only the current and the last block of
vectors; this one remembers a basis of many, which nearly equal singular values need. This one can give up a search that
is about to end below a known value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.linalg import matmul
from jaxsrn._tools.subspaces import fixed_start, projected_out, rayleigh_ritz, unit_or_zero, without_rounding

__all__ = ["SingularVectors", "leading_singular_vectors", "top_singular_vectors"]

# The basis holds so many vectors: more of them save steps, and cost memory and reorthogonalisation.
_BASIS = 20
# A restart carries so many Ritz vectors: they resolve nearly equal leading values, and leave less room for new vectors.
_KEPT = 8
# The residual is looked at after so many steps: every look takes a small SVD, and late looks take steps in vain.
_BETWEEN_CHECKS = 4
# The search ends after so many restarts, converged or not; its residual says which.
_MAX_RESTARTS = 200


class SingularVectors(NamedTuple):
    """A singular value of a map, its unit vectors, and the relative residual `||T^T output - value input|| / value`.

    The output is 0 where the map is zero.
    """

    value: Float[Array, ""]
    input: Float[Array, " in"]
    output: Float[Array, " out"]
    residual: Float[Array, ""]


class _Basis(NamedTuple):
    """A Krylov basis: `T^T T V^T = V^T P` for the rows `V` in use, but for the coupling of the last one to the next.

    All rows take part in every product, since XLA would copy slices; the rows not yet in use are zero.
    """

    vectors: Float[Array, "rows in"]
    projected: Float[Array, "rows rows"]
    coupling: Float[Array, ""]


class _State(NamedTuple):
    """The basis, the number of its vectors in use, the leading Ritz pair, and the number of restarts so far."""

    basis: _Basis
    used: Int[Array, ""]
    value: Float[Array, ""]
    weights: Float[Array, " rows"]
    residual: Float[Array, ""]
    restarts: Int[Array, ""]


def _extend(gram: Callable, j: Int[Array, ""], basis: _Basis) -> _Basis:
    """One step: column `j` of the projection, and the next vector, which is 0 where the space is exhausted."""
    vectors = basis.vectors
    image = gram(vectors[j])
    # The three-term recurrence is the first pass; a pass with all rows would read the whole basis once more.
    own = matmul(vectors[j], image)
    rest, others = projected_out(image - own * vectors[j] - basis.coupling * vectors[j - 1], vectors)
    rest = without_rounding(rest, image)
    column = others.at[j].add(own).at[j - 1].add(basis.coupling)
    projected = basis.projected.at[:, j].set(column).at[j].set(column)
    return _Basis(vectors.at[j + 1].set(unit_or_zero(rest)), projected, jnp.linalg.norm(rest))


def _restarted(basis: _Basis, kept: int) -> _Basis:
    """A thick restart: the basis of the `kept` leading Ritz vectors, followed by the next vector of the full one."""
    values, weights = rayleigh_ritz(basis.projected)
    vectors = jnp.zeros_like(basis.vectors).at[:kept].set(matmul(weights[:kept], basis.vectors))
    projected = jnp.zeros_like(basis.projected).at[jnp.arange(kept), jnp.arange(kept)].set(values[:kept])
    # The next vector couples with every kept one; its own step computes these couplings.
    return _Basis(vectors.at[kept].set(basis.vectors[-1]), projected, jnp.zeros_like(basis.coupling))


def leading_singular_vectors(
    matvec: Callable,
    rmatvec: Callable,
    start: Float[Array, " in"],
    out_size: int,
    tolerance: float | Float[Array, ""],
    first_check: int = _BASIS,
    floor: float | Float[Array, ""] = 0.0,
) -> SingularVectors:
    """The leading singular triplet of the map `matvec`.

    Args:
      matvec, rmatvec: the map and its transpose on flat vectors.
      start: the first vector of the Krylov space; any non-zero one that is not orthogonal to the answer.
      out_size: length of an output.
      tolerance: the relative residual at which the search stops.
      first_check: steps before the first look at the residual. The default is a whole basis, as a start near another
        singular vector could pass for the leading one earlier.
      floor: the search is given up where the singular value that it has come near is below this. A larger value might
        still follow, as it might after the end of any search.
    """
    # A basis of one vector more than the smaller side exhausts the space, and the last coupling is exactly zero.
    size = min(_BASIS, min(start.size, out_size) + 1)
    kept = min(_KEPT, size // 2)
    vectors = jnp.zeros((size + 1, start.size), start.dtype).at[0].set(unit_or_zero(start))
    zero = jnp.zeros((), start.dtype)
    empty = _Basis(vectors, jnp.zeros((size + 1, size + 1), start.dtype), zero)
    extend = functools.partial(_extend, lambda x: rmatvec(matvec(x)))

    def advance(state: _State) -> _State:
        full = state.used == size
        basis = lax.cond(full, lambda: _restarted(state.basis, kept), lambda: state.basis)
        first = jnp.where(full, kept, state.used)
        steps = jnp.where(first == 0, first_check, _BETWEEN_CHECKS)
        used = jnp.minimum(first + steps, size)
        basis = lax.fori_loop(first, used, extend, basis)
        values, weights = rayleigh_ritz(basis.projected)
        # This is `||T^T T v - theta v|| / theta` for the leading Ritz vector `v` and its Ritz value `theta`.
        residual = basis.coupling * jnp.abs(weights[0, used - 1]) / jnp.where(values[0] == 0, 1.0, values[0])
        return _State(basis, used, jnp.sqrt(values[0]), weights[0], residual, state.restarts + jnp.where(full, 1, 0))

    def unfinished(state: _State):
        # Some singular value is as near to this one as the residual says; the search goes on unless that is too low.
        promising = ~(state.value * (1 + state.residual) < floor)
        return (state.residual > tolerance) & promising & (state.restarts < _MAX_RESTARTS)

    infinite = jnp.asarray(jnp.inf, start.dtype)
    state = _State(empty, jnp.asarray(0), infinite, jnp.zeros(size + 1, start.dtype), infinite, jnp.asarray(0))
    state = lax.while_loop(unfinished, advance, state)
    best = matmul(state.weights, state.basis.vectors)
    image = matvec(best)
    return SingularVectors(jnp.linalg.norm(image), best, unit_or_zero(image), state.residual)


def top_singular_vectors(
    matvec: Callable, rmatvec: Callable, in_size: int, out_size: int, k: int, tolerance, dtype
) -> tuple[Float[Array, "k in"], Float[Array, "k out"]]:
    """The `k` leading pairs of singular vectors, each found in the map less the pairs before it (deflation).

    The Krylov space of one vector holds each singular value once. Deflation leaves the other copies of a repeated one.
    """

    def find(i: Int[Array, ""], found):
        values, inputs, outputs = found
        new = leading_singular_vectors(
            lambda x: matvec(x) - matmul(values * matmul(inputs, x), outputs),
            lambda y: rmatvec(y) - matmul(values * matmul(outputs, y), inputs),
            fixed_start((in_size,), dtype, seed=i),
            out_size,
            tolerance,
        )
        return values.at[i].set(new.value), inputs.at[i].set(new.input), outputs.at[i].set(new.output)

    nothing = jnp.zeros(k, dtype), jnp.zeros((k, in_size), dtype), jnp.zeros((k, out_size), dtype)
    return lax.fori_loop(0, k, find, nothing)[1:]
