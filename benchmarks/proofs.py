"""What the proofs of norms take: the banded one with zero padding, and branch and bound of flat spectra.

python benchmarks/proofs.py           # under a minute; records its table
python benchmarks/proofs.py --fast    # two layers of each
"""

from __future__ import annotations

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
from _clock import timed
from _report import duration, publish, table
from tqdm import tqdm

from jaxsrn import CircularConv, UnboundedConv, ZeroPaddedConv, bounds, spectral_norm

# The largest channels of 3x3 taps on these images for which the banded proof is taken, and smaller ones.
PADDED = ((16, 16), (32, 11), (16, 32), (8, 64))
# The tap in the middle, whose noise keeps the spectrum from being the same at all frequencies.
TAPS = {"orthogonal": jax.nn.initializers.orthogonal(), "Gaussian": jax.random.normal}
CHANNELS, NOISES = (16, 64), (1e-6, 1e-5, 1e-4, 1e-3)
RESOLUTIONS = (0.01, 1e-4)


def seconds_of(call) -> float:
    """The time of the second call, as the first one compiles."""
    jax.block_until_ready(call())
    time.sleep(0.05)
    return timed(call).seconds


def padded_row(size: int, channels: int) -> list[str]:
    """The widths of the cover and of the proven intervals, and the times of the latter."""
    op = ZeroPaddedConv((size, size))
    kernel = jax.random.normal(jax.random.key(0), (3, 3, channels, channels))
    norm, cover = spectral_norm(kernel, op), spectral_norm(kernel, CircularConv((size + 2, size + 2)))
    cells = [f"{size}x{size}, {channels} channels", f"{float(cover / norm - 1):.1e}"]
    for resolution in RESOLUTIONS:
        low, high = bounds.certified(kernel, op, resolution=resolution)
        seconds = seconds_of(lambda r=resolution: bounds.certified(kernel, op, resolution=r))
        cells += [f"{float(high / low - 1):.1e}", duration(seconds)]
    return cells


def flat_row(tap: str, channels: int, noise: float) -> list[str]:
    """The norm without edges of one tap of norm 1 with noise on all taps, and its time."""
    matrix = TAPS[tap](jax.random.key(0), (channels, channels))
    kernel = noise * jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
    kernel = kernel.at[1, 1].add(matrix / jnp.linalg.norm(matrix, 2))
    seconds = seconds_of(lambda: spectral_norm(kernel, UnboundedConv()))
    return [
        f"{tap}, {channels} channels",
        f"{noise:.0e}",
        f"{float(spectral_norm(kernel, UnboundedConv())):.6f}",
        duration(seconds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="two layers of each, nothing recorded")
    args = parser.parse_args()
    few = slice(2) if args.fast else slice(None)
    flat = list(itertools.product(TAPS, CHANNELS, NOISES))[few]
    header = (
        "3x3 taps",
        "cover above the norm",
        *(f"{r:g}: {what}" for r in RESOLUTIONS for what in ("width", "time")),
    )
    sections = [
        (
            "The certified interval with zero padding",
            "Widths and times of `bounds.certified` for two resolutions, Gaussian kernels in float32. Where the cover\n"
            "is further above the norm than the resolution, the banded factorization proves the upper end.\n\n"
            + table(header, [padded_row(*layer) for layer in tqdm(PADDED[few], desc="padded")]),
        ),
        (
            "Flat spectra without edges",
            "`spectral_norm` of one tap of norm 1 with Gaussian noise on all nine, in float32.\n\n"
            + table(("tap", "noise", "norm", "time"), [flat_row(*which) for which in tqdm(flat, desc="flat")]),
        ),
    ]
    publish("proofs", "Proofs of norms", sections, [], keep=not args.fast)


if __name__ == "__main__":
    main()
