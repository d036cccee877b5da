"""Stable rank normalization: of a matrix (Sanyal et al. 2020), and of any layer, exactly (Zheng et al. 2025, eq. 7)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.linalg import safe_sqrt
from jaxsrn.normalization.closed_form import Problem, closed_form, functional, solve
from jaxsrn.normalization.raising import raised
from jaxsrn.normalization.starts import survey
from jaxsrn.operators.maps import Dense, Operator
from jaxsrn.spectra import leading as _leading
from jaxsrn.spectra import pairs as _pairs
from jaxsrn.spectra.norms import SingularTriplet, check_triplet, frozen_value
from jaxsrn.spectra.ranks import stable_rank_range

__all__ = ["SRNResult", "srn", "srnc", "srnc_tanay"]


class SRNResult(NamedTuple):
    """A kernel of prescribed stable rank, and what is known of it.

    The numbers are those of the solution in float32 or wider, before the kernel is rounded to a narrower dtype.

    Attributes:
      kernel: the normalized kernel, in the dtype of the input.
      stable_rank: its stable rank.
      spectral_norm: its spectral norm.
      distance: `||T(K) - T(A)||_F / ||T(A)||_F`.
      gap: `distance - gap` is a proven lower bound on the distance of every kernel that meets the constraints
        (equal to `distance`, which proves nothing, where none was found); with zero padding above 2**18 entries of
        the explicit matrix as far as the kernel's norm, which is searched without a proof, is right.
      residual: the larger of `|stable_rank / target - 1|` and `|spectral_norm / M - 1|`, over the constraints asked;
        of a kernel returned unchanged, how far its stable rank is below the target.
      num_steps: minorise-maximise passes taken; 0 for matrices.
      num_preserved: leading singular values kept.
      feasible: whether the constraints can hold together where the search ended; how far they do says `residual`. If
        not, the kernel has the lowest (raising: the highest) stable rank found.
    """

    kernel: Shaped[Array, "..."]
    stable_rank: Float[Array, "..."]
    spectral_norm: Float[Array, "..."]
    distance: Float[Array, "..."]
    gap: Float[Array, "..."]
    residual: Float[Array, "..."]
    num_steps: Int[Array, "..."]
    num_preserved: Int[Array, "..."]
    feasible: Bool[Array, "..."]


def _ratio(numerator, denominator):
    """`numerator / denominator`, 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))


def _deviation(value, wanted):
    """`|value / wanted - 1|`, 0 where nothing is wanted of a zero kernel."""
    return jnp.where(wanted == 0, 0.0, jnp.abs(_ratio(value, wanted) - 1))


# Matrices


def srn(matrix: Kernel, target, *, num_preserved: int = 1, raise_rank: bool = False) -> SRNResult:
    """The matrix closest to `matrix` with stable rank `target` and its `num_preserved` leading singular values.

    Sanyal, Torr, Dokania 2020, Theorem 1: with `S1` the leading `max(1, k)` terms of the SVD and `S2` the rest, the
    optimum is `g1 S1 + g2 S2`. `k = 1` is the closest that keeps the spectral norm, `k = 0` the closest of all (its
    spectral norm grows). A `num_preserved` too large for the target keeps the largest feasible one, as their
    Algorithm 1; the result says which. Where `stable_rank <= target` the matrix is returned unchanged.

    With `raise_rank` a target above the stable rank is met too, keeping the spectral norm: the closest matrix is
    `U min(tau S, s_1) V^T` (a convex problem), filled up along null directions where the rank does not suffice.

    Args:
      matrix: `(c_in, c_out)`.
      target: the stable rank wanted, at least 1; traced.
      num_preserved: `k >= 0`; static.
      raise_rank: static.

    Returns:
      An `SRNResult`, with `gap = 0`. A target below 1, or above `min(c_in, c_out)` when raising, is infeasible.
      Derivatives hold the singular vectors constant: exact for the scalars, a surrogate for the matrix.

    Raises:
      ValueError: a matrix of the wrong rank or dtype, a bad target, a negative `num_preserved`.
    """
    matrix = kernel_array(matrix, Dense())
    num_preserved = static_int(num_preserved, "num_preserved", 0)
    target = positive_scalar(target, "target", float_dtype(matrix.dtype))
    return _srn(matrix, target, num_preserved, bool(raise_rank))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _srn(matrix, target, num_preserved, raise_rank):
    a, scale = _pairs.rescaled(matrix.astype(float_dtype(matrix.dtype)), Dense())
    u, _, vt = (lax.stop_gradient(part) for part in jnp.linalg.svd(lax.stop_gradient(a), full_matrices=False))
    # The singular values as functions of the matrix, with the vectors held constant.
    s = jnp.einsum("ij,ik,kj->j", u, a, vt.T, precision=lax.Precision.HIGHEST)
    rank = _ratio(jnp.sum(s**2), s[0] ** 2)
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
    change = jnp.matmul(u * (values - s)[None], vt, precision=lax.Precision.HIGHEST)
    new_rank = _ratio(jnp.sum(values**2), values[0] ** 2)
    result = SRNResult(
        kernel=a + change,
        stable_rank=new_rank,
        spectral_norm=values[0],
        distance=_ratio(safe_sqrt(jnp.sum((values - s) ** 2)), safe_sqrt(jnp.sum(s**2))),
        gap=jnp.zeros_like(rank),
        residual=jnp.maximum(_deviation(new_rank, jnp.where(rank == 0, 0.0, target)), _deviation(values[0], wanted)),
        num_steps=jnp.asarray(0),
        num_preserved=jnp.where(unchanged, num_preserved, preserved),
        feasible=feasible,
    )
    return in_own_scale(result, scale, matrix, Dense(), unchanged)


