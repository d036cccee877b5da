"""Wide layers with zero padding: the search in the few channels that the leading images use.

Most products are with a narrow layer between a few directions of the channels, and only the last are with the whole
layer. The directions are leading singular vectors of images, by subspace iteration (`_tools/subspaces.py`).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import divisor, einsum, matmul
from jaxsrn._tools.subspaces import fixed_start, subspace_iteration
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.image_pairs import matrix_free
from jaxsrn.spectra.padded.starts import Waves

__all__ = [
    "lead_alone",
    "pays_in_few_channels",
    "through_few_channels",
]

# Layers of so many channels are searched in `_FEW_CHANNELS` directions first, or in the smaller number of channels over
# `_FEW_OF` if that is more. More directions cost larger products, fewer leave more steps to the whole layer.
_MANY_CHANNELS, _FEW_CHANNELS, _FEW_OF = 32, 16, 16
# On images of at most so many samples the whole layer is searched at once, by a smaller program.
_SMALL_IMAGE = 512
# So many narrow layers are searched, each between the channels of what was found in the one before.
_ROUNDS = 2
# Subspace iteration for the channels takes so many steps. Each step weights a direction by its energy in the images.
_CHANNEL_STEPS = 2
# `lead_alone` counts up to so many large singular values as one. A second value of 0.83 of the first is the limit.
_ONE = 1.1


def pays_in_few_channels(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the layer is searched in few channels first (static)."""
    has_many = op.feature_group_count == 1 and min(kernel_shape[-2:]) >= _MANY_CHANNELS
    return has_many and math.prod(op.input_shape) > _SMALL_IMAGE


def lead_alone(waves: Waves) -> Bool[Array, ""]:
    """Whether the symbol has one large singular value at the frequencies of the waves, and no second near to it.

    Climbing finds the vectors of such a value precisely. Of several nearly equal values it finds a mixture of vectors,
    and the few channels of that mixture need not be those of the leading vector: norms were too low by up to 1.6e-3
    (`python -m tests.searches --waves --kernels 8`).

    The large values of a wave are counted by `sum(p)**2 / sum(p**2)` of their sixteenth powers `p`. It is `n` for `n`
    equal values, and 1 for one that is far above the others. Both sums run over all waves, so that lower ones count
    less.
    """
    # The largest value is 1 then, so that its powers are finite.
    grams = waves.grams / divisor(waves.values[0] ** 2).astype(waves.grams.dtype)
    squares = matmul(grams, grams)
    fourth = matmul(squares, squares)
    eighth = matmul(fourth, fourth)
    # The traces of the eighth and of the sixteenth powers are the sums of `p` and of `p**2`.
    sums = einsum("wij,wji->w", fourth, fourth).real
    return jnp.sum(sums**2) < _ONE * einsum("wij,wji->", eighth, eighth).real


def through_few_channels(
    kernel, op: ZeroPaddedConv, image: Float[Array, "..."], tolerance, pays: Bool[Array, ""]
) -> Float[Array, "..."]:
    """An input near the leading one of a layer of many channels whose leading images use few of them.

    Where it does not pay, the image is returned as it is.

    Restricted to images whose channels lie in a subspace, the layer is a narrow one. The nearly equal singular values
    that make a search long differ in space and not in channels, so the narrow layer has nearly all of them. A power
    step of the whole layer finds the subspaces of inputs and outputs. The pair of the step's two images lies in them
    and its value is at least the norm of the image's output, so that no search ends below what it starts from. The
    values left to the search in the whole layer are far from the leading one.
    """

    def search(_, image):
        output = op.apply(kernel, image, precision=lax.Precision.HIGHEST)
        back = op.transpose(kernel, output, precision=lax.Precision.HIGHEST)
        few = max(_FEW_CHANNELS, min(kernel.shape[-2:]) // _FEW_OF)
        ins, outs = (_channel_directions(images, few) for images in (back, output))
        narrow = einsum("...io,ai,bo->...ab", kernel, ins, outs)
        pair = matrix_free(narrow, op, einsum("...i,ai->...a", image, ins), tolerance).pair
        return einsum("...a,ai->...i", pair.input, ins)

    return lax.fori_loop(0, jnp.where(pays, _ROUNDS, 0), search, image)


def _channel_directions(images: Float[Array, "... c"], few: int) -> Float[Array, "{few} c"]:
    """Orthonormal rows that span the channels that the images use most, by subspace iteration."""
    rows = images.reshape((-1, images.shape[-1]))
    start = fixed_start((few, images.shape[-1]), images.dtype)
    return subspace_iteration(lambda basis: einsum("fc,nc,nd->fd", basis, rows, rows), start, _CHANNEL_STEPS)
