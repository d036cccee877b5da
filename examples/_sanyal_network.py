"""The network of `reproduce_sanyal2020.py`, its constraints, and a training run.

Two constraints hold the stable rank of a convolution. The exact one is that of jaxsrn: the stable rank of the linear
map. The one of Sanyal, Torr, Dokania 2020 is Algorithm 2 on the kernel reshaped to a matrix `(taps * c_in, c_out)`. A
dense layer is its own matrix, and both constraints are the same for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _reshaped import Reshaped
from flax import nnx

import jaxsrn.nnx as jnnx
from jaxsrn.penalties import fold_batch_norm

CLASSES = 10


class Size(NamedTuple):
    """What a run costs: the network, the images and the steps.

    Attributes:
      widths, strides: of the convolutions of the `CNN`; none for the `DenseNet` of the paper.
      image: the side of the images.
      rate: the first learning rate.
      halved: the epochs after which the rate is halved, again and again; 0 for a cosine decay to zero.
      score_every: epochs between two points of the curves.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    image: int
    num_train: int
    num_test: int
    epochs: int
    batch: int
    rate: float
    halved: int
    score_every: int


FAST = Size((8,), (2,), 8, 200, 100, 2, 50, 0.1, 0, 1)
SMALL = Size((16, 24, 32, 32), (1, 2, 2, 1), 16, 1500, 1000, 12, 50, 0.02, 0, 2)
FULL = Size((), (), 32, 50_000, 10_000, 200, 64, 0.1, 25, 5)


def conv_of(c_in: int, c_out: int, taps: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Circular padding, so that the exact constraint needs no images."""
    return nnx.Conv(c_in, c_out, (taps, taps), strides=stride, padding="CIRCULAR", use_bias=False, rngs=rngs)


class CNN(nnx.Module):
    """3x3 convolutions with circular padding, each with batch normalization and ReLU, and a dense layer."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        channels = list(zip((3, *size.widths), size.widths, strict=False))
        self.convs = nnx.List(
            [conv_of(*pair, 3, stride, rngs) for pair, stride in zip(channels, size.strides, strict=True)]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in size.widths])
        samples = (size.image // int(np.prod(size.strides))) ** 2
        self.head = nnx.Linear(samples * size.widths[-1], CLASSES, rngs=rngs)

    def __call__(self, x, tap=lambda h: h):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = tap(nnx.relu(norm(conv(x))))
        return self.head(x.reshape(len(x), -1))

    def without_batch_norm(self) -> dict:
        """The kernels, each batch normalization folded into the convolution before it; its shift is in no norm."""
        folded = [
            fold_batch_norm(conv.kernel[...], norm.scale[...], norm.var[...], epsilon=norm.epsilon)
            for conv, norm in zip(self.convs, self.norms, strict=True)
        ]
        return {
            "convs": {i: {"kernel": kernel} for i, kernel in enumerate(folded)},
            "head": {"kernel": self.head.kernel[...]},
        }


class DenseNet(nnx.Module):
    """DenseNet-40 of the paper: three blocks of twelve convolutions, 24 channels at first, dropout of 0.2."""

    def __init__(self, rngs: nnx.Rngs, growth: int = 12, depth: int = 12, first: int = 24):
        convs, norms, width = [conv_of(3, first, 3, 1, rngs)], [], first
        for block in range(3):
            for _ in range(depth):
                norms.append(nnx.BatchNorm(width, momentum=0.9, rngs=rngs))
                convs.append(conv_of(width, growth, 3, 1, rngs))
                width += growth
            norms.append(nnx.BatchNorm(width, momentum=0.9, rngs=rngs))
            convs += [conv_of(width, width, 1, 1, rngs)] if block < 2 else []
        self.convs, self.norms, self.depth = nnx.List(convs), nnx.List(norms), depth
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x, tap=lambda h: h):
        convs, norms = iter(self.convs), iter(self.norms)
        x = tap(next(convs)(x))
        for block in range(3):
            for _ in range(self.depth):
                new = self.dropout(next(convs)(nnx.relu(next(norms)(x))))
                x = tap(jnp.concatenate([x, new], axis=-1))
            x = nnx.relu(next(norms)(x))
            if block < 2:
                x = tap(nnx.avg_pool(self.dropout(next(convs)(x)), (2, 2), (2, 2)))
        return self.head(x.mean((1, 2)))

    def without_batch_norm(self) -> dict:
        """The kernels as they are: a normalization stands before a convolution here, and can be folded into none."""
        convs = {i: {"kernel": conv.kernel[...]} for i, conv in enumerate(self.convs)}
        return {"convs": convs, "head": {"kernel": self.head.kernel[...]}}


def network(size: Size, seed: int) -> nnx.Module:
    """The plain network."""
    rngs = nnx.Rngs(seed)
    return CNN(size, rngs) if size.widths else DenseNet(rngs)


def constrained(model, size: Size, how: str | None, fractions: tuple[float, ...] | None):
    """The model with norm 1 in every layer, and in layer `i` at most this share of the largest stable rank.

    Args:
      model: the plain network, which is not touched.
      size: that of the network.
      how: `"matrix"` (Sanyal et al.), `"exact"`, or `None` for the plain network.
      fractions: one for each layer, or `None` for the norm alone.
    """
    if how is None:
        return model
    operators = jnnx.layer_operators(model, jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32))
    shares = dict(zip(operators, fractions or [None] * len(operators), strict=True))

    def wrap(path, layer):
        share, is_conv = shares[(*path, "kernel")], isinstance(layer, nnx.Conv)
        options = {"input_shape": operators[(*path, "kernel")].input_shape if is_conv and how == "exact" else None}
        if is_conv and how == "matrix":
            layer, options = Reshaped(layer), {"computes": nnx.Linear}
        return jnnx.SpectralNorm(layer, **options) if share is None else jnnx.StableRankNorm(layer, share, **options)

    return jnnx.constrain(model, wrap)


def plain_of(model):
    """The plain network with the weights that the constrained one computes with."""
    model = jnnx.fold(model)
    model.convs = nnx.List([conv.plain() if isinstance(conv, Reshaped) else conv for conv in model.convs])
    model.eval()
    return model


def loss_of(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    optimizer.update(model, nnx.grad(loss_of)(model, x, y))


def batches_of(num: int, batch: int, rng: np.random.Generator):
    """The numbers of the images in random order; the last, smaller batch is left out."""
    return rng.permutation(num)[: num // batch * batch].reshape(-1, batch)


@functools.cache
def descent(size: Size) -> optax.GradientTransformation:
    """Gradient descent with a momentum of 0.9; one object for all runs, which share their compiled step by it."""
    per_epoch = size.num_train // size.batch
    steps = per_epoch * size.epochs
    rate = optax.cosine_decay_schedule(size.rate, steps)
    if size.halved:
        ends = range(size.halved * per_epoch, steps, size.halved * per_epoch)
        rate = optax.piecewise_constant_schedule(size.rate, dict.fromkeys(ends, 0.5))
    return optax.sgd(rate, momentum=0.9)


def optimizer_of(model, size: Size) -> nnx.Optimizer:
    return nnx.Optimizer(model, descent(size), wrt=nnx.Param)


def train(model, x, y, size: Size, rng: np.random.Generator):
    """Trains the model in place; yields the number of each epoch after it."""
    optimizer = optimizer_of(model, size)
    for epoch in range(1, size.epochs + 1):
        for batch in batches_of(len(x), size.batch, rng):
            train_step(model, optimizer, x[batch], y[batch])
        yield epoch