def _lowered_values(s: Float[Array, " n"], target, num_preserved: int):
    """Theorem 1 on the singular values: `(new values, number preserved)`."""
    squares = s**2
    head = jnp.cumsum(squares)
    tail = jnp.cumsum(squares[::-1])[::-1]
    if num_preserved == 0:
        s1, s2 = s[0], safe_sqrt(tail[1]) if len(s) > 1 else jnp.zeros_like(s[0])
        root = safe_sqrt(target - 1)
        g1 = (1 + root * _ratio(s2, s1)) / jnp.maximum(target, 1)
        g2 = g1 * root * _ratio(s1, s2)
        return jnp.where(jnp.arange(len(s)) == 0, g1, g2) * s, jnp.asarray(0)
    # Feasible iff the leading k alone do not exceed the target; k = 1 always is the last resort.
    # Rounding must not decide where the two are equal.
    room = 1 + 16 * jnp.finfo(s.dtype).eps
    fits = head[: min(num_preserved, len(s))] <= target * squares[0] * room
    k = jnp.maximum(jnp.sum(fits), 1)
    kept = jnp.arange(len(s)) < k
    rest = jnp.where(k < len(s), tail[jnp.minimum(k, len(s) - 1)], 0.0)
    g2 = _ratio(safe_sqrt(target * squares[0] - head[k - 1]), safe_sqrt(rest))
    return jnp.where(kept, s, g2 * s), k


def _raised_values(s: Float[Array, " n"], target):
    """`min(tau s, s_1)` with `sum = target s_1^2`; null values are filled evenly where `tau` alone cannot reach it."""
    largest, n = s[0], len(s)
    tail = jnp.append(jnp.cumsum((s**2)[::-1])[::-1], 0.0)
    # With the first j values clipped, the others carry (target - j) s_1^2; the right j clips just those that exceed.
    j = jnp.arange(1, n + 1, dtype=s.dtype)
    tau = jnp.where(tail[1:] > 0, safe_sqrt(_ratio((target - j) * largest**2, tail[1:])), jnp.inf)
    following = jnp.append(s[1:], 0.0)
    consistent = (tau * jnp.where(following > 0, following, 0.0) <= largest) & (target >= j) & jnp.isfinite(tau)
    tau = tau[jnp.argmax(consistent)]
    null = s <= n * jnp.finfo(s.dtype).eps * largest
    num_null = jnp.sum(null).astype(s.dtype)
    filler = jnp.minimum(largest * safe_sqrt(_ratio(target - (n - num_null), num_null)), largest)
    clipped = jnp.minimum(jnp.where(jnp.isfinite(tau), tau, 1.0) * s, largest)
    return jnp.where(target > n - num_null, jnp.where(null, filler, largest), clipped)


# Any layer


