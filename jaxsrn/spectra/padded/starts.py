"""Where the search with zero padding starts: the largest waves of the circular layer, faded out at the edges."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import unit
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.circular.grid_certificate import overshoot
from jaxsrn.spectra.circular.peaks import peaks
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed
from jaxsrn.spectra.pair import Pair

__all__ = [
    "Starts",
    "circular_starts",
    "two_phases",
]

# Waves from which a search may start.
_MOST_STARTS = 4
# How much finer than those of the image the frequencies are among which waves are looked for.
_FINER = 4


class Starts(NamedTuple):
    """Where to search: waves of the circular layer in two phases, faded out at the edges, and what each can reach.

    The norms of images in which a wave dominates are taken to be at most its limit, the largest singular value of the
    symbol around its frequency as far as climbing finds it.
    """

    limits: Float[Array, " starts"]
    waves: Float[Array, "starts 2 ..."]


def circular_starts(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Starts:
    """The largest waves of the circular layer, which are near the leading input.

    Nothing binds their frequencies to the grid of the image: half a step off, a wave runs out of phase at the edges.
    """
    layer, finer = _circular_model(op, kernel.shape)
    limits, pairs = peaks(kernel, layer, _MOST_STARTS, finer)

    def image(pair: Pair, turn):
        return windowed(pair._replace(input=turn * pair.input), layer, op, kernel.shape).input

    def phases(pair: Pair):
        # The phase with the larger real part first: where the symbol is real there is no other.
        angle = jnp.angle(jnp.sum(pair.input**2)) / 2
        turn = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))
        return two_phases(image(pair, turn), image(pair, 1j * turn))

    limits = jnp.where(limits > 0, limits * overshoot(layer, kernel.shape), 0)
    return Starts(limits, jax.vmap(phases)(pairs))


def _circular_model(op: ZeroPaddedConv, kernel_shape) -> tuple[CircularConv, int]:
    """The circular layer whose frequencies are looked at, and how much finer than those of the image they are."""
    sizes = (tuple(scale * n for n in op._dilated_shape) for scale in (1, _FINER))
    layer, finer = (circular_layer(op, kernel_shape, size, op.strides) for size in sizes)
    # Sites are counted in 32 bits.
    fine = not is_reduced(layer, kernel_shape) and math.prod(finer.grid) * op.feature_group_count < 2**31
    return (finer, _FINER) if fine else (layer, 1)


def two_phases(wave: Float[Array, "..."], turned: Float[Array, "..."]) -> Float[Array, "2 ..."]:
    """An orthonormal basis of both."""
    wave = unit(wave)
    return jnp.stack([wave, unit(turned - jnp.sum(wave * turned) * wave)])
