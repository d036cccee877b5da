"""Branch and bound: the largest singular value of a symbol over its grid, guaranteed, without an SVD at each frequency.

For a unit vector `x`, `||S(w) x||^2` is a trigonometric polynomial of degree `d_j` in the angle of axis `j`. Let its
values be between `a` and `U^2`. By the inequality of Bernstein and Szegoe the arc cosine of the root of
`(||S(w) x||^2 - a) / (U^2 - a)` then changes by at most `phi = 1/2 sum_j d_j |dw_j|`. If the grid's maximum `L` is in a
box of frequencies, the box's centre is at most `phi` away from it in that measure. With `x` the leading vector there

    sigma_max(S(centre))^2 >= a + (sqrt(L^2 - a) cos(phi) - sqrt(U^2 - L^2) sin(phi))^2.

By the grid certificate (`grid_certificate.py`) `U` is at most `L / prod_j cos(pi d_j / (2 n_j))`, and `a` is `L^2` less
a bound of how much any `||S(w) x||^2` varies with `w` (`_spread`). A box (`boxes.py`) whose centre is below this bound
for the best value known cannot hold a larger one, and one Cholesky factorization of the centre's Gram matrix proves
that. The other boxes are split, down to single frequencies. One that is higher than all known ones may lie on a slope,
where very many others are, so that the search climbs from it. How many boxes are looked at depends on the taps and on
the peaks of the spectrum, not on the size of the image. SVDs at all frequencies (Sedghi, Gupta, Long 2019) give the
same number at a cost that does.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen, picked, place_of_largest, put, repeated, slice_from
from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import einsum, thin_svd, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.proofs import are_below, rounding, squared_limit, with_room
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.spectra.circular.angles import waves
from jaxsrn.spectra.circular.boxes import Grid, centres, on_half_grid, spans, split
from jaxsrn.spectra.circular.climbing import Peak, best_frequency, chunk_of, climbs_from, filter_of
from jaxsrn.spectra.circular.fourier import symbol_of
from jaxsrn.spectra.circular.grams import GramPolynomial, grams_at, whole_grams
from jaxsrn.spectra.circular.real_floats import amplitudes_of, parts_of

__all__ = [
    "proven_peak",
    "unproven_peak",
]

# The number of columns from which an SVD takes longer than the Lanczos method and a proof
# (`python benchmarks/ablations.py`).
_LANCZOS_FROM = 128
# The most levels of boxes on any grid: the finest grid has `2**24` frequencies per axis (`sites.py`).
_MOST_LEVELS = 25
# The number of steps of the search for the best frequency of given vectors. The first are as long as half a box, and
# they halve wherever the frequency stays.
_MOVES = 40


class _Proof(NamedTuple):
    """A stack of boxes still to look at, with the finest on top, and the best pair so far.

    A box is its corner and its level. The best pair is new until it is known to be at a peak.
    """

    boxes: Int[Array, "capacity axes+1"]
    size: Int[Array, ""]
    best: Peak
    is_new: Bool[Array, ""]


def proven_peak(poly: GramPolynomial, grid: Grid, corners, exists, peaks: Peak, excess) -> Peak:
    """The highest peak of the grid, with the proof that nothing is larger by more than the share `excess`.

    Its pair is exact to rounding. `peaks` is what climbing found.
    """
    chunk, (count, axes) = chunk_of(poly), corners.shape
    # At most one chunk's halves wait on each level at a time, as the finest boxes are taken first.
    capacity = count + chunk * (_MOST_LEVELS * 2**axes + 1)
    nothing = jnp.zeros((capacity, axes + 1), jnp.int32), jnp.asarray(0, jnp.int32)
    boxes = jnp.concatenate([corners, jnp.zeros((count, 1), jnp.int32)], axis=-1)
    # A pair by the Lanczos method is at a peak up to the precision of climbing.
    best, is_new = (_highest_of(peaks), True) if _takes_lanczos(poly) else (unproven_peak(poly, grid, peaks), False)
    proof = _push(_Proof(*nothing, best, jnp.asarray(is_new)), boxes, exists)
    spread, allowed = _spread(poly), 1 + excess

    def step(proof: _Proof) -> _Proof:
        return _look(poly, grid, spread, chunk, allowed, _raised(poly, grid, len(peaks.value), proof))

    # NaN needs no proof, nor does a kernel of zeros. Another may have the value 0, at right angles to all that climbed.
    needless = -jnp.max(jnp.abs(poly.coefficients))
    return lax.while_loop(lambda proof: (proof.size > 0) & (proof.best.value > needless), step, proof).best


def unproven_peak(poly: GramPolynomial, grid: Grid, peaks: Peak) -> Peak:
    """The best of a stack of peaks with a pair that is exact to rounding, without a proof that no other is higher."""
    best = _highest_of(peaks)
    if _takes_lanczos(poly):
        return _polished(poly, grid, best)
    return _with_larger(poly, grid, best.index, best._replace(value=jnp.full_like(best.value, -1)))


def _highest_of(peaks: Peak) -> Peak:
    return picked(peaks, place_of_largest(peaks.value))


def _takes_lanczos(poly: GramPolynomial) -> bool:
    return min(poly.coefficients.shape[-2:]) >= _LANCZOS_FROM


def _whole_symbol(poly: GramPolynomial, grid: Grid, index: Int[Array, " axes"]):
    """The symbol of every group at an index of the grid."""
    return symbol_of(waves(grid.angles, 2 * index, poly.exponents), poly.coefficients)


def _spread(poly: GramPolynomial) -> Float[Array, ""] | float:
    """A bound of how much `||S(w) x||^2` varies with the angle for any unit vector `x`: twice the largest row sum.

    Without it, branch and bound would look at very many frequencies where a spectrum is flat.
    """
    if poly.basis is not None:
        # A reduced polynomial says nothing of the other directions, and its boxes are single frequencies.
        return math.inf
    # An entry's even and odd part have weights whose squares have the sum 1, and lie at right angles.
    varying = jnp.maximum(jnp.abs(poly.even[1:]), jnp.abs(poly.odd[1:]))
    slack = 2 * rounding(poly.coefficients.shape[-2], varying.dtype)
    return (2 + slack) * jnp.max(jnp.sum(varying, axis=(0, 3)))


def _push(proof: _Proof, boxes, keep) -> _Proof:
    """Puts the boxes that are to be kept on the stack, in their order."""
    sizes = proof.size + jnp.cumsum(keep, dtype=jnp.int32)
    place = jnp.where(keep, sizes - 1, len(proof.boxes))
    return proof._replace(boxes=put(proof.boxes, place, boxes), size=sizes[-1])


def _look(poly: GramPolynomial, grid: Grid, spread, chunk: int, allowed, proof: _Proof) -> _Proof:
    """Takes a chunk of boxes from the stack, discards those proven low, and puts back the halves of the others.

    A box is low if nothing in it exceeds the best value times `allowed`.
    """
    bottom = jnp.maximum(proof.size - chunk, 0)
    boxes = slice_from(proof.boxes, bottom, chunk)
    corners, levels = boxes[:, :-1], boxes[:, -1]
    reach, places = spans(grid, levels), jnp.arange(chunk, dtype=jnp.int32)
    low = _are_low(poly, grid, spread, corners, reach, allowed * proof.best.value)
    high = ~low & (bottom + places < proof.size)
    single = high & (levels == grid.last_level)
    best = _examined(poly, grid, allowed, corners, single, proof.best)
    halves, exists = split(grid, corners, reach, levels)
    keep = exists & (high & ~single)[:, None]
    below = jnp.minimum(levels + 1, grid.last_level)[:, None, None]
    halves = jnp.concatenate([halves, jnp.broadcast_to(below, (*halves.shape[:-1], 1))], axis=-1)
    found = best.value > proof.best.value
    is_new = proof.is_new | found if _takes_lanczos(poly) else found
    # The chunk's order is kept, so the finest stay on top.
    return _push(_Proof(proof.boxes, bottom, best, is_new), halves.reshape((-1, halves.shape[-1])), keep.reshape(-1))


def _raised(poly: GramPolynomial, grid: Grid, count: int, proof: _Proof) -> _Proof:
    """The proof with a new best pair moved uphill from its frequency, and there to the leading pair.

    By the Lanczos method it is new again where a move has raised its value. Other kernels climb with `count` climbers.
    """
    if _takes_lanczos(poly):
        move = functools.partial(_moved_on, poly, grid)
        best, is_new = _once(proof.is_new, move, (proof.best, proof.is_new))
        return proof._replace(best=best, is_new=is_new)
    best = _once(proof.is_new, functools.partial(_climbed_on, poly, grid, count), proof.best)
    return proof._replace(best=best, is_new=jnp.asarray(False))


def _climbed_on(poly: GramPolynomial, grid: Grid, count: int, best: Peak) -> Peak:
    """The best pair where climbing leads from it; by a stack of equal climbers, the subroutine of the search."""
    index, group, column = repeated((best.index, best.group, best.column), count)
    return _with_larger(poly, grid, climbs_from(poly, grid, index, group, column).index[0], best)


def _moved_on(poly: GramPolynomial, grid: Grid, state: tuple[Peak, Bool[Array, ""]]) -> tuple[Peak, Bool[Array, ""]]:
    """The best pair at the best frequency for its vectors, and whether that has raised its value."""
    best, _ = state
    slack = 4 * float(jnp.finfo(poly.even.dtype).eps)
    found = _polished(poly, grid, _moved(poly, grid, best))
    is_new = found.value > (1 + slack) * best.value
    # The value of a pair that is not exact may be larger by rounding.
    return chosen(found.value >= (1 - slack) * best.value, found, best), is_new


def _moved(poly: GramPolynomial, grid: Grid, peak: Peak) -> Peak:
    """The peak's vectors at the frequency, uphill from its own, at which their value is largest."""
    filters = filter_of(picked(poly.coefficients, peak.group), peak.row, peak.column)
    index = best_frequency(grid.angles, poly.exponents, filters, peak.index, jnp.right_shift(grid.sizes, 1), _MOVES)
    index, mirrored = on_half_grid(grid, index[None])
    return peak._replace(index=index[0], column=jnp.where(mirrored[0], peak.column.conj(), peak.column))


