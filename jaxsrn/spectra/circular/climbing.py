"""Climbing: frequencies where the symbol is large, found from estimates at the centres of boxes, without a proof.

Power steps estimate the largest singular value at the centre of each of the coarsest boxes. Climbing starts at the
largest estimates and alternates between two maximisations of `|u^H S(w) v|`: over `w` near the current frequency, with
`u` and `v` fixed, and over `u` and `v` by power steps, with `w` fixed. It ends at a **peak**: a frequency whose largest
singular value is a local maximum, with its pair. Power iteration of the whole layer (Ryu et al. 2019) works on images;
each step here works on one small matrix. `branch_and_bound.py` adds the proof.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.linalg import einsum, real_times
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.angles import waves
from jaxsrn.spectra.circular.boxes import Grid, centres, on_half_grid
from jaxsrn.spectra.circular.fourier import site_shape
from jaxsrn.spectra.circular.grams import CHUNK, GramPolynomial, grams_at, with_all_directions
from jaxsrn.spectra.circular.sites import stands_for_torus

__all__ = [
    "Estimates",
    "Peak",
    "best_frequency",
    "chunk_of",
    "climbs",
    "climbs_from",
    "estimates",
    "filter_of",
    "most_promising",
    "num_climbers",
]

# The number of power steps of an estimate. A wrong one costs a worse place to climb from, and never the proof
# (`python benchmarks/ablations.py`).
_POWER_STEPS = 8
# Power steps that let the vectors follow a frequency, at every step of a climb.
_FOLLOWING_STEPS = 3
# A guard of the loop over the steps of a climb.
_MOST_STEPS = 100
# The number of climbers, which start from the largest estimates: on the grid of an image, and the most on the torus.
# More of them find the highest peak more often, at a price each. Where they miss it, branch and bound goes on from a
# lower value, so that few are enough for a norm: with four on the torus that of a trained ResNet-50's stem takes 0.85
# times as long (`python benchmarks/ablations.py`). But searches with zero padding start from several peaks of the
# torus, and steepest descent takes the highest one without a proof. Of many channels a climber is dear, and branch and
# bound climbs itself.
_CLIMBERS, _MOST_CLIMBERS = 4, 16
_CLIMBERS_TIMES_ENTRIES = 2**18


class Peak(NamedTuple):
    """A frequency, a group, two unit vectors of its symbol, and their value.

    The symbol may be transposed (`grams.py`), so that the vectors are named by its rows and columns.
    """

    index: Int[Array, "... axes"]
    group: Int[Array, "..."]
    row: Complex[Array, "... rows"]
    column: Complex[Array, "... columns"]
    value: Float[Array, "..."]


def chunk_of(poly: GramPolynomial) -> int:
    """The number of frequencies that are worked on at a time."""
    return int(np.clip(CHUNK // math.prod(poly.even.shape[1:]), 4, 512))


def num_climbers(op: CircularConv, kernel_shape: tuple[int, ...]) -> int:
    """How many climbers start from the largest estimates (static)."""
    if not stands_for_torus(op):
        return _CLIMBERS
    entries = math.prod(site_shape(op, kernel_shape))
    return int(np.clip(_CLIMBERS_TIMES_ENTRIES // entries, _CLIMBERS, _MOST_CLIMBERS))


class Estimates(NamedTuple):
    """Frequencies with estimates of the largest singular value of every group there, and column vectors.

    The first frequencies are the centres of the coarsest boxes. The last `own_opposites` are those that are their own
    opposites, or nearly so: a real kernel has the same singular values at opposite frequencies, so that they are
    stationary there, and often highest. Where a kernel is reduced, every frequency is the centre of a box.
    """

    index: Int[Array, "points axes"]
    values: Float[Array, "points groups"]
    vectors: Complex[Array, "points groups kept"]
    own_opposites: int


def estimates(poly: GramPolynomial, grid: Grid, corners, exists: Bool[Array, " boxes"]) -> Estimates:
    """The estimates, by power steps from one start; they are 0 for boxes that do not exist."""
    chunk = chunk_of(poly)
    axes = corners.shape[-1]
    doubled = centres(corners, jnp.asarray(grid.sizes - 1)[None])
    own_opposites = 2**axes if poly.basis is None else 0
    if own_opposites:
        ends = np.array(list(itertools.product((0, 1), repeat=axes)), np.int32)
        doubled = jnp.concatenate([doubled, 2 * ends * jnp.right_shift(grid.samples, 1)[None]])
        exists = jnp.concatenate([exists, jnp.ones(own_opposites, bool)])
    columns, dtype = poly.even.shape[-1], poly.even.dtype
    start = jnp.stack([fixed_start((columns,), dtype), jnp.zeros(columns, dtype)], axis=-1)

    def estimate(doubled):
        grams = grams_at(poly, grid.angles, doubled)
        parts = grams.real, grams.imag

        def power(_, state):
            # Real and imaginary parts stand side by side, so that each matrix is read once, by faster products.
            even, odd = (einsum("pgij,pgjc->pgic", part, state[1]) for part in parts)
            vectors = jnp.stack([even[..., 0] - odd[..., 1], even[..., 1] + odd[..., 0]], axis=-1)
            values = jnp.sum(vectors**2, axis=(-2, -1))
            return values, vectors * _inverse_root(values)[..., None, None]

        nothing = jnp.zeros(grams.shape[:2], dtype), jnp.broadcast_to(start, (*grams.shape[:-1], 2))
        return lax.fori_loop(0, _POWER_STEPS, power, nothing)

    padded = jnp.pad(doubled, ((0, -len(doubled) % chunk), (0, 0))).reshape((-1, chunk, axes))
    values, vectors = (leaf.reshape((-1, *leaf.shape[2:]))[: len(doubled)] for leaf in lax.map(estimate, padded))
    values = jnp.where(exists[:, None], values, 0)
    return Estimates(jnp.right_shift(doubled, 1), values, lax.complex(vectors[..., 0], vectors[..., 1]), own_opposites)


def _inverse_root(squared: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / sqrt(squared)`, and a finite number for 0."""
    return lax.rsqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny))


