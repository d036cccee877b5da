"""`SRNCState`, what a training step carries to the next one, and `srnc_state`, where it starts: converged.

The closed form (`closed_form.py`) needs the leading pair of the kernel that it returns. A state holds that pair, and
what may overtake it, as a track (`tracking.py`). It starts from the starts of `srnc` (`starts.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar
from jaxsrn._tools.indexing import chosen, picked
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import kernel_tolerance
from jaxsrn.normalization.closed_form import INFEASIBLE, Problem, problem_of
from jaxsrn.normalization.normalized import normalized
from jaxsrn.normalization.starts import survey
from jaxsrn.normalization.training.tracking import Track, follow, start_track, track_as_floats, track_of_floats
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import Pair, rescaled

__all__ = [
    "MAX_PASSES",
    "SRNCState",
    "as_floats",
    "checked",
    "follows_own",
    "of_floats",
    "srnc_state",
    "without_pair_of_zero",
]

# Passes after which the starts are compared: more are surer to pick the best one, and every start takes them.
_START_PASSES = 10
# A guard of the loop, the same as the default of `srnc`.
MAX_PASSES = 500


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
    kernel, target, _ = checked(kernel, op, target, norm, cap)
    kernel, op = as_matrix(kernel, op)
    # The watch replaces a pair that the kernel outgrows, so that a proof would buy nothing. It would take nearly all of
    # the time for random kernels of many channels, whose largest singular values are alike at all frequencies.
    own = leading_pair(kernel, op, excess=1.0)
    return _srnc_state(kernel, op, own, target, follows_own(op, target, norm, cap))


def checked(kernel, op: Operator, target, norm, cap):
    """The kernel, the target (`None` where only the norm is asked for) and the norm, as arrays."""
    kernel = kernel_array(kernel, op)
    dtype = float_dtype(kernel.dtype)
    ensure(norm is not None or not cap, "cap: got True with norm=None, expected a norm to stay below; give norm.")
    norm = None if norm is None else positive_scalar(norm, "norm", dtype, or_zero=True)
    if target is None:
        return kernel, None, norm
    op._check_not_aliased(kernel.shape)
    return kernel, positive_scalar(target, "target", dtype), norm


def follows_own(op: Operator, target, norm, cap) -> bool:
    """Whether the state has a track of the kernel's own norm: not where the normalized kernel has the same pair."""
    return (norm is None or bool(cap)) and target is not None and not op._normalization_keeps_pairs


@functools.partial(program, static_argnums=4)
def _srnc_state(kernel, op, own, target, follows_own):
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    a, _ = rescaled(kernel, op)
    return as_floats(_started(a, op, own, target, follows_own), op, a)


def _started(a: Float[Array, "..."], op: Operator, own: Pair, target, follows_own: bool) -> SRNCState:
    """The state of a kernel whose own leading pair is known."""
    track = start_track(a, op, own, target is None)
    if target is None or op._normalization_keeps_pairs:
        return SRNCState(track, None)
    problem = problem_of(a, op, target, frozen_value(a, op, own))
    unchanged = problem.squared <= target * problem.norm**2
    starts = chosen(unchanged, jax.tree.map(lambda leaf: leaf[None], own), survey(problem, op, own).starts)
    settled = without_pair_of_zero(a, _settled(problem, op, starts, track))
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
        return (state.count < num_first + 2) | ((state.change > tolerance) & (state.count < num_first + MAX_PASSES))

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


def as_floats(state: SRNCState, op: Operator, a: Float[Array, "..."]) -> SRNCState:
    """The state in real floats throughout, as the caller keeps it: all of it NaN for a kernel with NaN in it."""
    nothing = 0.0 * jnp.sum(a)
    floats = SRNCState(*(track and track_as_floats(track, op, a.shape) for track in state))
    return jax.tree.map(lambda leaf: leaf + nothing, floats)


def of_floats(state: SRNCState, op: Operator, kernel_shape, dtype) -> SRNCState:
    """The state for computations in a dtype, whatever the caller did to its floats."""
    return SRNCState(*(track and track_of_floats(track, op, kernel_shape, dtype) for track in state))


def without_pair_of_zero(a: Float[Array, "..."], track: Track) -> Track:
    """The track with a pair whose output is 0 where the kernel is zero.

    A zero kernel has no leading pair, and an arbitrary one would lead the next kernel to a poor local solution. With an
    output of 0 the closed form is the next kernel itself, up to its scale, so the pair starts as that kernel's own.
    """
    # In the scale of `rescaled` it is 1, or 0 for a zero kernel.
    largest = jnp.sign(jnp.max(jnp.abs(a)))
    output = track.pair.output * largest.astype(track.pair.output.dtype)
    return track._replace(pair=track.pair._replace(output=output))
