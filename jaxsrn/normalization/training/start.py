"""`srnc_state`, where the state of a training step starts: converged.

The kernel's own leading pair comes first, and then pairs that the kernel of lower stable rank may have. For unbounded
layers, large circular ones, and large zero-padded ones with a target, training steps find the first pair, from nothing
(`watched_torus.py`) or from plane waves (`watched_images.py`), and no program of a search is compiled. For all others
`leading_pair` finds it. On the grid of a circular layer a climber may stay next to the best frequency of its cell, so
that its further pairs are the starts of `srnc` (`starts.py`), as are those with zero padding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar
from jaxsrn._tools.indexing import chosen, picked, place_of_largest, stack_of_one
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import MAX_PASSES, kernel_tolerance
from jaxsrn.normalization.closed_form import INFEASIBLE, Problem, problem_of
from jaxsrn.normalization.normalized import normalized
from jaxsrn.normalization.starts import best_of, image_waves, survey, with_own
from jaxsrn.normalization.training.passes import followed
from jaxsrn.normalization.training.state import SRNCState, as_floats, without_pair_of_zero
from jaxsrn.normalization.training.tracking import Track, follow, start_track
from jaxsrn.normalization.training.watched_torus import pairs_of
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.leading import branch_and_bound_pays
from jaxsrn.spectra.circular.sites import without_constant_axes
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.padded.leading import is_searched
from jaxsrn.spectra.pairs_by_kind import leading_pair, no_pair
from jaxsrn.spectra.singular_pair import Pair, is_small, rescaled

__all__ = ["checked", "follows_own", "srnc_state"]

# Passes that all starts take together before they are compared: more are surer to pick the best one.
_FIRST_PASSES = 40
# The least passes that find the kernel's own pair, roughly or well. To find it well they go on until they are at rest.
_FEW_PASSES, _MANY_PASSES = 20, 120
# The least passes that the best start takes. What may overtake it shows only after some of them, where the target is
# near to the kernel's own stable rank.
_LAST_PASSES = 20


def srnc_state(kernel: Kernel, op: Operator, target, *, norm=1.0, cap: bool = False) -> SRNCState:
    """The state that `srnc_step` starts from, already converged: its first step satisfies the constraints.

    Training steps of the kernel at rest find the kernel's own leading pair, without a proof that no other is larger. It
    is searched for dense and small layers, and with zero padding where the norm alone or the kernel's own is asked for.

    With a target that pair and others are starts. The best of them after a few passes is followed to the end by further
    steps. The other starts of circular layers and of those with zero padding are the ones of `srnc`. Unbounded layers
    take the best pairs that climbing over the frequencies finds, and may settle at another local solution than `srnc`.
    `python benchmarks/starts.py` measures how far the first steps of random kernels are off. With zero padding the time
    is proportional to the size of the image.

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
    needs_own = follows_own(op, target, norm, cap)
    by_steps = _is_found_by_steps(op, kernel.shape, _own_pair_may_be_rough(target, needs_own))
    own = None if by_steps else leading_pair(kernel, op)
    return _srnc_state(kernel, op, own, target, needs_own)


def _own_pair_may_be_rough(target, needs_own: bool) -> bool:
    """Whether the kernel's own pair is only a start on the way to the target, and not what the state is to hold."""
    return target is not None and not needs_own


def _is_found_by_steps(op: Operator, kernel_shape: tuple[int, ...], roughly: bool) -> bool:
    """Whether training steps find the kernel's own pair: not where all singular values can be computed (static).

    With zero padding they find it roughly, to within a few percent, from where a search goes on for long. A target
    below the kernel's own stable rank asks for no more. The norm alone, and the kernel's own norm, ask for a search.
    """
    if isinstance(op, CircularConv):
        return branch_and_bound_pays(kernel_shape, without_constant_axes(op, kernel_shape))
    if isinstance(op, ZeroPaddedConv):
        return roughly and is_searched(op, kernel_shape)
    return isinstance(op, UnboundedConv)


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


@functools.partial(program, static_argnums=4, brief=is_small)
def _srnc_state(kernel, op, own, target, needs_own):
    kernel, target = lax.stop_gradient((kernel.astype(float_dtype(kernel.dtype)), target))
    a, _ = rescaled(kernel, op)
    return as_floats(_started(a, op, own, target, needs_own), op, a)


def _started(a: Float[Array, "..."], op: Operator, pair: Pair | None, target, needs_own: bool) -> SRNCState:
    """The state of a kernel, with its own leading pair where that was searched."""
    waves = image_waves(a, op, target) if isinstance(op, ZeroPaddedConv) and target is not None else None
    if pair is None:
        own = _found(a, op, waves, _own_pair_may_be_rough(target, needs_own))
    else:
        own = start_track(a, op, pair, target is None)
    if target is None or op._normalization_keeps_pairs:
        return SRNCState(own, None)
    problem = problem_of(a, op, target, pair_value(a, op, own.pair))
    unchanged = problem.squared <= target * problem.norm**2
    alone = stack_of_one(own.pair)
    starts = chosen(unchanged, alone, _starts(problem, op, own, waves))
    settled = without_pair_of_zero(a, _settled(problem, op, starts, own))
    return SRNCState(settled, own if needs_own else None)


def _found(a: Float[Array, "..."], op: Operator, waves: Pair | None, roughly: bool) -> Track:
    """The track of the kernel's own pair, by steps from the largest of some waves, or from nothing."""
    if waves is None:
        first = no_pair(op, a.shape, a.dtype)
    else:
        images = op.apply(a, waves.input, precision=lax.Precision.HIGHEST)
        first = picked(waves, place_of_largest(jnp.linalg.norm(images.reshape((len(images), -1)), axis=1)))
    steps = (_FEW_PASSES, _FEW_PASSES) if roughly else (_MANY_PASSES, MAX_PASSES)
    return followed(a, op, None, SRNCState(start_track(a, op, first, True), None), steps).normalized


def _starts(problem: Problem, op: Operator, own: Track, waves: Pair | None) -> Pair:
    """The pairs that the kernel of lower stable rank may have."""
    if waves is not None:
        return with_own(own.pair, waves)
    if isinstance(op, UnboundedConv):
        return best_of(problem, op, *pairs_of(problem.kernel, op, own.watch))
    return survey(problem, op, own.pair).starts


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
    each = _FIRST_PASSES // num_starts
    num_first = num_starts * each

    def one_pass(state: _Search) -> _Search:
        turn = lax.div(state.count, np.int32(each))
        given = picked(starts, jnp.minimum(turn, num_starts - 1))
        is_first = (lax.rem(state.count, np.int32(each)) == 0) & (turn <= num_starts)
        given = chosen(turn < num_starts, given, state.best)
        pair = chosen(is_first, given, state.track.pair)
        kernel = normalized(a, op, target, pair)
        change = jnp.linalg.norm(kernel - state.kernel) / jnp.linalg.norm(kernel)
        merit = _merit(problem, kernel)
        best, merit = chosen(merit < state.merit, (pair, merit), (state.best, state.merit))
        track, _ = follow(kernel, op, Track(pair, state.track.watch), state.count)
        return _Search(track, kernel, change, best, merit, state.count + 1)

    def unfinished(state: _Search):
        count = state.count - num_first
        return (count < _LAST_PASSES) | ((state.change > tolerance) & (count < MAX_PASSES))

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
