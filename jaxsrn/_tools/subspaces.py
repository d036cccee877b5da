"""Leading singular vectors, matrix-free: Lanczos for `T^T T` with full reorthogonalisation and thick restarts.

The same Krylov spaces as those of Golub and Kahan 1965, on one side. The restart keeps the leading Ritz vectors (Wu,
Simon 2000).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.linalg import einsum, matmul

__all__ = [
    "leading_singular_vectors",
    "orthogonal_part",
    "random_start",
    "top_singular_vectors",
]


def orthogonal_part(vector, basis):
    """The unit vector along what the basis lacks; 0 where that is rounding alone, and the space exhausted."""
    before = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    # Twice is enough (Giraud et al. 2005).
    for _ in range(2):
        vector = vector - einsum("kj,kjn->kn", einsum("kjn,kn->kj", basis.conj(), vector), basis)
    norm = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    nothing = norm <= 100 * jnp.finfo(norm.dtype).eps * before
    return jnp.where(nothing, 0, vector / jnp.where(nothing, 1, norm).astype(vector.dtype))


# Ritz vectors carried through a restart resolve the cluster at the top; the rest of the basis is the memory price.
_BASIS = 20
_KEPT = 8
# Steps after which it is seen whether more are needed: a small SVD.
_BETWEEN_CHECKS = 4
_MAX_RESTARTS = 200


class _Basis(NamedTuple):
    """`T^T T V^T = V^T P` for the rows `V` in use, up to the coupling of the last of them to the next row.

    All rows take part in every product, as slices would be copied: those not yet in use are zero.
    """

    vectors: Float[Array, "rows in"]
    projected: Float[Array, "rows rows"]
    coupling: Float[Array, ""]


class _State(NamedTuple):
    """`used` vectors of the basis are there."""

    basis: _Basis
    used: Int[Array, ""]
    value: Float[Array, ""]
    residual: Float[Array, ""]
    restarts: Int[Array, ""]


def _extend(gram: Callable, j: Int[Array, ""], basis: _Basis) -> _Basis:
    """One step: the `j`-th column of the projection and the next vector (0 where nothing is left)."""
    vectors = basis.vectors
    image = gram(vectors[j])
    before = jnp.linalg.norm(image)
    # What the recurrence knows, then all the rest once more: one pass alone leaves rounding errors as large as the
    # cancellation.
    own = matmul(vectors[j], image)
    image = image - own * vectors[j] - basis.coupling * vectors[j - 1]
    others = matmul(vectors, image)
    image = image - matmul(others, vectors)
    column = others.at[j].add(own).at[j - 1].add(basis.coupling)
    norm = jnp.linalg.norm(image)
    # What is left of a vector inside the space is noise: the Krylov space is exhausted.
    norm = jnp.where(norm <= 10 * jnp.finfo(image.dtype).eps * before, 0.0, norm)
    following = jnp.where(norm == 0, 0.0, image / jnp.where(norm == 0, 1.0, norm))
    projected = basis.projected.at[:, j].set(column).at[j].set(column)
    return _Basis(vectors.at[j + 1].set(following), projected, norm)


def _ritz(basis: _Basis):
    """Values and coefficients of the Ritz vectors, the largest first."""
    # That of a positive semidefinite matrix; stacks of eigh are no safe ground in jaxlib 0.10.2 (jax issue 39292).
    _, values, coefficients = jnp.linalg.svd(basis.projected)
    return values, coefficients


def _restarted(basis: _Basis, kept: int) -> _Basis:
    """The basis rotated to its leading Ritz vectors, ready to go on."""
    values, coefficients = _ritz(basis)
    vectors = jnp.zeros_like(basis.vectors).at[:kept].set(matmul(coefficients[:kept], basis.vectors))
    projected = jnp.zeros_like(basis.projected).at[jnp.arange(kept), jnp.arange(kept)].set(values[:kept])
    # The next vector couples with all of those kept, which its own step finds.
    return _Basis(vectors.at[kept].set(basis.vectors[-1]), projected, jnp.zeros_like(basis.coupling))


def _progress(basis: _Basis, used: Int[Array, ""]):
    """The leading singular value so far, and `||T^T T v - theta v|| / theta` of its vector."""
    values, coefficients = _ritz(basis)
    residual = basis.coupling * jnp.abs(coefficients[0, used - 1]) / jnp.where(values[0] == 0, 1.0, values[0])
    return jnp.sqrt(values[0]), residual


def leading_singular_vectors(
    matvec: Callable,
    rmatvec: Callable,
    start: Float[Array, " in"],
    out_size: int,
    tolerance: float | Float[Array, ""],
    first_check: int = _BASIS,
    floor: float | Float[Array, ""] = 0.0,
) -> tuple[Float[Array, ""], Float[Array, " out"], Float[Array, " in"], Float[Array, ""]]:
    """The leading singular triplet of the map `matvec`, and the relative residual `||T^T u - sigma v|| / sigma`.

    Args:
      matvec, rmatvec: the map and its transpose on flat vectors.
      start: where the Krylov space starts; any non-zero vector that is not orthogonal to the answer.
      out_size: length of an output.
      tolerance: relative residual at which to stop.
      first_check: steps before the first look at the residual. By default a whole basis: a start near another
        singular vector would pass for the leading one earlier.
      floor: the search is given up where the singular value that it has come near is below. A larger one might
        still follow, as it might after the end of any search.

    Returns:
      `(sigma, u, v, residual)`; zeros for `u` where the map is zero.
    """
    # One more than the smaller side: with it the space is always exhausted, and the coupling exactly zero.
    size = min(_BASIS, min(start.size, out_size) + 1)
    kept = min(_KEPT, size // 2)
    norm = jnp.linalg.norm(start)
    empty = _Basis(
        jnp.zeros((size + 1, start.size), start.dtype).at[0].set(start / jnp.where(norm == 0, 1.0, norm)),
        jnp.zeros((size + 1, size + 1), start.dtype),
        jnp.zeros((), start.dtype),
    )
    extend = functools.partial(_extend, lambda x: rmatvec(matvec(x)))

    def advance(state: _State) -> _State:
        full = state.used == size
        basis = lax.cond(full, lambda: _restarted(state.basis, kept), lambda: state.basis)
        first = jnp.where(full, kept, state.used)
        steps = jnp.where(first == 0, first_check, _BETWEEN_CHECKS)
        used = jnp.minimum(first + steps, size)
        basis = lax.fori_loop(first, used, extend, basis)
        return _State(basis, used, *_progress(basis, used), state.restarts + full.astype(state.restarts.dtype))

    def unfinished(state: _State):
        # Some singular value is as near to this one as the residual.
        promising = ~(state.value * (1 + state.residual) < floor)
        return (state.residual > tolerance) & promising & (state.restarts < _MAX_RESTARTS)

    infinite = jnp.asarray(jnp.inf, start.dtype)
    state = _State(empty, jnp.asarray(0), infinite, infinite, jnp.asarray(0))
    state = lax.while_loop(unfinished, advance, state)
    right = matmul(_ritz(state.basis)[1][0], state.basis.vectors)
    image = matvec(right)
    value = jnp.linalg.norm(image)
    return value, jnp.where(value == 0, 0.0, image / jnp.where(value == 0, 1.0, value)), right, state.residual


def random_start(shape: tuple[int, ...], dtype, seed: int | Int[Array, ""] = 0) -> Float[Array, "..."]:
    """A fixed Gaussian vector: never orthogonal to a leading vector for reasons of symmetry."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def top_singular_vectors(
    matvec: Callable, rmatvec: Callable, in_size: int, out_size: int, k: int, tolerance, dtype
) -> tuple[Float[Array, "k out"], Float[Array, "k in"]]:
    """`k` leading pairs of singular vectors, one after the other: what is found is subtracted from the map.

    A Krylov space of one vector sees every singular value once; deflation leaves the other copies of a repeated one.
    """

    def find(i: Int[Array, ""], found):
        values, lefts, rights = found
        value, left, right, _ = leading_singular_vectors(
            lambda x: matvec(x) - matmul(values * matmul(rights, x), lefts),
            lambda y: rmatvec(y) - matmul(values * matmul(lefts, y), rights),
            random_start((in_size,), dtype, seed=i),
            out_size,
            tolerance,
        )
        return values.at[i].set(value), lefts.at[i].set(left), rights.at[i].set(right)

    nothing = jnp.zeros(k, dtype), jnp.zeros((k, out_size), dtype), jnp.zeros((k, in_size), dtype)
    return lax.fori_loop(0, k, find, nothing)[1:]
