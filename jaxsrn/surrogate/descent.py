"""Descent of a loss that changes with the steps, on the unit sphere, by any optax optimizer."""

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
from jaxsrn._tools.linalg import unit
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
    """An iterate, the optimizer's state, and the steps taken."""

    point: Float[Array, "..."]
    inner: optax.OptState
    count: Int[Array, ""]


def begin(point: Float[Array, "..."], optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(point, optimizer.init(point), jnp.asarray(0))


def starting_points(keys, like: Float[Array, "..."], initial=None) -> Float[Array, "starts ..."]:
    """A random point of the sphere per key, of the shape and dtype of `like`; `initial` in place of the first."""
    # Drawn in float32: the same in every precision.
    points = jax.vmap(lambda key: random(key, like.shape, axis=None, dtype=jnp.float32))(keys)
    points = points.astype(like.dtype)
    return points if initial is None else points.at[0].set(unit(initial.astype(like.dtype)))


def advance(state: State, loss: Callable, optimizer: optax.GradientTransformationExtraArgs, num_steps: int) -> State:
    """`num_steps` steps on `loss(point, step)`; line searches get the loss of their step."""

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
    """From `first` before the first step to `last` after the last."""
    return Partial(_exponential, first, jnp.log(last / first) / num_steps)


def _exponential(first, slope, step):
    return first * jnp.exp(slope * step.astype(first.dtype))


def by_step(value, name: str, dtype, *, or_zero: bool = False) -> Partial | None:
    """A number (checked) or a schedule `step -> number` as a function of the step; `None` stays."""
    if value is None:
        return None
    if callable(value):
        return Partial(value)
    return Partial(_constant, positive_scalar(value, name, float_dtype(dtype), or_zero=or_zero))


def _constant(value, step):
    return value
