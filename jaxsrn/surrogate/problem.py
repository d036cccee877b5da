"""The log-sum-exp surrogate of stable rank normalization, solved on the sphere (Zheng et al. 2025, section 3).

On the unit sphere of kernels the stable rank of a circular convolution is `N / max_l g_l(x)`, with `g_l` the squared
norm of the symbol at frequency `l` and `N` the number of frequencies. The paper smooths the maximum by log-sum-exp,
penalises the two constraints and descends on the sphere. It only approximates what `jaxsrn.srnc` solves exactly; where
the stable rank of a convolution is to be raised beyond the convex range, it is the only tool.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn import optim
from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.linalg import unit
from jaxsrn.normalization.closed_form import Problem
from jaxsrn.normalization.lowering import SRNResult, assessed, in_own_scale, problem_of
from jaxsrn.operators.maps import CircularConv, Operator
from jaxsrn.spectra import pairs as _pairs
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.norms import norm_of
from jaxsrn.surrogate.descent import State, advance, by_step, geometric, start, starting_points

__all__ = ["Trajectory", "form_eigenvalues", "forms", "log_sum_exp", "objective", "solve", "trajectory"]

# The default continuation, in units without scale: `alpha` times `N / target`, and the penalty relative to it. A sharp
# maximum and a weak penalty from the beginning: a stronger smoothing leads every start into the same basin, that of
# the frequency where the kernel itself is largest, which often is not the best one.
_ALPHAS = (1e2, 1e4)
_PENALTIES = (1e-1, 1e-4)
_RATES = (5e-2, 1e-4)
# A descent that ends with its stable rank this close, relatively, has met the constraints.
_MET = 1e-3


# The smoothed maximum


def log_sum_exp(kernel: Kernel, op: Operator, *, alpha, smooth: bool = False) -> Float[Array, ""]:
    """`(1/alpha) log sum_l exp(alpha g_l)`: a smooth upper bound of the squared spectral norm `max_l g_l`.

    Zheng et al. 2025, eq. 14, for any circular convolution: `g_l = sigma_max(S(w_l))^2` over all `N` frequencies,
    `max <= value <= max + log(N) / alpha`. Where several channels let singular values cross, that is not
    differentiable; `smooth` sums `tr exp(alpha G_l)`, with `G_l` the smaller Gram matrix of the symbol, which is
    smooth everywhere, and at most `max + log(N min(c_in, c_out)) / alpha` (`c_in` times the phases of a stride).

    Args:
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.
      alpha: sharpness, positive, in units of `1 / g`; traced. Any size: nothing overflows.
      smooth: static.

    Returns:
      A scalar in float32 or wider. Its gradient is exact where differentiable, and finite always.

    Raises:
      ValueError: a kernel that does not fit, an operator that is not circular, a bad `alpha`.
    """
    _check_circular(op)
    kernel = kernel_array(kernel, op)
    dtype = float_dtype(kernel.dtype)
    return _log_sum_exp(kernel.astype(dtype), op, positive_scalar(alpha, "alpha", dtype), bool(smooth))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _log_sum_exp(kernel, op, alpha, smooth):
    squares = _squared_values(kernel, op)
    if not smooth:
        # Of all groups, the symbol of which is their direct sum.
        squares = jnp.max(squares, axis=-1, keepdims=True)
    counts = _fourier.multiplicity(op)[:: op.feature_group_count, None]
    counts = jnp.broadcast_to(jnp.asarray(counts, squares.dtype), squares.shape)
    return jax.nn.logsumexp(alpha * squares, b=counts) / alpha


def _squared_values(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, "frequencies values"]:
    """Squared singular values of the symbol at every frequency of the half grid, all groups together."""
    symbol = _fourier.half_symbol(kernel, op)
    if min(symbol.shape[-2:]) == 1:
        squares = jnp.sum(jnp.real(symbol * jnp.conj(symbol)), axis=(-2, -1))
    else:
        squares = jnp.linalg.svd(symbol, compute_uv=False) ** 2
    return squares.reshape((math.prod(_fourier.half_grid(op)), -1))


def _check_circular(op) -> None:
    ensure(
        isinstance(op, CircularConv),
        f"op: got {op}, expected a CircularConv; the surrogate smooths over the frequencies of a circular convolution. "
        "srnc takes every operator.",
    )


# The quadratic forms of one channel


def forms(kernel_shape: tuple[int, ...], op: Operator) -> Float[np.ndarray, "frequencies taps taps"]:
    """`B_l = cos_l cos_l^T + sin_l sin_l^T`, so that `g_l(x) = x^T B_l x`, of a one-channel circular convolution.

    Zheng et al. 2025, section 3.1, for any number of axes; float64, frequencies and taps in row-major order.

    Args:
      kernel_shape: `(*taps, 1, 1)`.
      op: a `CircularConv` with strides 1.

    Raises:
      ValueError: more than one channel, strides, or an operator that is not circular.
    """
    waves = _waves(kernel_shape, op)
    return np.real(waves[:, :, None] * np.conj(waves[:, None, :]))


def form_eigenvalues(kernel_shape: tuple[int, ...], op: Operator) -> Float[np.ndarray, "frequencies 2"]:
    """The two eigenvalues of each `B_l` that can differ from 0, the larger first: `(q +- |sum_p e^{-2i <w, p>}|) / 2`.

    Zheng et al. 2025, Figure 1. On the unit sphere `g_l` is at most the larger one, and with three taps or more at
    least 0, the other eigenvalues of `B_l`, not the smaller one. Their sum is `q`, the number of taps; the largest of
    all is `q`, at the real frequencies, and `N / q <= srank <= N` is the feasible interval that it implies, which
    `jaxsrn.stable_rank_range` gives for every operator.

    Args, errors: as `forms`.
    """
    waves = _waves(kernel_shape, op)
    spread = np.abs(np.sum(waves**2, axis=-1))
    return np.stack([waves.shape[-1] + spread, waves.shape[-1] - spread], axis=-1) / 2


def _waves(kernel_shape: tuple[int, ...], op: Operator) -> np.ndarray:
    """`exp(-i <w_l, p>)`, one row per frequency, one column per tap."""
    _check_circular(op)
    op.check_kernel_shape(kernel_shape)
    ensure(
        kernel_shape[-2:] == (1, 1) and set(op.strides) == {1},
        f"kernel_shape: got {kernel_shape} for {op}, expected one channel, (*taps, 1, 1), and strides 1; with more, "
        "g_l is no quadratic form.",
    )
    waves = np.ones((1, 1))
    for row in _fourier.dft_rows(op, kernel_shape):
        waves = np.kron(waves, row[:, 0, :])
    return waves


# The penalised problem


def objective(
    x: Kernel, kernel: Kernel, op: Operator, target, *, alpha, penalty, smooth: bool = False
) -> Float[Array, ""]:
    """`h(x) = (g_lse(x) - N / r)^2 + penalty ||T(K) - T(A)||_F^2` with `K = sqrt(r M^2 / N) x`.

    Zheng et al. 2025, eq. 16: `||x|| = 1` gives `K` the Frobenius norm that goes with stable rank `r = target` and
    the spectral norm `M` of `A = kernel`; the first term, the spectral norm. `N` is the number of frequencies,
    `||T(K)||_F^2 = N ||K||^2`.

    Args:
      x: a point of the unit sphere, of the kernel's shape.
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.
      target: the stable rank wanted; traced.
      alpha: sharpness of `log_sum_exp`; traced.
      penalty: the paper's lambda, at least 0; traced.
      smooth: static; see `log_sum_exp`.

    Returns:
      A scalar in float32 or wider, differentiable in `x`, the kernel and all numbers.

    Raises:
      ValueError: a kernel or point that does not fit, aliased taps, an operator that is not circular, bad numbers.
    """
    kernel, target = _checked(kernel, op, target)
    x = _point(x, "x", kernel, op)
    dtype = float_dtype(kernel.dtype)
    alpha = positive_scalar(alpha, "alpha", dtype)
    penalty = positive_scalar(penalty, "penalty", dtype, or_zero=True)
    return _objective_of_kernel(x.astype(dtype), kernel.astype(dtype), op, target, alpha, penalty, bool(smooth))


@functools.partial(jax.jit, static_argnums=(2, 6))
def _objective_of_kernel(x, kernel, op, target, alpha, penalty, smooth):
    weights = op.frobenius_weights(kernel.shape, kernel.dtype)
    return _objective(x, Problem(kernel, weights, target, norm_of(kernel, op)), op, alpha, penalty, smooth)


def _objective(x, problem: Problem, op: CircularConv, alpha, penalty, smooth: bool):
    change = _kernel_at(x, problem, op) - problem.kernel
    constraint = _log_sum_exp(x, op, alpha, smooth) - _num_frequencies(op) / problem.target
    return constraint**2 + penalty * problem.inner(change, change)


def _kernel_at(x, problem: Problem, op: CircularConv):
    """`sqrt(r M^2 / N) x`: of stable rank `r` and norm `M` if `max_l g_l(x) = N / r`."""
    return jnp.sqrt(problem.target / _num_frequencies(op)) * problem.norm * x


def _num_frequencies(op: CircularConv) -> float:
    return float(math.prod(op.grid))


def _checked(kernel, op, target):
    _check_circular(op)
    kernel = kernel_array(kernel, op)
    op.check_not_aliased(kernel.shape)
    return kernel, positive_scalar(target, "target", float_dtype(kernel.dtype))


def _point(x, name: str, kernel, op):
    """An array that must look like the kernel."""
    x = kernel_array(x, op)
    ensure(x.shape == kernel.shape, f"{name}: got shape {x.shape}, expected that of the kernel, {kernel.shape}.")
    return x


# The descent on the sphere


class Trajectory(NamedTuple):
    """Iterates of the descent, the start first (leading axis: records).

    Attributes:
      points: on the unit sphere, `(records, *kernel.shape)`.
      objective: `h` at each, with the `alpha` and `penalty` of its step.
      stable_rank: of the kernel at each point.
      steps: the number of steps taken before each.
    """

    points: Float[Array, "records ..."]
    objective: Float[Array, " records"]
    stable_rank: Float[Array, " records"]
    steps: Int[Array, " records"]


def solve(
    kernel: Kernel,
    op: Operator,
    target,
    *,
    key,
    num_restarts: int = 32,
    num_steps: int = 2000,
    optimizer: optax.GradientTransformation | None = None,
    alpha=None,
    penalty=None,
    smooth: bool = False,
    initial: Kernel | None = None,
) -> SRNResult:
    """A kernel near `kernel` with stable rank near `target` and nearly the same norm, by descent on `objective`.

    The best of several descents from random points of the sphere: of those that end with both constraints met to
    1e-3 the closest, and where none does the one that misses least. By default with continuation: `alpha` grows and
    `penalty` falls geometrically, under Adam with a decaying step. As published (Zheng et al. 2025, eq. 17-19 and
    section 3.3): `num_restarts=1, num_steps=100_000, alpha=10.0, penalty=0.1, optimizer=optim.sphere_sgd(1e-5)`.

    Unlike `jaxsrn.srnc` it meets the constraints only approximately (see `residual`), and it lowers and raises the
    stable rank alike.

    Args:
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.
      target: the stable rank wanted; traced.
      key: a JAX random key, for the starts.
      num_restarts: static; the descents run side by side under `vmap`.
      num_steps: static; of each descent.
      optimizer: static; an optax transformation that stays on the sphere, `optim.on_sphere(...)` of any other or
        `optim.sphere_sgd(...)`. Build it once: a new one compiles anew.
      alpha, penalty: numbers (traced), or schedules `step -> number` (static), or `None` for continuation.
      smooth: static; see `log_sum_exp`.
      initial: a kernel whose direction the first descent starts from, in place of a random one.

    Returns:
      An `SRNResult`, the kernel being `sqrt(r M^2 / N) x`. `feasible` says whether the target is in
      `stable_rank_range`, not that it was met; `gap` is against the proven bound of `srnc` where the stable rank is
      lowered, and proves nothing (equal to `distance`) where it is raised. `num_steps` is that of each
      descent. Derivatives hold `x` constant.

    Raises:
      ValueError: as `objective`, or a number of restarts or steps below 1.
    """
    kernel, target, schedules, initial = _descent_arguments(kernel, op, target, alpha, penalty, initial)
    keys = jax.random.split(key, static_int(num_restarts, "num_restarts"))
    num_steps = static_int(num_steps, "num_steps")
    return _solve(kernel, op, target, keys, initial, schedules, optimizer, num_steps, bool(smooth))


@functools.partial(jax.jit, static_argnums=(1, 6, 7, 8))
def _solve(kernel, op, target, keys, initial, schedules, optimizer, num_steps, smooth):
    a, scale, problem, own, optimizer, loss = _prepared(kernel, op, target, schedules, optimizer, num_steps, smooth)

    def descend(point):
        end = unit(advance(start(point, optimizer), loss, optimizer, num_steps).point)
        change = _kernel_at(end, problem, op) - a
        missed = jnp.abs(level / jnp.max(_squared_values(end, op)) - 1)
        return end, jnp.where(missed <= _MET, 0.0, missed), problem.inner(change, change)

    level = _num_frequencies(op) / target
    ends, missed, distances = jax.vmap(descend)(starting_points(keys, a, initial))
    best = lax.stop_gradient(ends[jnp.lexsort((distances, missed))[0]])
    result = assessed(_kernel_at(best, problem, op), problem, own, op, jnp.asarray(num_steps))
    return in_own_scale(result, scale, kernel, op, jnp.asarray(False))


def trajectory(
    kernel: Kernel,
    op: Operator,
    target,
    *,
    key,
    num_steps: int = 2000,
    every: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    alpha=None,
    penalty=None,
    smooth: bool = False,
    initial: Kernel | None = None,
) -> Trajectory:
    """The iterates of one descent: those of `solve` with `num_restarts=1` and the same key, one of `every` recorded.

    Args:
      every: static; must divide `num_steps`.
      All others: as `solve`.

    Returns:
      A `Trajectory`, a constant for derivatives.

    Raises:
      ValueError: as `solve`, or an `every` that does not divide `num_steps`.
    """
    kernel, target, schedules, initial = _descent_arguments(kernel, op, target, alpha, penalty, initial)
    num_steps, every = static_int(num_steps, "num_steps"), static_int(every, "every")
    ensure(num_steps % every == 0, f"every: got {every}, expected a divisor of num_steps={num_steps}.")
    keys = jax.random.split(key, 1)
    return _trajectory(kernel, op, target, keys, initial, schedules, optimizer, num_steps, every, bool(smooth))


@functools.partial(jax.jit, static_argnums=(1, 6, 7, 8, 9))
def _trajectory(kernel, op, target, keys, initial, schedules, optimizer, num_steps, every, smooth):
    a, _, _, _, optimizer, loss = _prepared(kernel, op, target, schedules, optimizer, num_steps, smooth)

    def record(state: State) -> Trajectory:
        point = unit(state.point)
        rank = _num_frequencies(op) / norm_of(point, op) ** 2
        return Trajectory(point, loss(point, state.count), rank, state.count)

    def block(state: State, _):
        state = advance(state, loss, optimizer, every)
        return state, record(state)

    first = start(starting_points(keys, a, initial)[0], optimizer)
    _, rest = lax.scan(block, first, length=num_steps // every)
    return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), record(first), rest)


def _descent_arguments(kernel, op, target, alpha, penalty, initial):
    """What `solve` and `trajectory` ask of the arguments that they share."""
    kernel, target = _checked(kernel, op, target)
    schedules = by_step(alpha, "alpha", kernel.dtype), by_step(penalty, "penalty", kernel.dtype, or_zero=True)
    return kernel, target, schedules, None if initial is None else _point(initial, "initial", kernel, op)


def _prepared(kernel, op, target, schedules, optimizer, num_steps: int, smooth: bool):
    """The problem in the scale of its largest entry, and what a descent needs: the optimizer and `loss(x, step)`."""
    a, scale = _pairs.rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    problem, own = problem_of(a, op, target)
    frozen = lax.stop_gradient(problem)
    level = _num_frequencies(op) / frozen.target
    # Both terms of h relative to (N / r)^2.
    weight = level**2 / (frozen.target * jnp.where(frozen.norm == 0, 1.0, frozen.norm) ** 2)
    alpha, penalty = schedules
    alpha = alpha or geometric(*(a / level for a in _ALPHAS), num_steps)
    penalty = penalty or geometric(*(p * weight / scale**2 for p in _PENALTIES), num_steps)

    def loss(x, step):
        # As a function of the direction alone: its gradient is tangent, and line searches may leave the sphere.
        return _objective(unit(x), frozen, op, alpha(step), penalty(step) * scale**2, smooth)

    if optimizer is None:
        optimizer = optim.on_sphere(optax.adam(optax.exponential_decay(_RATES[0], num_steps, _RATES[1] / _RATES[0])))
    return a, scale, problem, own, optax.with_extra_args_support(optimizer), loss
