"""The watch of a circular or unbounded layer: pairs that climb elsewhere on the torus (`spectra/circular/sites.py`).

A step of a pair is a power step, and between its two products the frequency moves to the best one for the vectors. For
fixed vectors `u` and `v` the symbol is a scalar filter `u^H S(w) v = sum_t exp(-i <w, t>) u^H C_t v` with one term for
each tap, so that many frequencies are compared at the price of the product that the power step takes anyway, whatever
the size of the image. The frequencies that are compared lie around the pair, from far away to the nearest.

Such a step would not see another frequency with other vectors overtake. So the half grid is cut into **cells**, with a
**climber** in each: a pair of every group that takes the same steps, and does not leave its cell. The best of them, if
it is better than the pair of the track, takes its place. `spectra/circular/climbing.py` climbs from a cold start.

The climbers take nearly all of the time of a step. So where a training step consists of several, one half of them moves
in the first, the other half in the second, and so on.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.indexing import joined, picked, place_of_largest, put_from, slice_from
from jaxsrn._tools.linalg import einsum, zero_for_nan
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.normalization.training.watched_images import Step
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.angles import ROTATION
from jaxsrn.spectra.circular.fourier import polynomial, site_rotations, site_shape
from jaxsrn.spectra.circular.grid_certificate import degrees
from jaxsrn.spectra.circular.real_floats import indices_of, parts_of, turns_of
from jaxsrn.spectra.circular.sites import Site, half_grid, on_grid
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Climbers", "as_floats", "begin", "follow", "of_floats", "pairs_of", "watch_shapes"]

# Cells per degree of the symbol in a full turn of an axis, and the most of them: more miss fewer peaks, at the cost of
# a climber each. With two per degree a layer without edges ended 6% above its norm after 200 steps of Adam, with eight
# within 0.6% (`tests/test_nnx.py`).
_CELLS_PER_DEGREE, _MOST_CELLS = 8, 16
# Parts of the climbers that take turns. Where weights drift, norms ended up to 4.3% too large with four parts, and up
# to 0.24% with two. One part had 0.44%, and takes 1.4 times as long (`python benchmarks/watching.py`).
_PARTS = 2


class Climbers(NamedTuple):
    """A pair of every group in each cell: the index of its frequency, and its output in real and imaginary parts.

    Vectors have an axis for these parts, and factors are rotations, so that every product is one of real arrays.
    """

    index: Int[Array, "cells groups axes"]
    output: Float[Array, "cells groups parts columns"]


def watch_shapes(op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...]) -> Climbers:
    """The shapes of the climbers' arrays in floats, in their places (static)."""
    layer = on_grid(op, kernel_shape)
    cells, groups = len(_cells(layer, kernel_shape)), layer.feature_group_count
    return Climbers((cells, groups, layer.num_axes), (cells, groups, 2, site_shape(layer, kernel_shape)[1]))


def as_floats(watch: Climbers, op: CircularConv | UnboundedConv, kernel_shape) -> Climbers:
    """The climbers as they are kept between steps, in real floats (`spectra/circular/real_floats.py`)."""
    return watch._replace(index=turns_of(watch.index, on_grid(op, kernel_shape).grid, watch.output.dtype))


def of_floats(watch: Climbers, op: CircularConv | UnboundedConv, kernel_shape, dtype) -> Climbers:
    """The climbers of `as_floats` in a dtype, each in its cell, whatever was done to them."""
    layer = on_grid(op, kernel_shape)
    lowest, highest = np.moveaxis(_cells(layer, kernel_shape)[:, None], -1, 0)
    # A climber whose output is 0 knows nothing of the kernel.
    index, output = jax.tree.map(lambda leaf: zero_for_nan(leaf).astype(dtype), watch)
    return Climbers(indices_of(index, layer.grid, lowest, highest), output)


def begin(kernel: Float[Array, "..."], op: CircularConv | UnboundedConv) -> Climbers:
    """Climbers in the middle of their cells, with vectors that know nothing of the kernel."""
    index, outputs = watch_shapes(op, kernel.shape)
    cells = _cells(on_grid(op, kernel.shape), kernel.shape)
    middles = np.sum(cells, axis=-1, dtype=np.int32) // 2
    vectors = fixed_start((*outputs[:2], outputs[-1]), kernel.dtype)
    vectors = jnp.stack([vectors, jnp.zeros_like(vectors)], axis=2)
    return Climbers(jnp.broadcast_to(jnp.asarray(middles)[:, None], index), vectors)