def _normalised(vector: Complex[Array, " n"]) -> tuple[Complex[Array, " n"], Float[Array, ""]]:
    """The vector with norm 1, and 0 for 0; and the square of its norm."""
    squared = jnp.sum(vector.real**2 + vector.imag**2)
    return vector * _inverse_root(squared).astype(vector.dtype), squared


def most_promising(known: Estimates, count: int) -> Int[Array, " chosen"]:
    """The places of the largest estimates, and of the frequencies that are their own opposites."""
    points, groups = known.values.shape
    largest = lax.top_k(known.values.reshape(-1), min(count, known.values.size))[1]
    own = np.arange(points - known.own_opposites, points, dtype=np.int32)
    own_groups = place_of_largest(known.values[points - known.own_opposites :], 1)
    return jnp.concatenate([largest, own_groups + groups * own])


def climbs(poly: GramPolynomial, grid: Grid, known: Estimates, chosen: Int[Array, " k"]) -> Peak:
    """Where climbing leads from the estimates at the chosen places: a stack of peaks on the half grid."""
    groups = np.int32(known.values.shape[-1])
    point, group = lax.div(chosen, groups), lax.rem(chosen, groups)
    columns = picked(known.vectors.reshape((-1, known.vectors.shape[-1])), chosen)
    columns = jax.vmap(functools.partial(with_all_directions, poly))(group, columns)
    return climbs_from(poly, grid, picked(known.index, point), group, columns)


# A subroutine, as branch and bound climbs on from what it finds.
@program
def climbs_from(poly: GramPolynomial, grid: Grid, index, group: Int[Array, " k"], columns) -> Peak:
    """Where climbing leads from frequencies `(k, axes)`, groups and vectors of the columns: a stack of peaks."""
    peaks = jax.vmap(functools.partial(_uphill, poly, grid))(index, group, columns)
    index, mirrored = on_half_grid(grid, peaks.index)
    row, column = (jnp.where(mirrored, side.conj(), side) for side in (peaks.row, peaks.column))
    return peaks._replace(index=index, row=row, column=column)


