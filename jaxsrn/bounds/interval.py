"""The certified interval: two numbers that are guaranteed to hold the spectral norm of a layer between them.

The lower end is a value that the map attains. The upper end of a circular layer is the proof by branch and bound, the
upper end of a zero-padded one that of its covers (`covers.py`). For all image sizes at once a grid bounds the supremum
over all frequencies: a symbol of degree `d` is at most `1 / cos(pi d / (2 m))` times its maximum over `m` equispaced
angles per axis (M. Riesz; `grid_certificate.py`). `spectral_norm` gives one number instead, with zero padding proven
only for small layers.
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
from jaxsrn.spectra.circular.boxes import overshoot
from jaxsrn.spectra.circular.fourier import grouped
from jaxsrn.spectra.circular.leading import leading_wave
from jaxsrn.spectra.circular.site_pairs import site_pairs
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import by_largest, rescaled

__all__ = [
    "certified",
]

# The search for the lower end with zero padding. Every Rayleigh quotient is a lower end, so no proof is needed. The
# error of the value is about the square of the residual, 1e-5: far less than the covers lose at the upper end.
_LOWER_END = {"tolerance": 3e-3, "proven": False}


def certified(kernel: Kernel, op: Operator, *, resolution: float = 0.01, any_size: bool = False) -> NormInterval:
    """An interval that is guaranteed to hold the spectral norm of `T(kernel)`.

    The lower end of a circular layer is the norm at one frequency; its upper end is the proof by branch and bound that
    no other frequency exceeds it by more than `resolution`. The lower end of a zero-padded layer is a Rayleigh quotient
    of the map itself (Lanczos); its upper end is the norm of a cover (`covers.py`). Both ends of a dense layer are its
    `spectral_norm`. All ends are widened for rounding. The cost depends on the image only through Lanczos.

    With zero padding the width is what the covers lose, most on small images; it does not shrink with `resolution`. The
    upper end at one image size does not exceed a converged `tensor_norm`, up to rounding, because `tensor_norm` bounds
    the covers too.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      resolution: static; the relative width of the interval that is good enough (circular).
      any_size: static; an interval for the layers of **all** image sizes at once. The upper end bounds the symbol at
        all frequencies; the lower end is the norm at frequency 0 (circular) or the smallest tap's norm (zero padding).

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
    # A tap that misses this image meets larger ones, so `rescaled`, which drops it, serves one size alone.
    kernel, scale = by_largest(kernel) if any_size else rescaled(kernel, op)
    if isinstance(op, Dense):
        interval = _frozen_leading(kernel, op)
        interval = NormInterval(interval, interval)
    else:
        covered = covers(kernel, op, any_size)
        # The norms of covers are exact, so that the upper end is never looser than bounds that read the kernel alone.
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
    # The width is the excess that the proof leaves open and the room for rounding together.
    allowed = max(resolution - 3 * slack_of(kernel), 0.0)
    pair, excess = leading_wave(lax.stop_gradient(kernel), op, allowed)
    value = frozen_value(kernel, op, pair)
    return NormInterval(value, (1 + excess) * value)


def _frozen_leading(kernel: Float[Array, "..."], op: Operator, **options) -> Float[Array, ""]:
    return frozen_value(kernel, op, leading_pair(lax.stop_gradient(kernel), op, **options))


def _lower_at_any_size(kernel: Float[Array, "..."], op: Operator) -> Float[Array, ""]:
    """A number that no layer of these taps has a norm below, at any image size.

    Every circular grid has frequency 0. A zero-padded layer that connects two samples does so by one tap, and the norm
    is at least that of this block.
    """
    if isinstance(op, CircularConv):
        at_zero = jnp.arange(op.feature_group_count)
        return jnp.max(site_pairs(kernel, op, at_zero)[0])
    if not _always_connects(op, kernel.shape):
        return jnp.zeros((), kernel.dtype)
    by_group = grouped(kernel, op)
    taps = jnp.moveaxis(by_group, -2, -3).reshape((-1, op.feature_group_count, kernel.shape[-2], by_group.shape[-1]))
    return jnp.min(jnp.max(jnp.linalg.svd(taps, compute_uv=False)[..., 0], axis=-1))


def _always_connects(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether some tap meets a sample at every image size (static). Dilated taps may all miss a small image."""
    for axis, extent in enumerate(op._extents(kernel_shape)):
        # A larger image only repeats a whole period of strides inside it.
        for n in range(1, extent + op.strides[axis] * op.input_dilation[axis] + 1):
            sizes = (*op.input_shape[:axis], n, *op.input_shape[axis + 1 :])
            layer = dataclasses.replace(op, input_shape=sizes)
            outputs = layer.out_shape(kernel_shape)[axis]
            if outputs > 0 and not any(len(tap.outputs) for tap in layer._axis_contacts(kernel_shape)[axis]):
                return False
    return True
