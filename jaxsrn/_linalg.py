"""Leading singular pairs of small matrices, stacked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

__all__ = ["top_pairs", "top_values", "unit"]


def unit(vector: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`vector` with norm 1; the first basis vector in place of zero."""
    squared = jnp.sum(vector.real**2 + vector.imag**2) if jnp.iscomplexobj(vector) else jnp.sum(vector**2)
    is_zero = squared == 0
    first = jnp.zeros(vector.size, vector.dtype).at[0].set(1).reshape(vector.shape)
    # The derivative of a norm is 0/0 at zero; here it is that of the constant.
    return jnp.where(is_zero, first, vector / jnp.sqrt(jnp.where(is_zero, 1, squared)).astype(vector.dtype))


def top_pairs(matrices: Inexact[Array, "batch in out"]):
    """Leading singular values and vectors of a stack: `(values, u, v)` with `u^H A v = value`.

    The largest entry of `u` is real and positive, so that both vectors are real where the matrix is.
    """
    if min(matrices.shape[-2:]) == 1:
        u, v, values = _pair_of_vector(matrices)
    else:
        u, values, vh = jnp.linalg.svd(matrices, full_matrices=False)
        u, values, v = u[..., 0], values[..., 0], jnp.conj(vh[..., 0, :])
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-1, keepdims=True), axis=-1)
    turn = jnp.conj(largest) / jnp.abs(largest).astype(u.dtype)
    return values, u * turn, v * turn


def _pair_of_vector(matrices):
    """`top_pairs` of rows or columns, without an SVD."""
    row = matrices.shape[-2] == 1
    vector = matrices[..., 0, :] if row else matrices[..., 0]
    values = jnp.linalg.norm(vector, axis=-1)
    direction = jax.vmap(unit)(vector)
    one = jnp.ones((*values.shape, 1), matrices.dtype)
    return (one, jnp.conj(direction), values) if row else (direction, one, values)


def top_values(matrices: Inexact[Array, "batch in out"]) -> Float[Array, " batch"]:
    """Largest singular value of each matrix of a stack."""
    if min(matrices.shape[-2:]) == 1:
        return jnp.linalg.norm(matrices, axis=(-2, -1))
    return jnp.linalg.svd(matrices, compute_uv=False)[..., 0]
