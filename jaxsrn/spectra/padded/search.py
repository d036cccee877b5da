"""The leading singular pair of a layer with zero padding, by a search from waves of the circular layer. No proof."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.operators.maps import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.circular.branch_and_bound import peaks
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.pairs import Found, Pair, circular_layer, matrix_free, windowed

__all__ = ["at_first_contact", "search", "without_idle_axes"]

# Norm of the random part of a cold start, relative to the wave: other waves may be as large, and all take part.
_NOISE = 0.1
# Share of the second phase of a wave in what is found, relative to the first, below which the search is repeated from
# both: with less in the start it may have ended at the wrong one.
_SHARE = 0.35
# Relative difference of the norms of two phases beyond which they are no rivals: the noise has enough of both.
_RIVALS = 0.05
# Samples up to which phases are told apart (their norms differ as the window's coefficients at the doubled frequency
# do, by about `samples ** -3`), and the difference, as a share of the tolerance, beyond which they are on more samples.
_FEW_SAMPLES, _SAME = 512, 0.05
# Lanczos steps that a cold start takes at least: with that much noise it is not near a singular vector.
_COLD_STEPS = 10
# The same of a start that is near one.
_WARM_STEPS = 2
# Layers of so many channels are searched in so few of them first, or in that share of the smaller number.
_MANY_CHANNELS, _FEW_CHANNELS, _FEW_OF = 32, 16, 16
# Waves from which a search may start.
_MOST_STARTS = 4
# How much finer than those of the image the frequencies are among which waves are looked for.
_FINER = 4


def search(kernel: Float[Array, "..."], op: ZeroPaddedConv, tolerance) -> Pair:
    """The leading pair, to a relative residual; without a proof that no other singular value is larger."""
    noise = unit(random_start(op.in_shape(kernel.shape), kernel.dtype))
    wide = op.feature_group_count == 1 and min(kernel.shape[-2:]) >= _MANY_CHANNELS
    starts = _circular_starts(kernel, op)
    if wide:
        return _through_few_channels(kernel, op, starts, noise, tolerance)
    return _from_waves(kernel, op, starts, noise, tolerance).pair


# Axes of one tap


def without_idle_axes(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> ZeroPaddedConv:
    """The layer on a single sample along axes of one tap: it does the same to each of them, wherever it meets any."""
    contacts = _idle_contacts(op, kernel_shape)

    def where(alone, otherwise):
        return tuple(value if axis is None else alone for axis, value in zip(contacts, otherwise, strict=True))

    return dataclasses.replace(
        op,
        input_shape=where(1, op.input_shape),
        padding=where((0, 0), op.pads(kernel_shape)),
        strides=where(1, op.strides),
        input_dilation=where(1, op.input_dilation),
    )


def at_first_contact(pair: Pair, op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> Pair:
    """A pair of the layer without idle axes on the images of the layer: zero but where a tap first meets a sample."""
    contacts = _idle_contacts(op, kernel_shape)

    def placed(image, shape, side):
        place = tuple(slice(None) if axis is None else slice(axis[side], axis[side] + 1) for axis in contacts)
        return jnp.zeros(shape, image.dtype).at[place].set(image)

    right = placed(pair.right, op.in_shape(kernel_shape), 0)
    left = placed(pair.left, op.out_shape(kernel_shape), 1)
    return pair._replace(right=right, left=left)


def _idle_contacts(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> list[tuple[int, int] | None]:
    """The first input and output sample that the tap of each idle axis joins; `None` for the other axes.

    An axis is idle where its only tap meets the image. The first of several taps may meet no sample at all.
    """
    contacts = [(len(axis) == 1, axis[0]) for axis in op.axis_contacts(kernel_shape)]
    return [(int(tap.inputs[0]), int(tap.outputs[0])) if alone and len(tap.inputs) else None for alone, tap in contacts]


# Where the search starts


class _Starts(NamedTuple):
    """Where to search: waves of the circular layer in two phases, faded out at the edges, and what each can reach.

    The norms of images in which a wave dominates are taken to be at most its limit, the largest singular value of the
    symbol around its frequency as far as climbing finds it.
    """

    limits: Float[Array, " starts"]
    waves: Float[Array, "starts 2 ..."]


def _circular_starts(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> _Starts:
    """Near the leading right vector: the largest waves of the circular layer.

    Nothing binds their frequencies to the grid of the image: half a step off, a wave runs out of phase at the edges.
    """
    layer, finer = _circular_model(op, kernel.shape)
    limits, pairs = peaks(kernel, layer, _MOST_STARTS, finer)

    def image(pair: Pair, turn):
        return windowed(pair._replace(right=turn * pair.right), layer, op, kernel.shape).right

    def phases(pair: Pair):
        # The phase with the larger real part first: where the symbol is real there is no other.
        angle = jnp.angle(jnp.sum(pair.right**2)) / 2
        turn = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))
        return _two_phases(image(pair, turn), image(pair, 1j * turn))

    limits = jnp.where(limits > 0, limits * _fourier.overshoot(layer, kernel.shape), 0)
    return _Starts(limits, jax.vmap(phases)(Pair(*pairs)))


def _circular_model(op: ZeroPaddedConv, kernel_shape) -> tuple[CircularConv, int]:
    """The circular layer whose frequencies are looked at, and how much finer than those of the image they are."""
    sizes = (tuple(scale * n for n in op.dilated_shape) for scale in (1, _FINER))
    layer, finer = (circular_layer(op, kernel_shape, size, op.strides) for size in sizes)
    # Sites are counted in 32 bits.
    fine = not is_reduced(layer, kernel_shape) and math.prod(finer.grid) * op.feature_group_count < 2**31
    return (finer, _FINER) if fine else (layer, 1)


def _two_phases(wave: Float[Array, "..."], turned: Float[Array, "..."]) -> Float[Array, "2 ..."]:
    """An orthonormal basis of both."""
    wave = unit(wave)
    return jnp.stack([wave, unit(turned - jnp.sum(wave * turned) * wave)])


# From one wave and from several


class _Search(NamedTuple):
    """Where a search starts, what it found, how often there was one, and whether there has to be another."""

    start: Float[Array, "..."]
    found: Found
    count: Int[Array, ""]
    again: Bool[Array, ""]


def _from_wave(kernel, op: ZeroPaddedConv, waves: Float[Array, "2 ..."], noise, tolerance, floor) -> Found:
    """Lanczos with the real operator from a wave of the circular layer; given up where it seems to end below `floor`.

    The edges tell two phases of the wave apart, but often by less than 1e-4 of their norms. A start with next to
    nothing of one of them ends at the other: the search is repeated from both.
    """
    images = op.apply(kernel, waves, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.linalg.norm(images.reshape((2, -1)), axis=1)
    apart = jnp.abs(norms[1] - norms[0]) / jnp.where(norms[0] == 0, 1, norms[0])
    few = math.prod(op.input_shape) <= _FEW_SAMPLES
    rivals = (apart < _RIVALS) & (few | (apart > _SAME * tolerance))

    def attempt(state: _Search) -> _Search:
        found = matrix_free(kernel, op, state.start + _NOISE * noise, tolerance, first_check=_COLD_STEPS, floor=floor)
        right = found.pair.right
        shares = jnp.abs(jnp.tensordot(waves, right, right.ndim, precision=jax.lax.Precision.HIGHEST))
        again = (state.count == 0) & rivals & (shares[1] < _SHARE * shares[0])
        return _Search(found.pair.right + waves[1], found, state.count + 1, again)

    start = _Search(waves[0], _nothing(kernel, op), jnp.asarray(0), jnp.asarray(True))
    return jax.lax.while_loop(lambda state: state.again, attempt, start).found


def _nothing(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Found:
    """In place of what is not yet found."""
    right, left = (jnp.zeros(shape, kernel.dtype) for shape in (op.in_shape(kernel.shape), op.out_shape(kernel.shape)))
    return Found(jnp.zeros((), kernel.dtype), Pair(jnp.asarray(0), right, left))


def _from_waves(kernel, op: ZeroPaddedConv, starts: _Starts, noise, tolerance) -> Found:
    """The best that is found from several waves, the largest first, as long as one might exceed what is found."""

    def unfinished(state):
        k, best = state
        limit = starts.limits[jnp.minimum(k, len(starts.limits) - 1)]
        return (k < len(starts.limits)) & ((k == 0) | (limit > best.value))

    def look(state):
        k, best = state
        found = _from_wave(kernel, op, starts.waves[k], noise, tolerance, best.value)
        is_lower = (found.value <= best.value) & (k > 0)
        return k + 1, jax.tree.map(lambda new, old: jnp.where(is_lower, old, new), found, best)

    return jax.lax.while_loop(unfinished, look, (jnp.asarray(0), _nothing(kernel, op)))[1]


# Wide layers


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
        right, left = (einsum("...a,ia->...i", *both) for both in ((pair.right, self.ins), (pair.left, self.outs)))
        return pair._replace(right=right, left=left)


def _through_few_channels(kernel, op: ZeroPaddedConv, starts: _Starts, noise, tolerance) -> Pair:
    """The leading pair of a layer of many channels, whose images use few of them.

    On all images whose channels lie in a subspace the layer is a narrow one, which has nearly all of the nearly equal
    singular values that make the search long: they differ in space. A power step of the whole layer leads to the
    subspaces of inputs and outputs, and what is left to Lanczos is far from the leading value.
    """
    narrow = _narrowed(kernel, *_power_steps(kernel, op, starts, noise))
    waves, noise = (narrow.inside(images) for images in (starts.waves, noise))
    waves = jax.vmap(_two_phases)(waves[:, 0], waves[:, 1])
    first = narrow.outside(_from_waves(narrow.kernel, op, starts._replace(waves=waves), unit(noise), tolerance).pair)
    right, left = _power_step(kernel, op, first.right)
    # Room for the pair itself and for where it leads: what follows is no worse.
    sides = ((first.right, right), (first.left, left))
    narrow = _narrowed(kernel, *(jnp.stack([unit(image) for image in side]) for side in sides))
    start = narrow.inside(first.right)
    second = narrow.outside(matrix_free(narrow.kernel, op, start, tolerance, first_check=_WARM_STEPS).pair)

    def finish(state):
        _, pair = state
        return True, matrix_free(kernel, op, pair.right, tolerance, first_check=_WARM_STEPS).pair

    # A loop in place of `lax.cond`, which under `vmap` runs both branches.
    finished = _residual(first.right, right, left) <= tolerance
    return jax.lax.while_loop(lambda state: ~state[0], finish, (finished, second))[1]


def _power_step(kernel, op: ZeroPaddedConv, image: Float[Array, "..."]):
    """`(T^T T image, T image)`."""
    left = op.apply(kernel, image, precision=jax.lax.Precision.HIGHEST)
    return op.transpose(kernel, left, precision=jax.lax.Precision.HIGHEST), left


def _residual(image: Float[Array, "..."], right: Float[Array, "..."], left: Float[Array, "..."]) -> Float[Array, ""]:
    """`||T^T T image - value^2 image|| / value^2` of a unit image with its power step."""
    squared = jnp.sum(left**2)
    return jnp.linalg.norm((right - squared * image).reshape(-1)) / jnp.where(squared == 0, 1.0, squared)


def _power_steps(kernel, op: ZeroPaddedConv, starts: _Starts, noise):
    """The same of all waves that might exceed what the largest reaches as it is; zero in place of the others.

    With noise, for the sake of channels that the waves do not use.
    """
    first = _power_step(kernel, op, starts.waves[0, 0] + _NOISE * noise)
    count = jnp.sum(starts.limits > jnp.linalg.norm(first[1]))
    stacks = [jnp.zeros((len(starts.limits), *image.shape), image.dtype).at[0].set(image) for image in first]

    def step(k, stacks):
        images = _power_step(kernel, op, starts.waves[k, 0] + _NOISE * noise)
        return [stack.at[k].set(image) for stack, image in zip(stacks, images, strict=True)]

    return jax.lax.fori_loop(1, count, step, stacks)


def _narrowed(kernel: Float[Array, "..."], rights: Float[Array, "..."], lefts: Float[Array, "..."]) -> _Narrow:
    few = max(_FEW_CHANNELS, min(kernel.shape[-2:]) // _FEW_OF)
    ins, outs = _channel_directions(rights, few), _channel_directions(lefts, few)
    return _Narrow(einsum("...io,ia,ob->...ab", kernel, ins, outs), ins, outs)


def _channel_directions(images: Float[Array, "... c"], few: int) -> Float[Array, "c {few}"]:
    """An orthonormal basis of the channels that the images use most, by subspace iteration."""
    rows = images.reshape((-1, images.shape[-1]))
    basis = random_start((images.shape[-1], few), images.dtype)
    for _ in range(2):
        basis = jnp.linalg.qr(einsum("nc,nk->ck", rows, einsum("nc,ck->nk", rows, basis)))[0]
    return basis
