"""The scan of sites for the pairs that come closest to `A`, with a distance that provably no kernel beats.

The distance of a pair's closed form decreases in `e = <E, E>_d` and in `m = <A, E>_d`, for targets below the stable
rank of `A`. Upper bounds of both give a lower bound of the distance of every feasible kernel. The scan is branch and
bound over the sites (frequency, group; see `spectra/circular/sites.py`) and the phase of a pair: the sites are sorted
by a bound that needs no SVD, and the scan ends where that bound exceeds the best distance found.
`spectra/circular/branch_and_bound.py` bounds the norm instead.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import joined, picked
from jaxsrn._tools.linalg import divisor, einsum, safe_sqrt, top_pairs
from jaxsrn.normalization.closed_form import (
    INFEASIBLE,
    INFEASIBLE_FROM,
    Problem,
    is_feasible,
    squared_distance,
)
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import (
    axis_waves,
    complex_dtype,
    half_symbol,
    lags_of,
    polynomial,
    polyphase,
    site_shape,
    site_symbol,
    site_waves,
    squared_phase_sums,
    taps_by_phase,
    terms_of,
)
from jaxsrn.spectra.circular.grid_certificate import degrees
from jaxsrn.spectra.circular.site_pairs import pairs_at
from jaxsrn.spectra.circular.sites import Site, half_grid, sites_at
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "SCAN_CHUNK",
    "Reach",
    "Survey",
    "all_sites",
    "at_best_phases",
    "lower_bounds",
    "reach_of",
    "scanned",
]

# Pairs that are followed to the end: more are surer to lead to the best stationary point, and each takes its time.
_NUM_STARTS = 4
# Sites whose vectors are computed at a time: many share the overhead of an SVD, few stop the scan earlier. With one
# channel per site there is no SVD.
SCAN_CHUNK = 16
_CHEAP_CHUNK = 4
# Phases that are compared, and how often the search zooms in on the interval between the neighbours of the best one.
# The last interval is (2 / 15)^7 = 7e-7 of the first.
_NUM_PHASES = 16
_PHASE_ZOOMS = 7
# Of kernels of more terms the symbols take less than the products of all pairs of terms.
_MANY_TERMS = 256


class Survey(NamedTuple):
    """A stack of pairs to start from, and a squared distance that no feasible kernel beats.

    The bound is infinite where provably no kernel is feasible.
    """

    starts: Pair
    bound: Float[Array, ""]


class Reach(NamedTuple):
    """What is known of the sites of a layer without an SVD.

    Attributes:
      e: the largest `e` of the pairs in the box of a site, static.
      phase: the stride phase that allows the largest `e`, static; `None` where all are alike.
      sizes: the Frobenius norm of the symbol, which bounds its singular values.
      phi: how far apart the frequencies of a box are (`branch_and_bound.py`), static; 0 where a box is one frequency.
      samples: the number of output samples that the Frobenius norm counts, static.
    """

    e: Float[np.ndarray, " sites"]
    phase: int | None
    sizes: Float[Array, " sites"]
    phi: float
    samples: int


def reach_of(
    kernel: Float[Array, "..."], op: CircularConv, samples: int, has_boxes: bool, layer: Operator | None = None
) -> Reach:
    """The reach of all sites, each for itself or for the box around it; `layer` is what `op` is a model of, if any."""
    counts, sums = squared_phase_sums(op, kernel.shape)
    e = np.max(counts + np.abs(sums), axis=-1) / 2
    phi = 0.0
    if has_boxes:
        half_steps = np.pi / np.array(op.grid)
        phi = float(np.sum(half_steps * np.array(degrees(op, kernel.shape)) / 2))
        # The sum of exp(2i <w, t>) over the terms changes at most as fast as its terms turn around their middle.
        terms = terms_of(op, kernel.shape)
        turning = 2 * np.abs(terms - (terms.max(axis=0) + terms.min(axis=0)) / 2).sum(axis=0)
        e = np.minimum(e + np.sum(turning * half_steps) / 2, counts.max())
    phase = _richest_phase(op if layer is None else layer, op, kernel.shape)
    return Reach(e / samples, phase, _frobenius_norms(kernel, op), phi, samples)


def _richest_phase(layer: Operator, op: CircularConv, kernel_shape: tuple[int, ...]) -> int | None:
    """The stride phase of the circular layer whose taps allow the largest `e` in `layer`; `None` where all are alike.

    A tap adds at most one over the number of samples that it meets (`largest_squared_functional` of
    `spectra/ranks.py`).
    """
    contacts = layer._axis_contacts(kernel_shape)
    axes = [
        in_phase @ [1 / len(tap.outputs) if len(tap.outputs) else 0.0 for tap in taps]
        for taps, (_, in_phase) in zip(contacts, polyphase(op, kernel_shape), strict=True)
    ]
    sums = functools.reduce(np.multiply.outer, axes).reshape(-1)
    return None if np.ptp(sums) <= 1e-9 * sums.max() else int(np.argmax(sums))


def all_sites(op: CircularConv, reach: Reach) -> Site:
    """The sites that the reach is of."""
    return jax.tree.map(jnp.asarray, sites_at(op, np.arange(len(reach.e))))


def _frobenius_norms(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, " sites"]:
    """`||S(w)||_F` at every site, from the inner products of the terms, without the symbol where these are few."""
    coefficients, terms = polynomial(kernel, op)
    if len(terms) > _MANY_TERMS:
        return jnp.linalg.norm(half_symbol(kernel, op), axis=(-2, -1))
    flat = coefficients.reshape((*coefficients.shape[:2], -1))
    products = einsum("gtc,gsc->gts", flat, flat).reshape((len(flat), -1))
    lags, places = lags_of(terms)
    which = (len(lags) // 2 + places[:, None] - places[None]).reshape(-1)
    sums = jnp.zeros((len(flat), len(lags)), products.dtype).at[:, which].add(products)
    rows = [axis_waves(n, lags[:, j])[:m] for j, (n, m) in enumerate(zip(op.grid, half_grid(op), strict=True))]
    cosines = np.real(functools.reduce(lambda a, b: (a[:, None] * b[None]).reshape((-1, len(lags))), rows))
    return safe_sqrt(einsum("gl,fl->fg", sums, jnp.asarray(cosines, sums.dtype)).reshape(-1))


def lower_bounds(problem: Problem, e, values, phi: float):
    """Squared distances that no pair in the boxes beats, by bounds of `e` and by singular values at the centres."""
    m = jnp.minimum(values, problem.norm)
    if phi:
        # A singular value can be larger elsewhere in the box, by the inequality of Bernstein and Szegoe.
        angle = jnp.arccos(m / divisor(problem.norm))
        m = problem.norm * jnp.cos(jnp.maximum(angle - phi, 0))
    distance = squared_distance(e, m, problem)
    return jnp.where(is_feasible(e, problem.target), distance, INFEASIBLE / e)


def _best_phases(problem: Problem, mean, c, values):
    """The best phase `theta` of each pair `(u, e^{i theta} v)`: `(scores, theta)`, the scores as `Candidate.merit`.

    A pair has `m = sigma cos(theta)` and `e = mean + Re(e^{2 i theta} c)`. The distance decreases in both, `m` is
    largest at 0, and so the best phase lies between 0 and the maximiser of `e`. That interval is searched on a grid of
    phases, again and again around its best one.
    """
    size, angle = jnp.abs(c), jnp.angle(c)
    norm = divisor(problem.norm)
    shares = jnp.asarray(np.linspace(0, 1, _NUM_PHASES), mean.dtype)

    def zoom(_, state):
        _, _, low, high = state
        theta = low[:, None] + (high - low)[:, None] * shares[None]
        e = mean[:, None] + size[:, None] * jnp.cos(2 * theta + angle[:, None])
        m = values[:, None] * jnp.cos(theta)
        feasible = is_feasible(e, problem.target)
        distance = squared_distance(jnp.where(feasible, e, 1.0), m, problem)
        # Among pairs of equal infeasible `e` the one with the largest value is closest.
        scores = jnp.where(feasible, distance, INFEASIBLE / e * (1 - 1e-3 * m / norm))
        best, step = lax.argmin(scores, 1, jnp.int32).astype(mean.dtype), (high - low) / (_NUM_PHASES - 1)
        middle = low + best * step
        around = jnp.where(best == 0, low, middle - step), jnp.where(best == _NUM_PHASES - 1, high, middle + step)
        return jnp.min(scores, axis=-1), middle, *around

    nothing = jnp.zeros_like(mean), jnp.zeros_like(mean), jnp.zeros_like(mean), -angle / 2
    return lax.fori_loop(0, _PHASE_ZOOMS, zoom, nothing)[:2]


def at_best_phases(problem: Problem, op: CircularConv, values, pairs: Pair, samples: int):
    """The scores of pairs at their best phases, and the pairs turned to them.

    The amplitudes of a pair give its `mean` and `c` of `_best_phases`, with the number of taps in each stride phase and
    the sum of their squared phase factors at the site of the pair.
    """
    shape, dtype = problem.kernel.shape, problem.kernel.dtype
    taps = taps_by_phase(op, shape)
    by_phase = pairs.input.reshape((len(values), taps.shape[1], -1))
    factors = einsum("kt,tp->kp", site_waves(op, shape, pairs.site, dtype) ** 2, jnp.asarray(taps, by_phase.dtype))
    squares = jnp.sum(by_phase.conj() ** 2, axis=-1) * factors
    counts = jnp.asarray(taps.sum(axis=0), dtype)
    mean = einsum("kpi,p->k", jnp.abs(by_phase) ** 2, counts) / (2 * samples)
    c = jnp.sum(pairs.output**2, axis=-1) * jnp.sum(squares, axis=-1) / (2 * samples)
    scores, theta = _best_phases(problem, mean, c, values)
    turn = lax.complex(jnp.cos(theta), jnp.sin(theta))[:, None]
    return scores, pairs._replace(output=pairs.output * turn)


class _Scan(NamedTuple):
    """The best pairs so far with their scores, the lowest bound of the sites seen, and how many chunks these are."""

    scores: Float[Array, " starts"]
    pairs: Pair
    bound: Float[Array, ""]
    position: Int[Array, ""]


def scanned(problem: Problem, op: CircularConv, reach: Reach, wanted: Bool[Array, ""] | bool) -> Survey:
    """The best few sites with their best phases, by the closed form for the leading pair of `A` at each site.

    Sites are taken in the order of a bound that needs no SVD, until it exceeds the best distance found: all others
    are provably worse. With one channel per site a pair is a site and a phase, so what the scan finds is the global
    solution and its own lower bound. If no pair is feasible, the starts are those that allow the smallest stable rank:
    at the real frequencies, the largest singular values first.
    """
    kernel = problem.kernel
    e, count = jnp.asarray(reach.e, problem.norm.dtype), len(reach.e)
    sites = all_sites(op, reach)
    one_channel = site_shape(op, kernel.shape) == (1, 1)
    chunk, kept = (_CHEAP_CHUNK, 1) if one_channel else (SCAN_CHUNK, _NUM_STARTS)
    kept = min(kept, count)
    # A box may hold more than its centre, so that boxes are taken in the order of their centres' bounds.
    lowest = lower_bounds(problem, e, reach.sizes, 0.0)
    order = _in_chunks(lowest, min(chunk, count))
    num_chunks = len(order)

    def look(state: _Scan) -> _Scan:
        places = picked(order, state.position)
        values, pairs = pairs_at(kernel, op, picked(sites, places))
        bound = jnp.min(lower_bounds(problem, picked(e, places), values, reach.phi))
        if reach.phase is not None:
            values, pairs = _with_phase(kernel, op, values, pairs, reach.phase)
        scores, pairs = at_best_phases(problem, op, values, pairs, reach.samples)
        scores, pairs = joined(state[:2], (scores, pairs))
        best = lax.top_k(-scores, kept)[1]
        scores, pairs = picked((scores, pairs), best)
        return _Scan(scores, pairs, jnp.minimum(state.bound, bound), state.position + 1)

    def unfinished(state: _Scan):
        following = picked(lowest, picked(order, jnp.minimum(state.position, num_chunks - 1))[0])
        return wanted & (state.position < num_chunks) & (following < state.scores[0])

    rows, columns = site_shape(op, kernel.shape)
    complex_type = complex_dtype(kernel.dtype)
    nothing = Pair(
        Site(jnp.zeros((kept, op.num_axes), jnp.int32), jnp.zeros(kept, jnp.int32)),
        jnp.zeros((kept, rows), complex_type),
        jnp.zeros((kept, columns), complex_type),
    )
    infinite = jnp.full(kept, jnp.inf, kernel.dtype)
    scan = lax.while_loop(unfinished, look, _Scan(infinite, nothing, infinite[0], jnp.zeros((), jnp.int32)))
    if one_channel and not reach.phi:
        bound = scan.scores[0]
    else:
        unseen = (jnp.arange(num_chunks, dtype=jnp.int32) >= scan.position)[:, None]
        beyond = lower_bounds(problem, e, reach.sizes, reach.phi) if reach.phi else lowest
        bound = jnp.minimum(scan.bound, jnp.min(jnp.where(unseen, picked(beyond, order), jnp.inf)))
    return Survey(scan.pairs, jnp.where(bound < INFEASIBLE_FROM, bound, jnp.inf))


def _in_chunks(lowest: Float[Array, " sites"], chunk: int) -> Int[Array, "chunks {chunk}"]:
    """The sites in the order of their bounds, in chunks.

    The last chunk is filled up with the last site. Better ones, which were seen, would count as unseen there.
    """
    order = jnp.argsort(lowest).astype(jnp.int32)
    return jnp.concatenate([order, jnp.broadcast_to(order[-1], -len(order) % chunk)]).reshape((-1, chunk))


def _with_phase(kernel, op: CircularConv, values, pairs: Pair, phase: int):
    """The leading values and pairs of some sites, followed by the leading ones of inputs in one stride phase.

    Taps that are zero in the kernel have no part in its leading pairs where they alone are in a phase, and a target
    below what the other taps allow would then look infeasible.
    """
    symbols = jax.vmap(site_symbol, (None, None, 0))(kernel, op, pairs.site)
    by_phase = symbols.reshape((len(values), math.prod(op.strides), -1, symbols.shape[-1]))
    further, rows, outputs = top_pairs(by_phase[:, phase])
    inputs = jnp.zeros(by_phase.shape[:-1], rows.dtype).at[:, phase].set(rows).reshape(pairs.input.shape)
    return joined((values, pairs), (further, Pair(pairs.site, inputs, outputs)))
