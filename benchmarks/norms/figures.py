"""The pictures: time against error, and time against a size."""

from __future__ import annotations

import io
from collections.abc import Iterable

import matplotlib
import numpy as np
from _clock import Timed
from _report import RESULTS

from norms.cases import Case
from norms.in_jax import ends

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe, Ito: distinguishable with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
# Colour and marker by the beginning of a method's name; the first that fits.
STYLES = {
    "jaxsrn.bounds.gram": (ORANGE, "s"),
    "jaxsrn.bounds.cert": (ORANGE, "D"),
    "certified": (ORANGE, "D"),
    "jaxsrn.spectral": (RED, "*"),
    "spectral_norm": (RED, "*"),
    "NumPy": (BLACK, "o"),
    "JAX": (BLUE, "s"),
    "two-liner": (BLUE, "s"),
    "PyTorch": (SKY, "^"),
    "Gram, T = 5": (GREEN, "^"),
    "Gram, T = 6": (GREEN, "v"),
    "orthogonium": (GREEN, "x"),
    "power, 100": (PURPLE, "P"),
    "power, 10": (PURPLE, "X"),
    "power": (PURPLE, "+"),
    "flax.nnx.SpectralNorm, 10": (BLACK, "X"),
    "flax": (BLACK, "+"),
}


def style(name: str) -> dict[str, str]:
    """How a method is drawn, and its label."""
    colour, marker = next(look for start, look in STYLES.items() if name.startswith(start))
    return {"color": colour, "marker": marker, "label": name}


def error_figure(case: Case, runs: dict[str, Timed]) -> plt.Figure:
    """Time against relative error for one kernel, a point for each method or end of its interval."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, run in runs.items():
        # No error at all has no place on a logarithmic axis.
        errors = [max(abs(end / case.norm - 1), 1e-16) for end in ends(run.result)]
        axes.plot([1e3 * run.seconds] * 2, errors, linestyle=":", markersize=9, markeredgewidth=1.5, **style(name))
    axes.set(xscale="log", yscale="log", xlabel="time of one norm, ms", ylabel="relative error")
    axes.set_title(f"{case.name}: time against error; an interval shows both ends")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def lines_figure(xs: Iterable[int], times: dict[str, list[float]], label: str, title: str) -> plt.Figure:
    """Time against a size, a line for each method; lines of one method on several kernels differ in their dashes."""
    xs = list(xs)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, values in times.items():
        dash = {"2": "--", "3": ":"}.get(name[-1], "-") if "kernel" in name else "-"
        milliseconds = 1e3 * np.array(values)
        axes.plot(xs[: len(values)], milliseconds, dash, **style(name))
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time of one norm, ms", title=title)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def save(figures: dict[str, plt.Figure], keep: bool) -> None:
    """Draws every picture, and writes it to the results where it is to be kept."""
    RESULTS.mkdir(exist_ok=True)
    for name, figure in figures.items():
        # A smoke test draws too, into nothing. Metadata would name the version of Matplotlib.
        figure.savefig(RESULTS / f"{name}.png" if keep else io.BytesIO(), dpi=130, metadata={"Software": None})
        plt.close(figure)
