"""`srnc_step` and its state: stable rank normalization while the kernel changes, one cheap pass a training step.

The closed form (`closed_form.py`) needs the leading pair of the kernel that it returns. Here that pair is carried from
one step to the next, as spectral normalization carries its vectors, and takes a power step each time (Sanyal et al.
2020, Algorithm 2, for matrices). `srnc` iterates to the end instead, from several starts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import kernel_tolerance
from jaxsrn.normalization.closed_form import Problem, closed_form, functional, merit
from jaxsrn.normalization.lower_stable_rank import problem_of
from jaxsrn.normalization.starts import survey
from jaxsrn.normalization.training.implicit import moving_pair
from jaxsrn.normalization.training.normalized import normalized_or_rescaled, normalized_with
from jaxsrn.normalization.training.tracking import Track, follow, has_turned, start_track, track_shapes
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.circular.fourier import complex_dtype
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair, power_step
from jaxsrn.spectra.singular_pair import Pair, rescaled

__all__ = [
    "SRNCState",
    "check_gradient",
    "srnc_state",
    "srnc_step",
]

_GRADIENTS = ("frozen", "implicit")
# Passes after which the starts are compared: more are surer to pick the best one, and every start takes them.
_START_PASSES = 10
# A guard of the loop, the same as the default of `srnc`.
_MAX_PASSES = 500
# Power steps of matrices, and for the norm alone, where no stable rank is lowered: the leading singular values may lie
# close together there, and one step lags. `benchmarks/training.py --only left` shows what two steps leave.
_CLOSE_STEPS = 2


class SRNCState(NamedTuple):
    """What `srnc_step` carries: a pytree of small arrays (with zero padding four images, or eight where `own` is kept).

    Attributes:
      normalized: the track (`tracking.py`) of the normalized kernel's leading pair. A dense kernel has the same pair.
      own: the track of the kernel's own leading pair, where the kernel's norm is asked for; else `None`.
    """

    normalized: Track
    own: Track | None


def srnc_state(kernel: Kernel, op: Operator, target, *, norm=1.0, cap: bool = False) -> SRNCState:
    """The state that `srnc_step` starts from, already converged: its first step satisfies the constraints.

    The starts are those of `srnc` (for circular convolutions the scan over frequencies and phases). The best of them
    after a few passes is followed to the end by training steps of the kernel at rest. With zero padding the time is
    proportional to the size of the image.

    Args:
      kernel, op, target, norm, cap: as for `srnc_step`.

    Returns:
      An `SRNCState`, a constant for derivatives. Its structure depends on static things only: the operator, whether
      `target` or `norm` is `None`, and `cap`.

    Raises:
      ValueError: as `srnc_step` does.
    """
    kernel, target, _ = _checked(kernel, op, target, norm, cap)
    return _srnc_state(kernel, op, leading_pair(kernel, op), target, _follows_own(op, target, norm, cap))


def srnc_step(
    kernel: Kernel,
    state: SRNCState,
    op: Operator,
    target,
    *,
    norm=1.0,
    cap: bool = False,
    gradient: str = "frozen",
    num_steps: int | None = None,
):
    """Stable rank normalization in training: `(normalized kernel, new state)`, at the cost of a few images.

    A warm power step leads from the pair of the state to a pair `(u, v)`. The result is the kernel closest to `kernel`
    with `||T(K)||_F^2 = target * norm^2` and `<v, T(K) u> = norm`, by the closed form of `srnc`. Both constraints hold
    where the pair is the leading one of the result, and the pair follows the kernel as that changes. A kernel whose own
    stable rank is not above the target is only rescaled to the norm. Where the pair allows no such kernel (an
    infeasible target), the result has the lowest stable rank for that pair.

    Dense layers take Algorithm 2 of Sanyal, Torr, Dokania 2020, with two power steps for its one. Any other layer takes
    a pass of the iteration of `srnc` for Zheng et al. 2025, eq. 7, or two where another pair takes over. Its power step
    is one on the kernel normalized with the stored pair, and its state also has vectors that may overtake that pair.
    Without a target every layer takes two power steps, and the state of dense layers has such vectors too.

    Problem (7) is not convex, and the step follows a local solution. Where the kernel's own stable rank falls just
    below the target, a result that meets both constraints may stay for a while although the kernel itself would do. The
    function is pure and has no randomness: a caller that keeps the old state has only read it.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      state: from `srnc_state`, with the same `op`, `norm` and `cap`, or from the last step.
      op: its operator.
      target: the stable rank; traced. `None` normalizes the norm alone, which allows aliased taps.
      norm: the spectral norm of the result; traced, so that it can be learned. `None` keeps the kernel's own.
      cap: static. Whether the norm is only reduced, to the smaller of `norm` and the kernel's own. With a cap, or with
        `norm=None`, a kernel that meets norm and target is returned as it is, with the derivative of the identity, so
        that zero kernels train.
      gradient: static. `"frozen"` holds the singular vectors constant, as every spectral normalization does: it is
        exact for the norm, and for the kernel it leaves out how the vectors turn. `"implicit"` is the derivative of the
        converged step by the implicit function theorem. It takes a linear system in the vectors, each product a further
        power step, and is the frozen one where that system is singular (the two leading values meet). A second
        derivative is the true one only with `"implicit"` and a target; otherwise it takes the vectors for constants.
      num_steps: static. Power steps of the pair before the kernel is normalized with it. The default is two for dense
        layers and for the norm alone, whose leading singular values may lie close together, and otherwise one.

    Returns:
      The kernel in its dtype, with taps that meet no sample as they were, and the new state. Derivatives go through the
      kernel and through `norm`; the state is constant.

    Raises:
      ValueError: a kernel, target, norm, gradient or number of steps that does not fit; a state of another layer;
        aliased taps.
    """
    kernel, target, norm = _checked(kernel, op, target, norm, cap)
    check_gradient(gradient)
    is_close = target is None or op._normalization_keeps_pairs
    num_steps = (_CLOSE_STEPS if is_close else 1) if num_steps is None else static_int(num_steps, "num_steps")
    track = track_shapes(op, kernel.shape, _is_watched(op, target))
    expected = SRNCState(track, track if _follows_own(op, target, norm, cap) else None)
    ensure(
        jax.tree.map(jnp.shape, state) == expected,
        f"state: it does not fit a kernel of shape {kernel.shape} with {op}, {norm=}, {cap=}; take it from "
        "srnc_state with the same arguments.",
    )
    return _srnc_step(kernel, state, op, target, norm, bool(cap), gradient, num_steps)


def check_gradient(gradient: str) -> None:
    """Raises `ValueError` unless `gradient` is the name of one."""
    ensure(gradient in _GRADIENTS, f"gradient: got {gradient!r}, expected one of {_GRADIENTS}.")


def _checked(kernel, op: Operator, target, norm, cap):
    """The kernel, the target (`None` where only the norm is asked for) and the norm, as arrays."""
    kernel = kernel_array(kernel, op)
    dtype = float_dtype(kernel.dtype)
    ensure(norm is not None or not cap, "cap: got True with norm=None, expected a norm to stay below; give norm.")
    norm = None if norm is None else positive_scalar(norm, "norm", dtype, or_zero=True)
    if target is None:
        return kernel, None, norm
    op._check_not_aliased(kernel.shape)
    return kernel, positive_scalar(target, "target", dtype), norm


def _follows_own(op: Operator, target, norm, cap) -> bool:
    """Whether the state has a track of the kernel's own norm: not where the normalized kernel has the same pair."""
    return (norm is None or bool(cap)) and target is not None and not op._normalization_keeps_pairs


