"""Descent on the unit sphere, by any optax optimizer, of a loss that may change with the step.

The published method has a fixed step, `alpha` and penalty (Zheng et al. 2025, eqs. 17 to 19). Continuation, which is
not in the paper, lets them change with the step. Both are this one loop, under schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import float_dtype, positive_scalar
from jaxsrn._tools.linalg import by_largest, unit
from jaxsrn.sphere import random

__all__ = [
    "State",
    "advance",
    "begin",
    "by_step",
    "geometric",
    "starting_points",
]


class State(NamedTuple):
    """An iterate on the sphere, the optimizer's state, and the number of steps taken."""

    point: Float[Array, "..."]
    inner: optax.OptState
    count: Int[Array, ""]


def begin(point: Float[Array, "..."], optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(point, optimizer.init(point), jnp.asarray(0, jnp.int32))


def starting_points(keys, like: Float[Array, "..."], initial=None) -> Float[Array, "starts ..."]:
    """A random point of the sphere per key, of the shape and dtype of `like`; `initial` in place of the first."""
    # The points are drawn in float32, so that they are the same in every precision up to rounding.
    drawn = jax.vmap(lambda key: random(key, like.shape, axis=None, dtype=jnp.float32))(keys)
    points = jax.vmap(unit)(drawn.astype(like.dtype))
    # Squares of very small or large entries are no numbers of the dtype.
    return points if initial is None else points.at[0].set(unit(by_largest(initial.astype(like.dtype))[0]))


def advance(state: State, loss: Callable, optimizer: optax.GradientTransformationExtraArgs, num_steps: int) -> State:
    """The state after `num_steps` steps on `loss(point, step)`; line searches get the loss of their own step."""

    def step(_, state: State) -> State:
        def value_fn(point):
            return loss(point, state.count)

        value, gradient = jax.value_and_grad(value_fn)(state.point)
        updates, inner = optimizer.update(
            gradient, state.inner, state.point, value=value, grad=gradient, value_fn=value_fn
        )
        return State(optax.apply_updates(state.point, updates), inner, state.count + 1)

    return lax.fori_loop(0, num_steps, step, state)


# Numbers that change with the steps: pytrees of traced data over a static function


def geometric(first, last, num_steps: int) -> Partial:
    """The schedule that goes geometrically from `first` before the first step to `last` after the last step."""
    return Partial(_exponential, first, jnp.log(last / first) / num_steps)


def _exponential(first, slope, step):
    return first * jnp.exp(slope * step.astype(first.dtype))


def by_step(value, name: str, dtype, *, or_zero: bool = False) -> Partial | None:
    """A number, which is checked, or a schedule `step -> number`, as a function of the step; `None` stays `None`."""
    if value is None:
        return None
    if callable(value):
        return Partial(value)
    return Partial(_constant, positive_scalar(value, name, float_dtype(dtype), or_zero=or_zero))


def _constant(value, step):
    return value