def srnc(
    kernel: Kernel,
    op: Operator,
    target,
    *,
    keep_norm: bool = True,
    raise_rank: bool = False,
    max_steps: int = 500,
    tolerance=None,
    initial: SingularTriplet | _pairs.Pair | None = None,
) -> SRNResult:
    """The kernel closest to `kernel`, of the same support, whose layer has stable rank `target` and the same norm.

    Solves Zheng et al. 2025, eq. 7: minimise `||T(K) - T(A)||_F` subject to `srank(T(K)) = target` and
    `||T(K)||_2 = ||T(A)||_2`, by a closed form per singular pair inside a minorise-maximise iteration. Circular
    convolutions: all frequencies and phases are scanned, which is the global solution with one channel; otherwise
    the best few are followed, and `gap` says how far from optimal the result can be at most. Zero padding: several
    starts. Dense: `srn`, with one value preserved (`keep_norm`) or none. Where `stable_rank <= target` the kernel is
    returned unchanged; taps that never meet a sample of the image always are.

    With `raise_rank` a target above the stable rank is met too, keeping the norm: `K = P(tau A)`, with `P` the
    projection on the kernels of norm at most `||T(A)||_2`, at the `tau` that gives the stable rank. That is a convex
    problem, globally solved (`gap` by its duality gap), up to the stable rank `r_inf` of the limit `tau -> infinity`.
    A target beyond it is infeasible here, and the result is that of the largest `tau` tried, about `eps ** -0.25`: its
    `stable_rank` is reached, and stands for the limit `r_inf`, from which rounding at so large a `tau` keeps it up to
    two percent in float64. (Kernels with a larger stable rank can exist: `surrogate.solve` looks for them.)

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      target: the stable rank wanted; traced. See `stable_rank_range` for what is possible.
      keep_norm: static; `False` drops the constraint on the norm: the closest kernel with `srank = target`.
      raise_rank: static; also meet a target above the stable rank.
      max_steps: static; passes of the iteration; raising: SVDs of all matrices in one projection.
      tolerance: relative change of the kernel in a pass at which to stop, default `eps ** 0.6`; traced. The
        constraints are met to about its square. Raising: the relative error of the stable rank.
      initial: where to start, in place of the scan: a singular triplet, in training that of the last result; or the
        compact pair of a training state, `state.normalized.pair` of `srnc_state`. Raising does not use it.

    Returns:
      An `SRNResult`. Infeasible or not converged: said there, by `feasible` and `residual`. Derivatives hold the
      singular vectors constant: exact for the scalars, a surrogate for the kernel. Of a raised convolution they are
      those of `project_spectral_ball`, with the stable rank held.

    Raises:
      ValueError: a kernel, target or `initial` that does not fit, aliased taps, raising without `keep_norm`.
    """
    kernel = kernel_array(kernel, op)
    op.check_not_aliased(kernel.shape)
    dtype = float_dtype(kernel.dtype)
    target = positive_scalar(target, "target", dtype)
    tolerance = float(jnp.finfo(dtype).eps) ** 0.6 if tolerance is None else tolerance
    tolerance = positive_scalar(tolerance, "tolerance", dtype)
    max_steps = static_int(max_steps, "max_steps")
    ensure(
        keep_norm or not raise_rank, "keep_norm: got False with raise_rank=True, expected True; raising keeps the norm."
    )
    if initial is not None:
        _check_initial(initial, op, kernel.shape)
    if isinstance(op, Dense):
        return _srn(kernel, target, 1 if keep_norm else 0, bool(raise_rank))
    return (_srnc_raised if raise_rank else _srnc)(kernel, op, target, initial, tolerance, bool(keep_norm), max_steps)


def _check_initial(initial, op: Operator, kernel_shape) -> None:
    if not isinstance(initial, _pairs.Pair):
        return check_triplet(initial, op, kernel_shape)
    shapes, expected = jax.tree.map(jnp.shape, initial), _pairs.pair_shapes(op, kernel_shape)
    return ensure(shapes == expected, f"initial: got {shapes}, expected {expected} for {op}; take it from srnc_state.")


def _as_pair(initial: SingularTriplet | _pairs.Pair, op: Operator, kernel: Float[Array, "..."]) -> _pairs.Pair:
    if isinstance(initial, _pairs.Pair):
        return initial
    return _pairs.pair_of_images(
        initial.left.astype(kernel.dtype), initial.right.astype(kernel.dtype), op, kernel.shape
    )


@functools.partial(jax.jit, static_argnums=(5, 6))
def _srnc(*args):
    return lowered_with_pair(*args)[0]


def lowered_with_pair(kernel, op, target, initial, tolerance, keep_norm, max_steps) -> tuple[SRNResult, _pairs.Pair]:
    """`srnc` of checked arguments, and the pair that its kernel was made with: where the next can start."""
    a, scale = _pairs.rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    problem, own = problem_of(a, op, target)
    result, pair, unchanged = _lowered(problem, op, own, initial, tolerance, keep_norm, max_steps)
    return in_own_scale(result, scale, kernel, op, unchanged), pair


