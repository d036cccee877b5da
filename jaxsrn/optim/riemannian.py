"""Optax transformations: parameters on the unit sphere; layers of bounded norm, or of prescribed stable rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxsrn import sphere
from jaxsrn._tools.checks import ensure, float_dtype, positive_scalar
from jaxsrn.operators.layers import Layers
from jaxsrn.optim import keeping as _keeping
from jaxsrn.optim.keeping import KeepState, displacement, require_params

__all__ = ["KeepState", "SphereSGDState", "keep_spectral_norm", "keep_stable_rank", "on_sphere", "sphere_sgd"]


def _map(function, updates, *trees):
    """`jax.tree.map` that leaves missing updates (`None`) missing, as optax does."""
    return jax.tree.map(
        lambda update, *rest: None if update is None else function(update, *rest),
        updates,
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def _point(leaf) -> Float[Array, "..."]:
    """The point that a parameter stands for, `x / |x|` over the whole leaf, in float32 or wider."""
    leaf = jnp.asarray(leaf)
    ensure(
        jnp.issubdtype(leaf.dtype, jnp.floating),
        f"params: got a leaf of dtype {leaf.dtype}, expected real floating-point ones; leave it out with optax.masked.",
    )
    leaf = leaf.astype(float_dtype(leaf.dtype))
    return sphere.retract(leaf, jnp.zeros_like(leaf), axis=None)


def _points(params):
    """The points that the parameters stand for."""
    require_params(params)
    return jax.tree.map(_point, params)


def _tangent(vector, point):
    """`vector` projected on the tangent space, in the precision of the point."""
    return sphere.tangent(point, jnp.asarray(vector).astype(point.dtype), axis=None)


def on_sphere(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes any optax transformation Riemannian: every leaf stays on its unit sphere, as one point.

    Each step projects the gradient on the tangent space, `g - <g, x> x`, hands it to `inner`, projects what comes
    back, and retracts, `x' = (x + u) / |x + u|` (Zheng et al. 2025, eqs. 18 and 19, for any `u`). The update is
    `x' - x`, so `optax.apply_updates` lands on the sphere to rounding, step after step: nothing accumulates. Hence
    it comes last in a chain: learning rates and clipping belong into `inner`. States of `inner` (momentum, Adam's
    moments) are ambient and not transported; `sphere_sgd` transports.

    A parameter off the sphere is treated as `x / |x|` and lands on the sphere with the first step (to the rounding of
    the parameter, as updates are differences); a zero one lands where the step leads. A zero step leaves a point
    where it is. Narrow dtypes are computed in float32, the state of `inner` included.

        optimizer = on_sphere(optax.adam(1e-2))
        parts = {"sphere": on_sphere(optax.sgd(schedule)), "plain": optax.adam(1e-3)}
        optimizer = optax.partition(parts, {"direction": "sphere", "scale": "plain"})

    Args:
      inner: the transformation; its extra arguments are passed through. It sees the projected gradients and the
        normalized parameters, both in float32 or wider.

    Returns:
      The transformation; its state is that of `inner`. `update` needs `params`.

    Raises:
      ValueError: something else than a transformation; in `init` and `update`, leaves that aren't real floating;
        in `update`, missing `params` or gradients of other shapes.
    """
    ensure(
        callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None)),
        f"inner: got {inner!r}, expected an optax.GradientTransformation such as optax.sgd(0.1).",
    )
    inner = optax.with_extra_args_support(inner)

    def init(params):
        # Of the points, so that inner's state has the dtype that its updates will have.
        return inner.init(_points(params))

    def move(step, point, leaf):
        return displacement(sphere.retract(point, _tangent(step, point), axis=None), leaf)

    def update(updates, state, params=None, **extra_args):
        points = _points(params)
        steps, state = inner.update(_map(_tangent, updates, points), state, points, **extra_args)
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


def sphere_sgd(learning_rate, momentum=None) -> optax.GradientTransformationExtraArgs:
    """Riemannian gradient descent on the unit sphere, every leaf one point (Zheng et al. 2025, eqs. 17 to 19).

    `d` the gradient, `d~ = d - <d, x> x`, `x' = (x - eta d~) / |x - eta d~|`. With momentum, the heavy ball: the
    velocity `m = momentum * m + d~` takes the place of `d~`, and is carried to `x'` by parallel transport, so it
    stays tangent and keeps its length. Points off the sphere, updates and precision as in `on_sphere`.

    Args:
      learning_rate: `eta`, a number or an optax schedule.
      momentum: the share of the velocity that is kept, a number `>= 0`; `None` for none.

    Returns:
      The transformation; with momentum its state is a `SphereSGDState`. `update` needs `params`.

    Raises:
      ValueError: a negative momentum; in `update`, as `on_sphere`.
    """
    if momentum is None:
        return on_sphere(optax.sgd(learning_rate))
    if not isinstance(momentum, jax.core.Tracer):
        ensure(
            np.ndim(momentum) == 0 and bool(momentum >= 0),
            f"momentum: got {momentum}, expected a number >= 0, as a rule below 1; None for plain gradient descent.",
        )

    def accumulate(update, point, velocity):
        kept = jnp.asarray(momentum).astype(point.dtype) * _tangent(velocity, point)
        return kept + _tangent(update, point)

    def init(params):
        velocities = jax.tree.map(jnp.zeros_like, _points(params))
        return SphereSGDState(jnp.zeros((), jnp.int32), velocities)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        points = _points(params)
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        velocities = _map(accumulate, updates, points, state.momentum)
        targets = _map(lambda m, x: sphere.retract(x, -rate.astype(x.dtype) * m, axis=None), velocities, points)
        carried = _map(lambda m, x, y: sphere.transport(x, y, m, axis=None), velocities, points, targets)
        # Where an update is missing, the velocity waits.
        carried = jax.tree.map(
            lambda new, old: old if new is None else new, carried, state.momentum, is_leaf=lambda leaf: leaf is None
        )
        return _map(displacement, targets, params), SphereSGDState(optax.safe_increment(state.count), carried)

    return optax.GradientTransformationExtraArgs(init, update)