def _once(condition, step, state):
    """`step(state)` where the condition holds, else the state; under `vmap`, `lax.cond` would take every step."""
    return lax.while_loop(lambda s: s[0], lambda s: (jnp.asarray(False), step(s[1])), (condition, state))[1]


def _are_low(poly: GramPolynomial, grid: Grid, spread, corners, reach, limit):
    """Whether each box of the given `spans` is proven to hold nothing above the limit, up to rounding."""
    phi = jnp.sum(reach.astype(grid.rates.dtype) * jnp.asarray(grid.rates)[None], axis=-1)
    # A vector that reaches the limit has no value below `square - fall`, at any angle.
    square = limit**2
    fall = jnp.minimum(spread, square)
    root = jnp.sqrt(fall) * jnp.cos(phi) - limit * grid.tangent * jnp.sin(phi)
    squares = square - fall + jnp.maximum(root, 0) ** 2
    grams = grams_at(poly, grid.angles, centres(corners, reach))
    return are_below(grams, with_room(poly.coefficients.shape[-2], squares) - poly.loss)


def _examined(poly: GramPolynomial, grid: Grid, allowed, corners, high, known: Peak):
    """The best of the known pair and the leading ones at the frequencies that may be high, taken one by one."""
    places = jnp.arange(len(corners), dtype=jnp.int32)

    def examine(state):
        left, best = state
        place = place_of_largest(left)
        index = picked(corners, place)
        if poly.basis is None:
            found = _with_larger(poly, grid, index, best)
        else:
            # The reduced Gram matrix proves little.
            level = squared_limit(poly.coefficients.shape[-2], allowed * best.value)
            low = are_below(whole_grams(_whole_symbol(poly, grid, index))[None], level[None])[0]
            found = _once(~low, lambda best: _with_larger(poly, grid, index, best), best)
        return left & (places != place), found

    return lax.while_loop(lambda state: jnp.any(state[0]), examine, (high, known))[1]