def _is_watched(op: Operator, target) -> bool:
    """Whether tracks have a watch (`tracking.py`): Sanyal's algorithm carries one vector alone."""
    return target is None or not op._normalization_keeps_pairs


@functools.partial(program, static_argnums=4)
def _srnc_state(kernel, op, own, target, follows_own):
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    a, _ = rescaled(kernel, op)
    if target is None or op._normalization_keeps_pairs:
        return SRNCState(start_track(a, op, own, _is_watched(op, target)), None)
    problem = problem_of(a, op, target, own)
    unchanged = problem.inner(a, a) <= target * problem.norm**2
    pair = jax.tree.map(lambda a, b: jnp.where(unchanged, a, b), own, _best_start(problem, op, own))
    track = _without_pair_of_zero(a, _converged(a, op, target, pair))
    return SRNCState(track, start_track(a, op, own, True) if follows_own else None)


def _best_start(problem: Problem, op: Operator, own: Pair) -> Pair:
    """The start of `srnc` that is the best one after a few passes, where `srnc` would follow all to the end."""

    def climb(pair: Pair):
        def one_pass(_, pair):
            kernel = normalized_with(problem.kernel, op, problem.target, pair)
            return power_step(kernel, op, power_step(kernel, op, pair))

        pair = lax.fori_loop(0, _START_PASSES, one_pass, pair)
        return pair, closed_form(problem, functional(pair, op, problem.weights, problem.kernel.shape))

    pairs, candidates = jax.vmap(climb)(survey(problem, op, own).starts)
    best = jnp.argmin(merit(candidates))
    return jax.tree.map(lambda leaf: leaf[best], pairs)


