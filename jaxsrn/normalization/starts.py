"""Where the iteration starts, and what is provably out of its reach.

At a pair, the distance of the closed form decreases in `e = <E, E>_d` and in `m = <A, E>_d` (for targets below the
stable rank of `A`). Bounds on both bound every feasible kernel; the pairs that come closest to them are the starts.
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
from jaxsrn.spectra.circular.pairs import site_pairs
from jaxsrn.spectra.circular.sites import is_self_conjugate
from jaxsrn.spectra.padded.circular_model import circular_layer, windowed
from jaxsrn.spectra.pair import Pair
from jaxsrn.spectra.ranks import largest_functional

__all__ = [
    "Survey",
    "survey",
]

_NUM_STARTS = 4
# Frequencies whose vectors are computed at a time, best bound first.
_SCAN_CHUNK = 16
_CHEAP_CHUNK = 4
_NUM_PHASES = 16
_PHASE_ZOOMS = 12
_ZOOM_PHASES = 6
_MODEL_SIZE = 32


class _Reach(NamedTuple):
    """What no pair of a site can exceed: its `e`, and a lower bound of its squared distance."""

    largest: Float[Array, " sites"]
    bounds: Float[Array, " sites"]


def _squared_bounds(problem: Problem, largest, values):
    """Lower bounds of the squared distance from upper bounds of `e` and `m`; infinite where nothing is feasible."""
    squared = problem.inner(problem.kernel, problem.kernel)
    bounds = squared_distance(largest, values, problem.target, problem.norm, squared)
    return jnp.where(is_feasible(largest, problem.target), bounds, jnp.inf)


def _reach(problem: Problem, op: CircularConv) -> _Reach:
    """Without an SVD: a singular value is at most the norm of the operator, and the Frobenius norm of its symbol."""
    counts, sums = squared_phase_sums(op, problem.kernel.shape)
    largest = jnp.asarray(np.max(counts + np.abs(sums), axis=-1) / (2 * np.prod(op.grid)), problem.norm.dtype)
    sizes = jnp.linalg.norm(half_symbol(problem.kernel, op), axis=(-2, -1))
    return _Reach(largest, _squared_bounds(problem, largest, jnp.minimum(sizes, problem.norm)))


class Survey(NamedTuple):
    """Pairs to start from (stacked), and a squared distance that no feasible kernel can beat.

    The bound is infinite where provably no kernel is feasible.
    """

    starts: Pair
    bound: Float[Array, ""]


class _Scan(NamedTuple):
    """The best sites so far, the lowest bound of all seen; `position` counts chunks of the sorted sites."""

    scores: Float[Array, " starts"]
    sites: Int[Array, " starts"]
    bound: Float[Array, ""]
    position: Int[Array, ""]


def _phase_scores(problem: Problem, op: CircularConv, values, pairs: Pair, num_zooms: int):
    """The best phase `theta` of each pair `(u, e^{i theta} v)`: `(scores, theta)`.

    `m = sigma cos(theta)` and `e = (Q + Re(e^{2 i theta} c)) / (2 N)`. Both the distance's decrease in `e` and in
    `m` point into the interval between 0 and the maximiser of `e`: only it is searched, zooming in on the best.
    """
    counts, sums = squared_phase_sums(op, problem.kernel.shape)
    by_phase = pairs.input.reshape((len(values), counts.size, -1))
    counts, sums = jnp.asarray(counts, values.dtype), jnp.asarray(sums, by_phase.dtype)[pairs.site]
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
        """The best of equidistant phases: `(score, phase, the interval between its neighbours)`."""
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
    """The best few sites with their best phases, by the closed form on `A`'s own leading pairs.

    Sites are taken in the order of a bound that needs no SVD, until it exceeds the best distance found: all others
    are provably worse. With one channel per site, site and phase are all there is to a pair, so what the scan finds is
    the global solution and its own lower bound. If no pair is feasible, the real frequencies with the largest
    singular values: they allow the smallest stable rank there is.
    """
    reach = _reach(problem, op)
    num_sites = len(reach.bounds)
    # One input and one output per site: site and phase are all there is. The scan is the solution and the certificate.
    one_channel = site_shape(op, problem.kernel.shape) == (1, 1)
    scan_zooms = _PHASE_ZOOMS if one_channel else 0
    chunk, kept = (_CHEAP_CHUNK, 1) if one_channel else (_SCAN_CHUNK, _NUM_STARTS)
    chunk, kept = min(chunk, num_sites), min(kept, num_sites)
    num_chunks = -(-num_sites // chunk)
    order = jnp.argsort(reach.bounds)
    order = jnp.concatenate([order, jnp.broadcast_to(order[:1], (num_chunks * chunk - num_sites,))])
    order = order.reshape((num_chunks, chunk))

    def evaluate(sites, num_zooms):
        pair_values, pairs = site_pairs(problem.kernel, op, sites)
        scores, theta = _phase_scores(problem, op, pair_values, pairs, num_zooms)
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
    strongest = real[jnp.argsort(-site_pairs(problem.kernel, op, real)[0])[jnp.arange(kept) % len(real)]]
    found = jnp.isfinite(scan.scores[0])
    starts = evaluate(jnp.where(found, scan.sites, strongest), _PHASE_ZOOMS)[1]
    return Survey(starts, scan.scores[0] if one_channel else scan.bound)


def _image_starts(problem: Problem, op: ZeroPaddedConv, own: Pair) -> Pair:
    """The kernel's own leading pair, and the best pairs of the circular model, windowed to the image.

    The model's target stands as high above its smallest stable rank as the target does above this operator's.
    """
    shape = problem.kernel.shape
    # Its frequencies are only where to start, so it need not be as large as the true image.
    sizes = tuple(min(n, _MODEL_SIZE) for n in op._dilated_shape)
    model = circular_layer(op, shape, sizes, op.strides)
    norm = jnp.max(top_values(half_symbol(problem.kernel, model)))
    weights = model.frobenius_weights(shape, norm.dtype)
    ratio = largest_functional(shape, op) / largest_functional(shape, model)
    squared = jnp.sum(weights * problem.kernel**2)
    # Against rounding, and so that the model has something to lower.
    highest = 0.95 * squared / jnp.where(norm == 0, 1.0, norm) ** 2
    target = jnp.minimum(problem.target * ratio, highest)
    waves = _survey_circular(Problem(problem.kernel, weights, target, norm), model).starts

    images = jax.vmap(lambda pair: windowed(pair, model, op, shape))(waves)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), own, images)


def survey(problem: Problem, op: Operator, own: Pair) -> Survey:
    """Pairs to start from, and the bound; `own` is the leading pair of `A`.

    The bound takes `e` and `m` at their largest: per frequency for circular convolutions, `e*` and `M` otherwise.
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