def follow(
    kernel: Float[Array, "..."],
    op: CircularConv | UnboundedConv,
    pair: Pair,
    watch: Climbers,
    turn: Int[Array, ""] | None,
):
    """A step of the pair and of the climbers whose turn it is, by default all; the best of them is the new pair.

    Returns:
      `(pair, watch, step)`: another pair has taken over where a climber has taken the place of the pair.
    """
    layer = on_grid(op, kernel.shape)
    groups, samples = layer.feature_group_count, jnp.asarray(layer.grid, jnp.int32)
    coefficients, exponents = polynomial(kernel, layer)
    cells = _cells(layer, kernel.shape)
    start, count = _whose_turn(len(cells), turn)
    moving = [slice_from(leaf, start, count) for leaf in (*watch, jnp.asarray(cells))]
    # The pair is the first row, in every group.
    index, output, cells = jax.tree.map(
        lambda one, many: jnp.concatenate([jnp.broadcast_to(one, (1, *many.shape[1:])), many]),
        [pair.site.index, parts_of(pair.output).reshape((2, -1)), _everywhere(layer)],
        moving,
    )
    factors = site_rotations(layer, kernel.shape, index, kernel.dtype)
    before, inputs, reached = _inputs(coefficients, factors, output)
    products = einsum("pqs,kgpr,kgqtr->kgst", jnp.asarray(ROTATION, kernel.dtype), inputs, reached)
    filters = jnp.sum(factors * products[..., None, :, :], axis=-2)
    index = index + _best_steps(layer, kernel.shape, exponents, index, cells, filters)
    factors = site_rotations(layer, kernel.shape, index, kernel.dtype)
    # In this order the coefficients are multiplied as they lie in memory.
    turned = einsum("kgpqt,kgpr->kgqtr", factors, inputs)
    values, outputs = _units(einsum("gtrc,kgqtr->kgqc", coefficients, turned))
    # The first of equal values wins, so that nothing moves without need.
    winner = place_of_largest(_preferring_first(values).reshape(-1))
    rows = index, inputs, outputs
    best, *sides = picked([leaf.reshape((-1, *leaf.shape[2:])) for leaf in rows], winner)
    group = jnp.zeros_like(winner) if groups == 1 else lax.rem(winner, np.int32(groups))
    new = Pair(Site(lax.rem(best + samples, samples), group), *(lax.complex(*side) for side in sides))
    step = Step(picked(before[0], pair.site.group), jnp.max(values), winner != pair.site.group)
    moved = (put_from(leaf, start, rows[1:]) for leaf, rows in zip(watch, (index, outputs), strict=True))
    return new, Climbers(*moved), step


def pairs_of(kernel: Float[Array, "..."], op: UnboundedConv, watch: Climbers):
    """The pairs of all climbers, and pairs at the frequencies that are their own opposites: `(values, pairs)`.

    A real kernel has real singular vectors at those frequencies. Stable ranks can be lower there than at any frequency
    nearby (`largest_squared_functional` in `spectra/ranks.py`), so that climbers do not lead to them. The vectors are
    those of the climber in whose cell such a frequency lies.
    """
    layer = on_grid(op, kernel.shape)
    coefficients, _ = polynomial(kernel, layer)
    own_opposites, nearest = _own_opposites(layer, kernel.shape)
    index = jnp.broadcast_to(jnp.asarray(own_opposites)[:, None], (len(nearest), *watch.index.shape[1:]))
    further = Climbers(index, picked(watch.output, jnp.asarray(nearest)))
    index, output = joined(watch, further)
    factors = site_rotations(layer, kernel.shape, index, kernel.dtype)
    values, inputs, _ = _inputs(coefficients, factors, output)
    group = jnp.broadcast_to(jnp.arange(values.shape[1], dtype=jnp.int32), values.shape)
    pairs = Pair(Site(index, group), *(lax.complex(side[:, :, 0], side[:, :, 1]) for side in (inputs, output)))
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), (values, pairs))


def _inputs(coefficients: Float[Array, "groups terms rows columns"], factors, output):
    """The inputs that the symbols at given factors `exp(-i <w, t>)` make of outputs.

    Returns:
      `(values, inputs, products)`: the norms of the inputs, their directions, and the products of all terms.
    """
    reached = einsum("gtrc,kgqc->kgqtr", coefficients, output)
    return *_units(einsum("kgpqt,kgqtr->kgpr", factors, reached)), reached


def _whose_turn(num_cells: int, turn: Int[Array, ""] | None) -> tuple[Int[Array, ""] | int, int]:
    """The first of the climbers that move, and their number (static)."""
    if turn is None or num_cells % _PARTS:
        return 0, num_cells
    count = num_cells // _PARTS
    return lax.rem(turn, np.int32(_PARTS)) * np.int32(count), count


