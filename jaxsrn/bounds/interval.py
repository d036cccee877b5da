"""Bounds of the spectral norm of a layer: a certified interval, Gram iteration, and what reads the kernel alone.

Zero padding is bounded through circular layers that **cover** it: the zero-padded map is a circular one on the padded
image, restricted to some inputs and outputs, which can only lower the norm. A coarse grid of frequencies bounds the
supremum over all, and with it every image size: a symbol of degree `d` is at most `1 / cos(pi d / (2 m))` times its
maximum over `m` equispaced angles per axis (M. Riesz).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array
from jaxsrn.bounds.covers import NormInterval, covers, slack_of, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.fourier import grouped
from jaxsrn.spectra.circular.grid_certificate import overshoot
from jaxsrn.spectra.circular.pairs import site_pairs
from jaxsrn.spectra.circular.svd_or_branch_and_bound import leading_wave
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pair import by_largest, rescaled
from jaxsrn.spectra.pairs import leading_pair

__all__ = [
    "certified",
]

# How the lower end is searched with zero padding: to this relative residual (its error is the square), and without a
# proof, as every Rayleigh quotient is a lower end.
_LOWER_END = {"tolerance": 3e-3, "proven": False}


# The interval


def certified(kernel: Kernel, op: Operator, *, resolution: float = 0.01, any_size: bool = False) -> NormInterval:
    """An interval that is guaranteed to hold the spectral norm of `T(kernel)`.

    Circular: from below the value of a frequency, from above the proof by branch and bound that no other one exceeds
    it by more than `resolution`. Dense: as `spectral_norm`. Zero padding: from below a Rayleigh quotient of the real
    operator (Lanczos), from above the circular layers that cover it. The ends are widened for rounding. The cost does
    not depend on the size of the image, but for the Lanczos steps of zero padding.

    With zero padding the width is what the covers lose, most on small images; it does not shrink with `resolution`. The
    upper end, of one image size, is not above `tensor_norm` where that has converged, but for rounding: it bounds the
    covers, too.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      resolution: static; the relative width of the interval that is good enough (circular).
      any_size: static; an interval for the layers of **all** image sizes at once: from above the supremum of the
        symbol over all frequencies, from below frequency 0 (circular), or the smallest norm of a tap (zero padding).

    Returns:
      A `NormInterval` in float32 or wider; NaN where the kernel has one. The ends' gradients hold the singular
      vectors constant, and are finite.

    Raises:
      ValueError: a kernel that does not fit, or a resolution that is not between 0 and 1.
    """
    kernel = kernel_array(kernel, op)
    ensure(
        isinstance(resolution, (int, float)) and 0 <= resolution < 1,
        f"resolution: got {resolution!r}, expected a static number from 0 to 1, such as 0.01.",
    )
    return _certified(kernel, op, float(resolution), bool(any_size))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _certified(kernel, op, resolution, any_size):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    # At any size, taps that miss this image meet others.
    kernel, scale = by_largest(kernel) if any_size else rescaled(kernel, op)
    if isinstance(op, Dense):
        interval = _frozen_leading(kernel, op)
        interval = NormInterval(interval, interval)
    else:
        covered = covers(kernel, op, any_size)
        # Covers that are exact are never looser than the bounds that read the kernel alone.
        resolution = resolution if isinstance(op, CircularConv) else 0.0
        found = [_of_circular(k, cover, resolution) for k, cover in covered]
        above = [overshoot(cover, k.shape) if any_size else 1.0 for k, cover in covered]
        upper = functools.reduce(jnp.minimum, [one.upper * factor for one, factor in zip(found, above, strict=True)])
        if any_size:
            lower = _lower_at_any_size(kernel, op)
        else:
            lower = found[0].lower if isinstance(op, CircularConv) else _frozen_leading(kernel, op, **_LOWER_END)
        interval = NormInterval(lower, upper)
    wide = widened(interval, kernel, may_cancel=any_size or op._distinct_shape(kernel.shape) != kernel.shape)
    return NormInterval(wide.lower * scale, wide.upper * scale)


def _of_circular(kernel: Float[Array, "..."], op: CircularConv, resolution: float) -> NormInterval:
    # What the proof leaves open and the room for rounding are the width together.
    allowed = max(resolution - 3 * slack_of(kernel), 0.0)
    pair, excess = leading_wave(lax.stop_gradient(kernel), op, allowed)
    value = frozen_value(kernel, op, pair)
    return NormInterval(value, (1 + excess) * value)


def _frozen_leading(kernel: Float[Array, "..."], op: Operator, **options) -> Float[Array, ""]:
    return frozen_value(kernel, op, leading_pair(lax.stop_gradient(kernel), op, **options))


def _lower_at_any_size(kernel: Float[Array, "..."], op: Operator) -> Float[Array, ""]:
    """Every circular grid has frequency 0; a zero-padded layer that connects any two samples does it by a tap."""
    if isinstance(op, CircularConv):
        at_zero = jnp.arange(op.feature_group_count)
        return jnp.max(site_pairs(kernel, op, at_zero)[0])
    if not _always_connects(op, kernel.shape):
        return jnp.zeros((), kernel.dtype)
    by_group = grouped(kernel, op)
    taps = jnp.moveaxis(by_group, -2, -3).reshape((-1, op.feature_group_count, kernel.shape[-2], by_group.shape[-1]))
    return jnp.min(jnp.max(jnp.linalg.svd(taps, compute_uv=False)[..., 0], axis=-1))


def _always_connects(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether at every image size some tap meets a sample (static): dilated taps may all miss a small image."""
    for axis, extent in enumerate(op._extents(kernel_shape)):
        # Windows of a whole period of strides inside the image: from there on nothing new happens.
        for n in range(1, extent + op.strides[axis] * op.input_dilation[axis] + 1):
            sizes = (*op.input_shape[:axis], n, *op.input_shape[axis + 1 :])
            layer = dataclasses.replace(op, input_shape=sizes)
            outputs = layer.out_shape(kernel_shape)[axis]
            if outputs > 0 and not any(len(tap.outputs) for tap in layer._axis_contacts(kernel_shape)[axis]):
                return False
    return True
