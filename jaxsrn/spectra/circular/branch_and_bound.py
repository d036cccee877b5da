"""Branch and bound: the largest singular value of a symbol over its grid, guaranteed, without an SVD at each frequency.

For a unit vector `x`, `||S(w) x||^2` is a trigonometric polynomial of degree `d_j` in the angle of axis `j`. Let `U` be
the supremum of all singular values. By the inequality of Bernstein and Szegoe `arccos(||S(w) x|| / U)` then changes by
at most `phi = 1/2 sum_j d_j |dw_j|`. If the grid's maximum `L` is in a box of frequencies, the box's centre is at most
`phi` away from it in that measure, so that

    sigma_max(S(centre)) >= L cos(phi) - sqrt(U^2 - L^2) sin(phi),    U <= L / prod_j cos(pi d_j / (2 n_j)).

The bound of `U` is the grid certificate (`grid_certificate.py`). A box (`boxes.py`) whose centre is below the first
bound for the best value known cannot hold a larger one, and one Cholesky factorization of the centre's Gram matrix
proves that. The other boxes are split, down to single frequencies. One that is higher than all known ones may lie on a
slope, where very many others are, so that the search climbs from it. How many boxes are looked at depends on the taps
and on how flat the spectrum is, not on the size of the image. SVDs at all frequencies (Sedghi, Gupta, Long 2019) give
the same number at a cost that does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxsrn._tools.indexing import chosen, picked, put
from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.proofs import are_below, squared_limit
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.spectra.circular.angles import waves
from jaxsrn.spectra.circular.boxes import Grid, centres, edges, on_half_grid, split
from jaxsrn.spectra.circular.climbing import Peak, best_frequency, chunk_of, filter_of
from jaxsrn.spectra.circular.fourier import of_group, symbol_of
from jaxsrn.spectra.circular.grams import GramPolynomial, grams_at, whole_grams
from jaxsrn.spectra.circular.real_floats import amplitudes_of, parts_of

__all__ = [
    "best_peak",
    "highest_peak",
]

# From so many columns an SVD takes longer than the Lanczos method and a proof.
_WIDE = 128
# The most levels of boxes on any grid: the finest grid has `2**24` frequencies per axis (`sites.py`).
_MOST_LEVELS = 25
# The proof starts from a value that is lower than the best that climbing finds by this share. The frequency of that
# value is then looked at first, and its pair computed to rounding.
_DOUBT = 1e-4
# The search for the best frequency of given vectors takes so many steps. The first are as long as half a box, and they
# halve wherever the frequency stays.
_MOVES = 40


class _Proof(NamedTuple):
    """A stack of boxes still to look at, with the finest on top, and the best pair so far.

    A box is its corner and its level. The best pair of a wide kernel is new until it is known to be at a peak, and that
    of any other kernel is `None`.
    """

    boxes: Int[Array, "capacity axes+1"]
    size: Int[Array, ""]
    best: Peak
    is_new: Bool[Array, ""] | None


def highest_peak(poly: GramPolynomial, grid: Grid, corners, exists, peaks: Peak, excess) -> Peak:
    """The highest peak of the grid, with the proof that nothing is larger by more than the share `excess`.

    Its pair is exact to rounding. `peaks` is what climbing found.
    """
    climbed = _best_of(poly, peaks)
    chunk, (count, axes) = chunk_of(poly), corners.shape
    # At most one chunk's halves wait on each level at a time, as the finest boxes are taken first.
    capacity = count + 1 + chunk * (_MOST_LEVELS * 2**axes + 1)
    nothing = jnp.zeros((capacity, axes + 1), jnp.int32), jnp.asarray(0, jnp.int32)
    proof = _Proof(*nothing, climbed, jnp.asarray(True) if _is_wide(poly) else None)
    levels = jnp.zeros((count, 1), jnp.int32)
    first = jnp.concatenate([climbed.index, jnp.broadcast_to(grid.last_level, (1,))])[None]
    boxes = jnp.concatenate([jnp.concatenate([corners, levels], axis=-1), first.astype(jnp.int32)])
    # A flat spectrum takes all of the excess, so that nothing at the frequency of the peak may be higher.
    flat = _is_flat(poly, excess, climbed.value)
    allowed = jnp.where(flat, 1.0, 1 + excess)
    proof = _push(proof, boxes, jnp.concatenate([exists & ~flat, np.ones(1, bool)]))

    def step(proof: _Proof) -> _Proof:
        return _look(poly, grid, chunk, allowed, proof if proof.is_new is None else _raised(poly, grid, proof))

    # NaN needs no proof. Climbing may end at 0 although the kernel is not 0, at right angles to all of it.
    return lax.while_loop(lambda proof: (proof.size > 0) & (proof.best.value >= 0), step, proof).best


def best_peak(poly: GramPolynomial, grid: Grid, peaks: Peak) -> Peak:
    """The best of a stack of peaks with a pair that is exact to rounding, without a proof that no other is higher."""
    best = _highest_of(peaks)
    if _is_wide(poly):
        return _polished(poly, grid, best)
    known = best._replace(value=jnp.full_like(best.value, -1))
    return _larger_of(_whole_symbol(poly, grid, best.index), best.index, known)


def _best_of(poly: GramPolynomial, peaks: Peak) -> Peak:
    """The best of a stack of peaks; of kernels that are not wide its value is too low, so that its pair is computed."""
    best = _highest_of(peaks)
    return best if _is_wide(poly) else best._replace(value=(1 - _DOUBT) * best.value)


def _highest_of(peaks: Peak) -> Peak:
    return picked(peaks, lax.argmax(peaks.value, 0, jnp.int32))


def _is_wide(poly: GramPolynomial) -> bool:
    return min(poly.coefficients.shape[-2:]) >= _WIDE


def _whole_symbol(poly: GramPolynomial, grid: Grid, index: Int[Array, " axes"]):
    """The symbol of every group at an index of the grid."""
    return symbol_of(waves(grid.angles, 2 * index, poly.exponents), poly.coefficients)


def _is_flat(poly: GramPolynomial, excess, value):
    """Whether no singular value exceeds the largest one at the peak's frequency by more than the share `excess`.

    The Gram matrices of two frequencies differ by at most twice the norms of all coefficients but the constant one.
    Of the flat spectrum of an orthogonal kernel, branch and bound would look at every frequency.
    """
    if poly.basis is not None:
        # A reduced polynomial says too little, and only a zero kernel is flat.
        return jnp.max(jnp.abs(poly.coefficients)) == 0
    # By Cauchy and Schwarz, the sum of the norms is at most the root of so many times the sum of their squares.
    count = max(len(poly.even) - 1, 1)
    return jnp.sum(jnp.maximum(poly.even**2, poly.odd**2)[1:]) <= (excess * value**2) ** 2 / count


def _push(proof: _Proof, boxes, keep) -> _Proof:
    """Puts the boxes that are to be kept on the stack, in their order."""
    order = jnp.cumsum(keep, dtype=jnp.int32)
    place = jnp.where(keep, proof.size + order - 1, len(proof.boxes))
    return proof._replace(boxes=put(proof.boxes, place, boxes), size=proof.size + order[-1])


def _look(poly: GramPolynomial, grid: Grid, chunk: int, allowed, proof: _Proof) -> _Proof:
    """Takes a chunk of boxes from the stack, discards those proven low, and puts back the halves of the others.

    A box is low if nothing in it exceeds the best value times `allowed`.
    """
    bottom = jnp.maximum(proof.size - chunk, 0)
    boxes = lax.dynamic_slice_in_dim(proof.boxes, bottom, chunk, allow_negative_indices=False)
    corners, levels = boxes[:, :-1], boxes[:, -1]
    places = jnp.arange(chunk, dtype=jnp.int32)
    low = _are_low(poly, grid, corners, levels, allowed * proof.best.value)
    high = ~low & (bottom + places < proof.size)
    single = high & (levels == grid.last_level)
    best = _examined(poly, grid, allowed, corners, single, proof.best)
    halves, exists = split(grid, corners, levels)
    keep = exists & (high & ~single)[:, None]
    below = jnp.minimum(levels + 1, grid.last_level)[:, None, None]
    halves = jnp.concatenate([halves, jnp.broadcast_to(below, (*halves.shape[:-1], 1))], axis=-1)
    is_new = None if proof.is_new is None else proof.is_new | (best.value > proof.best.value)
    # The chunk's order is kept, so the finest stay on top.
    return _push(_Proof(proof.boxes, bottom, best, is_new), halves.reshape((-1, halves.shape[-1])), keep.reshape(-1))


def _raised(poly: GramPolynomial, grid: Grid, proof: _Proof) -> _Proof:
    """The proof with a new best pair moved to the best frequency for its vectors, and there to the leading pair.

    Where that raises its value, the pair is new again.
    """
    slack = 4 * float(jnp.finfo(poly.even.dtype).eps)

    def move(state):
        best, _ = state
        found = _polished(poly, grid, _moved(poly, grid, best))
        is_new = found.value > (1 + slack) * best.value
        # The value of a pair that is not exact may be larger by rounding.
        return chosen(found.value >= (1 - slack) * best.value, found, best), is_new

    best, is_new = _once(proof.is_new, move, (proof.best, proof.is_new))
    return proof._replace(best=best, is_new=is_new)


def _moved(poly: GramPolynomial, grid: Grid, peak: Peak) -> Peak:
    """The peak's vectors at the frequency, uphill from its own, at which their value is largest."""
    filters = filter_of(of_group(poly.coefficients, peak.group), peak.row, peak.column)
    index = best_frequency(grid.angles, poly.exponents, filters, peak.index, jnp.right_shift(grid.sizes, 1), _MOVES)
    index, mirrored = on_half_grid(grid, index[None])
    return peak._replace(index=index[0], column=jnp.where(mirrored[0], peak.column.conj(), peak.column))


