"""Subspaces: orthonormal vectors, the best of a span (Rayleigh, Ritz), subspace iteration, and Lanczos.

Lanczos here is for `T^T T` with full reorthogonalisation: the Krylov spaces of Golub and Kahan 1965, on one side. Its
thick restart keeps the leading Ritz vectors (Wu, Simon 2000). `jax.experimental.sparse.linalg.lobpcg_standard` needs a
matrix of more than five times as many rows as vectors that are asked for, keeps two blocks of vectors in memory where
nearly equal singular values need more, and cannot give a search up that ends below a known value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn._tools.linalg import matmul

__all__ = [
    "SingularVectors",
    "extended",
    "leading_singular_vectors",
    "orthonormal_rows",
    "random_start",
    "rayleigh_ritz",
    "remainder",
    "subspace_iteration",
    "top_singular_vectors",
]

# Ritz vectors carried through a restart resolve the cluster at the top; the rest of the basis is the memory price.
_BASIS = 20
_KEPT = 8
# Steps after which it is seen whether more are needed: a small SVD.
_BETWEEN_CHECKS = 4
_MAX_RESTARTS = 200


# Orthonormal vectors, and the best of their span


def remainder(
    vector: Inexact[Array, " n"], basis: Inexact[Array, "rows n"]
) -> tuple[Inexact[Array, " n"], Inexact[Array, " rows"]]:
    """What orthonormal rows leave of a vector, and its coefficients along them.

    What is rounding alone becomes 0: then the vector lies in the span. Rows of zeros take no part.
    """
    before, coefficients = jnp.linalg.norm(vector), jnp.zeros(len(basis), vector.dtype)
    # The first pass leaves rounding errors as large as the cancellation, the second is enough (Giraud et al. 2005).
    for _ in range(2):
        along = matmul(basis.conj(), vector)
        vector, coefficients = vector - matmul(along, basis), coefficients + along
    inside = jnp.linalg.norm(vector) <= 10 * jnp.finfo(before.dtype).eps * before
    return jnp.where(inside, 0, vector), coefficients


def extended(basis: Inexact[Array, "rows n"], vector: Inexact[Array, " n"]) -> Inexact[Array, "rows+1 n"]:
    """Orthonormal rows, and the unit vector that another one adds to their span (0 where nothing)."""
    rest = remainder(vector, basis)[0]
    return jnp.concatenate([basis, _unit_or_zero(rest)[None]])


def _unit_or_zero(vector: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    norm = jnp.linalg.norm(vector)
    return vector / jnp.where(norm == 0, 1, norm).astype(vector.dtype)


def orthonormal_rows(vectors: Inexact[Array, "... rows n"]) -> Inexact[Array, "... rows n"]:
    """An orthonormal basis of the span of the rows."""
    return jnp.linalg.qr(vectors.mT)[0].mT


def subspace_iteration(product: Callable, start: Inexact[Array, "... rows n"], num_steps: int):
    """Orthonormal rows near the leading eigenvectors of `product`, a symmetric map on rows (block power method)."""
    return lax.fori_loop(0, num_steps, lambda _, rows: orthonormal_rows(product(rows)), start)


def rayleigh_ritz(projected: Inexact[Array, "... rows rows"]):
    """Eigenvalues, the largest first, and eigenvectors in the rows, of a positive semidefinite matrix.

    The matrix is that of a map on orthonormal vectors: the eigenvectors combine them to the best of their span. The SVD
    of such a matrix is its eigendecomposition; stacks of `eigh` are no safe ground in jaxlib 0.10.2 (jax issue 39292).
    """
    _, values, weights = jnp.linalg.svd(projected)
    return values, weights.conj()


def random_start(shape: tuple[int, ...], dtype, seed: int | Int[Array, ""] = 0) -> Float[Array, "..."]:
    """A fixed Gaussian vector: never orthogonal to a leading vector for reasons of symmetry."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Lanczos


class SingularVectors(NamedTuple):
    """A singular value of a map, its unit vectors, and the relative residual `||T^T output - value input|| / value`.

    The output is 0 where the map is zero.
    """

    value: Float[Array, ""]
    input: Float[Array, " in"]
    output: Float[Array, " out"]
    residual: Float[Array, ""]


