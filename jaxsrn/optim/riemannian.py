"""Optax transformations that keep parameters on the unit sphere (Zheng et al. 2025, section 3.3)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import check_transformation, ensure, float_dtype, positive_scalar
from jaxsrn.optim.keeping import displacement, require_params
from jaxsrn.sphere import retract, tangent, transport

__all__ = [
    "SphereSGDState",
    "on_sphere",
    "sphere_sgd",
]


def _map(function, updates, *trees):
    """A `jax.tree.map` that leaves missing updates (`None`) missing, as optax does."""
    return jax.tree.map(
        lambda update, *rest: None if update is None else function(update, *rest),
        updates,
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def _point(leaf, axis) -> Float[Array, "..."]:
    """The points for which one parameter stands, `x / |x|` along the axis, in float32 or wider."""
    leaf = jnp.asarray(leaf)
    ensure(
        jnp.issubdtype(leaf.dtype, jnp.floating),
        f"params: got a leaf of dtype {leaf.dtype}, expected real floating-point ones; leave it out with optax.masked.",
    )
    leaf = leaf.astype(float_dtype(leaf.dtype))
    return retract(leaf, jnp.zeros_like(leaf), axis=axis)


def _points(params, axis):
    """The points for which the parameters stand."""
    require_params(params)
    return jax.tree.map(lambda leaf: _point(leaf, axis), params)


def _tangent(vector, point, axis):
    """`vector` projected on the tangent space, in the precision of the point."""
    return tangent(point, jnp.asarray(vector).astype(point.dtype), axis=axis)


def on_sphere(inner: optax.GradientTransformation, *, axis=None) -> optax.GradientTransformationExtraArgs:
    """Makes any optax transformation Riemannian: the parameters are points of unit spheres, and stay there.

    Each step projects the gradient on the tangent space, `g - <g, x> x`, hands it to `inner`, projects the step `u`
    that `inner` gives, and retracts, `x' = (x + u) / |x + u|` (Zheng et al. 2025, eqs. 18 and 19, for any `u`). The
    update is `x' - x`, so `optax.apply_updates` lands on the sphere to rounding in every step, and nothing accumulates.
    The transformation therefore comes last in a chain: learning rates and clipping belong into `inner`. States of
    `inner` (momentum, Adam's moments) are vectors of the ambient space and not transported; `sphere_sgd` transports.

    A parameter off the sphere is treated as `x / |x|` and lands on the sphere with the first step (to the rounding of
    the parameter, as updates are differences). A zero parameter lands where the step leads. A zero step leaves a point
    where it is. Narrow dtypes are computed in float32, the state of `inner` included.

        optimizer = on_sphere(optax.adam(1e-2))
        parts = {"sphere": on_sphere(optax.sgd(schedule)), "plain": optax.adam(1e-3)}
        optimizer = optax.partition(parts, {"direction": "sphere", "scale": "plain"})

    Args:
      inner: the transformation; its extra arguments are passed through. It sees the projected gradients and the
        normalized parameters, both in float32 or wider.
      axis: which axes of a leaf make one point, an int or a tuple; the others are a batch of points, each on its own
        sphere, as `sphere.random(key, (7, 3))` has seven with `axis=-1`. `None`: the whole leaf is one point.

    Returns:
      The transformation; its state is that of `inner`. `update` needs `params`.

    Raises:
      ValueError: something else than a transformation; in `init` and `update`, leaves that aren't real floating or
        that lack the axis; in `update`, missing `params` or gradients of other shapes.
    """
    check_transformation(inner, "inner")
    inner, project = optax.with_extra_args_support(inner), functools.partial(_tangent, axis=axis)

    def init(params):
        # `inner` will see updates in the dtype of the points, which may be wider than the parameters.
        return inner.init(_points(params, axis))

    def move(step, point, leaf):
        return displacement(retract(point, project(step, point), axis=axis), leaf)

    def update(updates, state, params=None, **extra_args):
        points = _points(params, axis)
        steps, state = inner.update(_map(project, updates, points), state, points, **extra_args)
        return _map(move, steps, points, params), state

    return optax.GradientTransformationExtraArgs(init, update)


class SphereSGDState(NamedTuple):
    """The state of `sphere_sgd` with momentum.

    Attributes:
      count: steps taken.
      momentum: the velocities, tangent at the parameters, in float32 or wider.
    """

    count: Int[Array, "..."]
    momentum: Any


def sphere_sgd(learning_rate, momentum=None, *, axis=None) -> optax.GradientTransformationExtraArgs:
    """Riemannian gradient descent on the unit sphere (Zheng et al. 2025, eqs. 17 to 19).

    With the gradient `d` and `d~ = d - <d, x> x` a step is `x' = (x - eta d~) / |x - eta d~|`. With momentum it is the
    heavy ball: the velocity `m = momentum * m + d~` takes the place of `d~` and is carried to `x'` by parallel
    transport, so it stays tangent and keeps its length. Points off the sphere, updates and precision are as in
    `on_sphere`.

    Args:
      learning_rate: `eta`, a number or an optax schedule.
      momentum: the share of the velocity that is kept, a number `>= 0`; `None` for plain gradient descent.
      axis: which axes of a leaf make one point, as in `on_sphere`; `optax.inject_hyperparams` needs
        `static_args=("axis",)`.

    Returns:
      The transformation; with momentum its state is a `SphereSGDState`. `update` needs `params`.

    Raises:
      ValueError: a momentum that is negative or not finite; in `update`, as `on_sphere`.
    """
    if momentum is None:
        return on_sphere(optax.sgd(learning_rate), axis=axis)
    # It is cast to the dtype of each leaf below.
    positive_scalar(momentum, "momentum", jnp.float32, or_zero=True)

    def accumulate(update, point, velocity):
        kept = jnp.asarray(momentum).astype(point.dtype) * _tangent(velocity, point, axis)
        return kept + _tangent(update, point, axis)

    def init(params):
        velocities = jax.tree.map(jnp.zeros_like, _points(params, axis))
        return SphereSGDState(jnp.zeros((), jnp.int32), velocities)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        points = _points(params, axis)
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        velocities = _map(accumulate, updates, points, state.momentum)
        targets = _map(lambda m, x: retract(x, -rate.astype(x.dtype) * m, axis=axis), velocities, points)
        carried = _map(lambda m, x, y: transport(x, y, m, axis=axis), velocities, points, targets)
        # Where an update is missing, the velocity waits.
        carried = jax.tree.map(
            lambda new, old: old if new is None else new, carried, state.momentum, is_leaf=lambda leaf: leaf is None
        )
        return _map(displacement, targets, params), SphereSGDState(optax.safe_increment(state.count), carried)

    return optax.GradientTransformationExtraArgs(init, update)
