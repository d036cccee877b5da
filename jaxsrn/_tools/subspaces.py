"""Subspaces: orthonormal vectors, the Rayleigh-Ritz step, and subspace iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn._tools.linalg import matmul, ratio

__all__ = [
    "direction_of",
    "extended",
    "fixed_start",
    "orthonormal_rows",
    "projected_out",
    "rayleigh_ritz",
    "subspace_iteration",
]

# Orthonormal vectors, and the best vectors of a span


def extended(basis: Inexact[Array, "rows n"], vector: Inexact[Array, " n"]) -> Inexact[Array, "rows+1 n"]:
    """Orthonormal rows and one more: the unit vector that `vector` adds to their span, or 0 where it adds nothing.

    Rows of zeros take no part.
    """
    # One pass leaves rounding errors as large as the cancellation, a second is enough (Giraud, Langou, Rozloznik 2005).
    rest = projected_out(projected_out(vector, basis)[0], basis)[0]
    return jnp.concatenate([basis, direction_of(rest, jnp.linalg.norm(vector))[0][None]])


def projected_out(vector: Inexact[Array, " n"], basis: Inexact[Array, "rows n"]):
    """One pass: the vector without its parts along orthonormal rows, and its coefficients along them."""
    along = matmul(basis.conj(), vector)
    return vector - matmul(along, basis), along


def direction_of(rest: Inexact[Array, " n"], size: float | Float[Array, ""] = 0.0):
    """What two passes leave of a vector: `(unit vector, norm)`, or zeros where only rounding is left.

    The vector lies in the span then. A few units of rounding are left of it; 10 of them are no new direction.

    Args:
      rest: what is left.
      size: of the numbers that the vector was computed from, whose rounding it has; 0 for one without rounding.
    """
    norm = jnp.linalg.norm(rest)
    norm = jnp.where(norm <= 10 * jnp.finfo(norm.dtype).eps * size, 0, norm)
    return rest * ratio(1.0, norm).astype(rest.dtype), norm


def orthonormal_rows(vectors: Inexact[Array, "... rows n"]) -> Inexact[Array, "... rows n"]:
    """An orthonormal basis of the span of the rows."""
    return jnp.linalg.qr(vectors.mT)[0].mT


def subspace_iteration(product: Callable, start: Inexact[Array, "... rows n"], num_steps: int):
    """Orthonormal rows near the leading eigenvectors of `product`, a symmetric map on rows (the block power method)."""
    return lax.fori_loop(0, num_steps, lambda _, rows: orthonormal_rows(product(rows)), start)


def rayleigh_ritz(projected: Inexact[Array, "... rows rows"]):
    """Eigenvalues, the largest first, and eigenvectors in the rows, of a positive semidefinite matrix.

    The matrix is a map's projection on orthonormal vectors, and its eigenvectors combine these to the best of their
    span. An SVD takes the place of `eigh`, whose stacks are not safe in jaxlib 0.10.2 (jax issue 39292); for such a
    matrix it is the eigendecomposition.
    """
    _, values, weights = jnp.linalg.svd(projected)
    return values, weights.conj()


def fixed_start(shape: tuple[int, ...], dtype, seed: int | Int[Array, ""] = 0) -> Float[Array, "..."]:
    """A fixed array of numbers between -1 and 1 without structure, to start a search from.

    No symmetry of a map makes it orthogonal to a leading vector. Its numbers are the squares of an arithmetic sequence
    modulo 1, which take few operations, where the random numbers of JAX take 150.
    """
    places = lax.iota(jnp.int32, math.prod(shape))
    # An array of one number: NumPy warns where a number alone overflows.
    number = np.full(1, seed, np.int32) if isinstance(seed, int) else jnp.asarray(seed, jnp.int32)[None]
    first = (2 * number + np.int32(1)) * np.int32(-2048144789)
    # The overflow of integers is the reduction modulo 1, and the factors are large and odd.
    numbers = (places * np.int32(1640531527) + first) * places + first
    return (numbers.astype(dtype) * 2.0**-31).reshape(shape)
