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
from jaxtyping import Array, Complex, Float, Int

from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import einsum, real_times, unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import Boxes, doubled_centres
from jaxsrn.spectra.circular.grams import (
    CHUNK,
    GramPolynomial,
    grams_at,
    is_transposed,
    symbol_at,
    waves_at,
    with_all_directions,
)
from jaxsrn.spectra.circular.sites import site_at
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "NUM_CLIMBERS",
    "Estimates",
    "Peak",
    "at_site",
    "best_climb",
    "chunk_of",
    "climbs",
    "estimates",
    "most_promising",
]

# An estimate takes so many power steps. A wrong one costs a worse place to climb from, and never the proof.
_POWER_STEPS = 8
# Power steps that let the vectors follow a frequency, at every step of a climb.
_FOLLOWING_STEPS = 3
# So many climbers start from the largest estimates: more of them find the highest peak more often, at a price each.
NUM_CLIMBERS = 8


class Peak(NamedTuple):
    """A frequency, a group, two unit vectors of its symbol, and their value.

    The symbol may be transposed (`grams.py`), so that the vectors are named by its rows and columns.
    """

    index: Int[Array, " axes"]
    group: Int[Array, ""]
    row: Complex[Array, " rows"]
    column: Complex[Array, " columns"]
    value: Float[Array, ""]