class _Basis(NamedTuple):
    """`T^T T V^T = V^T P` for the rows `V` in use, up to the coupling of the last of them to the next row.

    All rows take part in every product, as slices would be copied: those not yet in use are zero.
    """

    vectors: Float[Array, "rows in"]
    projected: Float[Array, "rows rows"]
    coupling: Float[Array, ""]


class _State(NamedTuple):
    """The basis, how many of its vectors are there, the leading Ritz pair, and the restarts so far."""

    basis: _Basis
    used: Int[Array, ""]
    value: Float[Array, ""]
    weights: Float[Array, " rows"]
    residual: Float[Array, ""]
    restarts: Int[Array, ""]


def _extend(gram: Callable, j: Int[Array, ""], basis: _Basis) -> _Basis:
    """One step: the `j`-th column of the projection and the next vector (0 where nothing is left)."""
    rest, column = remainder(gram(basis.vectors[j]), basis.vectors)
    projected = basis.projected.at[:, j].set(column).at[j].set(column)
    return _Basis(basis.vectors.at[j + 1].set(_unit_or_zero(rest)), projected, jnp.linalg.norm(rest))


def _restarted(basis: _Basis, kept: int) -> _Basis:
    """The basis rotated to its leading Ritz vectors, ready to go on."""
    values, weights = rayleigh_ritz(basis.projected)
    vectors = jnp.zeros_like(basis.vectors).at[:kept].set(matmul(weights[:kept], basis.vectors))
    projected = jnp.zeros_like(basis.projected).at[jnp.arange(kept), jnp.arange(kept)].set(values[:kept])
    # The next vector couples with all of those kept, which its own step finds.
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
      start: where the Krylov space starts; any non-zero vector that is not orthogonal to the answer.
      out_size: length of an output.
      tolerance: relative residual at which to stop.
      first_check: steps before the first look at the residual. By default a whole basis: a start near another
        singular vector would pass for the leading one earlier.
      floor: the search is given up where the singular value that it has come near is below. A larger one might
        still follow, as it might after the end of any search.
    """
    # One more than the smaller side: with it the space is always exhausted, and the coupling exactly zero.
    size = min(_BASIS, min(start.size, out_size) + 1)
    kept = min(_KEPT, size // 2)
    vectors = jnp.zeros((size + 1, start.size), start.dtype).at[0].set(_unit_or_zero(start))
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
        # `||T^T T v - theta v|| / theta` of the leading Ritz vector.
        residual = basis.coupling * jnp.abs(weights[0, used - 1]) / jnp.where(values[0] == 0, 1.0, values[0])
        return _State(basis, used, jnp.sqrt(values[0]), weights[0], residual, state.restarts + jnp.where(full, 1, 0))

    def unfinished(state: _State):
        # Some singular value is as near to this one as the residual.
        promising = ~(state.value * (1 + state.residual) < floor)
        return (state.residual > tolerance) & promising & (state.restarts < _MAX_RESTARTS)

    infinite = jnp.asarray(jnp.inf, start.dtype)
    state = _State(empty, jnp.asarray(0), infinite, jnp.zeros(size + 1, start.dtype), infinite, jnp.asarray(0))
    state = lax.while_loop(unfinished, advance, state)
    best = matmul(state.weights, state.basis.vectors)
    image = matvec(best)
    return SingularVectors(jnp.linalg.norm(image), best, _unit_or_zero(image), state.residual)


def top_singular_vectors(
    matvec: Callable, rmatvec: Callable, in_size: int, out_size: int, k: int, tolerance, dtype
) -> tuple[Float[Array, "k in"], Float[Array, "k out"]]:
    """`k` leading pairs of singular vectors, one after the other: what is found is subtracted from the map.

    A Krylov space of one vector sees every singular value once; deflation leaves the other copies of a repeated one.
    """

    def find(i: Int[Array, ""], found):
        values, inputs, outputs = found
        new = leading_singular_vectors(
            lambda x: matvec(x) - matmul(values * matmul(inputs, x), outputs),
            lambda y: rmatvec(y) - matmul(values * matmul(outputs, y), inputs),
            random_start((in_size,), dtype, seed=i),
            out_size,
            tolerance,
        )
        return values.at[i].set(new.value), inputs.at[i].set(new.input), outputs.at[i].set(new.output)

    nothing = jnp.zeros(k, dtype), jnp.zeros((k, in_size), dtype), jnp.zeros((k, out_size), dtype)
    return lax.fori_loop(0, k, find, nothing)[1:]
