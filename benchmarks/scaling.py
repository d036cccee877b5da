"""How do time and memory grow with channels, taps, image size and the number of kernels?

    python benchmarks/scaling.py           # all rows, and the largest kernels; about ten minutes; recorded
    python benchmarks/scaling.py --fast    # under a minute: two small sizes on each axis, nothing recorded

A row is one function along one axis; every size is measured in a process of its own. The exponent is the slope of the
logarithm of the time over that of the size, between the two largest sizes. Theory says what it tends to, from the work
of the step that dominates in the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _clock import timed
from _processes import in_process
from _report import duration, publish, table
from batch import forget_peak, megabytes, peak
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, UnboundedConv, ZeroPaddedConv, bounds

ABOUT = """\
Gaussian kernels, float32, after compilation; the median of five calls. `growth`: by how much the resident memory of the
process grows at the peak of a call, with the kernel in place, at the largest size."""
LARGEST = """\
One call each, after compilation, in a process of its own."""


class Layer(NamedTuple):
    """The sizes of a square layer on a square image, and how many kernels there are."""

    image: int
    channels: int
    taps: int
    kernels: int = 1


class Call(NamedTuple):
    """A function of one kernel, and its operator on an image of `n x n` samples."""

    function: Callable
    operator: Callable


class Axis(NamedTuple):
    """A function of `CALLS` along one size of a layer, the others fixed, and the exponent that theory says."""

    call: str
    size: str
    sizes: tuple[int, ...]
    layer: Layer
    theory: str


def lowered(kernel, op):
    """`srnc` halfway down to the lowest stable rank."""
    low = jaxsrn.stable_rank_range(kernel.shape, op).low
    return jaxsrn.srnc(kernel, op, (low + jaxsrn.stable_rank(kernel, op)) / 2).kernel


CALLS = {
    "spectral_norm, circular": Call(jaxsrn.spectral_norm, lambda n: CircularConv((n, n))),
    "spectral_norm, zero padding": Call(jaxsrn.spectral_norm, lambda n: ZeroPaddedConv((n, n))),
    "spectral_norm, unbounded": Call(jaxsrn.spectral_norm, lambda n: UnboundedConv()),
    "bounds.certified, circular": Call(bounds.certified, lambda n: CircularConv((n, n))),
    "srnc, circular": Call(lowered, lambda n: CircularConv((n, n))),
}
AXES = (
    # Branch and bound looks at as many boxes on a large image as on a small one.
    Axis("spectral_norm, circular", "image", (32, 128, 512, 2048), Layer(0, 16, 3), "0"),
    Axis("bounds.certified, circular", "image", (32, 128, 512, 2048), Layer(0, 16, 3), "0"),
    # Products with images, and more of them where frequencies lie closer.
    Axis("spectral_norm, zero padding", "image", (16, 32, 64, 128), Layer(0, 16, 3), "2 to 3"),
    # A scan over all frequencies, in the order of a bound.
    Axis("srnc, circular", "image", (16, 32, 64, 128), Layer(0, 4, 3), "at most 2"),
    # Cholesky factorizations of matrices of channels by channels.
    Axis("spectral_norm, circular", "channels", (32, 64, 128, 256), Layer(32, 0, 3), "3"),
    Axis("spectral_norm, unbounded", "channels", (32, 64, 128, 256), Layer(0, 0, 3), "3"),
    Axis("spectral_norm, zero padding", "channels", (32, 64, 128, 256), Layer(16, 0, 3), "2"),
    # The autocorrelation has the square of the taps' number, and the boxes grow with the taps.
    Axis("spectral_norm, circular", "taps", (3, 5, 7, 11), Layer(64, 16, 0), "2 to 4"),
    Axis("spectral_norm, zero padding", "taps", (3, 5, 7, 11), Layer(32, 16, 0), "2"),
    # `jax.lax.map` in batches.
    Axis("spectral_norm, circular", "kernels", (100, 1_000, 10_000, 100_000), Layer(16, 4, 3, 0), "1"),
    Axis("srnc, circular", "kernels", (10, 100, 1_000), Layer(16, 4, 3, 0), "1"),
)
FAST = tuple(axis._replace(sizes=axis.sizes[:2]) for axis in (AXES[0], AXES[2]))
# The largest kernels: 151 MB each.
LARGE = {
    "spectral_norm, circular": Layer(7, 2048, 3),
    "spectral_norm, zero padding": Layer(7, 2048, 3),
    "bounds.certified, circular": Layer(7, 2048, 3),
}
BATCH = 256


def compiled(call: Call, layer: Layer) -> tuple[Callable, jax.Array]:
    """The function compiled for the kernels of a layer, and the kernels."""
    op, shape = call.operator(layer.image), (layer.taps, layer.taps, layer.channels, layer.channels)
    one = functools.partial(lambda op, kernel: call.function(kernel, op), op)
    if layer.kernels == 1:
        kernels = np.random.default_rng(0).standard_normal(shape, np.float32)
        return jax.jit(one).lower(kernels).compile(), jnp.asarray(kernels)
    kernels = np.random.default_rng(0).standard_normal((layer.kernels, *shape), np.float32)
    mapped = jax.jit(lambda stack: jax.lax.map(one, stack, batch_size=min(BATCH, layer.kernels)))
    return mapped.lower(kernels).compile(), jnp.asarray(kernels)


def measured(name: str, layer: Layer, repeats: int) -> dict[str, float]:
    """The median time of a call in seconds, and the bytes by which this process grows at the peak of one."""
    call, kernels = compiled(CALLS[name], layer)
    forget_peak()
    before = peak()
    jax.block_until_ready(call(kernels))
    growth = peak() - before
    times = [timed(lambda: call(kernels)).seconds for _ in range(repeats)]
    return {"seconds": float(np.median(times)), "growth": growth}


def in_fresh_process(name: str, layer: Layer, repeats: int) -> dict[str, float]:
    return in_process(Path(__file__), "--one", json.dumps([name, layer, repeats]))


def row_of(axis: Axis) -> list[str]:
    """The times along an axis, the exponent at its end, and the memory there."""
    layers = [axis.layer._replace(**{axis.size: size}) for size in axis.sizes]
    found = [in_fresh_process(axis.call, layer, 5) for layer in tqdm(layers, desc=axis.call, leave=False)]
    (n, m), (before, last) = axis.sizes[-2:], found[-2:]
    exponent = math.log(last["seconds"] / before["seconds"]) / math.log(m / n)
    fixed = ", ".join(f"{name} {value}" for name, value in axis.layer._asdict().items() if value and name != axis.size)
    return [
        axis.call,
        axis.size,
        ", ".join(f"{size:,}: {duration(one['seconds'])}" for size, one in zip(axis.sizes, found, strict=True)),
        f"{exponent:.1f}",
        axis.theory,
        megabytes(last["growth"]),
        fixed,
    ]


def large_row(name: str, layer: Layer) -> list[str]:
    found = in_fresh_process(name, layer, 1)
    sizes = f"{layer.taps}x{layer.taps}, {layer.channels} to {layer.channels}, {layer.image}x{layer.image}"
    return [name, sizes, duration(found["seconds"]), megabytes(found["growth"])]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few small sizes; nothing is recorded")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        name, layer, repeats = json.loads(args.one)
        print(json.dumps(measured(name, Layer(*layer), repeats)))
        return 0
    header = ("function", "axis", "times", "exponent", "theory", "growth", "fixed")
    rows = [row_of(axis) for axis in tqdm(FAST if args.fast else AXES, desc="axes")]
    sections = [("Growth", f"{ABOUT}\n\n{table(header, rows)}")]
    if not args.fast:
        largest = [large_row(name, layer) for name, layer in tqdm(LARGE.items(), desc="largest")]
        sections.append(("Largest", f"{LARGEST}\n\n{table(('function', 'layer', 'time', 'growth'), largest)}"))
    publish("scaling", "Growth of time and memory", sections, [], keep=not args.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
