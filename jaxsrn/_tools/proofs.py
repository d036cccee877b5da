"""Proofs by Cholesky: all eigenvalues of a matrix are below a level where the difference has a factor."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

__all__ = [
    "are_below",
    "rounding",
    "squared_limit",
]


def rounding(rows: int, dtype) -> float:
    """What a singular value may be off by, relatively: from the Gram matrix and its factorization."""
    return 2 * math.sqrt(rows) * float(jnp.finfo(dtype).eps)


def squared_limit(rows: int, limits: Float[Array, "..."]) -> Float[Array, "..."]:
    """The squares of limits of singular values, with room for rounding."""
    # Half of it in terms of the singular value.
    return limits**2 * (1 + 2 * rounding(rows, limits.dtype))


def are_below(grams: Inexact[Array, "points groups n n"], levels: Float[Array, " points"]) -> Bool[Array, " points"]:
    """Whether all eigenvalues are below the levels: the differences have Cholesky factors."""
    scaled = grams / jnp.where(levels > 0, levels, 1)[:, None, None, None].astype(grams.dtype)
    identity = jnp.eye(grams.shape[-1], dtype=grams.dtype)[None, None]
    factor = lax.linalg.cholesky(identity - scaled, symmetrize_input=False)
    definite = jnp.all(jnp.isfinite(jnp.diagonal(factor, axis1=-2, axis2=-1).real), axis=(-2, -1))
    return definite & (levels > 0)
