"""`srn`, stable rank normalization of a matrix by one SVD (Sanyal, Torr, Dokania 2020, Theorem 1), and raising.

A matrix keeps its singular vectors, so the problem is one of its singular values and has a closed form. Raising is
beyond the paper.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.held import held
from jaxsrn._tools.linalg import einsum, matmul, ratio, safe_sqrt, thin_svd
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.normalization.result import SRNResult, deviation, in_own_scale
from jaxsrn.operators.base import Dense
from jaxsrn.spectra.singular_pair import rescaled

__all__ = [
    "srn",
    "srn_of_matrix",
]


def srn(matrix: Kernel, target, *, num_preserved: int = 1, raise_rank: bool = False) -> SRNResult:
    """The matrix closest to `matrix` with stable rank `target` and its `num_preserved` leading singular values.

    Sanyal, Torr, Dokania 2020, Theorem 1: with `S1` the leading `max(1, k)` terms of the SVD and `S2` the rest, the
    optimum is `g1 S1 + g2 S2`. The closest matrix that keeps the spectral norm is that of `k = 1`; the closest of all,
    whose spectral norm is larger, is that of `k = 0`. Where `num_preserved` is too large for the target, the largest
    feasible one is taken, as in their Algorithm 1; the result says which. A matrix with `stable_rank <= target` is
    returned unchanged.

    With `raise_rank` a target above the stable rank is met too, and the spectral norm is kept. The closest matrix is
    `U min(tau S, s_1) V^T` (a convex problem), filled up along null directions where the rank does not suffice.

    Args:
      matrix: `(c_in, c_out)`.
      target: the stable rank wanted, at least 1; traced.
      num_preserved: `k >= 0`; static.
      raise_rank: static. Whether to meet a target above the stable rank too.

    Returns:
      An `SRNResult`, with `gap = 0`. A target below 1, or above `min(c_in, c_out)` when raising, is infeasible.
      Derivatives hold the singular vectors constant: they are exact for the scalars and a surrogate for the matrix. A
      second derivative is that of the first one: exact for the scalars where the singular values are simple, and not
      symmetric for the matrix.

    Raises:
      ValueError: a matrix of the wrong rank or dtype, a bad target, a negative `num_preserved`.

    Examples:
      >>> import jax.numpy as jnp, jaxsrn
      >>> print(jnp.diag(jaxsrn.srn(jnp.eye(3), 2.0).kernel).round(4))
      [1.     0.7071 0.7071]
    """
    matrix = kernel_array(matrix, Dense())
    num_preserved = static_int(num_preserved, "num_preserved", 0)
    target = positive_scalar(target, "target", float_dtype(matrix.dtype))
    return srn_of_matrix(matrix, target, num_preserved, bool(raise_rank))


@functools.partial(program, static_argnums=(2, 3), brief=True)
def srn_of_matrix(matrix, target, num_preserved, raise_rank):
    """`srn` for checked arguments."""
    a, scale = rescaled(matrix, Dense())
    u, _, vt = thin_svd(lax.stop_gradient(a))
    # The singular values as functions of the matrix, with the vectors held constant.
    s = held(_values, _turning, a, (u, vt))
    rank = ratio(jnp.sum(s**2), s[0] ** 2)
    lowered, preserved = _lowered_values(s, target, num_preserved)
    feasible, unchanged = (target >= 1) & jnp.isfinite(rank), target >= rank
    values = jnp.where(unchanged, s, lowered)
    wanted = jnp.where(unchanged | (preserved > 0), s[0], lowered[0])
    if raise_rank:
        raises = (target > rank) & (s[0] > 0)
        values = jnp.where(raises, _raised_values(s, target), values)
        preserved = jnp.where(raises, 1, preserved)
        feasible = jnp.where(raises, target <= len(s), feasible)
        unchanged = unchanged & ~raises
    change = held(_assembled, _moved, (a, values - s), (u, vt))
    new_rank = ratio(jnp.sum(values**2), values[0] ** 2)
    result = SRNResult(
        kernel=a + change,
        stable_rank=new_rank,
        spectral_norm=values[0],
        distance=ratio(safe_sqrt(jnp.sum((values - s) ** 2)), safe_sqrt(jnp.sum(s**2))),
        # Zero, or NaN where the matrix has one.
        gap=jnp.where(jnp.isnan(target), target, 0 * rank),
        residual=jnp.where(rank == 0, 0.0, jnp.maximum(deviation(new_rank, target), deviation(values[0], wanted))),
        num_steps=jnp.asarray(0, jnp.int32),
        num_preserved=jnp.where(unchanged, min(num_preserved, len(s)), preserved),
        feasible=feasible,
    )
    return in_own_scale(result, scale, matrix, Dense(), unchanged)


# The singular vectors, held constant by first derivatives (`held.py`)


def _values(a: Float[Array, "in out"], vectors) -> Float[Array, " n"]:
    u, vt = vectors
    # Products of two at a time are dot products, which round less than one sum of all (`inner`).
    return einsum("ij,ij->j", u, matmul(a, vt.mT))


def _assembled(matrix_and_values, vectors) -> Float[Array, "in out"]:
    u, vt = vectors
    return matmul(u * matrix_and_values[1][None], vt)


def _moved(matrix_and_values, vectors):
    return _turning(matrix_and_values[0], vectors)


@jax.custom_jvp
def _turning(a: Float[Array, "in out"], vectors):
    """The singular vectors `(u, vt)` of `a` with their derivative; equal singular values do not turn each other's."""
    return vectors