class _Passes(NamedTuple):
    track: Track
    kernel: Float[Array, "..."]
    change: Float[Array, ""]
    count: Int[Array, ""]


def _converged(a: Float[Array, "..."], op: Operator, target, pair: Pair) -> Track:
    """The track after training steps of a kernel at rest, until the normalized kernel is at rest too."""
    tolerance = kernel_tolerance(a.dtype)

    def one_pass(state: _Passes) -> _Passes:
        track = follow(state.kernel, op, state.track)
        kernel = normalized_with(a, op, target, track.pair)
        change = jnp.linalg.norm(kernel - state.kernel) / jnp.linalg.norm(kernel)
        return _Passes(track, kernel, change, state.count + 1)

    def unfinished(state: _Passes):
        return (state.change > tolerance) & (state.count < _MAX_PASSES)

    kernel = normalized_with(a, op, target, pair)
    state = _Passes(start_track(kernel, op, pair, True), kernel, jnp.asarray(jnp.inf, a.dtype), jnp.asarray(0))
    return lax.while_loop(unfinished, one_pass, state).track


@functools.partial(program, static_argnums=(5, 6, 7))
def _srnc_step(kernel, state, op, target, norm, cap, gradient, num_steps):
    a, scale = rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    # A model may have been cast as a whole, and its state with it.
    fixed, (track, own) = lax.stop_gradient((a, jax.tree.map(functools.partial(_in_precision_of, a), state)))

    # The power step comes first, on this kernel: the stored pair is that of the kernel before the optimizer's step.
    def advance(_, tracks):
        track, own = tracks
        return _followed(fixed, op, target, track), None if own is None else follow(fixed, op, own)

    track, own = lax.fori_loop(0, num_steps, advance, (track, own))
    # Where the norm alone is asked for, the frozen gradient is the true one.
    pair = track.pair if gradient == "frozen" or target is None else moving_pair(a, op, target, track.pair)
    # The solution is proportional to the norm and does not depend on the scale of the kernel.
    unit_kernel, is_rescaled = normalized_or_rescaled(a, op, target, pair)
    unchanged = jnp.asarray(op._tap_counts(kernel.shape) == 0)
    if norm is None or cap:
        own_norm = scale * frozen_value(a, op, (own or track).pair)
        norm = own_norm if norm is None else jnp.minimum(norm, own_norm)
        # The map is the identity here. The product below has the same value, but no derivative at a zero kernel, where
        # both of its factors vanish.
        unchanged = unchanged | (is_rescaled & (own_norm <= norm))
    return jnp.where(unchanged, kernel, (norm * unit_kernel).astype(kernel.dtype)), SRNCState(track, own)


def _in_precision_of(kernel: Float[Array, "..."], leaf: jax.Array) -> jax.Array:
    """A leaf of the state in the kernel's dtype, or in the complex one of the same precision; sites stay."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return leaf.astype(complex_dtype(kernel.dtype) if jnp.iscomplexobj(leaf) else kernel.dtype)


def _followed(a: Float[Array, "..."], op: Operator, target, track: Track) -> Track:
    """The track after a step on the kernel normalized with its pair."""
    if target is None or op._normalization_keeps_pairs:
        # The normalized kernel has the same pairs as the kernel itself.
        return follow(a, op, track)

    def one_pass(state):
        count, _, track = state
        new = follow(normalized_with(a, op, target, track.pair), op, track)
        return count + 1, has_turned(track.pair, new.pair), new

    def unfinished(state):
        # Where another pair takes over, the kernel normalized with that pair is another one, which no step has seen.
        count, turned, _ = state
        return (count == 0) | ((count == 1) & turned)

    new = lax.while_loop(unfinished, one_pass, (jnp.asarray(0), jnp.asarray(False), track))[2]
    return _without_pair_of_zero(a, new)


def _without_pair_of_zero(a: Float[Array, "..."], track: Track) -> Track:
    """The track with a pair of zeros where the kernel is zero.

    A zero kernel has no leading pair, and an arbitrary one would lead the next kernel to a poor local solution. With a
    pair of zeros the closed form is the next kernel itself, up to its scale, so the pair starts as that kernel's own.
    """
    is_zero = jnp.all(a == 0)
    return track._replace(pair=jax.tree.map(lambda leaf: jnp.where(is_zero, jnp.zeros_like(leaf), leaf), track.pair))
