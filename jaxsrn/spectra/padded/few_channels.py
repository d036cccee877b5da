"""Wide layers with zero padding: the search in the few channels that their images use."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import einsum, matmul, unit
from jaxsrn._tools.subspaces import random_start, subspace_iteration
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.images import matrix_free
from jaxsrn.spectra.padded.from_waves import NOISE, from_waves
from jaxsrn.spectra.padded.starts import Starts, two_phases
from jaxsrn.spectra.pair import Pair

__all__ = [
    "MANY_CHANNELS",
    "through_few_channels",
]

# Layers of so many channels are searched in so few of them first, or in that share of the smaller number.
MANY_CHANNELS, _FEW_CHANNELS, _FEW_OF = 32, 16, 16
# Lanczos steps that a start near a singular vector takes at least.
_WARM_STEPS = 2
# Steps of subspace iteration for the channels: each squares the ratio of what is kept to what is lost.
_CHANNEL_STEPS = 2


class _Narrow(NamedTuple):
    """The layer between the channels that some images use most, and the directions that these are."""

    kernel: Float[Array, "..."]
    ins: Float[Array, "c_in few"]
    outs: Float[Array, "c_out few"]

    def inside(self, images: Float[Array, "..."]) -> Float[Array, "..."]:
        """Inputs of the layer as those of the narrow one."""
        return einsum("...i,ia->...a", images, self.ins)

    def outside(self, pair: Pair) -> Pair:
        """A pair of the narrow layer as one of the layer."""
        sides = (pair.input, self.ins), (pair.output, self.outs)
        inputs, outputs = (einsum("...a,ia->...i", *side) for side in sides)
        return pair._replace(input=inputs, output=outputs)


def through_few_channels(kernel, op: ZeroPaddedConv, starts: Starts, noise, tolerance) -> Pair:
    """The leading pair of a layer of many channels, whose images use few of them.

    On all images whose channels lie in a subspace the layer is a narrow one, which has nearly all of the nearly equal
    singular values that make the search long: they differ in space. A power step of the whole layer leads to the
    subspaces of inputs and outputs, and what is left to Lanczos is far from the leading value.
    """
    narrow = _narrowed(kernel, *_power_steps(kernel, op, starts, noise))
    waves, noise = (narrow.inside(images) for images in (starts.waves, noise))
    waves = jax.vmap(two_phases)(waves[:, 0], waves[:, 1])
    first = narrow.outside(from_waves(narrow.kernel, op, starts._replace(waves=waves), unit(noise), tolerance).pair)
    back, image = _power_step(kernel, op, first.input)
    # Room for the pair itself and for where it leads: what follows is no worse.
    sides = ((first.input, back), (first.output, image))
    narrow = _narrowed(kernel, *(jnp.stack([unit(image) for image in side]) for side in sides))
    start = narrow.inside(first.input)
    second = narrow.outside(matrix_free(narrow.kernel, op, start, tolerance, first_check=_WARM_STEPS).pair)

    def finish(state):
        _, pair = state
        return True, matrix_free(kernel, op, pair.input, tolerance, first_check=_WARM_STEPS).pair

    # A loop in place of `lax.cond`, which under `vmap` runs both branches.
    finished = _residual(first.input, back, image) <= tolerance
    return jax.lax.while_loop(lambda state: ~state[0], finish, (finished, second))[1]


def _power_step(kernel, op: ZeroPaddedConv, image: Float[Array, "..."]):
    """`(T^T T image, T image)`."""
    output = op.apply(kernel, image, precision=jax.lax.Precision.HIGHEST)
    return op.transpose(kernel, output, precision=jax.lax.Precision.HIGHEST), output


def _residual(image: Float[Array, "..."], back: Float[Array, "..."], output: Float[Array, "..."]) -> Float[Array, ""]:
    """`||T^T T image - value^2 image|| / value^2` of a unit image with its power step."""
    squared = jnp.sum(output**2)
    return jnp.linalg.norm((back - squared * image).reshape(-1)) / jnp.where(squared == 0, 1.0, squared)


def _power_steps(kernel, op: ZeroPaddedConv, starts: Starts, noise):
    """Power steps of every wave whose limit exceeds the first wave's norm; the other rows are zero.

    The waves take noise with them, for the sake of channels that they do not use.
    """
    first = _power_step(kernel, op, starts.waves[0, 0] + NOISE * noise)
    count = jnp.sum(starts.limits > jnp.linalg.norm(first[1]))
    stacks = [jnp.zeros((len(starts.limits), *image.shape), image.dtype).at[0].set(image) for image in first]

    def step(k, stacks):
        images = _power_step(kernel, op, starts.waves[k, 0] + NOISE * noise)
        return [stack.at[k].set(image) for stack, image in zip(stacks, images, strict=True)]

    return jax.lax.fori_loop(1, count, step, stacks)


def _narrowed(kernel: Float[Array, "..."], inputs: Float[Array, "..."], outputs: Float[Array, "..."]) -> _Narrow:
    few = max(_FEW_CHANNELS, min(kernel.shape[-2:]) // _FEW_OF)
    ins, outs = _channel_directions(inputs, few), _channel_directions(outputs, few)
    return _Narrow(einsum("...io,ia,ob->...ab", kernel, ins, outs), ins, outs)


def _channel_directions(images: Float[Array, "... c"], few: int) -> Float[Array, "c {few}"]:
    """An orthonormal basis of the channels that the images use most, by subspace iteration."""
    rows = images.reshape((-1, images.shape[-1]))
    start = random_start((few, images.shape[-1]), images.dtype)
    return subspace_iteration(lambda basis: matmul(matmul(basis, rows.T), rows), start, _CHANNEL_STEPS).T
