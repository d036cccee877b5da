"""Kernels of bounded spectral norm: one pass of singular value clipping, and the projection on the spectral ball.

The **spectral ball** is the set of kernels of the same support with `||T(K)||_2 <= max_norm`. The pass is
Clip_OperatorNorm of Sedghi, Gupta, Long 2019. It does not end in the ball, the projection does, at the nearest kernel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxsrn._tools.checks import Kernel, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.linalg import divisor, inner, safe_sqrt
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import gap_tolerance
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.projections.clipping import smooth_clipped, stack_map_of
from jaxsrn.projections.nearest import nearest, with_derivative, without_a_step
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import ensure_formable, idle_taps, rescaled

__all__ = [
    "ProjectionResult",
    "clip_singular_values",
    "project_spectral_ball",
]

# A norm that exceeds the limit by at most this many roundings counts as in the ball, so that a second projection
# changes nothing. The norm of a projected kernel differs from the limit by the rounding of its norm and its entries.
_ROOM = 64


class ProjectionResult(NamedTuple):
    """A kernel in the spectral ball, and how far from the nearest one it can be.

    Attributes:
      kernel: `||T(kernel)||_2 <= max_norm` up to the rounding of its dtype.
      gap: `(||T(kernel) - T(A)||_F - b) / ||T(A)||_F` with a proven bound `b`: no kernel of the ball is nearer to `A`
        than `b`. With `t` the relative distance of the kernel, the projection is at most `sqrt(2 t gap)` away.
      num_steps: steps taken, one SVD of all matrices each; 0 for a kernel that is in the ball already.
    """

    kernel: Shaped[Array, "..."]
    gap: Float[Array, "..."]
    num_steps: Int[Array, "..."]


def clip_singular_values(kernel: Kernel, op: Operator, max_norm) -> Shaped[Array, "..."]:
    """One pass of singular value clipping: the singular values of `T(kernel)` are clipped, then the taps are kept.

    Clip_OperatorNorm of Sedghi, Gupta, Long 2019: the symbol at every frequency is clipped and transformed back, and
    what falls outside the kernel's support is dropped. Dropping can raise the norm again, so one pass neither ends in
    the ball nor is it the projection (`project_spectral_ball`). On a dense layer it is both (Sanyal et al. 2020,
    Algorithm 3). Zero padding clips the explicit matrix, up to 2**24 entries; each tap becomes its mean over the image.
    An unbounded convolution is clipped at the frequencies of a coarse grid.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      max_norm: positive; traced.

    Returns:
      The kernel, in the dtype of the input. Derivatives, also in `max_norm`, are always finite. They are exact where no
      singular value equals `max_norm`, and one of the generalised derivatives elsewhere. Second derivatives are exact
      where, besides, all singular values of a matrix are distinct, and may be NaN elsewhere.

    Raises:
      ValueError: a kernel that does not fit, aliased taps, a `max_norm` that is not positive, or a zero-padded matrix
        that is too large to form.
    """
    kernel, max_norm = _checked(kernel, op, max_norm)
    shape = kernel.shape
    kernel, op = op._flattened(kernel)
    ensure_formable(op, kernel.shape, "project_spectral_ball(kernel, op, max_norm)")
    return _clip_singular_values(kernel, op, max_norm).reshape(shape)


def _checked(kernel, op: Operator, max_norm) -> tuple[jax.Array, jax.Array]:
    kernel = kernel_array(kernel, op)
    op._check_not_aliased(kernel.shape)
    return kernel, positive_scalar(max_norm, "max_norm", float_dtype(kernel.dtype))


@program
def _clip_singular_values(kernel, op, max_norm):
    a, scale = rescaled(kernel, op)
    stack_map = stack_map_of(op, a.shape, a.dtype)
    limit = max_norm / scale
    # The stack keeps inner products, so its adjoint is the transform back that keeps the taps.
    matrices, largest = smooth_clipped(stack_map.stack(a), limit)
    keep = (largest <= limit) | jnp.asarray(idle_taps(op, kernel.shape))
    return jnp.where(keep, kernel, (stack_map.pull_back(matrices) * scale).astype(kernel.dtype))


def project_spectral_ball(
    kernel: Kernel, op: Operator, max_norm, *, max_steps: int = 200, tolerance=None
) -> ProjectionResult:
    """The kernel closest to `kernel`, of the same support, whose layer has a spectral norm of at most `max_norm`.

    Solves the convex problem

        minimise ||T(K) - T(A)||_F   subject to   ||T(K)||_2 <= max_norm

    and says how far from its solution the result can be at most. A kernel in the ball is returned unchanged, and so are
    taps that never meet a sample of the image. The result is scaled by its `spectral_norm` at the end, so that it is in
    the ball whether or not the steps converged (as far as that norm is proven).

    Circular layers, and zero-padded ones up to an explicit matrix of 2**16 entries, take an augmented Lagrangian with
    semismooth Newton steps, one SVD of all matrices each (Zhao, Sun, Toh 2010). Alternating clips end elsewhere in the
    ball; Dykstra's algorithm finds the projection too, with many more SVDs (`python benchmarks/projections.py`). The
    singular values of a dense layer are clipped, which is exact (Sanyal et al. 2020, Algorithm 3).

    Unbounded convolutions take the same on a grid of 16 angles per degree of the symbol, and the result is scaled by
    its norm over all frequencies. The ball of the grid contains the true one, so that `gap` is proven; it is at most
    about 0.5% per axis.

    Larger zero-padded layers have no small matrices. There the result is an inner approximation: the projection, in the
    layer's own distance, on the ball of its cover (the circular layer on the padded image), with the radius widened
    until the layer's own norm is `max_norm`. `gap` is measured against an outer ball, that of the circular layer whose
    taps are tapered by a window on the image (`nearest.py`); it contains the layer's ball. Both approximations are
    worse the smaller the image, by the inverse of the square of its sides.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      max_norm: positive; traced.
      max_steps: static; the most steps of each convex problem that is solved.
      tolerance: the `gap` to stop at, default `eps ** 0.55`; traced. A tolerance that is not reached is no failure:
        `gap` says what was reached.

    Returns:
      A `ProjectionResult`. Derivatives of the kernel, also in `max_norm`, are those of the projection by its optimality
      conditions. They are exact up to rounding and the tolerance where the projection is differentiable (the active
      singular values stay the active ones), and finite and not expanding everywhere. In float32 some are off by
      percents, where the kernel is not known well enough to tell which values are active. `gap` has derivative 0.

    Raises:
      ValueError: a kernel that does not fit, aliased taps, a `max_norm` or `tolerance` that is not positive, a bad
        `max_steps`, or a second derivative of a convolution.
    """
    kernel, max_norm = _checked(kernel, op, max_norm)
    shape = kernel.shape
    kernel, op = op._flattened(kernel)
    dtype = float_dtype(kernel.dtype)
    tolerance = gap_tolerance(dtype) if tolerance is None else tolerance
    tolerance = positive_scalar(tolerance, "tolerance", dtype)
    max_steps = static_int(max_steps, "max_steps")
    found = _project_spectral_ball(kernel, op, leading_pair(kernel, op), max_norm, tolerance, max_steps)
    return found._replace(kernel=found.kernel.reshape(shape))


def _within_range(limit, dtype):
    """`(larger, limit / larger)`, where `larger` is the limit or machine epsilon.

    A limit that every kernel is far below is taken for a smaller one, whose square is a number of the dtype.
    """
    eps = float(jnp.finfo(dtype).eps)
    limit = jnp.minimum(limit, eps**-2)
    larger = jnp.maximum(limit, eps)
    return larger, limit / larger


@functools.partial(program, static_argnums=(5,))
def _project_spectral_ball(kernel, op, own, max_norm, tolerance, max_steps):
    a, scale = rescaled(kernel, op)
    # Squares of a limit below rounding leave the range of the dtype. A ball so small is solved as a larger one, whose
    # nearest kernel is scaled down: the ball of the limit lies in it, and so its least distance is a lower bound.
    limit, shrinking = _within_range(max_norm / scale, a.dtype)
    fixed, fixed_limit = lax.stop_gradient((a, limit))
    inside = pair_value(fixed, op, own) <= fixed_limit * (1 + _ROOM * jnp.finfo(a.dtype).eps)
    weights = op.frobenius_weights(a.shape, a.dtype)
    size = jnp.sqrt(inner(weights * fixed, fixed))
    if isinstance(op, Dense):
        found = smooth_clipped(a[None], limit)[0][0]
        # Zero, or NaN where the kernel has an entry that is not finite.
        gap, num_steps = 0 * size, jnp.asarray(1, jnp.int32)
    else:
        solution, nearby = lax.cond(
            inside,
            lambda: without_a_step(fixed, op, fixed_limit, own),
            lambda: nearest(fixed, op, fixed_limit, own, max_steps, tolerance * size),
        )
        found = with_derivative(op, a, limit, nearby.kernel, solution, nearby.leading)
        change = lax.stop_gradient(shrinking) * nearby.kernel - fixed
        farther = jnp.where(shrinking < 1, safe_sqrt(inner(weights * change, change)) - nearby.distance, 0.0)
        excess = nearby.excess + jnp.maximum(farther, 0.0)
        gap, num_steps = excess / divisor(size), nearby.num_steps
    found = found * shrinking
    keep = inside | jnp.asarray(idle_taps(op, kernel.shape))
    return ProjectionResult(
        kernel=jnp.where(keep, kernel, (found * scale).astype(kernel.dtype)),
        gap=jnp.where(inside, 0.0, gap),
        num_steps=jnp.where(inside, 0, num_steps),
    )
