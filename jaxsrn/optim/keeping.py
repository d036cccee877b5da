"""Constraints restored after the step of an optimizer: the part that both `optim.keep_...` transformations share.

The updates of an optimizer lead to some kernels. Every `every` steps these kernels are replaced by the nearest ones
that meet a constraint, and the updates by those that lead there: projected descent, in the manner of
`optax.keep_params_nonnegative`. Unlike there, a projection may start from what the last one found, which is the state.
Layers of one shape are corrected in one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.checks import ensure, errors_named, float_dtype, static_int
from jaxsrn._tools.indexing import repeated
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import MAX_PASSES, kernel_tolerance, vector_tolerance
from jaxsrn.normalization.lower_stable_rank import fixpoint_of, result_of, srnc
from jaxsrn.normalization.result import SRNResult
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.operators.layers import (
    Layers,
    check_layers,
    in_turn,
    kernel_places,
    named_kernels,
    split_shape,
)
from jaxsrn.projections.spectral_ball import project_spectral_ball
from jaxsrn.spectra.pairs_by_kind import no_pair
from jaxsrn.spectra.ranks import stable_rank, target_of_fraction
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "KeepState",
    "Rule",
    "displacement",
    "in_the_ball",
    "keep",
    "of_least_stable_rank",
    "of_stable_rank",
    "require_params",
]


class KeepState(NamedTuple):
    """The state of `keep_spectral_norm` and `keep_stable_rank`.

    Attributes:
      count: steps since the last projection.
      memory: one entry per layer, from which its next projection starts.
    """

    count: Int[Array, "..."]
    memory: Any


class Rule(NamedTuple):
    """How kernels are corrected. Layers under equal rules are corrected by one compiled function.

    Attributes:
      correct: `(kernels, op, memories, limit) -> (kernels, memories)` for a stack of layers, in float32 or wider.
      fraction: of the largest stable rank, to which the layers are held; `None` for a rule of the norm, whose limit is
        an argument of `keep`.
      remembers_pairs: whether the memory of a zero-padded layer is a pair; all others are empty.
    """

    correct: Callable
    fraction: float | None = None
    remembers_pairs: bool = False

    def remembers(self, op: Operator) -> bool:
        """Whether the memory of a layer is a pair."""
        return self.remembers_pairs and isinstance(op, ZeroPaddedConv)


def require_params(params) -> None:
    """Raises `ValueError` where `update` was called without parameters."""
    ensure(
        params is not None,
        "You are using a transformation that requires the current value of parameters, but you are not passing "
        "`params` when calling `update`; call update(updates, state, params).",
    )


def displacement(point, leaf):
    """What `optax.apply_updates` must add to the leaf to land on the point."""
    leaf = jnp.asarray(leaf)
    return (point - leaf.astype(point.dtype)).astype(leaf.dtype)


def keep(
    layers: Layers, every: int, rule: Rule, limit: Float[Array, ""] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation that corrects the kernels to which the updates lead, every `every` steps."""
    check_layers(layers)
    layers, every = dict(layers), static_int(every, "every")

    def init(params):
        if not jax.tree.leaves(params):
            # `optax.tree_map_params` asks for the structure of the state with a tree that has no leaves.
            return KeepState(0, tuple(Pair(None, 0, 0) if rule.remembers(op) else () for op in layers.values()))
        kernels = named_kernels(layers, params)
        memory = []
        for path, op in layers.items():
            outer, shape = split_shape(op, kernels[path].shape)
            with errors_named(f"layers: at {path!r}", " To exempt this layer, leave its path out of layers."):
                op._check_not_aliased(shape)
                if rule.fraction is not None:
                    target_of_fraction(rule.fraction, shape, op)
            first = no_pair(op, shape, float_dtype(kernels[path].dtype)) if rule.remembers(op) else ()
            memory.append(repeated(first, *outer))
        return KeepState(jnp.zeros((), jnp.int32), tuple(memory))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params)
        tree = jax.tree.structure(params)
        steps, places = tree.flatten_up_to(updates), kernel_places(layers, params)
        kernels = named_kernels(layers, params)
        ours = tuple(_checked_step(path, steps[places[path]], kernel) for path, kernel in kernels.items())
        ours, state = _correct(tuple(kernels.values()), ours, state, limit, tuple(layers.items()), every, rule)
        for path, step in zip(layers, ours, strict=True):
            steps[places[path]] = step
        return tree.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init, update)


# A function of the module, as `optax.inject_hyperparams` makes the transformation anew in every step.
@functools.partial(program, static_argnums=(4, 5, 6))
def _correct(kernels: tuple, steps: tuple, state: KeepState, limit, layers: tuple, every: int, rule: Rule):
    """The steps and the state after one step; `layers` is `((path, operator), ...)`."""
    ops, count = dict(layers), (state.count + 1) % every
    given = {path: step for path, step in zip(ops, steps, strict=True) if step is not None}
    memory = dict(zip(ops, state.memory, strict=True))
    correct = functools.partial(rule.correct, limit=rule.fraction if limit is None else limit)

    def corrected():
        return _corrected(ops, correct, dict(zip(ops, kernels, strict=True)), given, memory)

    due = corrected() if every == 1 else lax.cond(count == 0, corrected, lambda: _listed(ops, given, memory))
    return due[0], KeepState(count, due[1])


