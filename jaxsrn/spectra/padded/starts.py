"""The starts of the search with zero padding: the largest plane waves of the circular layer, faded out at the edges.

A frequency is worth a start where the largest singular value of the symbol has a local maximum (a peak, see
`circular/peaks.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.leading import search_arguments
from jaxsrn.spectra.circular.peaks import Climbed, climbed, several
from jaxsrn.spectra.circular.sites import without_constant_axes
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed_input
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Waves",
    "circular_peaks",
    "circular_waves",
    "cold_start",
    "missed_phase",
]

# The most waves that take part: more of them are more rivals of the largest one, and each has a smaller part.
_MOST_WAVES = 4
# The weights of the waves. Taps of one parity have waves of equal values, whose even sum would be zero on all
# samples but those of one parity; from there no other sample is reached.
_WEIGHTS = 1.0, 0.7, 0.5, 0.35
# The norm of the noise relative to the waves. Vectors that are no wave of the sum may lead, and all of them have to
# take part; more noise wastes the waves. Of 120 kernels of nearly equal peaks (`python -m tests.searches --layer
# "2-D, waves" --kernels 120`) six norms were too low by more than 1e-5 with a fifth of this noise, and two are with it.
_NOISE = 0.5
# The share of the other phase in a start, relative to what is found from it, below which the search is repeated from
# both. A larger share costs more second searches.
_LEAST_PHASE = 0.35
# The relative difference of two phases' norms beyond which they are no rivals.
_RIVALS = 0.05
# The most samples of images whose phases are always told apart, and the units of rounding by which the norms of phases
# differ that are told apart on larger images. The norms differ as the window's Fourier coefficients at the doubled
# frequency do, by about `samples ** -3`.
_FEW_SAMPLES, _EQUAL = 512, 3
# What a second phase adds to the first, below which it is the same.
_SAME = 0.1


class Waves(NamedTuple):
    """Waves of the circular layer, faded out at the edges, with their singular values there, the largest first.

    Each has two phases, orthonormal images. The second is 0 where the wave has only one, as at frequency 0.
    """

    values: Float[Array, " waves"]
    phases: Float[Array, "waves 2 ..."]


def circular_peaks(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Climbed:
    """The peaks of the circular layer on the padded image, by the program that its norm takes too."""
    return climbed(kernel, *search_arguments(_circular_model(op, kernel.shape), kernel))


def circular_waves(found: Climbed, kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Waves:
    """The waves of the highest of `circular_peaks`, which are near the leading input."""
    layer = _circular_model(op, kernel.shape)
    single, grid, *_ = search_arguments(layer, kernel)
    values, pairs = several(found, single, kernel.shape, grid, _MOST_WAVES)

    def phases(pair: Pair):
        turned = jnp.stack([pair.input, 1j * pair.input])
        first, second = jax.vmap(lambda side: windowed_input(pair.site, side, layer, op, kernel.shape))(turned)
        rest = second - jnp.sum(first * second) * first
        norm = jnp.linalg.norm(rest.reshape(-1))
        return jnp.stack([first, rest / jnp.where(norm < _SAME, jnp.inf, norm)])

    return Waves(values, jax.vmap(phases)(pairs))


def cold_start(waves: Waves) -> Float[Array, "..."]:
    """A sum of all waves, the larger ones with more weight, and noise.

    The Krylov space of the sum holds every singular vector that has a part in it, so that its largest singular value is
    found whichever wave leads there.
    """
    weights = np.asarray(_WEIGHTS[: len(waves.values)], waves.values.dtype)
    image = unit(einsum("k,k...->...", weights * waves.values, waves.phases[:, 0]))
    return image + _NOISE * unit(fixed_start(image.shape, image.dtype))


def missed_phase(kernel, op: ZeroPaddedConv, waves: Waves, start, found) -> tuple[Bool[Array, ""], Float[Array, "..."]]:
    """Whether a search may have missed the other phase of the input that it has found, and that phase, normalised.

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
    return rivals & (across < _LEAST_PHASE * along), unit(images[1])


def _circular_model(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> CircularConv:
    """The circular layer on the padded image, its axes of one tap left out."""
    return without_constant_axes(circular_layer(op, kernel_shape, op.strides), kernel_shape)
