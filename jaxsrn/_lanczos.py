"""Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation and thick restarts, matrix-free.

Golub, Kahan 1965; the restart keeps the leading Ritz vectors (Baglama, Reichel 2005).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = [
    "default_tolerance",
    "leading_singular_vectors",
    "random_start",
    "search_tolerance",
    "top_singular_vectors",
]

# Ritz vectors carried through a restart resolve the cluster at the top; the rest of the basis is the memory price.
_BASIS = 20
_KEPT = 8
# Steps after which it is seen whether more are needed: a small SVD.
_BETWEEN_CHECKS = 4
_MAX_RESTARTS = 200


def default_tolerance(dtype) -> float:
    """Relative residual of singular vectors that is asked for: the value's error is of the order of its square."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def search_tolerance(dtype) -> float:
    """The same where the leading pair of all is searched for: in float32 below the error that a norm may have, 1e-5.

    The residual bounds the error of the value also where others are so near that its square says nothing.
    """
    return float(jnp.finfo(dtype).eps) ** 0.75


class _Basis(NamedTuple):
    """`T right^T = left^T projected`, and `T^T left^T = right^T projected^T` up to the coupling to the next vector."""

    right: Float[Array, "basis+1 in"]
    left: Float[Array, "basis out"]
    projected: Float[Array, "basis basis"]
    coupling: Float[Array, ""]


class _State(NamedTuple):
    """`used` vectors of the basis are there."""

    basis: _Basis
    used: Int[Array, ""]
    residual: Float[Array, ""]
    restarts: Int[Array, ""]


def _dot(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _orthogonalise(vector, basis):
    """The part of `vector` orthogonal to the rows of `basis`, as a unit vector (0 where nothing is left)."""
    before = jnp.linalg.norm(vector)
    # Once leaves rounding errors as large as the cancellation; twice is enough (Giraud et al. 2005).
    coefficients = _dot(basis, vector)
    vector = vector - _dot(coefficients, basis)
    correction = _dot(basis, vector)
    vector = vector - _dot(correction, basis)
    norm = jnp.linalg.norm(vector)
    # What is left of a vector inside the space is noise: the Krylov space is exhausted.
    norm = jnp.where(norm <= 10 * jnp.finfo(vector.dtype).eps * before, 0.0, norm)
    unit = jnp.where(norm == 0, 0.0, vector / jnp.where(norm == 0, 1.0, norm))
    return unit, norm, coefficients + correction


def _extend(matvec, rmatvec, j: Int[Array, ""], basis: _Basis) -> _Basis:
    """One step of the bidiagonalisation: the `j`-th left vector and the next right one."""
    left_vector, alpha, column = _orthogonalise(matvec(basis.right[j]), basis.left)
    projected = basis.projected.at[:, j].set(column).at[j, j].set(alpha)
    left = basis.left.at[j].set(left_vector)
    next_vector, coupling, _ = _orthogonalise(rmatvec(left_vector), basis.right)
    return _Basis(basis.right.at[j + 1].set(next_vector), left, projected, coupling)


def _restarted(basis: _Basis, kept: int) -> _Basis:
    """The basis rotated to its leading Ritz vectors, ready to go on."""
    size = basis.left.shape[0]
    x, values, yt = jnp.linalg.svd(basis.projected)
    right = jnp.zeros_like(basis.right).at[:kept].set(_dot(yt[:kept], basis.right[:size]))
    right = right.at[kept].set(basis.right[size])
    left = jnp.zeros_like(basis.left).at[:kept].set(_dot(x[:, :kept].T, basis.left))
    projected = jnp.zeros_like(basis.projected).at[jnp.arange(kept), jnp.arange(kept)].set(values[:kept])
    return _Basis(right, left, projected, basis.coupling)


def _residual(basis: _Basis, used: Int[Array, ""]) -> Float[Array, ""]:
    """Relative residual of the leading Ritz vectors, of which `T v = sigma u` holds exactly."""
    x, values, _ = jnp.linalg.svd(basis.projected)
    return basis.coupling * jnp.abs(x[used - 1, 0]) / jnp.where(values[0] == 0, 1.0, values[0])


def leading_singular_vectors(
    matvec: Callable,
    rmatvec: Callable,
    start: Float[Array, " in"],
    out_size: int,
    tolerance: float | Float[Array, ""],
    first_check: int = _BASIS,
) -> tuple[Float[Array, ""], Float[Array, " out"], Float[Array, " in"], Float[Array, ""]]:
    """The leading singular triplet of the map `matvec`, and the relative residual `||T^T u - sigma v|| / sigma`.

    Args:
      matvec, rmatvec: the map and its transpose on flat vectors.
      start: where the Krylov space starts; any non-zero vector that is not orthogonal to the answer.
      out_size: length of an output.
      tolerance: relative residual at which to stop.
      first_check: steps before the first look at the residual. By default a whole basis: a start near another
        singular vector would pass for the leading one earlier.

    Returns:
      `(sigma, u, v, residual)`; zeros for `u` where the map is zero.
    """
    # One more than the smaller side: with it the space is always exhausted, and the coupling exactly zero.
    size = min(_BASIS, min(start.size, out_size) + 1)
    kept = min(_KEPT, size // 2)
    norm = jnp.linalg.norm(start)
    empty = _Basis(
        jnp.zeros((size + 1, start.size), start.dtype).at[0].set(start / jnp.where(norm == 0, 1.0, norm)),
        jnp.zeros((size, out_size), start.dtype),
        jnp.zeros((size, size), start.dtype),
        jnp.zeros((), start.dtype),
    )

    def advance(state: _State) -> _State:
        full = state.used == size
        basis = lax.cond(full, lambda: _restarted(state.basis, kept), lambda: state.basis)
        first = jnp.where(full, kept, state.used)
        steps = jnp.where(first == 0, first_check, _BETWEEN_CHECKS)
        used = jnp.minimum(first + steps, size)
        basis = lax.fori_loop(first, used, functools.partial(_extend, matvec, rmatvec), basis)
        return _State(basis, used, _residual(basis, used), state.restarts + full.astype(state.restarts.dtype))

    def unfinished(state: _State):
        return (state.residual > tolerance) & (state.restarts < _MAX_RESTARTS)

    start = _State(empty, jnp.asarray(0), jnp.asarray(jnp.inf, start.dtype), jnp.asarray(0))
    state = lax.while_loop(unfinished, advance, start)
    basis = _restarted(state.basis, 1)
    return basis.projected[0, 0], basis.left[0], basis.right[0], state.residual


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
            lambda x: matvec(x) - _dot(values * _dot(rights, x), lefts),
            lambda y: rmatvec(y) - _dot(values * _dot(lefts, y), rights),
            random_start((in_size,), dtype, seed=i),
            out_size,
            tolerance,
        )
        return values.at[i].set(value), lefts.at[i].set(left), rights.at[i].set(right)

    nothing = jnp.zeros(k, dtype), jnp.zeros((k, out_size), dtype), jnp.zeros((k, in_size), dtype)
    return lax.fori_loop(0, k, find, nothing)[1:]
