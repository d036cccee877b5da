"""Idle channels: those that the images of a found pair leave dark, where a pair without connection to it may hide.

A Krylov space never leaves the channels that its start is connected to, and one that reaches others by a little noise
alone may end before it sees that they hold the larger singular value. The search is then repeated from the channels
that are left.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import safe_sqrt
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.operators.groups import grouped
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Channels",
    "all_channels",
    "may_hold_more",
    "start_in",
    "without_channels_of",
]

# A channel is idle with so small a share of the energy that an average one has. A vector that is in the found pair's
# Krylov space has more of it; a larger share would call channels idle that only lie near a zero of the leading vector.
_IDLE = 1e-2


class Channels(NamedTuple):
    """Which input and output channels no pair that was found uses."""

    inputs: Bool[Array, " c_in"]
    outputs: Bool[Array, " c_out"]


def all_channels(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> Channels:
    """All channels of the layer."""
    return Channels(*(jnp.ones(count, bool) for count in op._channels(kernel_shape)))


def without_channels_of(pair: Pair, channels: Channels) -> Channels:
    """Those of the channels that are idle in both images of the pair."""

    def idle(image):
        energy = jnp.sum(image**2, axis=range(image.ndim - 1))
        return energy < _IDLE * jnp.mean(energy)

    return Channels(channels.inputs & idle(pair.input), channels.outputs & idle(pair.output))


def may_hold_more(channels: Channels, kernel, op: ZeroPaddedConv, value: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a singular value of the layer between the channels can exceed `value`, by a bound of its norm."""
    return _most(channels, kernel, op) > value


def start_in(channels: Channels, kernel, op: ZeroPaddedConv) -> Float[Array, "..."]:
    """Noise on the channels."""
    return jnp.where(channels.inputs, fixed_start(op.in_shape(kernel.shape), kernel.dtype), 0)


def _most(channels: Channels, kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Float[Array, ""]:
    """A bound of the norm of the layer between the channels: by Schur, of its largest sums of a row and of a column."""
    groups = op.feature_group_count
    inputs = channels.inputs.reshape((groups, -1)).T[..., None]
    outputs = channels.outputs.reshape((1, groups, -1))
    sizes = jnp.sum(jnp.abs(grouped(kernel, groups)), axis=range(op.num_axes))
    sizes = jnp.where(inputs & outputs, sizes, 0)
    return safe_sqrt(jnp.max(jnp.sum(sizes, axis=0)) * jnp.max(jnp.sum(sizes, axis=2)))
