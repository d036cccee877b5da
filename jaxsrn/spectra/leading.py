"""The leading singular pair of every operator, and the one near a given pair."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import matmul, top_pairs, top_values, unit
from jaxsrn._tools.subspaces import default_tolerance, random_start, search_tolerance
from jaxsrn.operators.maps import CircularConv, Dense, Operator
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.circular.branch_and_bound import (
    are_below,
    branch_and_bound,
    branch_and_bound_pays,
    squared_limit,
    svds_are_dear,
)
from jaxsrn.spectra.padded.search import at_first_contact, search, without_idle_axes
from jaxsrn.spectra.pairs import Pair, as_images, matrix_free, matrix_size, site_pairs

__all__ = ["leading", "leading_wave", "nearby"]

# Entries of an explicit matrix up to which a zero-padded layer's norm is proven: 512 x 512.
_PROVEN_SIZE = 2**18


def _first(pairs: Pair) -> Pair:
    return jax.tree.map(lambda leaf: leaf[0], pairs)


def leading_wave(kernel: Float[Array, "..."], op: CircularConv, excess: float = 0.0) -> tuple[Pair, float]:
    """The leading pair over all sites: by branch and bound, or SVDs where they take less.

    Returns:
      `(pair, excess)`: no singular value exceeds that of the pair by more than that share; at most what was allowed.
    """
    if math.prod(kernel.shape[:-2]) == op.feature_group_count == 1:
        return _constant_wave(kernel, op), 0.0
    layer = _fourier.without_idle_axes(op, kernel.shape)
    if branch_and_bound_pays(kernel.shape, layer):
        pair = Pair(*branch_and_bound(kernel, layer, excess))
    else:
        sites, excess = jnp.asarray(_fourier.distinct_sites(layer)[0]), 0.0
        values = top_values(_fourier.half_symbol(kernel, layer)[sites])
        pair = _first(site_pairs(kernel, layer, sites[jnp.argmax(values)][None])[1])
    return pair._replace(site=_fourier.same_site(op, layer, pair.site)), excess


def _constant_wave(kernel: Float[Array, "..."], op: CircularConv) -> Pair:
    """That of a single tap: its symbol is one matrix everywhere, in the first phase."""
    pair = _leading_of_matrix(kernel.reshape(kernel.shape[-2:]))
    rows, _ = _fourier.site_shape(op, kernel.shape)
    right = jnp.pad(pair.right, (0, rows - pair.right.size))
    dtype = _fourier.complex_dtype(kernel.dtype)
    return Pair(pair.site, right.astype(dtype), pair.left.astype(dtype))


def _leading_of_matrix(matrix: Float[Array, "in out"]) -> Pair:
    """By an SVD; of large matrices only where a Cholesky factorization does not prove what Lanczos finds."""
    if not svds_are_dear(1, matrix.shape):
        return _by_svd(matrix)
    start = random_start(matrix.shape[:1], matrix.dtype)
    pair = matrix_free(matrix, Dense(), start, default_tolerance(matrix.dtype)).pair
    limit = squared_limit(max(matrix.shape), matmul(pair.right, matmul(matrix, pair.left)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    proven = are_below(matmul(wide, wide.T)[None, None], limit[None])[0]

    def fall_back(state):
        proven, _ = state
        # What does not change in a loop XLA moves out of it. It does not know that nothing is proven in here.
        return ~proven, _by_svd(jnp.where(proven, 0, matrix))

    # A loop in place of `lax.cond`, which under `vmap` runs both branches.
    return jax.lax.while_loop(lambda state: ~state[0], fall_back, (proven, pair))[1]


def _by_svd(matrix: Float[Array, "in out"]) -> Pair:
    _, u, v = top_pairs(matrix[None])
    return Pair(jnp.asarray(0), u[0], v[0])


def leading(kernel: Float[Array, "..."], op: Operator, *, tolerance=None, start=None, proven: bool = True) -> Pair:
    """The leading pair of `T(kernel)`, found without any assumption. The kernel's scale must not be extreme.

    Small layers with zero padding are matrices, with a proof; with `proven=False` they are searched as large ones are.
    `tolerance` is the relative residual at which such a search stops, by default `search_tolerance`. With `start`, a
    right vector, the search starts there alone: a fixed random part is mixed in, so that a start that happens to be
    another singular vector cannot trap it.
    """
    if isinstance(op, Dense):
        return _leading_of_matrix(kernel)
    if isinstance(op, CircularConv):
        return leading_wave(kernel, op)[0]
    small = without_idle_axes(op, kernel.shape)
    if small.input_shape != op.input_shape:
        return at_first_contact(leading(kernel, small, tolerance=tolerance, proven=proven), op, kernel.shape)
    is_small = matrix_size(op, kernel.shape) <= _PROVEN_SIZE
    if (proven and is_small) or math.prod(op.input_shape) == 1:
        pair = _leading_of_matrix(op.to_dense(kernel).T)
        return as_images(pair.right, pair.left, op, kernel.shape)
    tolerance = search_tolerance(kernel.dtype) if tolerance is None else tolerance
    if start is None:
        return search(kernel, op, tolerance)
    noise = unit(random_start(op.in_shape(kernel.shape), kernel.dtype))
    return matrix_free(kernel, op, unit(start) + 1e-3 * noise, tolerance).pair


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair within reach of `pair`: at its site (circular), or in the Krylov space that it starts."""
    if isinstance(op, CircularConv):
        return _first(site_pairs(kernel, op, pair.site[None])[1])
    return matrix_free(kernel, op, pair.right, tolerance).pair
