"""The starts of the search with zero padding: the largest plane waves of the circular layer, faded out at the edges.

A frequency is worth a start where the largest singular value of the symbol has a local maximum (a peak, see
`circular/peaks.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import unit
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.boxes import overshoot
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.circular.leading import search_arguments
from jaxsrn.spectra.circular.peaks import several
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Starts",
    "circular_starts",
    "two_phases",
]

# A search may start from so many waves: more of them find more rivals of the largest one, and take longer to look for.
_MOST_STARTS = 4
# The frequencies are so many times as fine as the image's. A wave that is half a step off runs out of phase at the
# edges; an eighth of a step is left. Finer grids have more frequencies to prove low.
_FINER = 4


class Starts(NamedTuple):
    """Waves of the circular layer, each in two phases and faded out at the edges, and their limits.

    A limit is the largest singular value of the symbol around the wave's frequency, as far as climbing finds it. A
    singular value whose vectors this wave dominates is taken to be at most the limit.
    """

    limits: Float[Array, " starts"]
    waves: Float[Array, "starts 2 ..."]


def circular_starts(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Starts:
    """The largest waves of the circular layer, which are near the leading input.

    Their frequencies are of a finer grid than the image's, as nothing binds a zero-padded layer to the latter.
    """
    layer, finer = _circular_model(op, kernel.shape)
    limits, pairs = several(kernel, *search_arguments(layer, kernel), _MOST_STARTS, finer)

    def image(pair: Pair, turn):
        return windowed(pair._replace(input=turn * pair.input), layer, op, kernel.shape).input

    def phases(pair: Pair):
        # The phase with the larger real part comes first, since a real symbol has no other.
        angle = jnp.angle(jnp.sum(pair.input**2)) / 2
        turn = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))
        return two_phases(image(pair, turn), image(pair, 1j * turn))

    limits = jnp.where(limits > 0, limits * overshoot(layer, kernel.shape), 0)
    return Starts(limits, jax.vmap(phases)(pairs))


def _circular_model(op: ZeroPaddedConv, kernel_shape) -> tuple[CircularConv, int]:
    """The circular layer whose frequencies are looked at, and how many times as fine as the image's they are."""
    sizes = (tuple(scale * n for n in op._dilated_shape) for scale in (1, _FINER))
    layer, finer = (circular_layer(op, kernel_shape, size, op.strides) for size in sizes)
    # Kernels that are reduced on the image's grid (`grams.py`) would not be on a finer one. Sites must fit in 32 bits.
    fine = not is_reduced(layer, kernel_shape) and math.prod(finer.grid) * op.feature_group_count < 2**31
    return (finer, _FINER) if fine else (layer, 1)


def two_phases(wave: Float[Array, "..."], turned: Float[Array, "..."]) -> Float[Array, "2 ..."]:
    """An orthonormal basis of the span of two phases of a wave, the first one normalised."""
    wave = unit(wave)
    return jnp.stack([wave, unit(turned - jnp.sum(wave * turned) * wave)])