def _units(vectors: Float[Array, "k g parts n"]) -> tuple[Float[Array, "k g"], Float[Array, "k g parts n"]]:
    """The norms of the vectors, and their directions; a vector without structure takes the place of zero."""
    # Far below rounding, and its square is a normal number.
    spare = 1e3 * math.sqrt(jnp.finfo(vectors.dtype).tiny) * np.cos(np.arange(vectors.shape[-1]) ** 2)
    vectors = vectors + jnp.asarray([[[spare, 0 * spare]]], vectors.dtype)
    norms = jnp.sqrt(jnp.sum(vectors**2, axis=(-2, -1)))
    return norms, vectors / norms[..., None, None]


def _preferring_first(values: Float[Array, "k g"]) -> Float[Array, "k g"]:
    """The values, those of the first row raised by what rounding may hide."""
    factors = 1 + 4 * float(jnp.finfo(values.dtype).eps) * (np.arange(len(values)) == 0)
    return values * jnp.asarray(factors[:, None], values.dtype)


# Frequencies


def _cells(layer: CircularConv, kernel_shape) -> np.ndarray:
    """The first and the last index of every cell on each axis, `(cells, axes, 2)` (static)."""
    ranges = []
    for n, indices, degree in zip(layer.grid, half_grid(layer), degrees(layer, kernel_shape), strict=True):
        per_turn = min(_MOST_CELLS, _CELLS_PER_DEGREE * degree)
        # The last axis has half of the indices, and of the cells.
        count = min(indices, max(1, per_turn * indices // n))
        edges = np.arange(count + 1) * indices // count
        ranges.append(np.stack([edges[:-1], edges[1:] - 1], axis=-1))
    return np.array(list(itertools.product(*ranges)), np.int32)


def _own_opposites(layer: CircularConv, kernel_shape) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies of an even grid that are their own opposites, and the cell that each is in (static).

    On an axis along which the symbol is constant there is one of them.
    """
    free = zip(layer.grid, degrees(layer, kernel_shape), strict=True)
    axes = [(0, n // 2) if degree else (0,) for n, degree in free]
    index = np.array(list(itertools.product(*axes)), np.int32)
    first, last = np.moveaxis(_cells(layer, kernel_shape), -1, 0)
    holds = np.all((first <= index[:, None]) & (index[:, None] <= last), axis=-1)
    return index, np.argmax(holds, axis=-1).astype(np.int32)


def _offsets(layer: CircularConv, kernel_shape, dtype) -> np.ndarray:
    """The frequencies around one that are compared with it, itself first, as differences of indices (static).

    They are its neighbours at strides that halve from an eighth of a turn, down to single indices or to where rounding
    hides the differences.
    """
    finest = math.sqrt(jnp.finfo(dtype).eps) / 8
    strides, share = {(0,) * layer.num_axes}, 0.125
    while share >= finest:
        strides.add(tuple(math.ceil(share * n) for n in layer.grid))
        share /= 2
    free = [(-1, 0, 1) if degree else (0,) for degree in degrees(layer, kernel_shape)]
    steps = {tuple(np.multiply(stride, side)) for stride in strides for side in itertools.product(*free)}
    return np.array(sorted(steps, key=any), np.int32)


def _best_steps(layer: CircularConv, kernel_shape, exponents: np.ndarray, index, cells, filters):
    """From each row's frequency to the best in its cell, as differences of indices."""
    offsets = _offsets(layer, kernel_shape, filters.dtype)
    angles = 2 * np.pi * (offsets / layer.grid) @ exponents.T
    turns = np.einsum("pqs,snt->npqt", ROTATION, [np.cos(angles), np.sin(angles)])
    # No step, where another is better by no more than rounding.
    turns[0] *= 1 + 4 * float(jnp.finfo(filters.dtype).eps)
    values = jnp.sum(einsum("kgqt,npqt->kgnp", filters, jnp.asarray(turns, filters.dtype)) ** 2, axis=-1)
    allowed = _in_cells(index, cells, offsets)
    return picked(jnp.asarray(offsets), place_of_largest(jnp.where(allowed, values, 0), 2))


def _in_cells(index, cells: Int[Array, "rows axes 2"], offsets: np.ndarray):
    """Which offsets lead to a frequency in the row's cell."""
    lowest, highest = cells[:, None, :, 0], cells[:, None, :, 1]
    places = (index - lowest)[:, :, None] + jnp.asarray(offsets)[None, None]
    # A negative place is a large number without a sign.
    return jnp.all(places.astype(jnp.uint32) <= (highest - lowest)[:, :, None].astype(jnp.uint32), axis=-1)


def _everywhere(layer: CircularConv) -> np.ndarray:
    """A cell that no step from the half grid leaves (static)."""
    return np.array([[-n, 2 * n] for n in layer.grid], np.int32)