def chunk_of(poly: GramPolynomial) -> int:
    """The number of frequencies that are worked on at a time."""
    return int(np.clip(CHUNK // math.prod(poly.even.shape[1:]), 4, 512))


class Estimates(NamedTuple):
    """Values and column vectors of every group at the centres of the coarsest boxes, and upper bounds there.

    The bounds are of the largest singular value of all groups.
    """

    values: Float[Array, "boxes groups"]
    vectors: Complex[Array, "boxes groups kept"]
    bounds: Float[Array, " boxes"]


def estimates(poly: GramPolynomial, op: CircularConv, boxes: Boxes) -> Estimates:
    """The estimates, by power steps from one start, and the upper bounds, by Frobenius norms of the Gram matrices."""
    chunk = chunk_of(poly)
    count, columns = len(boxes.corners), poly.even.shape[-1]
    padded = np.resize(boxes.corners, (-count % chunk + count, op.num_axes))
    centres = doubled_centres(padded, boxes.sizes[:1], boxes.ends).reshape((-1, chunk, op.num_axes))
    start = jnp.zeros((columns, 2), poly.even.dtype).at[:, 0].set(unit(random_start((columns,), poly.even.dtype)))

    def estimate(doubled):
        grams = grams_at(poly, op, doubled)
        # ||G||_F^2 is the sum of the fourth powers of the singular values.
        bounds = jnp.sqrt(jnp.max(jnp.linalg.norm(grams, axis=(-2, -1)), axis=-1) + poly.loss)
        parts = grams.real, grams.imag

        def power(_, state):
            # Real and imaginary parts stand side by side, so that each matrix is read once, by faster products.
            even, odd = (einsum("pgij,pgjc->pgic", part, state[1]) for part in parts)
            vectors = jnp.stack([even[..., 0] - odd[..., 1], even[..., 1] + odd[..., 0]], axis=-1)
            values = jnp.linalg.norm(vectors, axis=(-2, -1))
            return values, vectors / jnp.where(values == 0, 1, values)[..., None, None]

        nothing = jnp.zeros(grams.shape[:2], bounds.dtype), jnp.broadcast_to(start, (*grams.shape[:-1], 2))
        values, vectors = lax.fori_loop(0, _POWER_STEPS, power, nothing)
        return values, lax.complex(vectors[..., 0], vectors[..., 1]), bounds

    values, vectors, bounds = lax.map(estimate, jnp.asarray(centres))
    values, vectors = (leaf.reshape((-1, *leaf.shape[2:]))[:count] for leaf in (values, vectors))
    return Estimates(values, vectors, bounds.reshape(-1)[:count])


def _uphill(poly: GramPolynomial, op: CircularConv, boxes: Boxes, index, group, column) -> Peak:
    """Where climbing leads from one frequency: the steps over frequencies halve from half a box to one index."""
    # A static index of the only group spares each climber a copy of the coefficients.
    coefficients = poly.coefficients[group if len(poly.coefficients) > 1 else 0]
    # Two neighbours on each side reach over small dips.
    around = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=op.num_axes)))
    grid, halvings = np.array(op.grid), int(np.max(boxes.sizes)).bit_length()

    def step(k, peak: Peak) -> Peak:
        # The first step stays at its frequency: there the row is yet to be found.
        stride = jnp.where(k == 0, 0, jnp.maximum(jnp.asarray(boxes.sizes[:1]) // 2**k, 1))
        candidates = (peak.index[None] + around * stride) % grid[None]
        filters = einsum("r,tr->t", peak.row.conj(), real_times("trc,c->tr", coefficients, peak.column))
        values = jnp.abs(einsum("pt,t->p", waves_at(poly, op, 2 * candidates), filters))
        index = candidates[jnp.argmax(values)]
        symbol = symbol_at(poly, op, index, coefficients)

        def power(_, sides):
            row = unit(einsum("rc,c->r", symbol, sides[1]))
            return row, unit(einsum("rc,r->c", symbol.conj(), row))

        row, column = lax.fori_loop(0, _FOLLOWING_STEPS, power, (peak.row, peak.column))
        return Peak(index, group, row, column, jnp.linalg.norm(einsum("rc,c->r", symbol, column)))

    nothing = jnp.zeros(poly.coefficients.shape[-2], column.dtype)
    start = Peak(index, group, nothing, column, jnp.zeros((), poly.even.dtype))
    return lax.fori_loop(0, halvings + 1, step, start)


def climbs(poly: GramPolynomial, op: CircularConv, boxes: Boxes, known: Estimates, chosen) -> Peak:
    """Where climbing leads from the chosen estimates: a stack of peaks at frequencies of the half grid."""
    box, group = jnp.unravel_index(chosen.astype(int), known.values.shape)
    starts = jnp.asarray(doubled_centres(boxes.corners, boxes.sizes[:1], boxes.ends) // 2)[box]
    if len(boxes.sizes) > 1:
        own, own_box = _own_opposites(op, boxes)
        starts = jnp.concatenate([starts, own.astype(starts.dtype)])
        group = jnp.concatenate([group, jnp.argmax(known.values[own_box], axis=-1)])
        box = jnp.concatenate([box, own_box])
    columns = jax.vmap(functools.partial(with_all_directions, poly))(group, known.vectors[box, group])
    peaks = jax.vmap(functools.partial(_uphill, poly, op, boxes))(starts, group, columns)
    mirrored = (peaks.index[:, -1] >= boxes.ends[-1])[:, None]
    index = jnp.where(mirrored, -peaks.index % np.array(op.grid)[None], peaks.index)
    row, column = (jnp.where(mirrored, side.conj(), side) for side in (peaks.row, peaks.column))
    return peaks._replace(index=index, row=row, column=column)


def most_promising(known: Estimates, count: int) -> Int[Array, " chosen"]:
    """The flat indices of the largest estimates."""
    return lax.top_k(known.values.reshape(-1), min(count, known.values.size))[1]


def _own_opposites(op: CircularConv, boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies that are their own opposites, or nearly so, and their coarsest boxes (static).

    A real kernel has the same singular values at opposite frequencies. They are therefore stationary at these
    frequencies, and often highest.
    """
    indices = np.array(list(itertools.product(*((0, n // 2) if n > 1 else (0,) for n in op.grid))))
    shape = -(-boxes.ends // boxes.sizes[0])
    return indices, np.ravel_multi_index((indices // boxes.sizes[0]).T, shape)


def best_climb(poly: GramPolynomial, op: CircularConv, boxes: Boxes, known: Estimates) -> Peak:
    """The best frequency of the half grid that climbing reaches from the most promising boxes, and its leading pair."""
    # There is nowhere to climb to where every frequency was estimated.
    chosen = most_promising(known, NUM_CLIMBERS if len(boxes.sizes) > 1 else 1)
    peaks = climbs(poly, op, boxes, known, chosen)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(peaks.value)], peaks)
    return _polished(poly, op, best.index, best.group, best.column)


def _polished(poly: GramPolynomial, op: CircularConv, index, group, column) -> Peak:
    """The leading pair of the symbol at one frequency and group, by the Lanczos method from a vector near it."""
    symbol = symbol_at(poly, op, index, poly.coefficients[group])

    def complex_of(x):
        return lax.complex(*jnp.split(x, 2))

    def real_of(z):
        return jnp.concatenate([z.real, z.imag])

    found = leading_singular_vectors(
        lambda x: real_of(einsum("rc,c->r", symbol, complex_of(x))),
        lambda y: real_of(einsum("rc,r->c", symbol.conj(), complex_of(y))),
        real_of(column),
        2 * len(symbol),
        vector_tolerance(poly.even.dtype),
    )
    row, column = unit(complex_of(found.output)), unit(complex_of(found.input))
    return Peak(index, group, row, column, jnp.linalg.norm(einsum("rc,c->r", symbol, column)))


def at_site(peak: Peak, op: CircularConv, kernel_shape: tuple[int, ...]) -> Pair:
    """The peak as a pair; the rows of a transposed symbol are its outputs, and the columns its inputs."""
    sides = (peak.column.conj(), peak.row.conj()) if is_transposed(op, kernel_shape) else (peak.row, peak.column)
    return Pair(site_at(op, peak.index, peak.group), *sides)
