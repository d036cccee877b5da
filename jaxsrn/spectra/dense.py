"""The leading pair of a matrix: an SVD, or Lanczos with a proof."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.limits import svds_are_dear, vector_tolerance
from jaxsrn._tools.linalg import matmul, top_pairs
from jaxsrn._tools.proofs import are_below, squared_limit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.operators.base import Dense
from jaxsrn.spectra.images import matrix_free
from jaxsrn.spectra.pair import Pair

__all__ = ["leading_of_matrix"]


def leading_of_matrix(matrix: Float[Array, "in out"]) -> Pair:
    """The leading pair of a matrix that maps rows to columns, as a dense kernel does.

    Small matrices take an SVD. Large ones take Lanczos, and one Cholesky factorization that proves its value; they take
    an SVD only where the proof fails.
    """
    if not svds_are_dear(1, matrix.shape):
        return _by_svd(matrix)
    start = random_start(matrix.shape[:1], matrix.dtype)
    pair = matrix_free(matrix, Dense(), start, vector_tolerance(matrix.dtype)).pair
    limit = squared_limit(max(matrix.shape), matmul(pair.input, matmul(matrix, pair.output)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    proven = are_below(matmul(wide, wide.T)[None, None], limit[None])[0]

    def fall_back(state):
        proven, _ = state
        # What does not change in a loop XLA moves out of it. It does not know that nothing is proven in here.
        return ~proven, _by_svd(jnp.where(proven, 0, matrix))

    # A loop in place of `lax.cond`, which under `vmap` runs both branches.
    return jax.lax.while_loop(lambda state: ~state[0], fall_back, (proven, pair))[1]


def _by_svd(matrix: Float[Array, "in out"]) -> Pair:
    _, rows, columns = top_pairs(matrix[None])
    return Pair(jnp.asarray(0), rows[0], columns[0])
