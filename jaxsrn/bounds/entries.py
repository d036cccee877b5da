"""Bounds that need no spectral norm of the symbol: its Frobenius norm, and the absolute values of the kernel's entries.

Sources: LipBound (Araujo et al. 2021), and Propositions 6 and 11 of Sedghi, Gupta, Long 2019, the second corrected.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, static_int
from jaxsrn._tools.linalg import einsum, inner, safe_sqrt, top_values
from jaxsrn._tools.programs import program
from jaxsrn.bounds.coefficients import matrix_norm, num_terms, smallest_over_covers
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.circular.fourier import axis_waves, complex_dtype, lags_of

__all__ = [
    "channel_l1",
    "l1",
    "lip_bound",
]


def lip_bound(kernel: Kernel, op: Operator, *, oversampling: int = 8) -> Float[Array, ""]:
    """LipBound, the largest Frobenius norm of the symbol, from a grid: a guaranteed upper bound of the spectral norm.

    Araujo et al. 2021, as in their code: `max_w ||S(w)||_F` over a grid of `m_j` angles on axis `j`, divided by
    `prod_j sqrt(1 - d_j / m_j)` with `d_j` the degree (`1 - d / m` for two equal axes). It bounds all frequencies and
    with them every image size, circular or zero-padded. It exceeds the norm by up to the root of the smaller number of
    channels, times that factor (1.14 for two axes by default). The factor is sufficient because `m_j >= 2 d_j`; the
    factor of `certified` is smaller. A zero-padded layer is bounded by its covers. The channels enter the cost only
    through one Gram matrix of the taps.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      oversampling: static; angles per degree and axis of the grid, at least 2.

    Returns:
      A scalar in float32 or wider, differentiable (finite also at zero); NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit, or an oversampling below 2.
    """
    kernel, op = computed_form(kernel, op)
    return _lip_bound(kernel, op, static_int(oversampling, "oversampling", 2))


@functools.partial(program, static_argnums=(1, 2), brief=True)
def _lip_bound(kernel, op, oversampling):
    def bound(tensor):
        groups, *terms, _, _ = tensor.shape
        flat = tensor.reshape((groups, num_terms(tensor), -1))
        if num_terms(tensor) == 1:
            # The norm of one row is its Frobenius norm. No factor would cover the rounding of a Gram matrix here.
            return jnp.max(top_values(flat))
        gram = einsum("gqc,gpc->gqp", flat, flat)
        # The squared Frobenius norm is a polynomial in the lags between terms.
        lags, places = lags_of(np.array(list(np.ndindex(*terms))))
        between = len(lags) // 2 + places[:, None] - places
        squares = jnp.zeros((groups, len(lags)), gram.dtype).at[:, between].add(gram)
        squares = squares.reshape((groups, *(2 * k - 1 for k in terms))).astype(complex_dtype(gram.dtype))
        sizes = [oversampling * max(k - 1, 1) for k in terms]
        for m, k in zip(sizes, terms, strict=True):
            waves = jnp.asarray(axis_waves(m, np.arange(1 - k, k)), squares.dtype)
            squares = jnp.tensordot(squares, waves, (1, 1), precision=lax.Precision.HIGHEST)
        factor = math.prod(math.sqrt(1 - (k - 1) / m) for m, k in zip(sizes, terms, strict=True))
        return safe_sqrt(jnp.max(jnp.real(squares))) / factor

    return smallest_over_covers(bound, kernel, op, guaranteed=True)


def l1(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`sum |K|` over the taps that meet the image: a guaranteed upper bound of the norm, the loosest and cheapest.

    Sedghi, Gupta, Long 2019, Proposition 6 (one channel) and the right end of Proposition 11 (several). It equals the
    norm of a circular convolution with one channel, stride 1 and a non-negative kernel (Proposition 7). It is never
    below `channel_l1`.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider, widened for rounding; NaN where the kernel has one. Its gradient is the sign of
      each entry.

    Raises:
      ValueError: a kernel that does not fit.
    """
    return _l1(*computed_form(kernel, op))


@functools.partial(program, brief=True)
def _l1(kernel, op):
    return smallest_over_covers(lambda tensor: inner(jnp.sign(tensor), tensor), kernel, op, guaranteed=True)


def channel_l1(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`||B||_2` of the channel matrix `B_cd = sum_p |K_cdp|`: a guaranteed upper bound of the spectral norm.

    It replaces Proposition 11 of Sedghi, Gupta, Long 2019, whose middle term `sqrt(sum_c max_d B_cd^2)` is no bound: a
    1x1 kernel that is the 2x2 matrix of ones has norm 2, where the formula gives `sqrt(2)`. No entry of `S(w)` exceeds
    the entry of `B` in absolute value, so `||S(w)|| <= ||B||_2`, and

        ||B||_2 <= sqrt(||B||_1 ||B||_inf),     ||B||_2 <= ||B||_F <= sum |K| = l1.

    With one channel it is Proposition 6. It is the norm where all entries are non-negative (circular, stride 1). A
    strided layer takes `B` of its polyphase kernel, a grouped one its largest group, a dense one the norm of `|K|`.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider, widened for rounding; NaN where the kernel has one. Its gradient holds the singular
      vectors of `B` constant and is always finite. The second derivative is exact for a simple value.

    Raises:
      ValueError: a kernel that does not fit.
    """
    return _channel_l1(*computed_form(kernel, op))


@functools.partial(program, brief=True)
def _channel_l1(kernel, op):
    def bound(tensor):
        # The norm of `B` is proven: power steps would give a bound that is too small.
        return matrix_norm(jnp.sum(jnp.abs(tensor), axis=range(1, tensor.ndim - 2)))

    return smallest_over_covers(bound, kernel, op, guaranteed=True)
