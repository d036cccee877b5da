"""Singular values of a layer: the symbol of a circular convolution, all singular values, and the largest few.

The symbol block-diagonalises a circular layer (Sedghi, Gupta, Long 2019). Layers with zero padding have no symbol:
all their values take an SVD of the explicit matrix, a few of them the Lanczos method with deflation.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, is_integer, kernel_array
from jaxsrn._tools.held import held, stationary
from jaxsrn._tools.indexing import stack_of_one
from jaxsrn._tools.lanczos import top_singular_vectors
from jaxsrn._tools.linalg import svdvals
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import DENSE_SIZE, vector_tolerance
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import half_symbol, symbol_on
from jaxsrn.spectra.circular.sites import distinct_sites, repetitions, without_constant_axes
from jaxsrn.spectra.image_pairs import flat_products
from jaxsrn.spectra.singular_pair import ensure_formable, matrix_size, rescaled

__all__ = [
    "singular_values",
    "symbol",
    "top_singular_values",
]


def symbol(kernel: Kernel, op: Operator) -> Complex[Array, "..."]:
    """The symbol `S(w) = sum_p K_p exp(-i <w, p>)` of a circular convolution at all its frequencies.

    The singular values of the layer are the union of those of `S(w)` over the grid (Sedghi, Gupta, Long 2019,
    Theorem 8). Taps are counted from index 0: a translation of the output does not change singular values.

    Args:
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.

    Returns:
      `(*grid, phases * c_in, c_out)`, or with groups `(*grid, groups, phases * c_in // groups, c_out // groups)`;
      complex. Here `grid = input_shape / strides`, and `phases = prod(strides)` counts the residues of a tap modulo the
      strides (polyphase), of which each has its own input channels; the phase is the slower index.

    Raises:
      ValueError: another operator, or a kernel that does not fit.
    """
    ensure(
        isinstance(op, CircularConv),
        f"op: got {op}, expected a CircularConv; other operators have no symbol at finitely many frequencies.",
    )
    return _symbol(kernel_array(kernel, op), op)


@functools.partial(program, brief=True)
def _symbol(kernel, op):
    out = symbol_on(kernel.astype(float_dtype(kernel.dtype)), op, op.grid)
    return out if op.feature_group_count > 1 else jnp.squeeze(out, op.num_axes)


def singular_values(kernel: Kernel, op: Operator) -> Float[Array, " n"]:
    """All `min(prod(in_shape), prod(out_shape))` singular values of `T(kernel)`, descending.

    Circular convolutions take SVDs of the symbol at half of the frequencies (Sedghi et al. 2019), dense layers an SVD,
    layers with zero padding an SVD of the explicit matrix, up to 2**24 entries. The values are differentiable, and the
    derivatives are finite where values coincide. Second derivatives are exact where all values of a matrix are
    distinct, and may be NaN elsewhere.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A vector in float32 or wider; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit, an `UnboundedConv`, whose values are infinitely many, or a zero-padded
        matrix that is too large to form.
    """
    kernel, op = computed_form(kernel, op)
    # The values are those of an image, and an image without edges has none.
    op.in_shape(kernel.shape)
    ensure_formable(op, kernel.shape, "top_singular_values(kernel, op, k)")
    return _singular_values(kernel, op)


@functools.partial(program, brief=True)
def _singular_values(kernel, op):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    if not isinstance(op, CircularConv):
        return svdvals(op.to_dense(kernel))
    layer = without_constant_axes(op, kernel.shape)
    sites, counts = distinct_sites(layer)
    values = svdvals(half_symbol(kernel, layer)[sites])
    counts = counts * repetitions(op, layer)
    values = jnp.repeat(values, counts, axis=0, total_repeat_length=int(counts.sum()))
    return _descending(values.reshape(-1))


@jax.custom_jvp
def _descending(values: Float[Array, " k"]) -> Float[Array, " k"]:
    """Nonnegative values in descending order, NaN first, so that NaN is never taken for the smallest value.

    The values are sorted as integers, which have the same order. As floats all values of 16 channels on 56x56 samples
    take 1.2 times as long, their SVDs included, on a CPU (`python benchmarks/ablations.py`).
    """
    integers = lax.bitcast_convert_type(jnp.abs(values), jnp.dtype(f"int{8 * values.dtype.itemsize}"))
    return lax.bitcast_convert_type(jnp.sort(integers)[::-1], values.dtype)


@_descending.defjvp
def _descending_jvp(primals, tangents):
    return jax.jvp(lambda values: jnp.sort(values)[::-1], primals, tangents)


def top_singular_values(kernel: Kernel, op: Operator, k: int) -> Float[Array, " k"]:
    """The `k` largest singular values of `T(kernel)`, descending, with multiplicity.

    Circular and dense layers take the first of `singular_values`, and so do layers with zero padding where a fifth or
    more of the values of a small matrix is asked for. Other layers with zero padding take the Lanczos method with
    deflation, matrix-free. The gradient holds the singular vectors constant, which is exact for simple values, and so
    is the second derivative. Of layers with more than 512 numbers in their vectors that is NaN where values nearly
    coincide and the steps of a linear solver do not suffice.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      k: static, from 1 to `min(prod(in_shape), prod(out_shape))`.

    Returns:
      A vector of `k` numbers in float32 or wider; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit, an `UnboundedConv`, or a `k` out of range.
    """
    kernel, op = computed_form(kernel, op)
    n = min(math.prod(op.in_shape(kernel.shape)), math.prod(op.out_shape(kernel.shape)))
    ensure(is_integer(k) and 1 <= k <= n, f"k: got {k!r}, expected an integer from 1 to {n}.")
    size = matrix_size(op, kernel.shape)
    if not op._needs_explicit_matrix or (5 * k >= n and size <= DENSE_SIZE):
        return singular_values(kernel, op)[:k]
    return _top_matrix_free(kernel, op, int(k))


@functools.partial(program, static_argnums=2)
def _top_matrix_free(kernel, op, k):
    # Products of small entries and of small kernels would be denormal numbers.
    kernel, scale = rescaled(kernel, op)
    products = flat_products(lax.stop_gradient(kernel), op)
    found = top_singular_vectors(*products, k, vector_tolerance(kernel.dtype), kernel.dtype)
    values = functools.partial(_values_of_vectors, op)
    move = stationary(lambda kernel, vectors: values(kernel, stack_of_one(vectors))[0])
    return scale * jnp.sort(held(values, jax.vmap(move, (None, 0)), kernel, found))[::-1]


def _values_of_vectors(op: Operator, kernel, vectors) -> Float[Array, " k"]:
    """`<v, T(K) u>` of flat vectors `(u, v)`, one of each in a row."""
    inputs, outputs = vectors
    images = op.apply(
        kernel, inputs.reshape((len(inputs), *op.in_shape(kernel.shape))), precision=lax.Precision.HIGHEST
    )
    return jnp.sum(outputs * images.reshape(outputs.shape), axis=-1)
