"""The networks of `srn_gan.py` and a step of their training: a generator, and a discriminator that is constrained."""

import functools
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from _reshaped import Reshaped
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx

__all__ = ["HELD", "Networks", "Sizes", "fixed", "gan_step", "generate", "new_networks", "raw", "standardized"]

LATENT = 64
# Of WGAN-GP (Gulrajani et al. 2017).
PENALTY = 10.0
HELD = (jnnx.StableRankNorm, jnnx.SpectralNorm)
WRAPPERS = (*HELD, nnx.SpectralNorm)


class Sizes(NamedTuple):
    """How large networks and training are.

    `image`: pixels of a side; `colours`: 3, or 1 for grey; `generator`: channels, from the dense layer on, each of the
    others with twice the side; `discriminator`: `(channels, taps, stride)` of each convolution; `batch`: real images of
    a step; `rates`: Adam's, of the generator and of the discriminator; `updates`: steps of the generator, each after
    one of the discriminator.
    """

    image: int
    colours: int
    generator: tuple[int, ...]
    discriminator: tuple[tuple[int, int, int], ...]
    batch: int
    rates: tuple[float, float]
    updates: int


def standardized(images):
    """From uint8 to [-1, 1], the range of the generator's tanh."""
    return images.astype(jnp.float32) / 127.5 - 1


class Generator(nnx.Module):
    """DCGAN's: a dense layer, transposed convolutions that double the image, a convolution, tanh."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        first, *_, last = widths = sizes.generator
        self.side = sizes.image // 2 ** (len(widths) - 1)
        self.dense = nnx.Linear(LATENT, self.side**2 * first, rngs=rngs)
        self.doubling = nnx.List(
            [nnx.ConvTranspose(*pair, (4, 4), strides=(2, 2), use_bias=False, rngs=rngs) for pair in pairwise(widths)]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths])
        self.last = nnx.Conv(last, sizes.colours, (3, 3), rngs=rngs)

    def __call__(self, z):
        x = self.dense(z).reshape(len(z), self.side, self.side, -1)
        x = nnx.relu(self.norms[0](x))
        for double, norm in zip(self.doubling, list(self.norms)[1:], strict=True):
            x = nnx.relu(norm(double(x)))
        return jnp.tanh(self.last(x))


class Discriminator(nnx.Module):
    """Convolutions with leaky ReLUs, zero-padded, and a dense layer: Miyato et al.'s standard CNN, or a smaller one."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        layers, c_in, side = [], sizes.colours, sizes.image
        for c_out, taps, stride in sizes.discriminator:
            layers.append(nnx.Conv(c_in, c_out, (taps, taps), strides=(stride, stride), rngs=rngs))
            c_in, side = c_out, side // stride
        self.layers = nnx.List([*layers, nnx.Linear(c_in * side**2, 1, rngs=rngs)])

    def __call__(self, x, update_stats: bool = True):
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.leaky_relu(_called(layer, x, update_stats), 0.1)
        return _called(last, x.reshape(len(x), -1), update_stats)[:, 0]


def _called(layer, x, update_stats: bool):
    return layer(x, update_stats=update_stats) if isinstance(layer, WRAPPERS) else layer(x)


# The constraints


def constrained(model: Discriminator, sizes: Sizes, held: str, fraction: float | None, norm: float) -> Discriminator:
    """The discriminator with every layer held: `exact` or `reshaped`, in norm alone where there is no fraction."""
    if held == "free":
        return model
    image = jax.ShapeDtypeStruct((1, sizes.image, sizes.image, sizes.colours), jnp.float32)
    operators = jnnx.layer_operators(model, image)
    layers = []
    for i, layer in enumerate(model.layers):
        is_conv = isinstance(layer, nnx.Conv)
        if held == "reshaped" and (fraction is None or not is_conv):
            layers.append(nnx.SpectralNorm(layer, rngs=nnx.Rngs(i)))
        elif held == "reshaped":
            layers.append(jnnx.StableRankNorm(Reshaped(layer), fraction, computes=nnx.Linear))
        else:
            op = operators["layers", i, "kernel"]
            layers.append(exact(layer, op, fraction, norm))
    model.layers = nnx.List(layers)
    return model


def exact(layer, op, fraction: float | None, norm: float):
    """The layer with this norm of its linear map; and its stable rank, where one below the largest is possible."""
    shape, kernel = getattr(op, "input_shape", None), layer.kernel[...]
    low, high = jaxsrn.stable_rank_range(kernel.shape, op)
    if fraction is None or low == high:
        return jnnx.SpectralNorm(layer, input_shape=shape, norm=norm)
    if fraction * high < 2 * low:
        # The lower end is certified, but with zero padding not always attained: what a kernel of this shape reaches.
        least = jaxsrn.srnc(kernel, op, 1.001 * low).stable_rank
        fraction = max(fraction, 1.001 * float(least) / high)
    return jnnx.StableRankNorm(layer, fraction, input_shape=shape, norm=norm)


