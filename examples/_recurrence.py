"""A small recurrent denoiser, the constraints on its loop, and what they prove.

The state is a stack of feature maps. A frame `x` gives

    z_1 = relu(feed(x) + loop_1(h)),   z_i = relu(loop_i(z_{i-1})),   h <- z_L,   denoised = x - out(h).

Only the layers of `loop` are on the way from the state to the next state. ReLU does not increase distances, so two
states that see the same frame come closer by the factor `L = prod ||loop_i||` at least. With `L < 1` the state is
bounded for every video and every length; with `L = 1` it cannot grow exponentially; `feed` and `out` do not matter.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx

__all__ = [
    "Cell",
    "Rule",
    "climbed",
    "contraction",
    "flattened",
    "folded",
    "forth_and_back",
    "gain",
    "middle",
    "original",
    "play",
    "start",
    "unrolled",
]


class Rule(NamedTuple):
    """The constraint on the layers of the loop: none but with `kind`.

    Attributes:
      kind: `plain`, `flattened` (norm of the reshaped kernel), `original` (SRN-C of Tanay et al.), `norm` or `rank`.
      fraction: of the largest stable rank, for `original` and `rank`.
      size: the side of the images for which it holds, with zero padding; `None`: every size.
      norm: of every layer of the loop, for `norm` and `rank`.
      carries: whether the loop starts near the identity, so that the state is carried on; else from Flax's kernels.
    """

    kind: str
    fraction: float | None
    size: int | None
    norm: float
    carries: bool


class Cell(nnx.Module):
    """A frame and the state, to the next state and the denoised frame."""

    def __init__(self, width: int, depth: int, carries: bool, rngs: nnx.Rngs):
        self.feed = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.loop = nnx.List([nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(depth)])
        self.out = nnx.Conv(width, 1, (3, 3), kernel_init=nnx.initializers.zeros, rngs=rngs)
        for layer in self.loop if carries else ():
            layer.kernel[...] = (0.5 * layer.kernel[...]).at[1, 1].add(jnp.eye(width, dtype=layer.kernel.dtype))

    def __call__(self, h, x):
        z = nnx.relu(self.feed(x) + self.loop[0](h))
        for layer in self.loop[1:]:
            z = nnx.relu(layer(z))
        return z, x - self.out(z)


def unrolled(cell: Cell, frames):
    """The denoised frames of `(number, batch, height, width, 1)`, from a state of zeros."""
    h = jnp.zeros((*frames.shape[1:-1], cell.feed.out_features), frames.dtype)
    # The gradient of a convolution within a loop is 20 times as slow on a CPU.
    return jax.lax.scan(cell, h, frames, unroll=len(frames))[1]


# The constraints


def start(width: int, depth: int, rule: Rule, seed: int) -> nnx.Module:
    """The cell with the wrappers of the rule around the layers of its loop."""
    cell = Cell(width, depth, rule.carries, nnx.Rngs(seed))
    if rule.kind not in ("norm", "rank"):
        return cell
    shape = None if rule.size is None else (rule.size, rule.size)

    def wrap(path, layer):
        if rule.kind == "norm":
            return jnnx.SpectralNorm(layer, input_shape=shape, norm=rule.norm)
        return jnnx.StableRankNorm(layer, rule.fraction, input_shape=shape, norm=rule.norm)

    return jnnx.constrain(cell, wrap, where=lambda path, layer: "loop" in path and isinstance(layer, nnx.Conv))


def folded(model: nnx.Module, rule: Rule) -> Cell:
    """The plain cell with the kernels that the rule gives; differentiable."""
    cell = jnnx.fold(model)
    for layer in cell.loop:
        if rule.kind == "flattened":
            layer.kernel[...] = flattened(layer.kernel[...])
        if rule.kind == "original":
            layer.kernel[...] = original(layer.kernel[...], rule)
    return cell


def flattened(kernel):
    """Divided by the norm of the kernel reshaped to a matrix, as `flax.nnx.SpectralNorm` does once it has converged."""
    return kernel / jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)


def original(kernel, rule: Rule):
    """The kernel divided by its norm, then SRN-C as Tanay et al. 2022 have it (Zheng et al. 2025, eq. 5-6).

    The convolution is circular, as in Zheng et al.
    """
    op = jaxsrn.CircularConv((rule.size, rule.size))
    target = jaxsrn.target_of_fraction(rule.fraction, kernel.shape, op)
    return jaxsrn.srnc_tanay(kernel / jaxsrn.spectral_norm(kernel, op), op, target).kernel


# What the norms prove


def contraction(cell: Cell, size: int | None = None) -> float:
    """A bound on `L`: the product of the norms of the loop's layers, at one image size or (`None`, certified) at all.

    With 1 or more nothing is proven.
    """
    kernels = [layer.kernel[...] for layer in cell.loop]
    if size is None:
        op = jaxsrn.UnboundedConv()
        return float(np.prod([jaxsrn.bounds.certified(kernel, op, resolution=1e-3).upper for kernel in kernels]))
    op = jaxsrn.ZeroPaddedConv((size, size))
    return float(np.prod([jaxsrn.spectral_norm(kernel, op) for kernel in kernels]))


def gain(cell: Cell) -> float:
    """A bound on the change of any denoised frame over the largest change of a frame of the video, at every image size.

    Frames are measured by their Euclidean norms. Of a change of at most 1 in every frame, the state changes by at most
    `||feed|| prod_{i>1} ||loop_i|| / (1 - L)`, and what is denoised by 1 plus `||out||` times that. Infinite for
    `L >= 1`.
    """
    op = jaxsrn.UnboundedConv()
    norms = [
        float(jaxsrn.bounds.certified(layer.kernel[...], op, resolution=1e-3).upper)
        for layer in (cell.feed, *cell.loop, cell.out)
    ]
    feed, first, *rest, out = norms
    total = first * np.prod(rest)
    return float(1 + out * feed * np.prod(rest) / (1 - total)) if total < 1 else float("inf")


# Long sequences


def forth_and_back(number: int, played: int) -> np.ndarray:
    """The frame that is shown at each of `played` times: 0, 1, ..., number - 1, number - 2, ..., 1, 0, 1, ..."""
    times = np.arange(played) % (2 * number - 2)
    return np.minimum(times, 2 * number - 2 - times)


def middle(frames, size: int):
    """The square in the middle."""
    y, x = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return frames[:, y : y + size, x : x + size]


@nnx.jit
def play(cell, states, clip, order, sigma, key):
    """The frames of the clip in their order under fresh noise, seen from several states `(number, height, width, c)`.

    Returns:
      At each time: the PSNR from each state, the largest feature from each, the distance of the first two states, and
      the PSNR of the noisy frame.
    """

    def one(states, now):
        index, key = now
        clean = clip[index][None]
        noisy = clean + sigma * jax.random.normal(key, clean.shape)
        states, denoised = cell(states, jnp.broadcast_to(noisy, (len(states), *clip.shape[1:])))
        distance = jnp.linalg.norm((states[0] - states[-1]).ravel())
        return states, (psnr(denoised, clean), jnp.abs(states).max((1, 2, 3)), distance, psnr(noisy, clean)[0])

    return jax.lax.scan(one, states, (order, jax.random.split(key, len(order))))[1]


def psnr(image, clean):
    return -10 * jnp.log10(jnp.mean((image - clean) ** 2, axis=(1, 2, 3)))


@functools.partial(nnx.jit, static_argnames="steps")
def climbed(cell, logits, h, steps: int):
    """The state after the video `sigmoid(logits)`, from `h`, once Adam has made the logarithm of its norm large."""

    def last(logits):
        return jax.lax.scan(lambda h, x: (cell(h, x)[0], None), h, nnx.sigmoid(logits))[0]

    def loss_of(logits):
        return -jnp.log(jnp.linalg.norm(last(logits).ravel()) + 1e-12)

    climb = optax.adam(0.2)

    def step(carry, _):
        logits, state = carry
        updates, state = climb.update(jax.grad(loss_of)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (logits, climb.init(logits)), None, length=steps)
    return last(logits)
