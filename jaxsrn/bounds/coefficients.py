"""The tensors of coefficients that the bounds read in place of an image, and the norms of stacks of matrices.

The symbol of every layer is a trigonometric polynomial `S(w) = sum_t exp(-i <w, t>) C_t`, its terms `t` a product of
one set of integers per axis. Strided layers have this form after the polyphase split. Bounds may count the terms of an
axis as 0, 1, 2, ...: those of a phase are equidistant, with one step for all phases, so that this is a substitution of
the frequency. The supremum of `||S(w)||` over all frequencies `w` bounds the layer at every image size, circular or
zero-padded (`covers.py`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.held import held, refusing, stationary
from jaxsrn._tools.indexing import stack_of_one
from jaxsrn._tools.linalg import einsum, inner, matmul, unit
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.bounds.covers import NormInterval, covers, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import axis_exponents, polynomial
from jaxsrn.spectra.circular.sites import on_grid
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.singular_pair import rescaled

__all__ = [
    "matrix_norm",
    "num_terms",
    "smallest_over_covers",
    "tensors",
]


def tensors(kernel: Float[Array, "..."], op: Operator) -> list[Float[Array, "..."]]:
    """One tensor of coefficients `(groups, *terms, rows, columns)` per cover: the supremum of each bounds the layer."""
    if isinstance(op, Dense):
        return [kernel[None]]
    return [_tensor(k, on_grid(cover, k.shape)) for k, cover in covers(kernel, op)]


def _tensor(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, "..."]:
    coefficients, _ = polynomial(kernel, op)
    terms = [len(exponents) for exponents in axis_exponents(op, kernel.shape)]
    return coefficients.reshape((coefficients.shape[0], *terms, *coefficients.shape[-2:]))


def num_terms(tensor: Float[Array, "..."]) -> int:
    """How many terms the symbol has, `q` of the literature where there are no strides (static)."""
    return math.prod(tensor.shape[1:-2])


def smallest_over_covers(
    bound, kernel: Float[Array, "..."], op: Operator, *, guaranteed: bool = False
) -> Float[Array, ""]:
    """The smallest value of `bound` on the tensors of a layer; `guaranteed` adds room for rounding."""
    kernel, scale = rescaled(kernel, op)
    found = tensors(kernel, op)
    value = functools.reduce(jnp.minimum, [bound(tensor) for tensor in found])
    if guaranteed:
        # A reshaping of a tensor may have all terms on its longer side.
        longest = max(num_terms(tensor) * max(tensor.shape[-2:]) for tensor in found)
        value = widened(NormInterval(value, value), kernel, op, longest).upper
    return value * scale


def _leading_vectors(matrix: Float[Array, "rows columns"], num_steps: int | None):
    """Unit vectors on the rows and on the columns: the leading pair (`num_steps=None`), or what power steps find."""
    if num_steps is None:
        pair = leading_of_matrix(matrix)
        return pair.input, pair.output

    def step(_, pair):
        row = unit(matmul(matrix, pair[1]))
        return row, unit(matmul(row, matrix))

    # The start is drawn in float32 for every dtype, because the result of few steps depends on it.
    start = unit(fixed_start((matrix.shape[1],), jnp.float32).astype(matrix.dtype))
    return lax.fori_loop(0, num_steps, step, (jnp.zeros(matrix.shape[0], matrix.dtype), start))


def matrix_norm(matrices: Float[Array, "groups rows columns"], num_steps: int | None = None) -> Float[Array, ""]:
    """The largest spectral norm of a stack of matrices, or what power steps find of it, which has no second derivative.

    The derivative holds the singular vectors constant.
    """
    vectors = jax.vmap(lambda matrix: _leading_vectors(matrix, num_steps))(lax.stop_gradient(matrices))
    return jnp.max(held(_forms, _MOVE if num_steps is None else _NO_MOVE, matrices, vectors))


def _forms(matrices, vectors):
    """`u^T A v` of each matrix of a stack, with vectors `(u, v)` on its rows and columns."""
    rows, columns = vectors
    return jax.vmap(inner)(rows, einsum("gio,go->gi", matrices, columns))


def _form(matrix, vectors):
    return _forms(matrix[None], stack_of_one(vectors))[0]


_MOVE = jax.vmap(stationary(_form))
_NO_MOVE = refusing(
    "num_steps: got a number of power steps, whose vectors are constants and whose bound has no second derivative; "
    "take num_steps=None."
)