def _checked_step(path, step, kernel):
    """The update of a kernel as an array of its shape, or `None` where it is missing.

    It is as wide as the kernel at least: rounded to a narrower dtype it would not lead to the corrected kernel.
    """
    if step is None:
        return None
    ensure(
        jnp.shape(step) == kernel.shape,
        f"updates: got shape {jnp.shape(step)} at {path!r}, expected that of the kernel, {kernel.shape}.",
    )
    step = jnp.asarray(step)
    is_narrower = jnp.finfo(step.dtype).bits < jnp.finfo(kernel.dtype).bits
    return step.astype(kernel.dtype) if is_narrower else step


def _listed(layers, steps: dict, memory: dict):
    """The steps (`None` where missing) and the memories, in the order of the layers."""
    return tuple(steps.get(path) for path in layers), tuple(memory[path] for path in layers)


def _corrected(layers, correct: Callable, kernels: dict, steps: dict, memory: dict):
    """The steps to the corrected kernels, and the new memories."""
    # The other branch of the `cond` reads these dictionaries too.
    steps, memory = dict(steps), dict(memory)
    wide = {path: float_dtype(kernels[path].dtype) for path in steps}
    points = {path: kernels[path].astype(dtype) + steps[path].astype(dtype) for path, dtype in wide.items()}
    for path, corrected, new in in_turn(correct, layers, points, memory):
        # A kernel that meets the constraint already keeps its step to the last bit.
        same, step = corrected == points[path], corrected - kernels[path].astype(corrected.dtype)
        steps[path] = jnp.where(same, steps[path], step.astype(steps[path].dtype))
        memory[path] = jax.tree.map(lambda new, old: new.astype(old.dtype), new, memory[path])
    return _listed(layers, steps, memory)


def in_the_ball() -> Rule:
    """The rule of the projection on the kernels with a spectral norm of at most the limit; it has no memory."""
    return Rule(_in_the_ball)


def of_stable_rank(fraction: float) -> Rule:
    """The rule of the closest kernels of the same norm whose stable rank is at most `fraction` of the largest.

    Its memory holds, for zero-padded layers, the pairs that the last correction ended with. Dense layers take one SVD,
    and the scan of circular layers costs little more than a pass from a known pair, so they remember nothing.
    """
    return Rule(_of_stable_rank, fraction, remembers_pairs=True)


def of_least_stable_rank(fraction: float) -> Rule:
    """The rule of the kernels of the same norm whose stable rank is raised to `fraction` of the largest if below it."""
    return Rule(_of_least_stable_rank, fraction)


def _in_the_ball(kernels, op: Operator, memories, limit):
    limit = limit.astype(kernels.dtype)
    # Under `vmap` all kernels would take as many steps as the slowest.
    return lax.map(lambda kernel: project_spectral_ball(kernel, op, limit).kernel, kernels), memories


def _of_stable_rank(kernels, op: Operator, memories, limit):
    target = jnp.asarray(target_of_fraction(limit, kernels.shape[1:], op), kernels.dtype)
    if isinstance(op, ZeroPaddedConv):
        return _followed(kernels, op, target, memories)
    return jax.vmap(lambda kernel: srnc(kernel, op, target).kernel)(kernels), memories


def _of_least_stable_rank(kernels, op: Operator, memories, limit):
    target = jnp.asarray(target_of_fraction(limit, kernels.shape[1:], op), kernels.dtype)

    def raised(kernel):
        # NaN is no stable rank that is high enough, and becomes NaN in every entry.
        is_enough = stable_rank(kernel, op) >= target
        return lax.cond(is_enough, lambda: kernel, lambda: srnc(kernel, op, target, raise_rank=True).kernel)

    # Under `vmap` all kernels would take as many steps as the slowest.
    return lax.map(raised, kernels), memories


def _followed(kernels, op: Operator, target, pairs: Pair):
    """The corrected kernels and their pairs, from the remembered pairs where that suffices, else from all starts.

    A remembered pair does not suffice where there is none, or where the constraints are missed. A pair that was
    feasible for the target is feasible for every kernel: `e`, the squared norm of its gradient, does not depend on the
    kernel.
    """
    dtype = kernels.dtype
    tolerance = jnp.asarray(kernel_tolerance(dtype), dtype)

    def corrected(kernel, pair):
        solution = fixpoint_of(kernel, op, target, pair, tolerance, MAX_PASSES)
        result = result_of(kernel, op, target, solution, keep_norm=True)
        return result.kernel, solution.pair, _is_met(result)

    *warm, met = jax.vmap(corrected)(kernels, pairs)
    known = jnp.any(pairs.input != 0, axis=tuple(range(1, pairs.input.ndim)))
    return lax.cond(
        jnp.all(met & known),
        lambda: tuple(warm),
        lambda: jax.vmap(lambda kernel: corrected(kernel, None)[:2])(kernels),
    )


def _is_met(result: SRNResult) -> Bool[Array, ""]:
    """Whether the constraints are met to the tolerance of singular vectors, or the kernel was returned unchanged."""
    # A smaller factor would search from all starts more often, a larger one keep kernels that miss more.
    met = result.residual <= 4 * vector_tolerance(result.residual.dtype)
    return result.feasible & (met | (result.distance == 0))
