"""Wide layers with zero padding: the search in the few channels that the leading images use.

Most products are with a narrow layer between a few directions of the channels, and only the last are with the whole
layer. The directions are leading singular vectors of images, by subspace iteration (`_tools/subspaces.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import einsum, matmul, unit
from jaxsrn._tools.subspaces import fixed_start, subspace_iteration
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.image_pairs import matrix_free
from jaxsrn.spectra.padded.from_waves import NOISE, from_waves
from jaxsrn.spectra.padded.starts import Starts, two_phases
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "MANY_CHANNELS",
    "through_few_channels",
]

# Layers of so many channels are searched in `_FEW_CHANNELS` directions first, or in the smaller number of channels over
# `_FEW_OF` if that is more. More directions cost larger products, fewer leave more steps to the whole layer.
MANY_CHANNELS, _FEW_CHANNELS, _FEW_OF = 32, 16, 16
# A start near a singular vector takes so many Lanczos steps at least; it is as good as converged.
_WARM_STEPS = 2
# Subspace iteration for the channels takes so many steps. Each step weights a direction by its energy in the images.
_CHANNEL_STEPS = 2


class _Narrow(NamedTuple):
    """The narrow layer between the directions of the channels that given images use most, and these directions."""

    kernel: Float[Array, "..."]
    ins: Float[Array, "c_in few"]
    outs: Float[Array, "c_out few"]

    def inside(self, images: Float[Array, "..."]) -> Float[Array, "..."]:
        """Input images of the whole layer, projected to inputs of the narrow one."""
        return einsum("...i,ia->...a", images, self.ins)

    def outside(self, pair: Pair) -> Pair:
        """A pair of the narrow layer as a pair of the whole one."""
        sides = (pair.input, self.ins), (pair.output, self.outs)
        inputs, outputs = (einsum("...a,ia->...i", *side) for side in sides)
        return pair._replace(input=inputs, output=outputs)


def through_few_channels(kernel, op: ZeroPaddedConv, starts: Starts, noise, tolerance) -> Pair:
    """The leading pair of a layer of many channels whose leading images use few of them.

    Restricted to images whose channels lie in a subspace, the layer is a narrow one. The nearly equal singular values
    that make a search long differ in space and not in channels, so the narrow layer has nearly all of them. Power steps
    of the whole layer find the subspaces of inputs and outputs. The values left to the search in the whole layer are
    far from the leading one.
    """
    narrow = _narrowed(kernel, *_power_steps(kernel, op, starts, noise))
    waves, noise = (narrow.inside(images) for images in (starts.waves, noise))
    waves = jax.vmap(two_phases)(waves[:, 0], waves[:, 1])
    first = narrow.outside(from_waves(narrow.kernel, op, starts._replace(waves=waves), unit(noise), tolerance).pair)
    back, image = _power_step(kernel, op, first.input)
    # The directions hold the pair itself and its power step, so that the second pair is no worse.
    sides = ((first.input, back), (first.output, image))
    narrow = _narrowed(kernel, *(jnp.stack([unit(image) for image in side]) for side in sides))
    start = narrow.inside(first.input)
    second = narrow.outside(matrix_free(narrow.kernel, op, start, tolerance, first_check=_WARM_STEPS).pair)

    def finish(state):
        _, pair = state
        return True, matrix_free(kernel, op, pair.input, tolerance, first_check=_WARM_STEPS).pair

    # The loop stands in place of `lax.cond`, which runs both branches under `vmap`.
    finished = _residual(first.input, back, image) <= tolerance
    return jax.lax.while_loop(lambda state: ~state[0], finish, (finished, second))[1]


def _power_step(kernel, op: ZeroPaddedConv, image: Float[Array, "..."]):
    """`(T^T T image, T image)`."""
    output = op.apply(kernel, image, precision=jax.lax.Precision.HIGHEST)
    return op.transpose(kernel, output, precision=jax.lax.Precision.HIGHEST), output


def _residual(image: Float[Array, "..."], back: Float[Array, "..."], output: Float[Array, "..."]) -> Float[Array, ""]:
    """`||T^T T image - value^2 image|| / value^2` for a unit image, from its power step."""
    squared = jnp.sum(output**2)
    return jnp.linalg.norm((back - squared * image).reshape(-1)) / jnp.where(squared == 0, 1.0, squared)


def _power_steps(kernel, op: ZeroPaddedConv, starts: Starts, noise):
    """Power steps of every wave whose limit exceeds the first wave's norm; the other rows are zero.

    Noise is added to every wave, for the sake of channels that the waves do not use.
    """
    first = _power_step(kernel, op, starts.waves[0, 0] + NOISE * noise)
    count = jnp.sum(starts.limits > jnp.linalg.norm(first[1]))
    stacks = [jnp.zeros((len(starts.limits), *image.shape), image.dtype).at[0].set(image) for image in first]

    def step(k, stacks):
        images = _power_step(kernel, op, starts.waves[k, 0] + NOISE * noise)
        return [stack.at[k].set(image) for stack, image in zip(stacks, images, strict=True)]

    return jax.lax.fori_loop(1, count, step, stacks)


def _narrowed(kernel: Float[Array, "..."], inputs: Float[Array, "..."], outputs: Float[Array, "..."]) -> _Narrow:
    """The layer between the directions of the channels that the given inputs and outputs use most."""
    few = max(_FEW_CHANNELS, min(kernel.shape[-2:]) // _FEW_OF)
    ins, outs = _channel_directions(inputs, few), _channel_directions(outputs, few)
    return _Narrow(einsum("...io,ia,ob->...ab", kernel, ins, outs), ins, outs)


def _channel_directions(images: Float[Array, "... c"], few: int) -> Float[Array, "c {few}"]:
    """An orthonormal basis of the channels that the images use most, by subspace iteration."""
    rows = images.reshape((-1, images.shape[-1]))
    start = fixed_start((images.shape[-1], few), images.dtype).T
    return subspace_iteration(lambda basis: matmul(matmul(basis, rows.T), rows), start, _CHANNEL_STEPS).T
