"""Branch and bound: the largest singular value of a symbol over its grid, guaranteed, without an SVD at each frequency.

For a unit vector `x`, `||S(w) x||^2` is a trigonometric polynomial of degree `d_j` in the angle of axis `j`. Let `U` be
the supremum of all singular values. By the inequality of Bernstein and Szegoe `arccos(||S(w) x|| / U)` then changes by
at most `1/2 sum_j d_j |dw_j|`. If the grid's maximum `L` is in a box of frequencies, the box's centre is at most `phi`
away from it in that measure, so that

    sigma_max(S(centre)) >= L cos(phi) - sqrt(U^2 - L^2) sin(phi),    U <= L / prod_j cos(pi d_j / (2 n_j)).

The bound of `U` is `grid_certificate.py`. A box whose centre is below the first bound for the best value known cannot
hold a larger one, and one Cholesky factorization of the centre's Gram matrix proves that. The other boxes are split,
down to single frequencies. How many are looked at depends on the taps and on how flat the spectrum is, not on the size
of the image. SVDs at all frequencies (Sedghi, Gupta, Long 2019) give the same number at a cost that does.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.linalg import top_pairs
from jaxsrn._tools.proofs import are_below, squared_limit
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import Boxes, boxes_of, doubled_centres
from jaxsrn.spectra.circular.climbing import Estimates, Peak, at_site, best_climb, chunk_of, estimates
from jaxsrn.spectra.circular.grams import GramPolynomial, gram_polynomial, grams_at, symbol_at, whole_grams
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "branch_and_bound",
    "highest_peak",
]


class _Proof(NamedTuple):
    """A stack of boxes still to look at, with the finest on top, and the best pair so far."""

    corners: Int[Array, "capacity axes"]
    levels: Int[Array, " capacity"]
    size: Int[Array, ""]
    best: Peak


def branch_and_bound(kernel: Float[Array, "..."], op: CircularConv, allowed: float = 0.0) -> Pair:
    """The pair of the largest singular value of the whole grid, up to a relative `2 sqrt(channels) eps`.

    With `allowed` no other singular value exceeds that of the pair by more than this share. The kernel's scale must not
    be extreme (`pair.rescaled`).
    """
    poly, boxes = gram_polynomial(kernel, op), boxes_of(op, kernel.shape)
    return at_site(highest_peak(poly, op, boxes, estimates(poly, op, boxes), allowed), op, kernel.shape)


def highest_peak(poly: GramPolynomial, op: CircularConv, boxes: Boxes, known: Estimates, allowed: float) -> Peak:
    """The highest peak of the grid: the best that climbing finds, and the proof that nothing is larger by `allowed`."""
    best, chunk = best_climb(poly, op, boxes, known), chunk_of(poly)
    # At most one chunk's children wait on each level at a time, as the finest boxes are taken first.
    capacity = len(boxes.corners) + (len(boxes.sizes) * 2**op.num_axes + 1) * chunk
    stack = jnp.zeros((capacity, op.num_axes), best.index.dtype), jnp.zeros(capacity, jnp.int32), jnp.asarray(0)
    high = ~(known.bounds <= (1 + allowed) * best.value * float(boxes.factors[0]))
    proof = _push(_Proof(*stack, best), boxes.corners, jnp.zeros(len(high), jnp.int32), high)
    step = functools.partial(_look, poly, op, boxes, chunk, allowed)
    # Zero and NaN need no proof.
    return lax.while_loop(lambda proof: (proof.size > 0) & (proof.best.value > 0), step, proof).best


def _push(proof: _Proof, corners, levels, keep: Bool[Array, " boxes"]) -> _Proof:
    """Puts the boxes that are to be kept on the stack, in their order."""
    place = jnp.where(keep, proof.size + jnp.cumsum(keep) - 1, len(proof.levels))
    return proof._replace(
        corners=proof.corners.at[place].set(corners, mode="drop"),
        levels=proof.levels.at[place].set(levels, mode="drop"),
        size=proof.size + jnp.sum(keep),
    )


def _look(poly: GramPolynomial, op: CircularConv, boxes: Boxes, chunk: int, allowed: float, proof: _Proof) -> _Proof:
    """Takes a chunk of boxes from the stack, discards those proven low, and puts back the parts of the others."""
    bottom = jnp.maximum(proof.size - chunk, 0)
    corners = lax.dynamic_slice_in_dim(proof.corners, bottom, chunk)
    levels = lax.dynamic_slice_in_dim(proof.levels, bottom, chunk)
    waiting = bottom + jnp.arange(chunk) < proof.size
    high = waiting & ~_are_low(poly, op, boxes, corners, levels, (1 + allowed) * proof.best.value)
    single = levels == len(boxes.sizes) - 1
    best = _largest_of(poly, op, allowed, corners, high & single, proof.best)
    parts, is_part = _split(boxes, corners, levels)
    keep = (is_part & (high & ~single)[:, None]).reshape(-1)
    # The chunk's order is kept, so the finest stay on top.
    proof = proof._replace(size=bottom, best=best)
    return _push(proof, parts.reshape((-1, op.num_axes)), jnp.repeat(levels + 1, parts.shape[1]), keep)


def _are_low(poly: GramPolynomial, op: CircularConv, boxes: Boxes, corners, levels, limit) -> Bool[Array, " boxes"]:
    """Whether each box is proven to hold nothing above the limit, up to rounding."""
    sizes, factors = jnp.asarray(boxes.sizes)[levels], jnp.asarray(boxes.factors, poly.even.dtype)[levels]
    limits = jnp.where(factors > 0, limit * factors, 0)
    grams = grams_at(poly, op, doubled_centres(corners, sizes, boxes.ends))
    return are_below(grams, squared_limit(poly.coefficients.shape[-2], limits) - poly.loss)


def _largest_of(
    poly: GramPolynomial, op: CircularConv, allowed: float, indices, among: Bool[Array, " chunk"], known: Peak
) -> Peak:
    """The largest of the known pair and the pairs at single frequencies, which are looked at one after the other.

    They are few, as most frequencies were discarded in larger boxes.
    """

    def examine(index, known: Peak) -> Peak:
        values, rows, columns = top_pairs(symbol_at(poly, op, index, poly.coefficients))
        group = jnp.argmax(values).astype(known.group.dtype)
        found = Peak(index, group, rows[group], columns[group], values[group])
        larger = found.value > known.value
        return jax.tree.map(lambda a, b: jnp.where(larger, a, b), found, known)

    def step(state):
        among, known = state
        k = jnp.argmax(among)
        # The reduced Gram matrix proves little, and the best pair may have become larger since.
        level = squared_limit(poly.coefficients.shape[-2], (1 + allowed) * known.value)
        low = are_below(whole_grams(poly, op, indices[k])[None], level[None])[0]
        return among.at[k].set(False), lax.cond(low, lambda: known, lambda: examine(indices[k], known))

    return lax.while_loop(lambda state: jnp.any(state[0]), step, (among, known))[1]


def _split(boxes: Boxes, corners, levels):
    """The corners of the parts of each box on the next level, `(boxes, parts, axes)`, and which of them exist."""
    sizes = jnp.asarray(boxes.sizes)
    own, next_ = sizes[levels], sizes[jnp.minimum(levels + 1, len(sizes) - 1)]
    halves = np.array(list(itertools.product((0, 1), repeat=corners.shape[-1])))
    parts = corners[:, None] + halves[None] * next_[:, None]
    exists = (parts < boxes.ends[None, None]) & ((halves == 0)[None] | (own > next_)[:, None])
    return parts, jnp.all(exists, axis=-1)
