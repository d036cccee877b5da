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
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.indexing import chosen, picked
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import kernel_tolerance
from jaxsrn.normalization.closed_form import INFEASIBLE, Problem, problem_of
from jaxsrn.normalization.implicit import frozen, moving_pair
from jaxsrn.normalization.normalized import is_only_rescaled, normalized
from jaxsrn.normalization.starts import survey
from jaxsrn.normalization.training.tracking import (
    Track,
    follow,
    start_track,
    track_as_floats,
    track_of_floats,
    track_shapes,
)
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
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
# A pass that raises the largest value by this share says that the state knows little of the kernel, whose weights were
# loaded or moved far. Then passes go on until one raises it by less than the second share.
_FAR, _AT_REST = 0.05, 1e-5
# Power steps, except with zero padding and a target: there each takes several products with images. For the norm alone
# the leading singular values may lie close together, and one step lags.
_SEVERAL_STEPS = 2


class SRNCState(NamedTuple):
    """What `srnc_step` carries: a pytree of small arrays (with zero padding four images, or eight where `own` is kept).

    All of them are real floats: frequencies as shares of a full turn, amplitudes as real and imaginary parts. So a
    state may be averaged, cast to any floating dtype, or stored in any file, with the rest of a model. The next step
    puts right what that changed.

    Attributes:
      normalized: the track (`tracking.py`) of the normalized kernel's leading pair. A dense kernel has the same pair.
      own: the track of the kernel's own leading pair, where the kernel's norm is asked for; else `None`.
    """

    normalized: Track
    own: Track | None


def srnc_state(kernel: Kernel, op: Operator, target, *, norm=1.0, cap: bool = False) -> SRNCState:
    """The state that `srnc_step` starts from, already converged: its first step satisfies the constraints.

    The starts are those of `srnc` (for circular and unbounded convolutions the scan over frequencies and phases). The
    best of them after a few passes is followed to the end by training steps of the kernel at rest. With zero padding
    the time is proportional to the size of the image. Without a target, and for dense layers, the kernel's own leading
    pair is the start; circular and unbounded convolutions take the highest peak that climbing finds, without a proof.
    What may overtake it is unknown then, and is found in the first steps.

    Args:
      kernel, op, target, norm, cap: as for `srnc_step`.

    Returns:
      An `SRNCState`, a constant for derivatives. Its structure depends on static things only: the operator, whether
      `target` or `norm` is `None`, and `cap`.

    Raises:
      ValueError: as `srnc_step` does.
    """
    kernel, target, _ = _checked(kernel, op, target, norm, cap)
    kernel, op = as_matrix(kernel, op)
    # The watch replaces a pair that the kernel outgrows, so that a proof would buy nothing. It would take nearly all of
    # the time for random kernels of many channels, whose largest singular values are alike at all frequencies.
    own = leading_pair(kernel, op, excess=1.0)
    return _srnc_state(kernel, op, own, target, _follows_own(op, target, norm, cap))


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
) -> tuple[Kernel, SRNCState]:
    """Stable rank normalization in training: `(normalized kernel, new state)`, at the cost of a few images.

    A warm power step leads from the pair of the state to a pair `(u, v)`. The result is the kernel closest to `kernel`
    with `||T(K)||_F^2 = target * norm^2` and `<v, T(K) u> = norm`, by the closed form of `srnc`. Both constraints hold
    where the pair is the leading one of the result, and the pair follows the kernel as that changes. A kernel whose own
    stable rank is not above the target is only rescaled to the norm. Where the pair allows no such kernel (an
    infeasible target), the result has the lowest stable rank for that pair.

    Dense layers, and convolutions without edges whose kernel has one tap, take Algorithm 2 of Sanyal, Torr, Dokania
    2020, with two power steps for its one. Any other layer takes passes of the iteration of `srnc` for Zheng et al.
    2025, eq. 7: two, or with zero padding one unless another pair takes over. Its power step is one on the kernel
    normalized with the stored pair, and its state also has vectors that may overtake that pair. The steps of circular
    and unbounded layers need no image. Without a target every layer takes two power steps, and the state of dense
    layers has such vectors too.

    Problem (7) is not convex, and the step follows a local solution. Where the kernel's own stable rank falls just
    below the target, a result that meets both constraints may stay for a while although the kernel itself would do. The
    function is pure and has no randomness: a caller that keeps the old state has only read it.

    A state may be far from its kernel: of other weights, which were loaded since, or an average of states. The step
    sees that by the singular value that its first pass finds, which is then more than 5% above what the state knew of.
    It goes on with passes until one raises the value by less than 1e-5, up to 500. The constraints hold after that;
    with a target, the local solution may be one that `srnc_state` would not have chosen.

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
        derivative is that of the gradient that was asked for, of the converged step. With `"implicit"`, and without a
        target, it is the true one; with `"frozen"` and a target it is not symmetric, and NaN where that system is
        singular.
      num_steps: static. Power steps of the pair before the kernel is normalized with it. The default is one with zero
        padding and a target, where each takes products with images, and otherwise two, and more where the state is far
        from the kernel. A number that is given is kept to, except that one step is followed by a second one where
        another pair takes over.

    Returns:
      The kernel in its dtype, with taps that meet no sample as they were, and the new state. Derivatives go through the
      kernel and through `norm`; the state is constant.

    Raises:
      ValueError: a kernel, target, norm, gradient or number of steps that does not fit; a state of another layer;
        aliased taps.
    """
    kernel, target, norm = _checked(kernel, op, target, norm, cap)
    shape = kernel.shape
    kernel, op = as_matrix(kernel, op)
    check_gradient(gradient)
    few = target is not None and isinstance(op, ZeroPaddedConv)
    least, most = (1 if few else _SEVERAL_STEPS, _MAX_PASSES) if num_steps is None else (num_steps, num_steps)
    steps = static_int(least, "num_steps"), static_int(most, "num_steps")
    own = track_shapes(op, kernel.shape, True) if _follows_own(op, target, norm, cap) else None
    expected = SRNCState(track_shapes(op, kernel.shape, target is None), own)
    ensure(
        jax.tree.map(jnp.shape, state) == expected,
        f"state: it does not fit a kernel of shape {kernel.shape} with {op}, {norm=}, {cap=}; take it from "
        "srnc_state with the same arguments.",
    )
    stepped, state = _srnc_step(kernel, state, op, target, norm, bool(cap), gradient, steps)
    return stepped.reshape(shape), state


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


