"""Residual networks in plain Flax NNX, of any width, to be trained with and without wrapped layers."""

from __future__ import annotations

import functools

from flax import nnx


class ConvNorm(nnx.Module):
    """A convolution without bias, and its batch normalization."""

    def __init__(self, c_in: int, c_out: int, taps: int, strides: int = 1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(c_in, c_out, (taps, taps), strides=strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(c_out, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Convolutions, and a shortcut around them, which is one too where channels or size change.

    `taps` are those of the convolutions, two or three of them; the last has `c_out` channels, the others `c_narrow`.
    The stride is in the first.
    """

    def __init__(
        self, c_in: int, c_narrow: int, c_out: int, taps: tuple[int, ...], strides: int = 1, *, rngs: nnx.Rngs
    ):
        channels = [c_in, *[c_narrow] * (len(taps) - 1), c_out]
        self.convs = nnx.List(
            [ConvNorm(channels[i], channels[i + 1], k, strides if i == 0 else 1, rngs=rngs) for i, k in enumerate(taps)]
        )
        self.shortcut = None if c_in == c_out and strides == 1 else ConvNorm(c_in, c_out, 1, strides, rngs=rngs)

    def __call__(self, x):
        y = x
        for conv in self.convs[:-1]:
            y = nnx.relu(conv(y))
        return nnx.relu(self.convs[-1](y) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem, `blocks` of each stage, a mean over the image and a dense layer.

    Every stage has twice the channels of the one before, on half of its image. `taps` are those of a block, whose last
    convolution is `expansion` times as wide as the others. A `deep` stem is that of ImageNet: 7x7 taps and a pooling,
    with stride 2 each; the other one has 3x3 taps.
    """

    def __init__(self, *, blocks, taps, expansion: int, deep: bool, width: int, classes: int, rngs: nnx.Rngs):
        self.deep = deep
        self.stem = ConvNorm(3, width, 7 if deep else 3, 2 if deep else 1, rngs=rngs)
        layers, c_in = [], width
        for stage, number in enumerate(blocks):
            narrow = width * 2**stage
            for i in range(number):
                strides = 2 if stage > 0 and i == 0 else 1
                layers.append(Block(c_in, narrow, expansion * narrow, taps, strides, rngs=rngs))
                c_in = expansion * narrow
        self.blocks = nnx.List(layers)
        self.dense = nnx.Linear(c_in, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        if self.deep:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean(axis=(1, 2)))


# 21 layers of 16 to 128 channels for images of 32x32 samples, and 54 of 64 to 2048 for those of ImageNet.
resnet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), taps=(3, 3), expansion=1, deep=False, width=16, classes=10)
resnet50 = functools.partial(
    ResNet, blocks=(3, 4, 6, 3), taps=(1, 3, 1), expansion=4, deep=True, width=64, classes=1000
)