# A subroutine, as a proof takes it twice.
@program
def _with_larger(poly: GramPolynomial, grid: Grid, index: Int[Array, " axes"], known: Peak) -> Peak:
    """The leading pair at an index of the grid where its value is larger than that of the known pair."""
    rows, values, columns = thin_svd(_whole_symbol(poly, grid, index))
    leading = rows[:, :, 0], columns[:, 0].conj(), values[:, 0]
    group = place_of_largest(leading[-1])
    found = Peak(index, group, *picked(leading, group))
    return chosen(found.value > known.value, found, known)


def _polished(poly: GramPolynomial, grid: Grid, peak: Peak) -> Peak:
    """The leading pair of the symbol at the frequency and group of a peak, by the Lanczos method from its vector."""
    symbol = symbol_of(waves(grid.angles, 2 * peak.index, poly.exponents), picked(poly.coefficients, peak.group))

    found = leading_singular_vectors(
        lambda x: parts_of(einsum("rc,c->r", symbol, amplitudes_of(x))),
        lambda y: parts_of(einsum("rc,r->c", symbol.conj(), amplitudes_of(y))),
        parts_of(peak.column),
        2 * len(symbol),
        vector_tolerance(poly.even.dtype),
    )
    row, column = unit(amplitudes_of(found.output)), unit(amplitudes_of(found.input))
    return peak._replace(row=row, column=column, value=jnp.linalg.norm(einsum("rc,c->r", symbol, column)))
