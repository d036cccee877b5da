"""The leading pair of a matrix: an SVD where the matrix is small, else the Lanczos method with a proof.

The Lanczos method (`_tools/lanczos.py`) finds a singular value at a fraction of the cost of `jnp.linalg.svd`, but
could miss the largest. One Cholesky factorization of the smaller Gram matrix proves that none is larger.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import by_largest, matmul, top_pairs
from jaxsrn._tools.programs import program
from jaxsrn._tools.proofs import are_below, squared_limit
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import svds_are_dear, vector_tolerance
from jaxsrn.operators.base import Dense
from jaxsrn.spectra.common_shapes import in_common_shape
from jaxsrn.spectra.image_pairs import matrix_free
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["leading_of_dense", "leading_of_matrix"]


def leading_of_dense(kernel: Float[Array, "in out"]) -> Pair:
    """The leading pair of a dense layer whose kernel is of any scale; called eagerly, of its common shape."""
    filled, *_ = in_common_shape(kernel, Dense())
    pair = _leading_of_dense(filled)
    if filled is kernel:
        return pair
    # A tall matrix was transposed.
    first, second = (pair.input, pair.output) if kernel.shape[0] <= kernel.shape[1] else (pair.output, pair.input)
    return Pair(pair.site, first[: kernel.shape[0]], second[: kernel.shape[1]])


@functools.partial(program, brief=True)
def _leading_of_dense(kernel):
    return leading_of_matrix(by_largest(kernel)[0])


def leading_of_matrix(matrix: Float[Array, "in out"]) -> Pair:
    """The leading pair of a matrix that maps rows to columns, as a dense kernel does.

    Small matrices take an SVD. Large ones take the Lanczos method and one Cholesky factorization that proves its value,
    and an SVD only where the proof fails.
    """
    if not svds_are_dear(1, matrix.shape):
        return _by_svd(matrix)
    start = fixed_start(matrix.shape[:1], matrix.dtype)
    pair = matrix_free(matrix, Dense(), start, vector_tolerance(matrix.dtype)).pair
    limit = squared_limit(max(matrix.shape), matmul(pair.input, matmul(matrix, pair.output)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    proven = are_below(matmul(wide, wide.T)[None, None], limit[None])[0]

    def fall_back(state):
        proven, _ = state
        # XLA moves out of a loop what does not depend on its state, so the SVD must depend on `proven`.
        return ~proven, _by_svd(jnp.where(proven, 0, matrix))

    # The loop stands in place of `lax.cond`, which runs both branches under `vmap`.
    return jax.lax.while_loop(lambda state: ~state[0], fall_back, (proven, pair))[1]


def _by_svd(matrix: Float[Array, "in out"]) -> Pair:
    """The leading pair by an SVD of the whole matrix."""
    _, rows, columns = top_pairs(matrix[None])
    return Pair(None, rows[0], columns[0])
