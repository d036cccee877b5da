"""The starts of the search with zero padding: the largest plane waves of the circular layer, faded out at the edges.

A frequency is worth a start where the largest singular value of the symbol has a local maximum (a peak, see
`circular/peaks.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.circular.leading import search_arguments
from jaxsrn.spectra.circular.peaks import several
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Waves",
    "circular_waves",
    "cold_start",
    "missed_phase",
]

# So many waves take part: more of them are more rivals of the largest one, and each has a smaller part.
_MOST_WAVES = 4
# The norm of the noise relative to the waves. Vectors that are no wave of the sum may lead, and all of them have to
# take part; more noise wastes the waves.
_NOISE = 0.1
# The share of the other phase in a start, relative to what is found from it, below which the search is repeated from
# both. A larger share costs more second searches.
_SHARE = 0.35
# The relative difference of two phases' norms beyond which they are no rivals.
_RIVALS = 0.05
# Phases of images of at most so many samples are always told apart, those of larger images if their norms differ by
# more than so many units of rounding. The norms differ as the window's Fourier coefficients at the doubled frequency
# do, by about `samples ** -3`.
_FEW_SAMPLES, _EQUAL = 512, 3
# What a second phase adds to the first, below which it is the same.
_SAME = 0.1
# The frequencies are so many times as fine as the image's. A wave that is half a step off runs out of phase at the
# edges; an eighth of a step is left.
_FINER = 4


class Waves(NamedTuple):
    """Waves of the circular layer, faded out at the edges, with their singular values there, the largest first.

    Each has two phases, orthonormal images. The second is 0 where the wave has only one, as at frequency 0.
    """

    values: Float[Array, " waves"]
    phases: Float[Array, "waves 2 ..."]


def circular_waves(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Waves:
    """The largest waves of the circular layer as far as climbing finds them, which are near the leading input.

    Their frequencies are of a finer grid than the image's, as nothing binds a zero-padded layer to the latter.
    """
    layer, finer = _circular_model(op, kernel.shape)
    values, pairs = several(kernel, *search_arguments(layer, kernel), _MOST_WAVES, finer)

    def phases(pair: Pair):
        first, second = (
            windowed(pair._replace(input=turn * pair.input), layer, op, kernel.shape).input for turn in (1, 1j)
        )
        rest = second - jnp.sum(first * second) * first
        norm = jnp.linalg.norm(rest.reshape(-1))
        return jnp.stack([first, rest / jnp.where(norm < _SAME, jnp.inf, norm)])

    return Waves(values, jax.vmap(phases)(pairs))


def cold_start(waves: Waves) -> Float[Array, "..."]:
    """A sum of all waves, the larger ones with more weight, and noise.

    The Krylov space of the sum holds every singular vector that has a part in it, so that its largest singular value is
    found whichever wave leads there.
    """
    image = unit(einsum("k,k...->...", waves.values, waves.phases[:, 0]))
    return image + _NOISE * unit(fixed_start(image.shape, image.dtype))


def missed_phase(kernel, op: ZeroPaddedConv, waves: Waves, start, found) -> Float[Array, "..."]:
    """The other phase of the input that a search has found, normalised; 0 where the search need not be repeated.

    Two phases of a wave have nearly equal norms, as only the edges tell them apart. A start with next to nothing of one
    of them ends at the other. Phases whose norms are far apart are no rivals, as the noise then has enough of both.
    """
    shares = einsum("kp...,...->kp", waves.phases, found)
    turned = jnp.stack([shares, jnp.stack([-shares[:, 1], shares[:, 0]], axis=1)])
    images = einsum("rkp,kp...->r...", turned, waves.phases)
    outputs = op.apply(kernel, images, precision=lax.Precision.HIGHEST)
    own, other = jnp.linalg.norm(outputs.reshape((2, -1)), axis=1)
    along, across = jnp.abs(einsum("r...,...->r", images, start))
    apart, few = jnp.abs(other - own), math.prod(op.input_shape) <= _FEW_SAMPLES
    rivals = (apart < _RIVALS * own) & (few | (apart > _EQUAL * jnp.finfo(own.dtype).eps * own))
    again = rivals & (across < _SHARE * along)
    return jnp.where(again, unit(images[1]), 0)


def _circular_model(op: ZeroPaddedConv, kernel_shape) -> tuple[CircularConv, int]:
    """The circular layer whose frequencies are looked at, and how many times as fine as the image's they are."""
    sizes = (tuple(scale * n for n in op._dilated_shape) for scale in (1, _FINER))
    layer, finer = (circular_layer(op, kernel_shape, size, op.strides) for size in sizes)
    # Kernels that are reduced on the image's grid (`grams.py`) would not be on a finer one. Sites must fit in 32 bits.
    fine = not is_reduced(layer, kernel_shape) and math.prod(finer.grid) * op.feature_group_count < 2**31
    return (finer, _FINER) if fine else (layer, 1)
