"""Wide layers with zero padding: the search in the few channels that the leading images use.

Most products are with a narrow layer between a few directions of the channels, and only the last are with the whole
layer. The directions are leading singular vectors of images, by subspace iteration (`_tools/subspaces.py`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import einsum, matmul
from jaxsrn._tools.subspaces import fixed_start, subspace_iteration
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.image_pairs import matrix_free
from jaxsrn.spectra.padded.starts import Waves, cold_start, missed_phase

__all__ = [
    "pays_in_few_channels",
    "through_few_channels",
]

# Layers of so many channels are searched in `_FEW_CHANNELS` directions first, or in the smaller number of channels over
# `_FEW_OF` if that is more. More directions cost larger products, fewer leave more steps to the whole layer.
_MANY_CHANNELS, _FEW_CHANNELS, _FEW_OF = 32, 16, 16
# On images of at most so many samples the whole layer is searched at once. That takes up to twice as long there, and up
# to four times on larger images. Where waves of nearly equal size lie in different channels, the few channels may be
# the wrong ones, and a norm was too low by up to 7e-3 (`python -m tests.searches`).
_SMALL_IMAGE = 512
# So many narrow layers are searched, each between the channels of what was found in the one before.
_ROUNDS = 2
# Subspace iteration for the channels takes so many steps. Each step weights a direction by its energy in the images.
_CHANNEL_STEPS = 2


def pays_in_few_channels(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the layer is searched in few channels first (static)."""
    has_many = op.feature_group_count == 1 and min(kernel_shape[-2:]) >= _MANY_CHANNELS
    return has_many and math.prod(op.input_shape) > _SMALL_IMAGE


def through_few_channels(kernel, op: ZeroPaddedConv, waves: Waves, tolerance) -> Float[Array, "..."]:
    """An input near the leading one of a layer of many channels whose leading images use few of them.

    Restricted to images whose channels lie in a subspace, the layer is a narrow one. The nearly equal singular values
    that make a search long differ in space and not in channels, so the narrow layer has nearly all of them. A power
    step of the whole layer finds the subspaces of inputs and outputs. The pair of the step's two images lies in them
    and its value is at least the norm of the image's output, so that no search ends below what it starts from. The
    values left to the search in the whole layer are far from the leading one.
    """
    start = cold_start(waves)

    def search(k, image):
        image = image + jnp.where(k == 0, 0, missed_phase(kernel, op, waves, start, image))
        output = op.apply(kernel, image, precision=jax.lax.Precision.HIGHEST)
        back = op.transpose(kernel, output, precision=jax.lax.Precision.HIGHEST)
        few = max(_FEW_CHANNELS, min(kernel.shape[-2:]) // _FEW_OF)
        ins, outs = (_channel_directions(images, few) for images in (back, output))
        narrow = einsum("...io,ia,ob->...ab", kernel, ins, outs)
        pair = matrix_free(narrow, op, einsum("...i,ia->...a", image, ins), tolerance).pair
        return einsum("...a,ia->...i", pair.input, ins)

    return jax.lax.fori_loop(0, _ROUNDS, search, start)


def _channel_directions(images: Float[Array, "... c"], few: int) -> Float[Array, "c {few}"]:
    """An orthonormal basis of the channels that the images use most, by subspace iteration."""
    rows = images.reshape((-1, images.shape[-1]))
    start = fixed_start((images.shape[-1], few), images.dtype).T
    return subspace_iteration(lambda basis: matmul(matmul(basis, rows.T), rows), start, _CHANNEL_STEPS).T