# Compiled: run operation by operation it would also compile the next states, which nobody reads here.
@nnx.jit
def fixed(model: Discriminator) -> Discriminator:
    """The plain discriminator with the weights that `model` computes with."""
    model = nnx.clone(model)
    model.layers = nnx.List([_plain(layer) for layer in model.layers])
    return model


def raw(model: Discriminator) -> Discriminator:
    """The plain discriminator with the parameters themselves, before they are normalized."""
    model = nnx.clone(model)
    model.layers = nnx.List([_plain(layer.layer if isinstance(layer, HELD) else layer) for layer in model.layers])
    return model


def _plain(layer):
    if isinstance(layer, HELD):
        layer = layer.folded()
    if isinstance(layer, Reshaped):
        return layer.plain()
    if isinstance(layer, nnx.SpectralNorm):
        # It overwrites its kernel by what it computes with.
        kernel = layer.layer_instance.kernel
        x = jnp.zeros((1, kernel.shape[0]) if kernel.ndim == 2 else (1, 8, 8, kernel.shape[2]))
        layer = nnx.clone(layer)
        layer(x, update_stats=False)
        return layer.layer_instance
    return layer


# Training


class Networks(NamedTuple):
    """What is trained, and the optimizers of both."""

    generator: Generator
    discriminator: Discriminator
    generator_optimizer: nnx.Optimizer
    discriminator_optimizer: nnx.Optimizer


@functools.cache
def _adam(rate: float):
    # One object for all seeds: they share a compiled program.
    return optax.adam(rate, 0.5, 0.9)


def new_networks(sizes: Sizes, held: str, fraction: float | None, seed: int, norm: float = 1.0) -> Networks:
    """Both networks, of which the seed fixes the first weights, and their optimizers."""
    generator = Generator(sizes, nnx.Rngs(2 * seed))
    discriminator = constrained(Discriminator(sizes, nnx.Rngs(2 * seed + 1)), sizes, held, fraction, norm)
    models = generator, discriminator
    optimizers = [
        nnx.Optimizer(model, _adam(rate), wrt=nnx.Param) for model, rate in zip(models, sizes.rates, strict=True)
    ]
    return Networks(generator, discriminator, *optimizers)


def _scores(model, real, fake):
    # One call, so that a wrapper takes one step.
    return jnp.split(model(jnp.concatenate([real, fake])), 2)


def hinge(model, real, fake, key):
    """Discriminator's loss of Lim, Ye 2017 and Miyato et al. 2018."""
    real, fake = _scores(model, real, fake)
    return jnp.mean(nnx.relu(1 - real)) + jnp.mean(nnx.relu(1 + fake))


def wasserstein(model, real, fake, key):
    """Discriminator's loss of Gulrajani et al. 2017: the gradient has norm 1 between real and generated images."""
    share = jax.random.uniform(key, (len(real), 1, 1, 1))
    slopes = jax.grad(lambda x: jnp.sum(model(x)))(share * real + (1 - share) * fake)
    norms = jnp.sqrt(jnp.sum(slopes**2, axis=(1, 2, 3)) + 1e-12)
    real, fake = _scores(model, real, fake)
    return jnp.mean(fake) - jnp.mean(real) + PENALTY * jnp.mean((norms - 1) ** 2)


LOSSES = {"hinge": hinge, "wasserstein": wasserstein}


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def gan_step(graph, state, loss: str, batch: int, images, key):
    """One step of the discriminator, then one of the generator; the new state, and the discriminator's loss."""
    networks = Networks(*nnx.merge(graph, state))
    generator, discriminator, *optimizers = networks
    keys = jax.random.split(key, 4)
    real = standardized(images[jax.random.randint(keys[0], (batch,), 0, len(images))])
    fake = generator(jax.random.normal(keys[1], (batch, LATENT)))
    value, grads = nnx.value_and_grad(LOSSES[loss])(discriminator, real, fake, keys[2])
    optimizers[1].update(discriminator, grads)

    def of_generator(generator):
        fake = generator(jax.random.normal(keys[3], (batch, LATENT)))
        # A copy, since flax.nnx.SpectralNorm overwrites its kernel even here.
        return -jnp.mean(nnx.clone(discriminator)(fake, update_stats=False))

    optimizers[0].update(generator, nnx.grad(of_generator)(generator))
    return nnx.state(tuple(networks)), value


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generated(graph, state, key, number):
    return nnx.merge(graph, state)(jax.random.normal(key, (number, LATENT)))


def generate(generator: Generator, number: int, seed: int, batch: int = 500) -> jax.Array:
    """Images of the generator, in evaluation mode."""
    graph, state = nnx.split(nnx.view(generator, use_running_average=True))
    keys = jax.random.split(jax.random.key(seed), -(-number // batch))
    return jnp.concatenate([_generated(graph, state, key, batch) for key in keys])[:number]
