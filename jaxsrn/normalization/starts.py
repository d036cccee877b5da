"""The pairs that the iteration starts from, and a distance that provably no kernel beats.

The distance of a pair's closed form decreases in `e = <E, E>_d` and in `m = <A, E>_d`, for targets below the stable
rank of `A`. Upper bounds of both give a lower bound of the distance of every feasible kernel. The pairs that come
closest to it are the starts. For circular convolutions this is branch and bound over the sites (frequency, group; see
`spectra/circular/sites.py`) and the phase of a pair: the sites are sorted by a bound that needs no SVD, and the scan
ends where that bound exceeds the best distance found. `spectra/circular/branch_and_bound.py` bounds the norm instead.
Zheng et al. 2025 take random starts on the sphere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsrn._tools.linalg import top_values
from jaxsrn.normalization.closed_form import Problem, is_feasible, squared_distance
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.fourier import half_symbol, site_shape, squared_phase_sums
from jaxsrn.spectra.circular.site_pairs import site_pairs
from jaxsrn.spectra.circular.sites import is_self_conjugate, sites_at
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed
from jaxsrn.spectra.ranks import largest_functional
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Survey",
    "survey",
]

# Pairs that are followed to the end: more are surer to lead to the best stationary point, and each takes its time.
_NUM_STARTS = 4
# Sites whose vectors are computed at a time: many share the overhead of an SVD, few stop the scan earlier. With one
# channel per site there is no SVD, and each phase is searched to the end.
_SCAN_CHUNK = 16
_CHEAP_CHUNK = 4
# Phases that are compared at first, how often the search zooms in, and the phases that are compared in each zoom. A
# zoom keeps 2 of the 5 intervals between its phases: the last is (2 / 15) (2 / 5)^12 = 2e-6 of the first.
_NUM_PHASES = 16
_PHASE_ZOOMS = 12
_ZOOM_PHASES = 6
# The largest image of the circular model, per axis. The model only says where to start, so its cost need not grow with
# the true image.
_MODEL_SIZE = 32


class _Reach(NamedTuple):
    """Bounds of all pairs of a site: the largest `e`, and a squared distance that none of them is below."""

    largest: Float[Array, " sites"]
    bounds: Float[Array, " sites"]


def _squared_bounds(problem: Problem, largest, values):
    """Lower bounds of the squared distance by upper bounds of `e` and `m`; infinite where no kernel is feasible."""
    squared = problem.inner(problem.kernel, problem.kernel)
    bounds = squared_distance(largest, values, problem.target, problem.norm, squared)
    return jnp.where(is_feasible(largest, problem.target), bounds, jnp.inf)


def _reach(problem: Problem, op: CircularConv) -> _Reach:
    """Bounds without an SVD: a singular value is at most the operator's norm, and its symbol's Frobenius norm."""
    counts, sums = squared_phase_sums(op, problem.kernel.shape)
    largest = jnp.asarray(np.max(counts + np.abs(sums), axis=-1) / (2 * np.prod(op.grid)), problem.norm.dtype)
    sizes = jnp.linalg.norm(half_symbol(problem.kernel, op), axis=(-2, -1))
    return _Reach(largest, _squared_bounds(problem, largest, jnp.minimum(sizes, problem.norm)))


class Survey(NamedTuple):
    """A stack of pairs to start from, and a squared distance that no feasible kernel beats.

    The bound is infinite where provably no kernel is feasible.
    """

    starts: Pair
    bound: Float[Array, ""]


class _Scan(NamedTuple):
    """The best sites so far, the lowest bound of those seen, and how many chunks of the sorted sites these are."""

    scores: Float[Array, " starts"]
    sites: Int[Array, " starts"]
    bound: Float[Array, ""]
    position: Int[Array, ""]


def _phase_scores(problem: Problem, op: CircularConv, sites, values, pairs: Pair, num_zooms: int):
    """The best phase `theta` of each pair `(u, e^{i theta} v)`: `(scores, theta)`, the scores squared distances.

    A pair has `m = sigma cos(theta)` and `e = (Q + Re(e^{2 i theta} c)) / (2 N)`. The distance decreases in both, `m`
    is largest at 0, and so the best phase lies between 0 and the maximiser of `e`. That interval is searched on a grid
    of phases, again and again around its best one.
    """
    counts, sums = squared_phase_sums(op, problem.kernel.shape)
    by_phase = pairs.input.reshape((len(values), counts.size, -1))
    counts, sums = jnp.asarray(counts, values.dtype), jnp.asarray(sums, by_phase.dtype)[sites]
    q = jnp.sum(jnp.sum(jnp.abs(by_phase) ** 2, axis=-1) * counts[None], axis=-1)
    c = jnp.sum(pairs.output**2, axis=-1) * jnp.sum(jnp.sum(jnp.conj(by_phase) ** 2, axis=-1) * sums, axis=-1)
    total = 2 * float(np.prod(op.grid))
    squared = problem.inner(problem.kernel, problem.kernel)

    def score(theta):
        turned = jnp.abs(c)[:, None] * jnp.cos(2 * theta + jnp.angle(c)[:, None])
        e = (q[:, None] + turned) / total
        m = values[:, None] * jnp.cos(theta)
        feasible = is_feasible(e, problem.target)
        distance = squared_distance(jnp.where(feasible, e, 1.0), m, problem.target, problem.norm, squared)
        return jnp.where(feasible, distance, jnp.inf)

    def search(ends, num_phases: int):
        """The best of several equidistant phases: `(score, phase, the interval between its neighbours)`."""
        grid = jnp.linspace(0.0, 1.0, num_phases, dtype=values.dtype)[None]
        theta = ends[0][:, None] + (ends[1] - ends[0])[:, None] * grid
        scores = score(theta)
        best = jnp.argmin(scores, axis=-1)[:, None]
        low, middle, high = (
            jnp.take_along_axis(theta, jnp.clip(best + side, 0, num_phases - 1), axis=-1)[:, 0] for side in (-1, 0, 1)
        )
        return jnp.take_along_axis(scores, best, axis=-1)[:, 0], middle, (low, high)

    found = search((jnp.zeros_like(q), -jnp.angle(c) / 2), _NUM_PHASES)
    return jax.lax.fori_loop(0, num_zooms, lambda _, found: search(found[2], _ZOOM_PHASES), found)[:2]


def _turn(pairs: Pair, theta) -> Pair:
    factor = jax.lax.complex(jnp.cos(theta), jnp.sin(theta))[:, None]
    return pairs._replace(output=pairs.output * factor)


def _survey_circular(problem: Problem, op: CircularConv) -> Survey:
    """The best few sites with their best phases, by the closed form for the leading pair of `A` at each site.

    Sites are taken in the order of a bound that needs no SVD, until it exceeds the best distance found: all others
    are provably worse. With one channel per site a pair is a site and a phase, so what the scan finds is the global
    solution and its own lower bound. If no pair is feasible, the starts are the real frequencies with the largest
    singular values: they allow the smallest stable rank there is.
    """
    reach = _reach(problem, op)
    num_sites = len(reach.bounds)
    one_channel = site_shape(op, problem.kernel.shape) == (1, 1)
    scan_zooms = _PHASE_ZOOMS if one_channel else 0
    chunk, kept = (_CHEAP_CHUNK, 1) if one_channel else (_SCAN_CHUNK, _NUM_STARTS)
    chunk, kept = min(chunk, num_sites), min(kept, num_sites)
    num_chunks = -(-num_sites // chunk)
    order = jnp.argsort(reach.bounds)
    order = jnp.concatenate([order, jnp.broadcast_to(order[:1], (num_chunks * chunk - num_sites,))])
    order = order.reshape((num_chunks, chunk))

    all_sites = sites_at(op, np.arange(num_sites))

    def pairs_at(sites):
        return site_pairs(problem.kernel, op, jax.tree.map(lambda leaf: jnp.asarray(leaf)[sites], all_sites))

    def evaluate(sites, num_zooms):
        pair_values, pairs = pairs_at(sites)
        scores, theta = _phase_scores(problem, op, sites, pair_values, pairs, num_zooms)
        bounds = _squared_bounds(problem, reach.largest[sites], pair_values)
        return scores, _turn(pairs, theta), jnp.min(bounds)

    def body(state: _Scan) -> _Scan:
        sites = order[state.position]
        scores, _, bound = evaluate(sites, scan_zooms)
        scores, sites = jnp.concatenate([state.scores, scores]), jnp.concatenate([state.sites, sites])
        best = jnp.argsort(scores)[:kept]
        return _Scan(scores[best], sites[best], jnp.minimum(state.bound, bound), state.position + 1)

    def unfinished(state: _Scan):
        next_bound = reach.bounds[order[jnp.minimum(state.position, num_chunks - 1), 0]]
        return (state.position < num_chunks) & (next_bound < state.scores[0])

    infinite = jnp.asarray(jnp.inf, reach.bounds.dtype)
    empty = _Scan(jnp.broadcast_to(infinite, (kept,)), order[0, :kept], infinite, jnp.asarray(0))
    scan = jax.lax.while_loop(unfinished, body, empty)
    real = jnp.asarray(np.flatnonzero(is_self_conjugate(op)))
    strongest = real[jnp.argsort(-pairs_at(real)[0])[jnp.arange(kept) % len(real)]]
    found = jnp.isfinite(scan.scores[0])
    starts = evaluate(jnp.where(found, scan.sites, strongest), _PHASE_ZOOMS)[1]
    return Survey(starts, scan.scores[0] if one_channel else scan.bound)


def _image_starts(problem: Problem, op: ZeroPaddedConv, own: Pair) -> Pair:
    """The kernel's own leading pair, and the best pairs of the circular model, windowed to the image.

    The circular model is the circular layer with the same kernel on an image of about the same size. Its target is the
    multiple of its smallest stable rank that the target is of this operator's.
    """
    shape = problem.kernel.shape
    sizes = tuple(min(n, _MODEL_SIZE) for n in op._dilated_shape)
    model = circular_layer(op, shape, sizes, op.strides)
    norm = jnp.max(top_values(half_symbol(problem.kernel, model)))
    weights = model.frobenius_weights(shape, norm.dtype)
    ratio = largest_functional(shape, op) / largest_functional(shape, model)
    squared = jnp.sum(weights * problem.kernel**2)
    # A target at the model's own stable rank or above it would leave nothing to lower.
    highest = 0.95 * squared / jnp.where(norm == 0, 1.0, norm) ** 2
    target = jnp.minimum(problem.target * ratio, highest)
    waves = _survey_circular(Problem(problem.kernel, weights, target, norm), model).starts

    images = jax.vmap(lambda pair: windowed(pair, model, op, shape))(waves)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), own, images)


def survey(problem: Problem, op: Operator, own: Pair) -> Survey:
    """The pairs to start from, and the bound of all kernels; `own` is the leading pair of `A`.

    The bound takes `e` and `m` at their largest: at every site for circular convolutions, `e*` and `M` otherwise.
    """
    if isinstance(op, CircularConv):
        return _survey_circular(problem, op)
    e = jnp.asarray(largest_functional(problem.kernel.shape, op), problem.norm.dtype)
    squared = problem.inner(problem.kernel, problem.kernel)
    bound = squared_distance(e, problem.norm, problem.target, problem.norm, squared)
    bound = jnp.where(is_feasible(e, problem.target), bound, jnp.inf)
    if isinstance(op, ZeroPaddedConv):
        return Survey(_image_starts(problem, op, own), bound)
    return Survey(jax.tree.map(lambda leaf: leaf[None], own), bound)
