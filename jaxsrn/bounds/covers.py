"""Covers: the circular layers whose norms bound the norm of a layer from above.

A **cover** of a zero-padded layer is the circular layer with the same taps on the padded image. The zero-padded map is
this circular map restricted to some inputs and some outputs, and a restriction cannot raise the norm. A circular layer
is its own cover. A bound of a cover's symbol at all frequencies bounds the layer at every image size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.proofs import rounding
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.boxes import degrees
from jaxsrn.spectra.circular.fourier import grouped
from jaxsrn.spectra.padded.circular_model import circular_layer

__all__ = [
    "NormInterval",
    "covers",
    "for_any_size",
    "slack_of",
    "widened",
]

# Angles per degree and axis of the grid that stands for all frequencies. By `overshoot` the bound then exceeds the
# supremum by at most 0.25% in two dimensions, `1 / cos(pi / 64)**2 - 1`. Twice as many angles per axis would cost four
# times as much there, and leave a quarter of this excess.
_OVERSAMPLING = 32


class NormInterval(NamedTuple):
    """`lower <= ||T(K)||_2 <= upper`."""

    lower: Float[Array, "..."]
    upper: Float[Array, "..."]


def covers(kernel: Float[Array, "..."], op: Operator, any_size: bool) -> list[tuple[Float[Array, "..."], CircularConv]]:
    """The covers of a layer as `(kernel, operator)`: the norm of each is an upper bound of the layer's norm.

    With `any_size` every operator has a grid that is fine enough to stand for all frequencies.
    """
    found = []
    if isinstance(op, CircularConv):
        found.append((kernel, op))
    elif set(op.input_dilation) == {1} or set(op.strides) != {1}:
        found.append((kernel, _cover(op, kernel.shape, op.strides)))
    if set(op.input_dilation) != {1}:
        # The adjoint of an input dilation is a stride. A layer with both has two covers; each one ignores either.
        found.append((_adjoint(kernel, op), _cover(op, kernel.shape, op.input_dilation)))
    return [(k, for_any_size(cover, k.shape) if any_size else cover) for k, cover in found]


def _cover(op: ZeroPaddedConv, kernel_shape, strides: tuple[int, ...]) -> CircularConv:
    """The circular operator on the padded image, which is enlarged until the strides divide it."""
    padded = tuple(n + sum(pad) for n, pad in zip(op._dilated_shape, op._pads(kernel_shape), strict=True))
    return circular_layer(op, kernel_shape, padded, strides)


def _adjoint(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Float[Array, "..."]:
    """The kernel with inputs and outputs of each group exchanged. Norms do not depend on the order of the taps."""
    by_group = grouped(kernel, op)
    return jnp.swapaxes(by_group, -3, -1).reshape((*kernel.shape[:-2], by_group.shape[-1], -1))


def for_any_size(op: CircularConv, kernel_shape, oversampling: int = _OVERSAMPLING) -> CircularConv:
    """The operator with the same symbol on a grid that is fine enough to bound its supremum."""
    # Without a stride the dilation only repeats the spectrum.
    dilation = tuple(1 if s == 1 else e for s, e in zip(op.strides, op.kernel_dilation, strict=True))
    op = dataclasses.replace(op, kernel_dilation=dilation)
    grid = [oversampling * max(d, 1) for d in degrees(op, kernel_shape)]
    return dataclasses.replace(op, input_shape=tuple(m * s for m, s in zip(grid, op.strides, strict=True)))


def slack_of(kernel: Float[Array, "..."]) -> float:
    """The relative amount by which `widened` moves each end."""
    return 2 * rounding(math.prod(kernel.shape[:-1]), kernel.dtype)


def widened(interval: NormInterval, kernel: Float[Array, "..."], may_cancel: bool) -> NormInterval:
    """The interval with room for rounding.

    Aliased taps are summed and may cancel (`may_cancel`). Their rounding is relative to the taps, not to the sum.
    """
    slack = slack_of(kernel)
    margin = slack * lax.stop_gradient(jnp.linalg.norm(kernel)) if may_cancel else 0.0
    lower = jnp.maximum(interval.lower * (1 - slack) - margin, 0)
    return NormInterval(lower, interval.upper * (1 + slack) + margin)
