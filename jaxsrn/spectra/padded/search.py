"""The leading singular pair of a layer with zero padding, by a search from waves of the circular layer. No proof."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxsrn._tools.linalg import unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.padded.few_channels import MANY_CHANNELS, through_few_channels
from jaxsrn.spectra.padded.from_waves import from_waves
from jaxsrn.spectra.padded.starts import circular_starts
from jaxsrn.spectra.pair import Pair

__all__ = [
    "search",
]


def search(kernel: Float[Array, "..."], op: ZeroPaddedConv, tolerance) -> Pair:
    """The leading pair, to a relative residual; without a proof that no other singular value is larger."""
    noise = unit(random_start(op.in_shape(kernel.shape), kernel.dtype))
    wide = op.feature_group_count == 1 and min(kernel.shape[-2:]) >= MANY_CHANNELS
    starts = circular_starts(kernel, op)
    if wide:
        return through_few_channels(kernel, op, starts, noise, tolerance)
    return from_waves(kernel, op, starts, noise, tolerance).pair