# Layers


def keep_spectral_norm(layers: Layers, max_norm, *, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keeps the spectral norm of layers at or below `max_norm` while any optimizer trains them.

    In the manner of `optax.keep_params_nonnegative`: it comes last in a chain and changes the updates, so that
    `optax.apply_updates` lands on the closest kernels in the ball, `project_spectral_ball` of the kernels that the
    optimizer would have reached. That is projected descent on `{||T(K)||_2 <= max_norm}`, with the norm of the whole
    layer, padding and strides included.

        optimizer = optax.chain(optax.adam(1e-3), keep_spectral_norm(layer_operators(model, x), 1.0))

    Guaranteed after every projection: `||T(K)||_2 <= max_norm` up to rounding. Kernels in the ball, and all other
    parameters, are not touched. With `every > 1` the updates in between pass unchanged, at no cost; then a norm
    exceeds `max_norm` by at most the sum of `||T(step)||_2` since the last projection. `benchmarks/training.py --only
    keeping` measures the cost and that drift.

    Layers of equal operator and shape are projected in one call. Zero-padded layers too large for an explicit matrix
    take several convex problems and are an inner approximation (see `project_spectral_ball`): use a large `every`.
    Inside `optax.MultiSteps` every accumulated step computes a projection, and the last of them counts; outside,
    `chain(MultiSteps(adam, k).gradient_transformation(), keep_spectral_norm(..., every=k))`, only that one is computed.
    The same under `vmap`, where all branches run.

    Args:
      layers: `{path: operator}`, as `jaxsrn.nnx.layer_operators` gives it; a path is the tuple of plain keys to the
        kernel, `("conv1", "kernel")`.
      max_norm: positive.
      every: steps from one projection to the next; the first is that of step `every`. Static.

    Returns:
      The transformation; its state is a `KeepState`. `update` needs `params`. A missing update (`None`) stays missing.
      Updates keep their dtype; narrow kernels meet the constraint to their rounding.

    Raises:
      ValueError: a `max_norm` that is not positive, a bad `every`; in `init` and `update`, naming the layer: a path
        that names no leaf of `params` or several, a kernel that does not fit its operator, aliased taps; in `update`,
        missing `params` or updates of other shapes.
    """
    limit = positive_scalar(max_norm, "max_norm", jnp.result_type(float))
    return _keeping.keep(layers, every, _keeping.in_the_ball(limit))


def keep_stable_rank(layers: Layers, fraction: float, *, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keeps the stable rank of layers at or below a fraction of the largest while any optimizer trains them.

    As `keep_spectral_norm`, with the closest kernels of stable rank `fraction * min(prod(in), prod(out))` and of the
    norm that each layer has of itself: `srnc` (Zheng et al. 2025, eq. 7), for matrices `srn` with one value preserved
    (Sanyal, Torr, Dokania 2020). Layers whose stable rank is below that are not touched.

        optimizer = optax.chain(optax.adam(1e-3), keep_stable_rank(layer_operators(model, x), 0.3, every=10))

    Guaranteed after every projection: the stable rank of every layer is at most the target (equal to it where it was
    above) up to the tolerance of `srnc`, and its norm is that of the kernel that the optimizer's own updates lead to.
    (The norm may grow with training; put `keep_spectral_norm` before this one to bound it too.) In between the stable
    rank drifts with the updates: with `t = ||T(step)||_F / ||T||_2` summed since the last projection and `r` the
    target, its square root is at most `(sqrt(r) + t) / (1 - t)`.

    Problem (7) is not convex. Circular layers are scanned anew in every projection, zero-padded ones start from the
    pair of images that the last projection ended with, which takes far less time, and from several starts where
    that does not meet the constraints.

    Args:
      layers, every: as `keep_spectral_norm`.
      fraction: in (0, 1] (Sanyal's `c`, Zheng's `beta`), as in `jaxsrn.nnx.StableRankNorm`.

    Returns, errors: as `keep_spectral_norm`; also a fraction outside (0, 1], and in `init`, naming the layer, one that
      is below what its taps allow.
    """
    ensure(
        np.ndim(fraction) == 0 and 0 < float(fraction) <= 1, f"fraction: got {fraction}, expected a number in (0, 1]."
    )
    return _keeping.keep(layers, every, _keeping.of_stable_rank(float(fraction)))