def _lowered(problem: Problem, op: Operator, own: _pairs.Pair, initial, tolerance, keep_norm: bool, max_steps: int):
    """The solution, the pair that it was made with, and whether the kernel is unchanged."""
    a = problem.kernel
    frozen, tolerance = lax.stop_gradient((problem, tolerance))
    starts, bound = survey(frozen, op, own)
    if initial is not None:
        starts = jax.tree.map(lambda leaf: leaf[None], _as_pair(lax.stop_gradient(initial), op, a))
    solution = lax.stop_gradient(solve(frozen, op, starts, max_steps, tolerance))
    # The closed form once more, now as a function of the kernel: what derivatives see.
    direction = lax.stop_gradient(functional(solution.pair, op, frozen.weights, a.shape))
    lowered = closed_form(problem, direction).kernel
    if not keep_norm:
        lowered = lowered * _ratio(problem.inner(lowered, a), problem.inner(lowered, lowered))
    squared = problem.inner(a, a)
    unchanged = problem.target >= _ratio(squared, problem.norm**2)
    result = jnp.where(unchanged, a, lowered)
    feasible = unchanged | (solution.candidate.feasible & jnp.isfinite(solution.norm))
    norm = jnp.where(unchanged, problem.norm, frozen_value(result, op, solution.leading))
    distance = _ratio(safe_sqrt(problem.inner(result - a, result - a)), safe_sqrt(squared))
    gap = _gap(frozen, bound, lax.stop_gradient(distance), keep_norm, feasible, unchanged)
    result = _measured(result, problem, norm, distance, gap, solution.num_steps, keep_norm, feasible)
    return result, solution.pair, unchanged


@functools.partial(jax.jit, static_argnums=(5, 6))
def _srnc_raised(kernel, op, target, initial, tolerance, keep_norm, max_steps):
    a, scale = _pairs.rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    problem, own = problem_of(a, op, target)
    raises = (target > _ratio(problem.inner(a, a), problem.norm**2)) & (problem.norm > 0)
    # Under vmap both branches are computed: nothing may be divided by the norm of a zero kernel.
    guarded = problem._replace(norm=jnp.where(problem.norm == 0, 1.0, problem.norm))

    def lower() -> SRNResult:
        result, _, unchanged = _lowered(problem, op, own, initial, tolerance, keep_norm, max_steps)
        return in_own_scale(result, scale, kernel, op, unchanged)

    def raise_() -> SRNResult:
        return in_own_scale(_raised(guarded, op, own, max_steps, tolerance), scale, kernel, op, jnp.asarray(False))

    return lax.cond(raises, raise_, lower)


def _raised(problem: Problem, op: Operator, own: _pairs.Pair, max_steps: int, tolerance) -> SRNResult:
    found = raised(problem, op, own, max_steps, tolerance)
    change, squared = found.kernel - problem.kernel, problem.inner(problem.kernel, problem.kernel)
    distance = _ratio(safe_sqrt(problem.inner(change, change)), safe_sqrt(squared))
    fixed, known = lax.stop_gradient((problem, distance))
    gap = _gap(fixed, found.squared_bound, known, True, found.feasible, False)
    norm = frozen_value(found.kernel, op, found.leading)
    return _measured(found.kernel, problem, norm, distance, gap, found.num_steps, True, found.feasible)


def problem_of(a: Float[Array, "..."], op: Operator, target) -> tuple[Problem, _pairs.Pair]:
    """Problem (7) for a kernel, its norm as a function of the kernel, and the leading pair."""
    own = _leading.leading(lax.stop_gradient(a), op)
    weights = op.frobenius_weights(a.shape, a.dtype)
    return Problem(a, weights, target, frozen_value(a, op, own)), own


def _gap(problem: Problem, bound, distance, keep_norm: bool, feasible, unchanged):
    """How much closer than `distance` (relative) a feasible kernel could be at most."""
    squared = problem.inner(problem.kernel, problem.kernel)
    bound = jnp.maximum(bound, 0)
    if not keep_norm:
        # In terms of the angle to `A`: the distance from `A` to the ray is `|A| sin`.
        radius, size = problem.norm * safe_sqrt(problem.target), safe_sqrt(squared)
        versine = _ratio(jnp.maximum(bound - (size - radius) ** 2, 0), 2 * radius * size)
        bound = squared * versine * (2 - versine)
    gap = jnp.maximum(distance - _ratio(safe_sqrt(bound), safe_sqrt(squared)), 0)
    return jnp.where(unchanged, 0.0, jnp.where(feasible, gap, distance))


