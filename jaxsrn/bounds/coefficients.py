"""The symbols whose suprema bound a layer, as tensors of coefficients, and norms of their matrices.

The symbol of every layer, strided ones after the polyphase split, is `S(w) = sum_t exp(-i <w, t>) C_t` over a box of
terms `t`; its supremum over all `w` bounds the layer at every image size, circular or zero-padded.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import float_dtype
from jaxsrn._tools.limits import vector_tolerance
from jaxsrn._tools.linalg import einsum, matmul, top_pairs, unit
from jaxsrn._tools.subspaces import leading_singular_vectors, random_start
from jaxsrn.bounds.covers import NormInterval, covers, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import axis_exponents, polynomial
from jaxsrn.spectra.pair import rescaled

__all__ = [
    "largest_form",
    "matrix_norm",
    "num_terms",
    "smallest_over_covers",
    "tensors",
]


def tensors(kernel: Float[Array, "..."], op: Operator) -> list[Float[Array, "..."]]:
    """The coefficients `(groups, *terms, rows, columns)` of symbols whose suprema bound the layer."""
    if isinstance(op, Dense):
        return [kernel[None]]
    return [_tensor(k, cover) for k, cover in covers(kernel, op, False)]


def _tensor(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, "..."]:
    coefficients, _ = polynomial(kernel, op)
    terms = [len(exponents) for exponents in axis_exponents(op, kernel.shape)]
    return coefficients.reshape((coefficients.shape[0], *terms, *coefficients.shape[-2:]))


def num_terms(tensor: Float[Array, "..."]) -> int:
    return math.prod(tensor.shape[1:-2])


def smallest_over_covers(
    bound, kernel: Float[Array, "..."], op: Operator, *, guaranteed: bool = False
) -> Float[Array, ""]:
    """The smallest of the bounds by the tensors of a layer; where `guaranteed`, with room for rounding."""
    kernel, scale = rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    value = functools.reduce(jnp.minimum, [bound(tensor) for tensor in tensors(kernel, op)])
    if guaranteed:
        value = widened(NormInterval(value, value), kernel, may_cancel=False).upper
    return value * scale


# Of matrices whose smaller side is at most this an SVD is as fast as Lanczos, and quicker to compile.
_SVD_SIDE = 64


def _leading_vectors(matrix: Float[Array, "rows columns"], num_steps: int | None):
    """The leading singular vectors `(u, v)`: by an SVD or Lanczos, or so many steps of the power method."""
    # The same numbers in every dtype: what few steps find depends on them.
    start = random_start((matrix.shape[1],), jnp.float32).astype(matrix.dtype)
    if num_steps is not None:

        def step(_, pair):
            left = unit(matmul(matrix, pair[1]))
            return left, unit(matmul(left, matrix))

        return lax.fori_loop(0, num_steps, step, (jnp.zeros(matrix.shape[0], matrix.dtype), unit(start)))
    if min(matrix.shape) <= _SVD_SIDE:
        _, left, right = top_pairs(matrix[None])
        return left[0], right[0]
    tolerance = vector_tolerance(matrix.dtype)
    _, left, right, _ = leading_singular_vectors(
        lambda x: matmul(matrix, x), lambda y: matmul(y, matrix), start, matrix.shape[0], tolerance
    )
    return unit(left), unit(right)


def matrix_norm(matrices: Float[Array, "groups rows columns"], num_steps: int | None = None) -> Float[Array, ""]:
    """The largest spectral norm of a stack of matrices, its vectors held constant."""
    left, right = jax.vmap(lambda matrix: _leading_vectors(matrix, num_steps))(lax.stop_gradient(matrices))
    return largest_form(left, matrices, right)


def largest_form(left, matrices: Float[Array, "groups rows columns"], right) -> Float[Array, ""]:
    """The largest `u^T A v` of a stack."""
    return jnp.max(einsum("gi,gio,go->g", left, matrices, right))
