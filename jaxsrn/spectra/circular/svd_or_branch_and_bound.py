"""The leading pair of a circular layer over all sites: by SVDs or by branch and bound, whichever takes less.

An SVD at every site is the way of Sedghi, Gupta, Long 2019. A layer whose kernel has one tap has the same symbol
everywhere, and is a matrix.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import top_values
from jaxsrn._tools.tolerances import svds_are_dear
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.branch_and_bound import branch_and_bound
from jaxsrn.spectra.circular.fourier import complex_dtype, half_symbol, site_shape
from jaxsrn.spectra.circular.site_pairs import site_pairs
from jaxsrn.spectra.circular.sites import distinct_sites, half_grid, same_site, without_constant_axes
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.singular_pair import Pair, first_of

__all__ = [
    "branch_and_bound_pays",
    "leading_wave",
]


def leading_wave(kernel: Float[Array, "..."], op: CircularConv, excess: float = 0.0) -> tuple[Pair, float]:
    """The leading pair over all sites, by SVDs or by branch and bound up to the allowed `excess`.

    Returns:
      `(pair, excess)`: no singular value exceeds that of the pair by more than this share, 0 for SVDs.
    """
    if math.prod(kernel.shape[:-2]) == op.feature_group_count == 1:
        return _constant_wave(kernel, op), 0.0
    layer = without_constant_axes(op, kernel.shape)
    if branch_and_bound_pays(kernel.shape, layer):
        pair = branch_and_bound(kernel, layer, excess)
    else:
        sites, excess = jnp.asarray(distinct_sites(layer)[0]), 0.0
        values = top_values(half_symbol(kernel, layer)[sites])
        pair = first_of(site_pairs(kernel, layer, sites[jnp.argmax(values)][None])[1])
    return pair._replace(site=same_site(op, layer, pair.site)), excess


def _constant_wave(kernel: Float[Array, "..."], op: CircularConv) -> Pair:
    """The leading pair of a kernel of one tap, whose symbol is one matrix at all sites, in the first phase."""
    pair = leading_of_matrix(kernel.reshape(kernel.shape[-2:]))
    rows, _ = site_shape(op, kernel.shape)
    inputs = jnp.pad(pair.input, (0, rows - pair.input.size))
    dtype = complex_dtype(kernel.dtype)
    return Pair(pair.site, inputs.astype(dtype), pair.output.astype(dtype))


def branch_and_bound_pays(kernel_shape: tuple[int, ...], op: CircularConv) -> bool:
    """Whether branch and bound takes less than an SVD at every site (static)."""
    sites = math.prod(half_grid(op)) * op.feature_group_count
    return svds_are_dear(sites, site_shape(op, kernel_shape))