def in_own_scale(result: SRNResult, scale, kernel: Shaped[Array, "..."], op: Operator, unchanged) -> SRNResult:
    """The result for the kernel in its own scale and dtype; what is unchanged, to the last bit."""
    keep = unchanged | jnp.asarray(op.tap_counts(kernel.shape) == 0)
    own = jnp.where(keep, kernel, (result.kernel * scale).astype(kernel.dtype))
    return result._replace(kernel=own, spectral_norm=result.spectral_norm * scale)


def _measured(result, problem, norm, distance, gap, num_steps, keep_norm, feasible) -> SRNResult:
    rank = _ratio(problem.inner(result, result), norm**2)
    wanted = jnp.where(problem.norm == 0, 0.0, problem.target)
    residual = _deviation(rank, wanted)
    if keep_norm:
        residual = jnp.maximum(residual, _deviation(norm, problem.norm))
    return SRNResult(
        kernel=result,
        stable_rank=rank,
        spectral_norm=norm,
        distance=distance,
        gap=gap,
        residual=residual,
        num_steps=num_steps,
        num_preserved=jnp.asarray(1 if keep_norm else 0),
        feasible=feasible,
    )


def srnc_tanay(kernel: Kernel, op: Operator, target) -> SRNResult:
    """The original SRN-C (Tanay et al. 2022; Zheng et al. 2025, eq. 5-6), kept to show what it misses.

    `a1 + gamma (a - a1)` with `a1 = sigma grad_K <u, T(K) v>` and `gamma = sqrt(target - 1) sigma / ||T(a - a1)||_F`,
    by analogy with the dense case, where `T(a1)` would be the leading rank-one term. For a convolution it is not: the
    direction is right and the length is wrong, so both the stable rank and the norm are missed, by `residual`.

    Args, errors: as `srnc`. A kernel with `stable_rank <= target` is returned unchanged.

    Returns:
      An `SRNResult`; `distance - gap` is the same proven bound as `srnc`'s for the true problem, so `gap` is negative
      where the constraints are missed on the near side. `feasible` says whether the target is in
      `stable_rank_range`, not that it was met.
    """
    kernel = kernel_array(kernel, op)
    op.check_not_aliased(kernel.shape)
    return _srnc_tanay(kernel, op, positive_scalar(target, "target", float_dtype(kernel.dtype)))


@jax.jit
def _srnc_tanay(kernel, op, target):
    a, scale = _pairs.rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    problem, own = problem_of(a, op, target)
    first = problem.norm * lax.stop_gradient(_pairs.plain_gradient(own, op, a.shape))
    rest = a - first
    gamma = _ratio(safe_sqrt(target - 1) * problem.norm, safe_sqrt(problem.inner(rest, rest)))
    unchanged = target >= _ratio(problem.inner(a, a), problem.norm**2)
    result = assessed(jnp.where(unchanged, a, first + gamma * rest), problem, own, op, jnp.asarray(0))
    return in_own_scale(result._replace(gap=jnp.where(unchanged, 0.0, result.gap)), scale, kernel, op, unchanged)


def assessed(candidate, problem: Problem, own: _pairs.Pair, op: Operator, num_steps) -> SRNResult:
    """What is known of a candidate for (7), whoever found it; `own` is the leading pair of the original kernel."""
    leading = _leading.leading(lax.stop_gradient(candidate), op)
    change, squared = candidate - problem.kernel, problem.inner(problem.kernel, problem.kernel)
    distance = _ratio(safe_sqrt(problem.inner(change, change)), safe_sqrt(squared))
    low, high = stable_rank_range(candidate.shape, op)
    feasible = (problem.target >= low) & (problem.target <= high)
    bound = _ratio(safe_sqrt(survey(lax.stop_gradient(problem), op, own).bound), safe_sqrt(squared))
    # The bound is one for targets below the stable rank of the original.
    proves = jnp.isfinite(bound) & (problem.target < _ratio(squared, problem.norm**2))
    gap = jnp.where(proves, distance - bound, distance)
    norm = frozen_value(candidate, op, leading)
    return _measured(candidate, problem, norm, distance, gap, num_steps, True, feasible)
