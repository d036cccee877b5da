"""Where a symbol is largest over all its frequencies, without an SVD at each: branch and bound, guaranteed.

For a unit vector `x`, `||S(w) x||^2` is a trigonometric polynomial of degree `d_j` in the angle of axis `j`. With `U`
the supremum of all singular values, `arccos(||S(w) x|| / U)` therefore changes by at most `1/2 sum_j d_j |dw_j|`
(Bernstein, Szegoe). If the grid's maximum `L` is in a block of frequencies, then at the block's centre, at most `phi`
away in that measure,

    sigma_max(S(centre)) >= L cos(phi) - sqrt(U^2 - L^2) sin(phi),    U <= L / prod_j cos(pi d_j / (2 n_j)),

the latter by M. Riesz. A block whose centre is below that cannot hold a frequency larger than the best one known: one
Cholesky factorization of its Gram matrix tells. The other blocks are split, down to single frequencies. How many are
looked at depends on the taps and on how flat the spectrum is, not on the size of the image.
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
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int

from jaxsrn import _fourier
from jaxsrn._grams import (
    CHUNK,
    GramPolynomial,
    gram_polynomial,
    grams_at,
    is_reduced,
    is_transposed,
    symbol_at,
    waves_at,
    whole_grams,
    with_all_directions,
)
from jaxsrn._lanczos import default_tolerance, leading_singular_vectors, random_start
from jaxsrn._linalg import real_times, top_pairs, unit
from jaxsrn.operators import CircularConv

__all__ = [
    "are_below",
    "branch_and_bound",
    "branch_and_bound_pays",
    "finer_grids_are_free",
    "rounding",
    "squared_limit",
    "svds_are_dear",
]

# Blocks start at this phi: wider ones are discarded too rarely in a flat spectrum, narrower ones are too many.
_WIDEST = 0.6
_POWER_STEPS = 8
_NUM_CLIMBERS = 8
# The SVDs of so much work take as long as branch and bound at its least, each counted with its overhead.
_SVD_WORK, _SVD_OVERHEAD = 2e6, 400
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


# Blocks of frequencies (static)


class _Blocks(NamedTuple):
    """Boxes of indices of the half grid, from coarse to fine.

    Attributes:
      sizes: `(levels, axes)`; those of the last level are 1.
      corners: `(boxes, axes)`, of the coarsest ones.
      ends: `(axes,)`, how many indices there are.
      factors: `(levels,)`: a block with a frequency of value `L` has at least `L` times this at its centre.
    """

    sizes: np.ndarray
    corners: np.ndarray
    ends: np.ndarray
    factors: np.ndarray


def _blocks(op: CircularConv, kernel_shape: tuple[int, ...]) -> _Blocks:
    degrees, ends = np.array(_fourier.degrees(op, kernel_shape)), np.array(_fourier.half_grid(op))
    # Half the angle between neighbours in the measure of phi.
    rate = np.pi * degrees / (2 * np.array(op.grid))
    overshoot = _fourier.overshoot(op, kernel_shape)
    certified = math.isfinite(overshoot)
    excess = math.sqrt(overshoot**2 - 1) if certified else 0.0
    share = _WIDEST / max(1, np.count_nonzero(degrees))
    sizes = [np.ones_like(ends)]
    # Reduced Gram matrices belong to single frequencies.
    while certified and not is_reduced(op, kernel_shape):
        wider = np.where((sizes[0] < ends) & (rate * (2 * sizes[0] - 1) <= share), 2 * sizes[0], sizes[0])
        if np.all(wider == sizes[0]):
            break
        sizes.insert(0, wider)
    phi = np.sum(rate * (np.array(sizes) - 1), axis=-1)
    corners = np.array(list(itertools.product(*(range(0, e, s) for e, s in zip(ends, sizes[0], strict=True)))))
    if len(sizes) == 1:
        corners = _without_mirrored(corners, op.grid)
    return _Blocks(np.array(sizes), corners, ends, np.cos(phi) - excess * np.sin(phi))


def _without_mirrored(indices: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """One of each pair of opposite frequencies: at both ends of its last axis the half grid has them both."""

    def rank(indices):
        return np.ravel_multi_index(indices[:, ::-1].T, grid[::-1])

    return indices[rank(indices) <= rank(-indices % np.array(grid))]


# A good lower bound


class _Pair(NamedTuple):
    """A frequency, the group, unit vectors of its symbol, and their value."""

    index: Int[Array, " axes"]
    group: Int[Array, ""]
    left: Complex[Array, " rows"]
    right: Complex[Array, " columns"]
    value: Float[Array, ""]


def _estimates(poly: GramPolynomial, op: CircularConv, blocks: _Blocks, chunk: int):
    """At the centres of the coarsest blocks: power steps, and an upper bound of the largest singular value.

    Returns:
      `(values, right vectors)` of every block and group, and the upper bounds of every block.
    """
    count, columns = len(blocks.corners), poly.even.shape[-1]
    padded = np.resize(blocks.corners, (-count % chunk + count, op.num_axes))
    centres = _doubled_centres(padded, blocks.sizes[:1], blocks.ends).reshape((-1, chunk, op.num_axes))
    start = jnp.zeros((columns, 2), poly.even.dtype).at[:, 0].set(unit(random_start((columns,), poly.even.dtype)))

    def estimate(doubled):
        grams = grams_at(poly, op, doubled)
        # ||G||_F^2 is the sum of the fourth powers of the singular values.
        bounds = jnp.sqrt(jnp.max(jnp.linalg.norm(grams, axis=(-2, -1)), axis=-1) + poly.loss)
        vectors = jnp.broadcast_to(start, (*grams.shape[:-1], 2))
        for _ in range(_POWER_STEPS):
            # Real and imaginary parts side by side: the matrices are read once, and by faster products.
            even, odd = (_einsum("pgij,pgjc->pgic", part, vectors) for part in (grams.real, grams.imag))
            vectors = jnp.stack([even[..., 0] - odd[..., 1], even[..., 1] + odd[..., 0]], axis=-1)
            values = jnp.linalg.norm(vectors, axis=(-2, -1), keepdims=True)
            vectors = vectors / jnp.where(values == 0, 1, values)
        return values[..., 0, 0], lax.complex(vectors[..., 0], vectors[..., 1]), bounds

    values, vectors, bounds = lax.map(estimate, jnp.asarray(centres))
    values, vectors = (leaf.reshape((-1, *leaf.shape[2:]))[:count] for leaf in (values, vectors))
    return values, vectors, bounds.reshape(-1)[:count]


def _doubled_centres(corners, sizes, ends):
    """Twice the central index of boxes, the last ones cut off at the end of the grid."""
    return corners + (corners + sizes).clip(max=ends[None]) - 1


def _climb(poly: GramPolynomial, op: CircularConv, blocks: _Blocks, index, group, right) -> _Pair:
    """Uphill from one frequency: vectors fixed, the best frequency around; frequency fixed, power steps."""
    coefficients = poly.coefficients[group]
    around = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=op.num_axes)))
    grid, halvings = np.array(op.grid), int(np.max(blocks.sizes)).bit_length()

    def power(index, right):
        symbol = symbol_at(poly, op, index, coefficients)
        for _ in range(3):
            left = unit(_einsum("rc,c->r", symbol, right))
            right = unit(_einsum("rc,r->c", symbol.conj(), left))
        return left, right, jnp.linalg.norm(_einsum("rc,c->r", symbol, right))

    def step(k, pair: _Pair) -> _Pair:
        stride = jnp.maximum(jnp.asarray(blocks.sizes[:1]) // 2 ** (k + 1), 1)
        candidates = (pair.index[None] + around * stride) % grid[None]
        filters = _einsum("r,tr->t", pair.left.conj(), real_times("trc,c->tr", coefficients, pair.right))
        values = jnp.abs(_einsum("pt,t->p", waves_at(poly, op, 2 * candidates), filters))
        index = candidates[jnp.argmax(values)]
        return _Pair(index, group, *power(index, pair.right))

    return lax.fori_loop(0, halvings, step, _Pair(index, group, *power(index, right)))


def _best_climb(poly: GramPolynomial, op: CircularConv, blocks: _Blocks, values, vectors) -> _Pair:
    """The best frequency of the half grid that climbing reaches from the most promising blocks, with its pair."""
    _, chosen = lax.top_k(values.reshape(-1), min(_NUM_CLIMBERS if len(blocks.sizes) > 1 else 1, values.size))
    box, group = jnp.unravel_index(chosen.astype(int), values.shape)
    starts = jnp.asarray(_doubled_centres(blocks.corners, blocks.sizes[:1], blocks.ends) // 2)[box]
    rights = jax.vmap(functools.partial(with_all_directions, poly))(group, vectors[box, group])
    if len(blocks.sizes) == 1:
        # Every frequency was estimated: there is nowhere to climb to.
        return _polished(poly, op, starts[0], group[0], rights[0])
    pairs = jax.vmap(functools.partial(_climb, poly, op, blocks))(starts, group, rights)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(pairs.value)], pairs)
    mirrored = best.index[-1] >= blocks.ends[-1]
    index = jnp.where(mirrored, -best.index % np.array(op.grid), best.index)
    right = jnp.where(mirrored, best.right.conj(), best.right)
    return _polished(poly, op, index, best.group, right)


def _polished(poly: GramPolynomial, op: CircularConv, index, group, right) -> _Pair:
    """The leading pair of the symbol of one frequency and group, by Lanczos from a vector near it."""
    symbol = symbol_at(poly, op, index, poly.coefficients[group])

    def complex_of(x):
        return lax.complex(*jnp.split(x, 2))

    def real_of(z):
        return jnp.concatenate([z.real, z.imag])

    _, left, right, _ = leading_singular_vectors(
        lambda x: real_of(_einsum("rc,c->r", symbol, complex_of(x))),
        lambda y: real_of(_einsum("rc,r->c", symbol.conj(), complex_of(y))),
        real_of(right),
        2 * len(symbol),
        default_tolerance(poly.even.dtype),
    )
    left, right = unit(complex_of(left)), unit(complex_of(right))
    return _Pair(index, group, left, right, jnp.linalg.norm(_einsum("rc,c->r", symbol, right)))


# The proof that nothing is larger


class _Proof(NamedTuple):
    """Boxes still to look at (a stack, the finest on top), and the best pair so far."""

    corners: Int[Array, "capacity axes"]
    levels: Int[Array, " capacity"]
    size: Int[Array, ""]
    best: _Pair


def rounding(rows: int, dtype) -> float:
    """What a singular value may be off by, relatively: from the Gram matrix and its factorization."""
    return 2 * math.sqrt(rows) * float(jnp.finfo(dtype).eps)


def svds_are_dear(count: int, shape: tuple[int, int]) -> bool:
    """Whether SVDs of so many matrices take longer than proofs that none has a larger singular value; static."""
    return min(shape) > 1 and count * (min(shape) ** 3 + _SVD_OVERHEAD) > _SVD_WORK


def branch_and_bound_pays(kernel_shape: tuple[int, ...], op: CircularConv) -> bool:
    """Whether an SVD at every site would take longer; static."""
    sites = math.prod(_fourier.half_grid(op)) * op.feature_group_count
    return svds_are_dear(sites, _fourier.site_shape(op, kernel_shape))


def finer_grids_are_free(kernel_shape: tuple[int, ...], op: CircularConv) -> bool:
    """Whether branch and bound, by blocks of frequencies, takes as long on a larger image; static."""
    return branch_and_bound_pays(kernel_shape, op) and not is_reduced(op, kernel_shape)


def branch_and_bound(kernel: Float[Array, "..."], op: CircularConv, excess: float = 0.0):
    """The largest singular value of the whole grid, up to a relative `2 sqrt(channels) eps`, with its vectors.

    With `excess` a singular value that no other one exceeds by more than that share. The kernel's scale must not be
    extreme.

    Returns:
      `(site, u, v)`, unit vectors with `u^H S v` that value.
    """
    poly = gram_polynomial(kernel, op)
    blocks = _blocks(op, kernel.shape)
    chunk = int(np.clip(CHUNK // math.prod(poly.even.shape[1:]), 4, 512))
    values, vectors, bounds = _estimates(poly, op, blocks, chunk)
    best = _best_climb(poly, op, blocks, values, vectors)
    # Of each level at most one chunk's children wait at a time, as the finest are taken first.
    capacity = len(blocks.corners) + (len(blocks.sizes) * 2**op.num_axes + 1) * chunk
    stack = jnp.zeros((capacity, op.num_axes), best.index.dtype), jnp.zeros(capacity, jnp.int32), jnp.asarray(0)
    high = ~(bounds <= (1 + excess) * best.value * float(blocks.factors[0]))
    proof = _push(_Proof(*stack, best), blocks.corners, jnp.zeros(len(bounds), jnp.int32), high)
    step = functools.partial(_look, poly, op, blocks, chunk, excess)
    # Zero and NaN need no proof.
    best = lax.while_loop(lambda proof: (proof.size > 0) & (proof.best.value > 0), step, proof).best
    site = _fourier.site_at(op, best.index, best.group)
    swap = is_transposed(op, kernel.shape)
    return site, *((best.right.conj(), best.left.conj()) if swap else (best.left, best.right))


def _push(proof: _Proof, corners, levels, keep: Bool[Array, " boxes"]) -> _Proof:
    """Puts the boxes to keep on the stack, in their order."""
    place = jnp.where(keep, proof.size + jnp.cumsum(keep) - 1, len(proof.levels))
    return proof._replace(
        corners=proof.corners.at[place].set(corners, mode="drop"),
        levels=proof.levels.at[place].set(levels, mode="drop"),
        size=proof.size + jnp.sum(keep),
    )


def _look(poly: GramPolynomial, op: CircularConv, blocks: _Blocks, chunk: int, excess: float, proof: _Proof) -> _Proof:
    """Takes boxes from the stack, discards those proven to be low, and puts back the parts of the others."""
    bottom = jnp.maximum(proof.size - chunk, 0)
    corners = lax.dynamic_slice_in_dim(proof.corners, bottom, chunk)
    levels = lax.dynamic_slice_in_dim(proof.levels, bottom, chunk)
    waiting = bottom + jnp.arange(chunk) < proof.size
    high = waiting & ~_are_low(poly, op, blocks, corners, levels, (1 + excess) * proof.best.value)
    single = levels == len(blocks.sizes) - 1
    best = _largest_of(poly, op, excess, corners, high & single, proof.best)
    parts, is_part = _split(blocks, corners, levels)
    keep = (is_part & (high & ~single)[:, None]).reshape(-1)
    # The chunk's order is kept, so the finest stay on top.
    proof = proof._replace(size=bottom, best=best)
    return _push(proof, parts.reshape((-1, op.num_axes)), jnp.repeat(levels + 1, parts.shape[1]), keep)


def _are_low(poly: GramPolynomial, op: CircularConv, blocks: _Blocks, corners, levels, limit) -> Bool[Array, " boxes"]:
    """Whether boxes are proven to hold nothing above the limit, up to rounding."""
    sizes, factors = jnp.asarray(blocks.sizes)[levels], jnp.asarray(blocks.factors, poly.even.dtype)[levels]
    limits = jnp.where(factors > 0, limit * factors, 0)
    grams = grams_at(poly, op, _doubled_centres(corners, sizes, blocks.ends))
    return are_below(grams, squared_limit(poly.coefficients.shape[-2], limits) - poly.loss)


def squared_limit(rows: int, limits: Float[Array, "..."]) -> Float[Array, "..."]:
    """The squares of limits of singular values, with room for rounding."""
    # Half of it in terms of the singular value.
    return limits**2 * (1 + 2 * rounding(rows, limits.dtype))


def are_below(grams: Inexact[Array, "points groups n n"], levels: Float[Array, " points"]) -> Bool[Array, " points"]:
    """Whether all eigenvalues are below the levels: the differences have Cholesky factors."""
    scaled = grams / jnp.where(levels > 0, levels, 1)[:, None, None, None].astype(grams.dtype)
    identity = jnp.eye(grams.shape[-1], dtype=grams.dtype)[None, None]
    factor = lax.linalg.cholesky(identity - scaled, symmetrize_input=False)
    definite = jnp.all(jnp.isfinite(jnp.diagonal(factor, axis1=-2, axis2=-1).real), axis=(-2, -1))
    return definite & (levels > 0)


def _largest_of(
    poly: GramPolynomial, op: CircularConv, excess: float, indices, among: Bool[Array, " chunk"], known: _Pair
) -> _Pair:
    """The largest of the known pair and those at single frequencies, one after the other: they are few."""

    def examine(index, known: _Pair) -> _Pair:
        values, left, right = top_pairs(symbol_at(poly, op, index, poly.coefficients))
        group = jnp.argmax(values).astype(known.group.dtype)
        found = _Pair(index, group, left[group], right[group], values[group])
        larger = found.value > known.value
        return jax.tree.map(lambda a, b: jnp.where(larger, a, b), found, known)

    def step(state):
        among, known = state
        k = jnp.argmax(among)
        # A reduced Gram matrix says little, and what has been found since may be higher.
        level = squared_limit(poly.coefficients.shape[-2], (1 + excess) * known.value)
        low = are_below(whole_grams(poly, op, indices[k])[None], level[None])[0]
        return among.at[k].set(False), lax.cond(low, lambda: known, lambda: examine(indices[k], known))

    return lax.while_loop(lambda state: jnp.any(state[0]), step, (among, known))[1]


def _split(blocks: _Blocks, corners, levels):
    """The boxes of the next level in each box, `(boxes, parts, axes)`, and which of them there are."""
    sizes = jnp.asarray(blocks.sizes)
    own, next_ = sizes[levels], sizes[jnp.minimum(levels + 1, len(sizes) - 1)]
    halves = np.array(list(itertools.product((0, 1), repeat=corners.shape[-1])))
    parts = corners[:, None] + halves[None] * next_[:, None]
    exists = (parts < blocks.ends[None, None]) & ((halves == 0)[None] | (own > next_)[:, None])
    return parts, jnp.all(exists, axis=-1)