@_turning.defjvp
def _turning_jvp(primals, tangents):
    a, (u, vt) = primals
    u, vt = _turning(a, (u, vt))
    s, v, da = _values(a, (u, vt)), vt.T, tangents[0]
    inside = matmul(u.T, matmul(da, v))
    differences = s[None, :] ** 2 - s[:, None] ** 2
    same = jnp.abs(differences) <= vector_tolerance(s.dtype) * s[0] ** 2
    weights = jnp.where(same, 0.0, 1 / jnp.where(same, 1.0, differences))
    of_u = matmul(u, weights * (inside * s[None, :] + s[:, None] * inside.T))
    of_v = matmul(v, weights * (s[:, None] * inside + inside.T * s[None, :]))
    # What turns out of the span of the vectors.
    of_u = of_u + ratio(matmul(da, v) - matmul(u, inside), s[None, :])
    of_v = of_v + ratio(matmul(da.T, u) - matmul(v, inside.T), s[None, :])
    return (u, vt), (of_u, of_v.T)


# The singular values


def _lowered_values(s: Float[Array, " n"], target, num_preserved: int):
    """Theorem 1 for the singular values: `(new values, number preserved)`."""
    squares = s**2
    head = jnp.cumsum(squares)
    tail = jnp.cumsum(squares[::-1])[::-1]
    if num_preserved == 0:
        s1, s2 = s[0], safe_sqrt(tail[1]) if len(s) > 1 else jnp.zeros_like(s[0])
        root = safe_sqrt(target - 1)
        g1 = (1 + root * ratio(s2, s1)) / jnp.maximum(target, 1)
        g2 = g1 * root * ratio(s1, s2)
        return jnp.where(jnp.arange(len(s)) == 0, g1, g2) * s, jnp.asarray(0, jnp.int32)
    # A number k is feasible where the leading k values alone do not exceed the target; where none is, k = 1 is taken.
    # The room keeps rounding from deciding where the two are equal.
    room = 1 + 16 * jnp.finfo(s.dtype).eps
    fits = head[: min(num_preserved, len(s))] <= target * squares[0] * room
    k = jnp.maximum(jnp.sum(fits), 1)
    kept = jnp.arange(len(s)) < k
    rest = jnp.where(k < len(s), tail[jnp.minimum(k, len(s) - 1)], 0.0)
    g2 = ratio(safe_sqrt(target * squares[0] - head[k - 1]), safe_sqrt(rest))
    return jnp.where(kept, s, g2 * s), k


def _raised_values(s: Float[Array, " n"], target):
    """`min(tau s, s_1)` of squared norm `target s_1^2`; null values are filled evenly where no `tau` suffices."""
    largest, n, eps = s[0], len(s), jnp.finfo(s.dtype).eps
    # Values that are 0 but for rounding take no part, and rounding does not decide where two numbers are equal.
    null, room = s <= n * eps * largest, 1 + 16 * eps
    num_null, own = jnp.sum(null).astype(s.dtype), jnp.where(null, 0.0, s)
    tail = jnp.append(jnp.cumsum((own**2)[::-1])[::-1], 0.0)
    # Where the first j values are clipped, the others carry (target - j) s_1^2. The right j clips just those above s_1.
    j = jnp.arange(1, n + 1, dtype=s.dtype)
    tau = jnp.where(tail[1:] > 0, safe_sqrt(ratio((target - j) * largest**2, tail[1:])), jnp.inf)
    following = jnp.append(own[1:], 0.0)
    clips_those = tau * jnp.where(following > 0, following, 0.0) <= largest * room
    consistent = clips_those & (target >= j) & jnp.isfinite(tau)
    tau = tau[jnp.argmax(consistent)]
    filler = jnp.minimum(largest * safe_sqrt(ratio(target - (n - num_null), num_null)), largest)
    clipped = jnp.minimum(jnp.where(jnp.isfinite(tau), tau, 1.0) * s, largest)
    fills = (target * room >= n - num_null) | ~jnp.any(consistent)
    return jnp.where(fills, jnp.where(null, filler, largest), clipped)