def _once(condition, step, state):
    """`step(state)` where the condition holds, else the state; under `vmap`, `lax.cond` would take every step."""
    return lax.while_loop(lambda s: s[0], lambda s: (jnp.asarray(False), step(s[1])), (condition, state))[1]


def _are_low(poly: GramPolynomial, grid: Grid, corners, levels, limit):
    """Whether each box is proven to hold nothing above the limit, up to rounding."""
    sizes = edges(grid, levels)
    phi = jnp.sum((sizes - 1).astype(grid.rates.dtype) * jnp.asarray(grid.rates)[None], axis=-1)
    limits = limit * jnp.maximum(jnp.cos(phi) - grid.tangent * jnp.sin(phi), 0)
    grams = grams_at(poly, grid.angles, centres(corners, sizes))
    return are_below(grams, squared_limit(poly.coefficients.shape[-2], limits) - poly.loss)


def _examined(poly: GramPolynomial, grid: Grid, allowed, corners, high, known: Peak):
    """The best of the known pair and the leading ones at the frequencies that may be high, taken one by one."""
    places = jnp.arange(len(corners), dtype=jnp.int32)

    def examine(state):
        left, best = state
        place = lax.argmax(left, 0, jnp.int32)
        index = picked(corners, place)
        symbol = _whole_symbol(poly, grid, index)
        if poly.basis is None:
            found = _larger_of(symbol, index, best)
        else:
            # The reduced Gram matrix proves little.
            level = squared_limit(poly.coefficients.shape[-2], allowed * best.value)
            low = are_below(whole_grams(symbol)[None], level[None])[0]
            found = _once(~low, lambda best: _larger_of(symbol, index, best), best)
        return left & (places != place), found

    return lax.while_loop(lambda state: jnp.any(state[0]), examine, (high, known))[1]


