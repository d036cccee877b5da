"""The residual networks of the examples, for images as those of CIFAR-10: He et al. 2016, in both orders of a block."""

import jax.numpy as jnp
from _cifar10 import NUM_CLASSES
from flax import nnx

__all__ = ["Block", "PreActivationBlock", "ResNet", "ResNetV2"]


def convolution(c_in: int, c_out: int, rngs: nnx.Rngs, strides: int = 1, use_bias: bool = False) -> nnx.Conv:
    return nnx.Conv(c_in, c_out, (3, 3), strides=strides, use_bias=use_bias, rngs=rngs)


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)


def skipped(x, strides: int, channels: int):
    """The identity; where the image shrinks, that of every second sample, and zeros in the channels that are new."""
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, channels - x.shape[-1])])


def block_sizes(widths: list[int], blocks: int) -> list[tuple[int, int, int]]:
    """`(c_in, c_out, strides)` of every block: a stage for each width, half the image from one to the next."""
    strides = [2 if stage and not i else 1 for stage in range(len(widths)) for i in range(blocks)]
    channels = [widths[0], *(width for width in widths for _ in range(blocks))]
    return list(zip(channels, channels[1:], strides, strict=False))


class Block(nnx.Module):
    """Two convolutions, each with a batch norm after it or with a bias, and the identity."""

    def __init__(self, c_in: int, c_out: int, strides: int, rngs: nnx.Rngs, has_norms: bool = True):
        self.conv1 = convolution(c_in, c_out, rngs, strides, use_bias=not has_norms)
        self.norm1 = batch_norm(c_out, rngs) if has_norms else nnx.identity
        self.conv2 = convolution(c_out, c_out, rngs, use_bias=not has_norms)
        self.norm2 = batch_norm(c_out, rngs) if has_norms else nnx.identity
        self.strides = strides

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + skipped(x, self.strides, y.shape[-1]))


class ResNet(nnx.Module):
    """The network of "Deep residual learning for image recognition": a stage of `blocks` blocks for each width."""

    def __init__(self, widths: list[int], blocks: int, rngs: nnx.Rngs, *, has_norms: bool = True):
        self.stem = convolution(3, widths[0], rngs, use_bias=not has_norms)
        self.stem_norm = batch_norm(widths[0], rngs) if has_norms else nnx.identity
        self.blocks = nnx.List([Block(*sizes, rngs, has_norms) for sizes in block_sizes(widths, blocks)])
        self.head = nnx.Linear(widths[-1], NUM_CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class PreActivationBlock(nnx.Module):
    """Two convolutions, each after a batch norm and its activation, and the identity."""

    def __init__(self, c_in: int, c_out: int, strides: int, rngs: nnx.Rngs):
        self.norm1 = batch_norm(c_in, rngs)
        self.conv1 = convolution(c_in, c_out, rngs, strides)
        self.norm2 = batch_norm(c_out, rngs)
        self.conv2 = convolution(c_out, c_out, rngs)
        self.strides = strides

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return y + skipped(x, self.strides, y.shape[-1])


class ResNetV2(nnx.Module):
    """The ResNet v2, of "Identity mappings in deep residual networks": nothing is between one identity and the next."""

    def __init__(self, widths: list[int], blocks: int, rngs: nnx.Rngs):
        self.stem = convolution(3, widths[0], rngs)
        self.blocks = nnx.List([PreActivationBlock(*sizes, rngs) for sizes in block_sizes(widths, blocks)])
        self.norm = batch_norm(widths[-1], rngs)
        self.head = nnx.Linear(widths[-1], NUM_CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))
