"""One step of training a Flax NNX model, compiled, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class TrainingStep(NamedTuple):
    """A compiled step: `run()` takes it from where the last one ended, and returns the state of the model."""

    run: Callable[[], Any]
    flops: float


def descent(model, x):
    """Plain gradient descent, whatever the model."""
    return optax.sgd(1e-3)


def training_step(model: nnx.Module, x: jax.Array, transformation: Callable = descent) -> TrainingStep:
    """A step that makes the squares of the model's outputs smaller, with the optimizer `transformation(model, x)`."""
    optimizer = nnx.Optimizer(model, transformation(model, x), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    compiled = step.lower(state, x).compile()
    held = [state]

    def run():
        held[0] = jax.block_until_ready(compiled(held[0], x))
        return held[0]

    return TrainingStep(run, compiled.cost_analysis()["flops"])


def first_of(model: nnx.Module, x: jax.Array) -> tuple[TrainingStep, float]:
    """The step, and the seconds until it has been taken once: tracing, compiling and running it."""
    start = time.perf_counter()
    step = training_step(model, x)
    step.run()
    return step, time.perf_counter() - start
