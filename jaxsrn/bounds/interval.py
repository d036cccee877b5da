"""The certified interval: two numbers that are guaranteed to hold the spectral norm of a layer between them.

The lower end is a value that the map attains. The upper end of a circular or unbounded layer is the proof by branch and
bound, the upper end of a zero-padded one that of its covers (`covers.py`). `spectral_norm` gives one number instead,
with zero padding proven only for small layers.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, is_static_number
from jaxsrn._tools.linalg import unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import torus_excess
from jaxsrn.bounds.covers import NormInterval, covers, slack_of, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, UnboundedConv, ZeroPaddedConv
from jaxsrn.spectra.circular.grid_certificate import overshoot
from jaxsrn.spectra.circular.leading import leading_wave
from jaxsrn.spectra.circular.sites import on_grid
from jaxsrn.spectra.common_shapes import in_common_shape
from jaxsrn.spectra.moving_pairs import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import Pair, rescaled, without_idle_taps

__all__ = [
    "certified",
    "certified_by_pair",
]

# The search for the lower end with zero padding. Every Rayleigh quotient is a lower end, so no proof is needed. The
# error of the value is about the square of the residual, 1e-5: far less than the covers lose at the upper end.
_LOWER_END_TOLERANCE = 3e-3


def certified(kernel: Kernel, op: Operator, *, resolution: float = 0.01) -> NormInterval:
    """An interval that is guaranteed to hold the spectral norm of `T(kernel)`.

    The lower end of a circular or unbounded layer is the norm at one frequency; its upper end is the proof by
    branch and bound that no other frequency exceeds it by more than `resolution`. The lower end of a zero-padded
    layer is a Rayleigh quotient of the map itself (Lanczos); its upper end is the norm of a cover (`covers.py`).
    Both ends of a dense layer are its `spectral_norm`. All ends are widened for rounding. Denormal entries count as
    0, as in XLA. The cost depends on the image only through Lanczos.

    `spectral_norm` of a zero-padded layer above 2**18 entries of the explicit matrix is searched for without a proof:
    the true norm exceeds it by at most `upper - spectral_norm(kernel, op)`. `probabilistic` has an upper end that is
    far closer on small images, and that may fail with a probability of 1e-9.

    The upper end of an `UnboundedConv` bounds the norm of the layer at every image size, circular or zero-padded. With
    zero padding the width is what the covers lose, most on small images; it does not shrink with `resolution`. The
    upper end at one image size does not exceed a converged `tensor_norm`, up to rounding, because `tensor_norm` bounds
    the covers too.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      resolution: static; the relative width of the interval that is good enough (circular and unbounded). Unbounded
        layers take at least 3.5e-6 in float32, and 1e-6 in float64.

    Returns:
      A `NormInterval` in float32 or wider; NaN where the kernel has one. The ends' gradients hold the singular
      vectors constant, and are finite. Second derivatives are those of `spectral_norm` and as exact as the pairs: the
      lower end of zero-padded layers above 2**18 entries of the explicit matrix has a search that stops early.

    Raises:
      ValueError: a kernel that does not fit, or a resolution that is not between 0 and 1.
    """
    kernel, op = computed_form(kernel, op)
    ensure(
        is_static_number(resolution) and 0 <= float(resolution) < 1,
        f"resolution: got {resolution!r}, expected a static number from 0 to 1, such as 0.01.",
    )
    kernel, op, _ = in_common_shape(kernel.astype(float_dtype(kernel.dtype)), op)
    # The pairs are found by compiled functions that the norms share.
    fixed = without_idle_taps(lax.stop_gradient(kernel), op)
    covered = [] if isinstance(op, Dense) else covers(fixed, op)
    # The norms of covers are exact, so that the upper end is never looser than bounds that read the kernel alone. The
    # width is the excess that the proof leaves open and the room for rounding together.
    exact = isinstance(op, ZeroPaddedConv)
    excess = 0.0 if exact else max(float(resolution) - 3 * slack_of(kernel, op), 0.0)
    above = tuple(leading_wave(k, cover, excess) for k, cover in covered)
    below = leading_pair(kernel, op, tolerance=_LOWER_END_TOLERANCE) if exact or not covered else above[0][0]
    return _interval(kernel, op, below, above)


def certified_by_pair(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> NormInterval:
    """The interval of a layer without zero padding from its leading pair, whose search has proven it already.

    It is what `certified` returns at its finest resolution, without a second search. `pair` is that of `leading_pair`.
    """
    kernel = kernel.astype(float_dtype(kernel.dtype))
    excess = torus_excess(kernel.dtype) if isinstance(op, UnboundedConv) else 0.0
    return _interval(kernel, op, pair, () if isinstance(op, Dense) else ((pair, excess),))


@program
def _interval(kernel, op, below: Pair, above: tuple[tuple[Pair, Float[Array, ""] | float], ...]):
    """The interval by the pair of its lower end, and by the pairs of the covers with what may exceed their values."""
    kernel, scale = rescaled(kernel, op)
    # A vector whose norm is above 1 by rounding would lift the lower end above the norm.
    below = below._replace(input=unit(below.input), output=unit(below.output))
    lower = frozen_value(kernel, op, below)
    covered = [] if isinstance(op, Dense) else covers(kernel, op)
    ends = [
        (1 + excess) * _beyond(cover, k.shape) * frozen_value(k, cover, pair)
        for (k, cover), (pair, excess) in zip(covered, above, strict=True)
    ]
    upper = functools.reduce(jnp.minimum, ends) if ends else lower
    interval = NormInterval(lower, upper)
    wide = widened(interval, kernel, op)
    return NormInterval(wide.lower * scale, wide.upper * scale)


def _beyond(op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...]) -> float:
    """What frequencies beyond the operator's grid may add: a factor, 1 where it sees no others (static)."""
    return overshoot(on_grid(op, kernel_shape), kernel_shape) if isinstance(op, UnboundedConv) else 1.0
