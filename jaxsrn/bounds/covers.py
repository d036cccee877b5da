"""Covers: the circular layers whose norms bound the norm of a layer from above.

A **cover** of a zero-padded layer is the circular layer with the same taps on the padded image. The zero-padded map is
this circular map restricted to some inputs and some outputs, and a restriction cannot raise the norm. A circular or
unbounded layer is its own cover. A bound of a cover's symbol at all frequencies bounds the layer at every image size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.proofs import rounding
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.groups import exchanged
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.padded.circular_model import circular_layer

__all__ = [
    "NormInterval",
    "covers",
    "slack_of",
    "widened",
]


class NormInterval(NamedTuple):
    """`lower <= ||T(K)||_2 <= upper`."""

    lower: Float[Array, "..."]
    upper: Float[Array, "..."]


def covers(
    kernel: Float[Array, "..."], op: CircularConv | UnboundedConv | ZeroPaddedConv
) -> list[tuple[Float[Array, "..."], CircularConv | UnboundedConv]]:
    """The covers of a layer as `(kernel, operator)`: the norm of each is an upper bound of the layer's norm."""
    if isinstance(op, (CircularConv, UnboundedConv)):
        return [(kernel, op)]
    found = []
    if set(op.input_dilation) == {1} or set(op.strides) != {1}:
        found.append((kernel, circular_layer(op, kernel.shape, op.strides)))
    if set(op.input_dilation) != {1}:
        # The adjoint of an input dilation is a stride. A layer with both has two covers; each one ignores either. Norms
        # do not depend on the order of the taps.
        adjoint = exchanged(kernel, op.feature_group_count)
        found.append((adjoint, circular_layer(op, kernel.shape, op.input_dilation)))
    return found


def slack_of(kernel: Float[Array, "..."], op: Operator, longest: int = 1) -> float:
    """The relative amount by which `widened` moves each end.

    It is twice what rounding may do to sums over the taps and inputs, and what the proofs by Cholesky factorization
    allow for sums over the longer side of a symbol. `longest` is the number of terms of other sums.
    """
    *taps, inputs, outputs = kernel.shape
    phases, spread = math.prod(op._axis_strides(kernel.shape)), math.prod(op._axis_input_dilations(kernel.shape))
    rows = max(inputs * max(math.prod(taps), phases), outputs * spread // op._groups)
    return 2 * rounding(max(rows, longest), kernel.dtype)


def widened(interval: NormInterval, kernel: Float[Array, "..."], op: Operator, longest: int = 1) -> NormInterval:
    """The interval with room for rounding.

    Aliased taps are summed and may cancel. Their rounding is relative to the taps, not to the sum.
    """
    slack = slack_of(kernel, op, longest)
    lower, upper = interval.lower * (1 - slack), interval.upper * (1 + slack)
    if op._distinct_shape(kernel.shape) != kernel.shape:
        margin = slack * lax.stop_gradient(jnp.linalg.norm(kernel))
        lower, upper = lower - margin, upper + margin
    return NormInterval(jnp.maximum(lower, 0), upper)
