"""The trained ResNet-50 of `resnet50.py` as a model of Flax NNX."""

from __future__ import annotations

import _resnets
import jax.numpy as jnp
import resnet50
from flax import nnx

# Keras's layers have this epsilon in their batch normalizations, and a padding of their own in the stem.
EPSILON, STEM_PADDING = 1e-3, ((3, 3), (3, 3))


def trained_resnet50() -> nnx.Module:
    """The network with its weights, those of the biases left out, which no norm depends on."""
    weights = resnet50.load_arrays()
    model = nnx.eval_shape(lambda: _resnets.resnet50(rngs=nnx.Rngs(0)))
    model.stem.conv.padding = STEM_PADDING
    set_layer(model.stem, weights, "conv1", "bn_conv1")
    blocks = iter(model.blocks)
    for stage, count in enumerate(resnet50.BLOCKS):
        for letter in "abcdef"[:count]:
            block, branch = next(blocks), f"{stage + 2}{letter}_branch"
            for part, end in zip((*block.convs, block.shortcut), ("2a", "2b", "2c", "1"), strict=True):
                if part is not None:
                    set_layer(part, weights, f"res{branch}{end}", f"bn{branch}{end}")
    for name in ("kernel", "bias"):
        setattr(model.dense, name, nnx.Param(jnp.asarray(weights[f"fc1000/{name}"])))
    return model


def set_layer(part, weights, conv: str, norm: str) -> None:
    """Sets the kernel of a convolution, and the batch normalization after it."""
    part.conv.kernel = nnx.Param(jnp.asarray(weights[f"{conv}/kernel"]))
    part.norm.epsilon = EPSILON
    for name, stored, kind in (
        ("scale", "gamma", nnx.Param),
        ("bias", "beta", nnx.Param),
        ("mean", "moving_mean", nnx.BatchStat),
        ("var", "moving_variance", nnx.BatchStat),
    ):
        setattr(part.norm, name, kind(jnp.asarray(weights[f"{norm}/{stored}"])))
