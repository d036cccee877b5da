"""The leading singular pair of every operator, and the one near a given pair."""

from __future__ import annotations

import math

from jaxtyping import Array, Float

from jaxsrn._tools.limits import PROVEN_SIZE, search_tolerance
from jaxsrn._tools.linalg import unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.svd_or_branch_and_bound import first_of, leading_wave
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.images import as_images, matrix_free
from jaxsrn.spectra.padded.idle_axes import at_first_contact, without_idle_axes
from jaxsrn.spectra.padded.search import search
from jaxsrn.spectra.pair import Pair, matrix_size
from jaxsrn.spectra.pairs import site_pairs

__all__ = [
    "leading_pair",
    "nearby",
]


def leading_pair(kernel: Float[Array, "..."], op: Operator, *, tolerance=None, start=None, proven: bool = True) -> Pair:
    """The leading pair of `T(kernel)`, found without any assumption. The kernel's scale must not be extreme.

    Small layers with zero padding are matrices, with a proof; with `proven=False` they are searched as large ones are.
    `tolerance` is the relative residual at which such a search stops, by default `search_tolerance`. With `start`, a
    right vector, the search starts there alone: a fixed random part is mixed in, so that a start that happens to be
    another singular vector cannot trap it.
    """
    if isinstance(op, Dense):
        return leading_of_matrix(kernel)
    if isinstance(op, CircularConv):
        return leading_wave(kernel, op)[0]
    small = without_idle_axes(op, kernel.shape)
    if small.input_shape != op.input_shape:
        return at_first_contact(leading_pair(kernel, small, tolerance=tolerance, proven=proven), op, kernel.shape)
    is_small = matrix_size(op, kernel.shape) <= PROVEN_SIZE
    if (proven and is_small) or math.prod(op.input_shape) == 1:
        pair = leading_of_matrix(op.to_dense(kernel).T)
        return as_images(pair.right, pair.left, op, kernel.shape)
    tolerance = search_tolerance(kernel.dtype) if tolerance is None else tolerance
    if start is None:
        return search(kernel, op, tolerance)
    noise = unit(random_start(op.in_shape(kernel.shape), kernel.dtype))
    return matrix_free(kernel, op, unit(start) + 1e-3 * noise, tolerance).pair


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair within reach of `pair`: at its site (circular), or in the Krylov space that it starts."""
    if isinstance(op, CircularConv):
        return first_of(site_pairs(kernel, op, pair.site[None])[1])
    return matrix_free(kernel, op, pair.right, tolerance).pair
