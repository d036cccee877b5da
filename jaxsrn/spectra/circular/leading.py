"""The leading pair over all frequencies that a layer sees: by SVDs or by branch and bound, whichever takes less.

An SVD at every site is the way of Sedghi, Gupta, Long 2019. A layer whose kernel has one tap has the same symbol
everywhere, and is a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.linalg import by_largest, top_values
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import svds_are_dear, torus_excess
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.boxes import grid_of, num_boxes
from jaxsrn.spectra.circular.climbing import num_climbers
from jaxsrn.spectra.circular.fourier import complex_dtype, half_symbol, site_shape
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.circular.peaks import climbed, proven_pair, unproven_pair
from jaxsrn.spectra.circular.site_pairs import pair_at
from jaxsrn.spectra.circular.sites import Site, distinct_sites, half_grid, on_grid, sites_at, without_constant_axes
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "branch_and_bound_pays",
    "leading_wave",
    "search_arguments",
]


def leading_wave(
    kernel: Float[Array, "..."], op: CircularConv | UnboundedConv, excess: float | Float[Array, ""] = 0.0
) -> tuple[Pair, float | Float[Array, ""]]:
    """The leading pair over all sites, by SVDs or by branch and bound up to the allowed `excess`.

    With a static excess of 1 the pair is that of the highest peak that climbing finds, without branch and bound.
    Called eagerly, it compiles the climb and branch and bound once for all image sizes.

    Returns:
      `(pair, excess)`: no singular value exceeds that of the pair by more than this share, 0 for SVDs.
    """
    if math.prod(kernel.shape[:-2]) == op.feature_group_count == 1:
        return _constant_wave(kernel, on_grid(op, kernel.shape)), 0.0
    layer = without_constant_axes(on_grid(op, kernel.shape), kernel.shape)
    if isinstance(op, UnboundedConv):
        least = torus_excess(kernel.dtype)
        excess = jnp.maximum(excess, least) if isinstance(excess, jax.Array) else max(excess, least)
    elif not branch_and_bound_pays(kernel.shape, layer):
        return _by_svds(kernel, layer), 0.0
    single, grid, *rest = search_arguments(layer, kernel)
    found = climbed(kernel, single, grid, *rest)
    if not isinstance(excess, jax.Array) and excess >= 1:
        return unproven_pair(found, single, kernel.shape, grid), excess
    return proven_pair(found, single, kernel.shape, grid, excess, isinstance(op, UnboundedConv)), excess


def branch_and_bound_pays(kernel_shape: tuple[int, ...], op: CircularConv) -> bool:
    """Whether branch and bound takes less than an SVD at every site (static)."""
    sites = math.prod(half_grid(op)) * op.feature_group_count
    return svds_are_dear(sites, site_shape(op, kernel_shape))


def search_arguments(op: CircularConv, kernel: Float[Array, "..."]):
    """What `climbed` takes of a layer: `(op, grid, counts, reduced, count)`.

    All but the grid is static, and the same for most image sizes. The operator is the one on a single frequency.
    """
    reduced = is_reduced(op, kernel.shape)
    return *_geometry(op, kernel.shape, jnp.dtype(kernel.dtype), reduced), reduced, num_climbers(op, kernel.shape)


# NumPy takes 0.4 ms for it, which every eager call would pay.
@functools.lru_cache(maxsize=1024)
def _geometry(op: CircularConv, kernel_shape: tuple[int, ...], dtype, reduced: bool):
    single = dataclasses.replace(op, input_shape=op.strides)
    return single, grid_of(op, kernel_shape, dtype, reduced), num_boxes(op, kernel_shape, reduced)


@functools.partial(program, brief=True)
def _by_svds(kernel, op):
    kernel, places = by_largest(kernel)[0], distinct_sites(op)[0]
    values = top_values(half_symbol(kernel, op)[places])
    sites = jax.tree.map(jnp.asarray, sites_at(op, places))
    return pair_at(kernel, op, picked(sites, place_of_largest(values)))


@functools.partial(program, brief=True)
def _constant_wave(kernel, op):
    """The leading pair of a kernel of one tap, whose symbol is one matrix at all sites, in the first phase."""
    pair = leading_of_matrix(by_largest(kernel)[0].reshape(kernel.shape[-2:]))
    rows, _ = site_shape(op, kernel.shape)
    inputs, dtype = jnp.pad(pair.input, (0, rows - pair.input.size)), complex_dtype(kernel.dtype)
    site = Site(jnp.zeros(op.num_axes, jnp.int32), jnp.zeros((), jnp.int32))
    return Pair(site, inputs.astype(dtype), pair.output.astype(dtype))