class _Climb(NamedTuple):
    """A climb: where it is, the products of all terms' transposes with its row, the next steps, how many were taken."""

    peak: Peak
    returned: Complex[Array, "terms columns"]
    stride: Int[Array, " axes"]
    count: Int[Array, ""]


def _uphill(poly: GramPolynomial, grid: Grid, index, group, column) -> Peak:
    """Where climbing leads from one frequency.

    The steps over frequencies start at half a box, and halve wherever the frequency stays, until they are finer than
    rounding tells apart.
    """
    coefficients = picked(poly.coefficients, group)
    # Products with the transpose read it as it lies in memory.
    transposed = coefficients.mT

    def step(state: _Climb) -> _Climb:
        peak, returned, stride, count = state
        filters = einsum("tc,c->t", returned.conj(), peak.column)
        index, own, next_stride = _better_frequency(grid.angles, poly.exponents, filters, peak.index, stride)

        def power(_, sides):
            _, _, column, _ = sides
            # All climbers multiply the same coefficients at once, where each would have to read a symbol of its own.
            row, _ = _normalised(einsum("t,tr->r", own, real_times("trc,c->tr", coefficients, column)))
            returned = real_times("tcr,r->tc", transposed, row)
            column, squared = _normalised(einsum("t,tc->c", own.conj(), returned))
            return returned, row, column, squared

        sides = returned, peak.row, peak.column, peak.value
        returned, row, column, squared = lax.fori_loop(0, _FOLLOWING_STEPS, power, sides)
        # The first step stays where it is, as the row is yet to be found.
        next_stride = jnp.where(count == 0, jnp.right_shift(grid.sizes, 1), next_stride)
        return _Climb(Peak(index, group, row, column, jnp.sqrt(squared)), returned, next_stride, count + 1)

    def unfinished(state: _Climb):
        return (state.count == 0) | (jnp.any(state.stride > grid.finest) & (state.count < _MOST_STEPS))

    terms, rows, columns = coefficients.shape
    start = Peak(index, group, jnp.zeros(rows, column.dtype), column, jnp.zeros((), poly.even.dtype))
    returned = jnp.zeros((terms, columns), column.dtype)
    begin = _Climb(start, returned, jnp.zeros_like(index), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, step, begin).peak


def filter_of(coefficients: Float[Array, "terms rows columns"], row, column) -> Complex[Array, " terms"]:
    """The scalar filter `u^H C_t v`, whose value at a frequency is `u^H S(w) v`."""
    return einsum("r,tr->t", row.conj(), real_times("trc,c->tr", coefficients, column))


def best_frequency(angles, exponents: np.ndarray, filters: Complex[Array, " terms"], index, stride, num_steps: int):
    """Where a scalar filter leads uphill in `num_steps` steps, from a frequency and with a first stride."""

    def step(_, state):
        return _better_frequency(angles, exponents, filters, *state)[::2]

    return lax.fori_loop(0, num_steps, step, (index, stride))[0]


def _better_frequency(angles, exponents: np.ndarray, filters: Complex[Array, " terms"], index, stride):
    """Where a scalar filter is largest, among a frequency and its neighbours some strides away.

    Returns:
      `(index, waves, stride)`: the frequency, `exp(-i <w, t>)` there, and the next stride, which is half as long where
      the frequency stays.
    """
    # Two neighbours on each side reach over small dips; the frequency itself comes first.
    around = np.array(sorted(itertools.product((-2, -1, 0, 1, 2), repeat=index.size), key=any), np.int32)
    candidates = index[None] + around * stride[None]
    factors = waves(angles, 2 * candidates, exponents)
    best = place_of_largest(jnp.abs(einsum("pt,t->p", factors, filters)))
    return *picked((candidates, factors), best), jnp.right_shift(jnp.where(best == 0, stride, 2 * stride), 1)
