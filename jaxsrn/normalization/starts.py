"""The pairs that the iteration starts from, and a distance that provably no kernel beats, for each kind of layer.

Circular convolutions are scanned at all of their sites (`scan.py`), unbounded ones on a coarse grid, where each
frequency stands for the box of frequencies around it. With zero padding the starts are waves of a model without edges.
Zheng et al. 2025 take random starts on the sphere.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.indexing import joined, picked, stack_of_one
from jaxsrn._tools.linalg import divisor, thin_svd, top_values
from jaxsrn._tools.tolerances import svds_are_dear
from jaxsrn.normalization.closed_form import (
    INFEASIBLE_FROM,
    Problem,
    problem_of,
)
from jaxsrn.normalization.scan import (
    SCAN_CHUNK,
    Reach,
    Survey,
    all_sites,
    at_best_phases,
    lower_bounds,
    reach_of,
    scanned,
)
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.fourier import (
    site_symbol,
)
from jaxsrn.spectra.circular.grid_certificate import on_dividing_grid
from jaxsrn.spectra.circular.sites import among, on_grid, without_edges
from jaxsrn.spectra.image_pairs import of_flat_vectors
from jaxsrn.spectra.padded.circular_model import windowed
from jaxsrn.spectra.ranks import largest_squared_functional
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "best_of",
    "image_waves",
    "survey",
    "with_own",
]

# Climbers are at peaks of the singular values, which are not those of the distance, so that more of them are tried.
_NUM_CLIMBERS = 8
# Singular values after the largest whose pairs are tried too, of small layers with zero padding.
_NUM_NEXT = 4
# Angles per degree of the coarse grid of an unbounded convolution, whose boxes have to be small for a close bound, and
# of the model of a zero-padded one, which only says where to start: the best few sites of a finer grid would be
# neighbours of one another.
_TORUS_ANGLES, _MODEL_ANGLES = 16, 4
# The logarithm to base 2 of the most frequencies of a coarse grid.
_LOG2_MOST_SITES = 13


def _scanned_torus(problem: Problem, op: UnboundedConv, wanted: Bool[Array, ""] | bool) -> Survey:
    """The survey of an unbounded convolution: the frequencies of a coarse grid, each for the box around it."""
    kernel = problem.kernel
    coarse, fine = _coarse(op, kernel.shape, _TORUS_ANGLES), on_grid(op, kernel.shape)
    found = scanned(problem, coarse, reach_of(kernel, coarse, 1, has_boxes=True), wanted)
    return found._replace(starts=found.starts._replace(site=among(found.starts.site, coarse, fine)))


def best_of(problem: Problem, op: UnboundedConv, values: Float[Array, " n"], pairs: Pair) -> Pair:
    """The best few of pairs of known values, at their best phases, for an unbounded convolution."""
    scores, pairs = at_best_phases(problem, on_grid(op, problem.kernel.shape), values, pairs, 1)
    return picked(pairs, lax.top_k(-scores, min(_NUM_CLIMBERS, len(scores)))[1])


def _coarse(op: UnboundedConv | ZeroPaddedConv, kernel_shape: tuple[int, ...], per_degree: int) -> CircularConv:
    """The circular layer of the same taps on a coarse grid of at most `2**_LOG2_MOST_SITES` sites."""
    return on_dividing_grid(op, kernel_shape, per_degree, _LOG2_MOST_SITES // (len(kernel_shape) - 2))


def image_waves(kernel: Float[Array, "..."], op: ZeroPaddedConv, target, wanted: Bool[Array, ""] | bool = True) -> Pair:
    """The best pairs of a circular model, windowed to the image.

    The model is the convolution without edges, on a coarse grid. Its target is the multiple of its smallest stable rank
    that the target is of this operator's.
    """
    shape = kernel.shape
    model = _coarse(op, shape, _MODEL_ANGLES)
    reach = reach_of(kernel, model, 1, has_boxes=False, layer=op)
    norm, squared = _norm_of_model(kernel, model, reach), jnp.sum(kernel**2)
    target = target * largest_squared_functional(shape, op) / largest_squared_functional(shape, without_edges(op))
    # A target at the model's own stable rank or above it would leave nothing to lower.
    target = jnp.minimum(target, 0.95 * squared / divisor(norm) ** 2)
    waves = scanned(problem_of(kernel, without_edges(op), target, norm), model, reach, wanted).starts
    return jax.vmap(lambda pair: windowed(pair, model, op, shape))(waves)


def _norm_of_model(kernel: Float[Array, "..."], model: CircularConv, reach: Reach) -> Float[Array, ""]:
    """The largest singular value at the sites whose symbols have the largest Frobenius norms, an estimate from below.

    It only says where to start.
    """
    places = lax.top_k(reach.sizes, min(SCAN_CHUNK, reach.sizes.size))[1]
    sites = picked(all_sites(model, reach), places)
    return jnp.max(top_values(jax.vmap(site_symbol, (None, None, 0))(kernel, model, sites)))


def survey(problem: Problem, op: Operator, own: Pair, wanted: Bool[Array, ""] | bool = True) -> Survey:
    """The pairs to start from, and the bound of all kernels; `own` is the leading pair of `A`.

    The bound takes `e` and `m` at their largest: at every site on the torus, `e*` and `M` otherwise. Where the survey
    is not `wanted`, as for some kernels of a batch, the scan ends at once, and what it returns says nothing.
    """
    if isinstance(op, CircularConv):
        return scanned(problem, op, reach_of(problem.kernel, op, math.prod(op.grid), has_boxes=False), wanted)
    if isinstance(op, UnboundedConv):
        return _scanned_torus(problem, op, wanted)
    e = jnp.asarray(largest_squared_functional(problem.kernel.shape, op), problem.norm.dtype)
    bound = lower_bounds(problem, e, problem.norm, 0.0)
    bound = jnp.where(bound < INFEASIBLE_FROM, bound, jnp.inf)
    if isinstance(op, ZeroPaddedConv):
        starts = with_own(own, image_waves(problem.kernel, op, problem.target, wanted))
        return Survey(_with_next(problem.kernel, op, starts), bound)
    return Survey(stack_of_one(own), bound)


def _with_next(kernel: Float[Array, "..."], op: ZeroPaddedConv, starts: Pair) -> Pair:
    """The starts, followed by the pairs of the next singular values where the explicit matrix has a cheap SVD.

    On a few samples singular vectors are no waves.
    """
    sizes = op._sizes(kernel.shape)
    if svds_are_dear(1, sizes):
        return starts
    # The rows of the explicit matrix are outputs, those of its transpose inputs.
    rows, _, columns = thin_svd(op.to_dense(kernel).T)
    following = jax.vmap(lambda row, column: of_flat_vectors(row, column, op, kernel.shape))
    return joined(starts, following(rows.T[1 : 1 + _NUM_NEXT], columns[1 : 1 + _NUM_NEXT]))


def with_own(own: Pair, pairs: Pair) -> Pair:
    """The kernel's own leading pair, followed by others."""
    return joined(stack_of_one(own), pairs)
