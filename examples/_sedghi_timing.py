"""Figure 1 of Sedghi, Gupta, Long 2019: the time of all singular values of a layer, against its channels."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from _report import paragraphs, save, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["curves_of", "draw", "explicit_matrix", "report", "two_lines"]


def explicit_matrix(kernel: np.ndarray, image: int, strides: int = 1) -> np.ndarray:
    """The paper's matrix (6), entry by entry: every output reads the taps after it, modulo the image."""
    n, sites, (c_in, c_out) = image, range(0, image, strides), kernel.shape[-2:]
    matrix = np.zeros((len(sites), len(sites), c_out, n, n, c_in), kernel.dtype)
    for row, x in enumerate(sites):
        for column, y in enumerate(sites):
            for p, q in np.ndindex(kernel.shape[:2]):
                matrix[row, column, :, (x + p) % n, (y + q) % n] += kernel[p, q].T
    return matrix.reshape(len(sites) ** 2 * c_out, -1)


def two_lines(kernel: np.ndarray, image: int) -> np.ndarray:
    """The paper's code."""
    transforms = np.fft.fft2(kernel, (image, image), axes=(0, 1))
    return np.sort(np.linalg.svd(transforms, compute_uv=False), axis=None)[::-1]


# The paper's third method is TensorFlow's form of its code. jaxsrn's takes half of the frequencies, and the norm alone
# takes no SVD at all frequencies.
METHODS: dict[str, Callable] = {
    "SVD of the full matrix": lambda kernel, n: np.linalg.svd(explicit_matrix(kernel, n), compute_uv=False),
    "the paper's code, NumPy": two_lines,
    "jaxsrn.singular_values": lambda kernel, n: jaxsrn.singular_values(kernel, CircularConv((n, n))),
    "jaxsrn.spectral_norm": lambda kernel, n: jaxsrn.spectral_norm(kernel, CircularConv((n, n))),
}
STYLES = dict(zip(METHODS, (("k", "o-"), ("#D55E00", "s--"), ("#0072B2", "D-."), ("#009E73", "^:")), strict=True))
# A method that took longer than this is not given more channels: each doubling takes 4 to 8 times as long.
SLOWEST = 2.0
ROUNDS = 3


def cpu_seconds(call: Callable) -> float:
    """The median CPU time of a call that is compiled: what else a machine does is no part of it."""
    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - begun)
    return float(np.median(times))


class Curve(NamedTuple):
    """CPU seconds by method and number of channels, for square kernels of so many taps on square images."""

    taps: int
    image: int
    seconds: dict[str, dict[int, float]]


def curve_of(taps: int, image: int, channels: list[int], methods: list[str]) -> Curve:
    """Random normal kernels in float32, as many channels in as out."""
    seconds = {name: {} for name in methods}
    for number in tqdm(channels, desc=f"{taps}x{taps} on {image}x{image}"):
        kernel = np.random.default_rng(number).standard_normal((taps, taps, number, number)).astype(np.float32)
        for name in methods:
            if max(seconds[name].values(), default=0) <= SLOWEST:
                seconds[name][number] = cpu_seconds(lambda name=name, kernel=kernel: METHODS[name](kernel, image))
    return Curve(taps, image, seconds)


def curves_of(fast: bool) -> list[Curve]:
    """The two cases of the figure. The full matrix of the second has 4096 rows with one channel."""
    names = list(METHODS)
    if fast:
        return [curve_of(3, 4, [2, 4], names)]
    return [curve_of(3, 16, [2, 4, 8, 16, 32, 64], names), curve_of(11, 64, [1, 2, 4, 8, 16, 32], names[1:])]


def draw(curves: list[Curve], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(6.5 * len(curves), 4.6), layout="constrained", squeeze=False)
    for curve, ax in zip(curves, axes[0], strict=True):
        for name, times in curve.seconds.items():
            color, style = STYLES[name]
            ax.plot(list(times), list(times.values()), style, color=color, ms=5, label=name)
        ax.set(xlabel="channels", ylabel="CPU seconds", xscale="log", yscale="log")
        ax.set_xscale("log", base=2)
        ax.set_title(f"{curve.taps}x{curve.taps} on {curve.image}x{curve.image}")
        ax.legend(frameon=False)
    save(figure, path, dpi=100)


def report(curves: list[Curve]) -> str:
    tables = []
    for curve in curves:
        numbers = sorted({number for times in curve.seconds.values() for number in times})
        rows = [
            [name, *(f"{times[number]:.2e}" if number in times else "-" for number in numbers)]
            for name, times in curve.seconds.items()
        ]
        title = f"{curve.taps}x{curve.taps} on {curve.image}x{curve.image}; channels:"
        tables.append(table((title, *map(str, numbers)), rows))
    return paragraphs(
        f"CPU seconds of a call, compiled, one thread, in float32; the median of {ROUNDS} calls. A method that took "
        f"more than {SLOWEST:g} s is not given more channels. `spectral_norm` gives the largest singular value alone, "
        "exactly. The full matrix of the second case is left out, as in the paper: with one channel it has 4096 rows.",
        *tables,
        "![Time of all singular values](timing.png)",
    )