@functools.partial(program, static_argnums=4)
def _srnc_state(kernel, op, own, target, follows_own):
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    a, _ = rescaled(kernel, op)
    return _as_floats(_started(a, op, own, target, follows_own), op, a)


def _started(a: Float[Array, "..."], op: Operator, own: Pair, target, follows_own: bool) -> SRNCState:
    """The state of a kernel whose own leading pair is known."""
    track = start_track(a, op, own, target is None)
    if target is None or op._normalization_keeps_pairs:
        return SRNCState(track, None)
    problem = problem_of(a, op, target, frozen_value(a, op, own))
    unchanged = problem.squared <= target * problem.norm**2
    starts = chosen(unchanged, jax.tree.map(lambda leaf: leaf[None], own), survey(problem, op, own).starts)
    settled = _without_pair_of_zero(a, _settled(problem, op, starts, track))
    return SRNCState(settled, start_track(a, op, own, True) if follows_own else None)


class _Search(NamedTuple):
    """The track that takes passes, the last normalized kernel and how much it changed, and the best pair so far."""

    track: Track
    kernel: Float[Array, "..."]
    change: Float[Array, ""]
    best: Pair
    merit: Float[Array, ""]
    count: Int[Array, ""]


def _settled(problem: Problem, op: Operator, starts: Pair, track: Track) -> Track:
    """The track of the best start: training steps of the kernel at rest, until the normalized kernel is at rest too.

    Every start takes a few passes, one start after the other, and then the best pair that was seen takes the rest. The
    loop of `srnc` follows all of them to the end.
    """
    a, target = problem.kernel, problem.target
    tolerance = kernel_tolerance(a.dtype)
    num_starts = len(starts.input)
    num_first = num_starts * _START_PASSES

    def one_pass(state: _Search) -> _Search:
        turn = lax.div(state.count, np.int32(_START_PASSES))
        given = picked(starts, jnp.minimum(turn, num_starts - 1))
        is_first = (lax.rem(state.count, np.int32(_START_PASSES)) == 0) & (turn <= num_starts)
        given = chosen(turn < num_starts, given, state.best)
        pair = chosen(is_first, given, state.track.pair)
        kernel = normalized(a, op, target, pair)
        change = jnp.linalg.norm(kernel - state.kernel) / jnp.linalg.norm(kernel)
        merit = _merit(problem, kernel)
        best, merit = chosen(merit < state.merit, (pair, merit), (state.best, state.merit))
        track, _ = follow(kernel, op, Track(pair, state.track.watch), state.count)
        return _Search(track, kernel, change, best, merit, state.count + 1)

    def unfinished(state: _Search):
        # The second pass of the best is the first that can be compared with the one before.
        return (state.count < num_first + 2) | ((state.change > tolerance) & (state.count < num_first + _MAX_PASSES))

    infinite = jnp.asarray(jnp.inf, a.dtype)
    nothing = _Search(track, a, infinite, track.pair, infinite, jnp.asarray(0, jnp.int32))
    return lax.while_loop(unfinished, one_pass, nothing).track


def _merit(problem: Problem, kernel: Float[Array, "..."]) -> Float[Array, ""]:
    """A sort key of normalized kernels as `Candidate.merit` is one of candidates; the numbers are others.

    All feasible kernels have the same `<K, K>_d`, so that their distance decreases in `<K, A>_d`.
    """
    squared = problem.inner(kernel, kernel)
    feasible = squared <= problem.target * (1 + 100 * jnp.finfo(kernel.dtype).eps)
    return jnp.where(feasible, -problem.inner(kernel, problem.kernel), INFEASIBLE * squared)


