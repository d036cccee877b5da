"""Proofs by Cholesky factorization that no singular value exceeds a limit.

The eigenvalues of a Hermitian `G` are all below a level exactly where `level I - G` is positive definite, that is where
it has a Cholesky factor. One factorization costs a small part of an SVD.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

__all__ = [
    "are_below",
    "rounding",
    "squared_limit",
    "with_room",
]


def rounding(rows: int, dtype) -> float:
    """The relative error that the Gram matrix and its factorization are allowed to cause in a singular value.

    The root is the growth of independent rounding errors of sums over `rows`; their worst case would grow as `rows`.
    """
    return 2 * math.sqrt(rows) * float(jnp.finfo(dtype).eps)


def squared_limit(rows: int, limits: Float[Array, "..."]) -> Float[Array, "..."]:
    """The squares of limits of singular values, with room for rounding."""
    return with_room(rows, limits**2)


def with_room(rows: int, squares: Float[Array, "..."]) -> Float[Array, "..."]:
    """Limits of squared singular values, with room for rounding."""
    # The relative error of a square is twice that of the singular value.
    return squares * (1 + 2 * rounding(rows, squares.dtype))


def are_below(grams: Inexact[Array, "points groups n n"], levels: Float[Array, " points"]) -> Bool[Array, " points"]:
    """Whether all eigenvalues of each point's Gram matrices are below its level; false where the level is not positive.

    The test is whether the Cholesky factor of `I - G / level` is finite.
    """
    is_positive = levels > 0
    inverse = (1 / jnp.where(is_positive, levels, 1))[:, None, None, None]
    identity = jnp.eye(grams.shape[-1], dtype=levels.dtype)[None, None]
    # LAPACK reads columns. They are the rows of the transpose, which for a Hermitian matrix is its conjugate.
    conjugate = identity - inverse * grams.real
    conjugate = lax.complex(conjugate, inverse * grams.imag) if jnp.iscomplexobj(grams) else conjugate
    factor = lax.linalg.cholesky(conjugate.mT, symmetrize_input=False)
    # A factor that does not exist is NaN; so is its last entry.
    definite = jnp.all(jnp.isfinite(factor[..., -1, -1].real), axis=-1)
    return definite & is_positive
