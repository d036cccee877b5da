"""The squared spectral norm, smoothed by log-sum-exp over the frequencies, and its quadratic forms for one channel.

The source is Zheng et al. 2025, section 3, which has one channel and one axis. Here any circular convolution is
smoothed; with one channel and stride 1 the squared norm at a frequency is a quadratic form of the kernel.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, kernel_shape_of, positive_scalar
from jaxsrn._tools.linalg import svdvals
from jaxsrn._tools.programs import program
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import dft_rows, half_symbol
from jaxsrn.spectra.circular.sites import half_grid, multiplicity

__all__ = [
    "check_circular",
    "form_eigenvalues",
    "forms",
    "log_sum_exp",
    "smoothed_maximum",
    "squared_values",
]


def log_sum_exp(kernel: Kernel, op: Operator, *, alpha, smooth: bool = False) -> Float[Array, ""]:
    """`(1/alpha) log sum_l exp(alpha g_l)`: a smooth upper bound of the squared spectral norm `max_l g_l`.

    Zheng et al. 2025, eq. 14, for any circular convolution: with `g_l = sigma_max(S(w_l))^2` over all `N` frequencies,
    `max <= value <= max + log(N) / alpha`. With several channels singular values can cross, and there it is not
    differentiable. With `smooth` the sum is over `tr exp(alpha G_l)`, with `G_l` the smaller Gram matrix of the symbol:
    smooth everywhere, and at most `max + log(N min(c_in, c_out)) / alpha` (`c_in` times the phases of a stride).

    Args:
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.
      alpha: sharpness, positive, in units of `1 / g`; traced. No size of it overflows.
      smooth: static; `True` for the trace, which is smooth everywhere.

    Returns:
      A scalar in float32 or wider. Its gradient is finite where the squares of the values are, and exact where the
      value is differentiable. Second derivatives are exact where the singular values of every frequency are distinct,
      and may be NaN elsewhere.

    Raises:
      ValueError: a kernel that does not fit, an operator that is not circular, a bad `alpha`.
    """
    check_circular(op)
    kernel = kernel_array(kernel, op)
    dtype = float_dtype(kernel.dtype)
    return smoothed_maximum(kernel.astype(dtype), op, positive_scalar(alpha, "alpha", dtype), bool(smooth))


@functools.partial(program, static_argnums=(1, 3))
def smoothed_maximum(kernel, op, alpha, smooth):
    """`log_sum_exp` of checked arguments."""
    squares = squared_values(kernel, op)
    if not smooth:
        # The maximum is over all groups too: the symbol of a grouped layer is the direct sum of theirs.
        squares = jnp.max(squares, axis=-1, keepdims=True)
    counts = multiplicity(op)[:: op.feature_group_count, None]
    counts = jnp.broadcast_to(jnp.asarray(counts, squares.dtype), squares.shape)
    # The largest is subtracted before it is scaled: what rounding leaves of it would be scaled by a sharp alpha.
    largest = lax.stop_gradient(jnp.max(squares))
    return largest + jnp.log(jnp.sum(counts * jnp.exp(alpha * (squares - largest)))) / alpha


def squared_values(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, "frequencies values"]:
    """The squared singular values of the symbol at each frequency of the half grid, those of all groups in one row."""
    symbol = half_symbol(kernel, op)
    if min(symbol.shape[-2:]) == 1:
        squares = jnp.sum(jnp.real(symbol * jnp.conj(symbol)), axis=(-2, -1))
    else:
        squares = svdvals(symbol) ** 2
    return squares.reshape((math.prod(half_grid(op)), -1))


def check_circular(op) -> CircularConv:
    """The operator; `ValueError` where the operator has no frequencies to smooth over."""
    ensure(
        isinstance(op, CircularConv),
        f"op: got {op}, expected a CircularConv; the surrogate smooths over the frequencies of a circular convolution. "
        "srnc takes every operator.",
    )
    return op


def forms(kernel_shape: tuple[int, ...], op: Operator) -> Float[np.ndarray, "frequencies taps taps"]:
    """The forms `B_l = cos_l cos_l^T + sin_l sin_l^T` of a one-channel circular convolution: `g_l(x) = x^T B_l x`.

    Zheng et al. 2025, section 3.1, for any number of axes. The result is in float64, with frequencies and taps in
    row-major order.

    Args:
      kernel_shape: `(*taps, 1, 1)`.
      op: a `CircularConv` with strides 1.

    Returns:
      `(frequencies, taps, taps)`.

    Raises:
      ValueError: more than one channel, strides, or an operator that is not circular.
    """
    waves = _waves(kernel_shape, op)
    return np.real(waves[:, :, None] * np.conj(waves[:, None, :]))


def form_eigenvalues(kernel_shape: tuple[int, ...], op: Operator) -> Float[np.ndarray, "frequencies 2"]:
    """The two eigenvalues of each `B_l` that can differ from 0, the larger first: `(q +- |sum_p e^{-2i <w, p>}|) / 2`.

    Zheng et al. 2025, Figure 1. On the unit sphere `g_l` is at most the larger one. Its minimum is the smaller one only
    with two taps; with more it is 0, since all other eigenvalues of `B_l` are 0. The two sum to `q`, the number of
    taps. The largest over all `l` is `q`, at the real frequencies. It implies the feasible interval
    `N / q <= srank <= N`, which `jaxsrn.stable_rank_range` gives for every operator.

    Args:
      kernel_shape: that of a kernel of one channel, `(*taps, 1, 1)`.
      op: a `CircularConv` without strides.

    Returns:
      `(frequencies, 2)`, a row for each `B_l`.

    Raises:
      ValueError: what `forms` raises it for.
    """
    waves = _waves(kernel_shape, op)
    spread = np.abs(np.sum(waves**2, axis=-1))
    return np.stack([waves.shape[-1] + spread, waves.shape[-1] - spread], axis=-1) / 2


def _waves(kernel_shape: tuple[int, ...], op: Operator) -> np.ndarray:
    """`exp(-i <w_l, p>)`, one row per frequency, one column per tap."""
    op = check_circular(op)
    kernel_shape = kernel_shape_of(kernel_shape, op)
    ensure(
        kernel_shape[-2:] == (1, 1) and set(op.strides) == {1},
        f"kernel_shape: got {kernel_shape} for {op}, expected one channel, (*taps, 1, 1), and strides 1; with more, "
        "g_l is no quadratic form.",
    )
    waves = np.ones((1, 1))
    for row in dft_rows(op, kernel_shape):
        waves = np.kron(waves, row[:, 0, :])
    return waves
