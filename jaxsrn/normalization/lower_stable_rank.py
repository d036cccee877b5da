"""`srnc`, exact stable rank normalization of any layer (Zheng et al. 2025, eq. 7): what it takes, solves and returns.

Targets below the stable rank are met by `iteration.py` from the starts of `starts.py`, targets above it by
`raise_stable_rank.py`, and those of matrices by `matrices.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.held import held
from jaxsrn._tools.linalg import divisor, ratio
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import MAX_PASSES, kernel_tolerance
from jaxsrn.normalization.closed_form import Problem, closed_form, functional, scaled_problem
from jaxsrn.normalization.implicit import determined_pair
from jaxsrn.normalization.iteration import Fixpoint, minorise_maximise
from jaxsrn.normalization.matrices import srn_of_matrix
from jaxsrn.normalization.raise_stable_rank import raised
from jaxsrn.normalization.result import SRNResult, in_own_scale, in_shape, measured, proven_gap
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import pair_value, with_free_frequency
from jaxsrn.spectra.norms import SingularTriplet, check_triplet
from jaxsrn.spectra.pairs_by_kind import pair_of_floats, pair_of_images, pair_shapes
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "fixpoint_of",
    "result_of",
    "srnc",
]


def srnc(
    kernel: Kernel,
    op: Operator,
    target,
    *,
    keep_norm: bool = True,
    raise_rank: bool = False,
    max_steps: int = MAX_PASSES,
    tolerance=None,
    initial: SingularTriplet | Pair | None = None,
) -> SRNResult:
    """The kernel closest to `kernel`, of the same support, whose layer has stable rank `target` and the same norm.

    Solves Zheng et al. 2025, eq. 7: minimise `||T(K) - T(A)||_F` subject to `srank(T(K)) = target` and `||T(K)||_2 =
    ||T(A)||_2`, by a closed form per singular pair inside a minorise-maximise iteration. For circular convolutions it
    scans all frequencies and phases. With one channel and without strides the best of them is the global solution;
    otherwise the best few are followed, and `gap` says how far from optimal the result can be at most. With zero
    padding it takes several starts. For dense layers it is `srn`, with one value preserved (`keep_norm`) or none. A
    kernel with `stable_rank <= target` is returned unchanged, and so are taps that never meet a sample of the image.

    With `raise_rank` a target above the stable rank is met too, and the norm is kept. The solution is `K = P(tau A)`,
    with `P` the projection on the kernels of norm at most `||T(A)||_2`, at the `tau` that gives the stable rank. That
    is a convex problem, globally solved (`gap` by its duality gap), up to the stable rank `r_inf` of the limit
    `tau -> infinity`. A target beyond it is infeasible here. The result is then that of the largest `tau` tried, about
    `eps ** -0.25`, and its `stable_rank` stands for `r_inf`, near which rounding at so large a `tau` leaves it. Kernels
    with a larger stable rank can exist: `surrogate.solve` looks for them.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      target: the stable rank wanted; traced. `stable_rank_range` says what is possible.
      keep_norm: static. `False` drops the constraint on the norm, for the closest kernel with `srank = target`.
      raise_rank: static. Whether to meet a target above the stable rank too.
      max_steps: static. The most passes of the iteration; when raising, the most SVDs of all matrices in a projection.
      tolerance: the relative change of the kernel in a pass at which to stop, by default `eps ** 0.6`; traced. The
        constraints are met to about its square. When raising it is the relative error of the stable rank.
      initial: where to start, in place of the scan: a singular triplet, such as that of `leading_triplet`, or the pair
        `state.normalized.pair` of `srnc_state`. Raising, and layers that are matrices, do not use it.

    Returns:
      An `SRNResult`, whose `feasible` and `residual` say where the target is infeasible or the passes ran out.
      Derivatives hold the singular vectors constant: they are exact for the scalars and a surrogate for the kernel. A
      second derivative is that of the first one: exact for the scalars, and not symmetric for the kernel. It is NaN
      where the pair of the solution is not determined, such as at the lowest stable rank that a pair allows. A raised
      convolution has the derivatives of `project_spectral_ball`, with the stable rank held.

    Raises:
      ValueError: a kernel, target, `initial`, `tolerance` or `max_steps` that does not fit, aliased taps, raising
        without `keep_norm`, or a second derivative with `raise_rank` of a convolution.

    Examples:
      The identity on 64 samples within three taps, from stable rank 64 to 24 (Zheng et al. 2025):

      >>> import jax.numpy as jnp, jaxsrn
      >>> identity = jnp.array([1.0, 0.0, 0.0]).reshape(3, 1, 1)
      >>> result = jaxsrn.srnc(identity, jaxsrn.CircularConv((64,)), 24.0)
      >>> print(result.kernel.ravel().round(4), f"{result.spectral_norm:.4f} {result.stable_rank:.4f}")
      [0.5  0.25 0.25] 1.0000 24.0000
    """
    kernel = kernel_array(kernel, op)
    shape = kernel.shape
    kernel, op = as_matrix(kernel, op)
    op._check_not_aliased(kernel.shape)
    dtype = float_dtype(kernel.dtype)
    target = positive_scalar(target, "target", dtype)
    tolerance = positive_scalar(kernel_tolerance(dtype) if tolerance is None else tolerance, "tolerance", dtype)
    max_steps = static_int(max_steps, "max_steps")
    ensure(
        keep_norm or not raise_rank, "keep_norm: got False with raise_rank=True, expected True; raising keeps the norm."
    )
    if initial is not None:
        _check_initial(initial, op, kernel.shape)
    if isinstance(op, Dense):
        return in_shape(srn_of_matrix(kernel, target, 1 if keep_norm else 0, bool(raise_rank)), shape)
    if isinstance(initial, SingularTriplet):
        initial = _stored(initial.right, initial.left, op, kernel)
    elif initial is not None:
        initial = pair_of_floats(initial, op, kernel.shape, dtype)
    solution = fixpoint_of(kernel, op, target, initial, tolerance, max_steps)
    if raise_rank:
        return _raised_or_lowered(kernel, op, target, solution, tolerance, max_steps)
    return _result_of(kernel, op, target, solution, bool(keep_norm))


def _check_initial(initial, op: Operator, kernel_shape) -> None:
    if isinstance(initial, Pair):
        shapes, expected = jax.tree.map(jnp.shape, initial), pair_shapes(op, kernel_shape)
        ensure(shapes == expected, f"initial: got {shapes}, expected {expected} for {op}; take it from srnc_state.")
    else:
        check_triplet(initial, op, kernel_shape)


@functools.partial(program, brief=True)
def _stored(inputs, outputs, op, kernel) -> Pair:
    dtype = float_dtype(kernel.dtype)
    return pair_of_images(inputs.astype(dtype), outputs.astype(dtype), op, kernel.shape)


def fixpoint_of(kernel, op: Operator, target, initial: Pair | None, tolerance, max_steps: int) -> Fixpoint:
    """The solution of (7) for checked arguments, a constant for derivatives."""
    kernel, target, initial, tolerance = lax.stop_gradient((kernel, target, initial, tolerance))
    return minorise_maximise(kernel, op, target, initial, max_steps, tolerance)


def result_of(kernel, op: Operator, target, solution: Fixpoint, keep_norm: bool) -> SRNResult:
    """What `srnc` returns for the end of its iteration.

    Derivatives see the closed form as a function of the kernel, and nothing of the iteration. Second derivatives see
    how its pair moves.
    """
    problem, scale = scaled_problem(kernel, op, target, solution.own)
    a = problem.kernel
    fixed, unchanged = lax.stop_gradient(problem), solution.unchanged
    pair = with_free_frequency(solution.pair, op, a.dtype)
    new = held(functools.partial(_of_pair, op), functools.partial(_moved_pair, op), problem, pair)
    if not keep_norm:
        new = new * ratio(problem.inner(new, a), problem.inner(new, new))
    result = jnp.where(unchanged, a, new)
    feasible = unchanged | (solution.candidate.feasible & jnp.isfinite(solution.norm))
    # Where the kernel is at right angles to the functional of its pair, rounding decides on which side the result is.
    norm = jnp.where(unchanged, problem.norm, jnp.abs(pair_value(result, op, solution.leading)))
    distance = problem.distance(result)
    gap = proven_gap(fixed, solution.bound, lax.stop_gradient(distance), keep_norm, feasible, unchanged)
    found = measured(result, problem, norm, distance, gap, solution.num_steps, keep_norm, feasible)
    return in_own_scale(found, scale, kernel, op, unchanged)


_result_of = program(result_of, static_argnums=4, brief=True)


def _of_pair(op: Operator, problem: Problem, pair: Pair):
    """The kernel of the closed form."""
    return closed_form(problem, functional(pair, op, problem.kernel.shape)).kernel


def _moved_pair(op: Operator, problem: Problem, pair: Pair) -> Pair:
    # A kernel whose stable rank is low enough is returned as it is.
    is_used = lax.stop_gradient((problem.target < problem.stable_rank).astype(problem.kernel.dtype))
    return determined_pair(op, (problem.kernel, problem.target, is_used), pair)


@functools.partial(program, static_argnums=5)
def _raised_or_lowered(kernel, op, target, solution, tolerance, max_steps):
    problem, scale = scaled_problem(kernel, op, target, solution.own)
    raises = solution.unchanged & (target > problem.stable_rank) & (problem.norm > 0)
    # Under vmap both branches are computed, so nothing may be divided by the norm of a zero kernel.
    guarded = problem._replace(norm=divisor(problem.norm))

    def raise_() -> SRNResult:
        found = _raised(guarded, op, solution.own, max_steps, tolerance)
        return in_own_scale(found, scale, kernel, op, jnp.asarray(False))

    return lax.cond(raises, raise_, lambda: result_of(kernel, op, target, solution, True))


def _raised(problem: Problem, op: Operator, own: Pair, max_steps: int, tolerance) -> SRNResult:
    found = raised(problem, op, own, max_steps, tolerance)
    distance = problem.distance(found.kernel)
    fixed, known = lax.stop_gradient((problem, distance))
    gap = proven_gap(fixed, found.squared_bound, known, True, found.feasible, False)
    norm = pair_value(found.kernel, op, found.leading)
    return measured(found.kernel, problem, norm, distance, gap, found.num_steps, True, found.feasible)
