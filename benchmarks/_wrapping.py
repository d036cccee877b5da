"""A network as it is, and with a stable rank norm on every layer: held at every image size, or at the layer's own."""

from __future__ import annotations

import jax
from flax import nnx

import jaxsrn.nnx as jnnx

PLAIN, UNBOUNDED, SIZED = "plain", "without input_shape", "with input_shape"
VARIANTS = (PLAIN, UNBOUNDED, SIZED)
# Below the stable rank that layers start with, about a quarter of the largest, so that every layer is constrained.
FRACTION = 0.15
LAYERS = (nnx.Conv, nnx.Linear)


def wrapped(model: nnx.Module, x, variant: str, where=LAYERS) -> nnx.Module:
    """The model as a variant has it, ready to be trained on inputs like `x`."""
    if variant == PLAIN:
        return model
    operators = jnnx.layer_operators(model, x) if variant == SIZED else {}

    def wrap(path, layer):
        shape = getattr(operators.get((*path, "kernel")), "input_shape", None)
        return jnnx.StableRankNorm(layer, FRACTION, input_shape=shape)

    model = jnnx.constrain(model, wrap, where)
    jax.block_until_ready(nnx.state(model))
    return model