@functools.partial(program, static_argnums=(5, 6, 7))
def _srnc_step(kernel, state, op, target, norm, cap, gradient, steps):
    a, scale = rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    fixed, state = lax.stop_gradient((a, _of_floats(state, op, kernel.shape, a.dtype)))

    # The power step comes first, on this kernel: the stored pair is that of the kernel before the optimizer's step.
    track, own = state = _followed(fixed, op, target, state, steps)
    # Where the norm alone is asked for, the frozen gradient is the true one.
    pair = track.pair if gradient == "frozen" or target is None else moving_pair(a, op, target, track.pair)
    # The solution is proportional to the norm and does not depend on the scale of the kernel.
    unit_kernel = (frozen if gradient == "frozen" else normalized)(a, op, target, pair)
    unchanged = jnp.asarray(op._tap_counts(kernel.shape) == 0)
    if norm is None or cap:
        own_norm = scale * frozen_value(a, op, (own or track).pair)
        norm = own_norm if norm is None else jnp.minimum(norm, own_norm)
        # The map is the identity here. The product below has the same value, but no derivative at a zero kernel, where
        # both of its factors vanish.
        unchanged |= is_only_rescaled(a, op, target, pair) & (own_norm <= norm)
    normalized_kernel = jnp.where(unchanged, kernel, (norm * unit_kernel).astype(kernel.dtype))
    return normalized_kernel, _as_floats(state, op, fixed)


def _as_floats(state: SRNCState, op: Operator, a: Float[Array, "..."]) -> SRNCState:
    """The state in real floats throughout, as the caller keeps it: all of it NaN for a kernel with NaN in it."""
    nothing = 0.0 * jnp.sum(a)
    floats = SRNCState(*(track and track_as_floats(track, op, a.shape) for track in state))
    return jax.tree.map(lambda leaf: leaf + nothing, floats)


def _of_floats(state: SRNCState, op: Operator, kernel_shape, dtype) -> SRNCState:
    """The state for computations in a dtype, whatever the caller did to its floats."""
    return SRNCState(*(track and track_of_floats(track, op, kernel_shape, dtype) for track in state))


class _Passes(NamedTuple):
    """The passes of a step so far; whether another pair took over in the last, and whether the state is still far."""

    count: Int[Array, ""]
    turned: Bool[Array, ""]
    far: Bool[Array, ""]
    state: SRNCState


def _followed(a: Float[Array, "..."], op: Operator, target, state: SRNCState, steps: tuple[int, int]) -> SRNCState:
    """The state after steps of its tracks: on the kernel normalized with the pair of the first, and on the kernel.

    They are at least `steps[0]`. Where the state is far from the kernel, they go on until it is at rest, up to
    `steps[1]`.
    """
    # Without a target, and for matrices, the normalized kernel has the same pairs as the kernel itself.
    keeps_pairs = target is None or op._normalization_keeps_pairs

    def one_pass(passes: _Passes) -> _Passes:
        track, own = passes.state
        kernel = a if keeps_pairs else normalized(a, op, target, track.pair)
        turn = passes.count if steps[1] > 1 else None
        track, step = follow(kernel, op, track, turn)
        # The closed form gives the value 1 to the pair with which it was made.
        rise = _rise(step.before if keeps_pairs else 1.0, step.after)
        if own is not None:
            own, step_of_own = follow(a, op, own, turn)
            rise = jnp.maximum(rise, _rise(step_of_own.before, step_of_own.after))
        far = rise > jnp.where(passes.far, _AT_REST, _FAR)
        return _Passes(passes.count + 1, step.turned, far, SRNCState(track, own))

    def unfinished(passes: _Passes):
        # Where another pair takes over, the kernel normalized with that pair is another one, which no step has seen.
        least = steps[0] if steps[0] > 1 else jnp.where(passes.turned, 2, steps[0])
        return passes.count < jnp.where(passes.far, steps[1], least)

    no = jnp.asarray(False)
    state = lax.while_loop(unfinished, one_pass, _Passes(jnp.asarray(0, jnp.int32), no, no, state)).state
    return state if keeps_pairs else state._replace(normalized=_without_pair_of_zero(a, state.normalized))


def _rise(before, after):
    """By which share a singular value that a pass found is larger than before, for kernels in the scale of `rescaled`.

    Their norm is about 1 or larger, so that a value below 1 stands for 1; else rounding would rise in zero kernels.
    """
    return (after - before) / jnp.maximum(after, 1.0)


def _without_pair_of_zero(a: Float[Array, "..."], track: Track) -> Track:
    """The track with a pair whose output is 0 where the kernel is zero.

    A zero kernel has no leading pair, and an arbitrary one would lead the next kernel to a poor local solution. With an
    output of 0 the closed form is the next kernel itself, up to its scale, so the pair starts as that kernel's own.
    """
    # In the scale of `rescaled` it is 1, or 0 for a zero kernel.
    largest = jnp.sign(jnp.max(jnp.abs(a)))
    output = track.pair.output * largest.astype(track.pair.output.dtype)
    return track._replace(pair=track.pair._replace(output=output))