def _larger_of(symbol, index, known: Peak) -> Peak:
    rows, values, columns = jnp.linalg.svd(symbol, full_matrices=False)
    leading = rows[:, :, 0], columns[:, 0].conj(), values[:, 0]
    group = lax.argmax(leading[-1], 0, jnp.int32)
    found = Peak(index, group, *picked(leading, group))
    return chosen(found.value > known.value, found, known)


def _polished(poly: GramPolynomial, grid: Grid, peak: Peak) -> Peak:
    """The leading pair of the symbol at the frequency and group of a peak, by the Lanczos method from its vector."""
    symbol = symbol_of(waves(grid.angles, 2 * peak.index, poly.exponents), of_group(poly.coefficients, peak.group))

    found = leading_singular_vectors(
        lambda x: parts_of(einsum("rc,c->r", symbol, amplitudes_of(x))),
        lambda y: parts_of(einsum("rc,r->c", symbol.conj(), amplitudes_of(y))),
        parts_of(peak.column),
        2 * len(symbol),
        vector_tolerance(poly.even.dtype),
    )
    row, column = unit(amplitudes_of(found.output)), unit(amplitudes_of(found.input))
    return peak._replace(row=row, column=column, value=jnp.linalg.norm(einsum("rc,c->r", symbol, column)))
