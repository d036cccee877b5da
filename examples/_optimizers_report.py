"""The tables and the picture of compare_optimizers.py, from the results of its runs."""

from pathlib import Path

import matplotlib
import numpy as np
from _optimizers import ABOUT
from _report import paragraphs, save, table
from _studies import UNCORRECTED, curve, mean_and_spread, mean_difference, of_layers

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = ["LONGER", "draw", "sections_of"]

# The setting of the cheap optimizer with more steps.
LONGER = "muon-flattened-longer"
# What all others are compared with.
BASE = "muon-flattened"
WORDS = {**ABOUT, LONGER: "optax's Muon, flattened, four times the steps"}
# Okabe, Ito: distinguishable with any colour vision; and lines that differ in greyscale.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#D55E00")
LINES = ("-", "-", "--", "-", "--", "-", ":", ":")


def medians(runs: list[dict], entry: int) -> np.ndarray:
    """The median over layers of their norms (0) or stable ranks (1), `(seeds, measurements)`."""
    return np.median(of_layers(runs, entry), axis=-1)


def shares(runs: list[dict]) -> np.ndarray:
    """The shares of all layers at every time, of the first seed, `(times, layers)`."""
    return np.array([list(layers.values()) for layers in runs[0]["shares"]])


def seconds_of_step(costs: dict[str, np.ndarray], name: str) -> float:
    return float(np.median(costs[BASE if name == LONGER else name]))


def pilot_table(pilots: dict, tried: dict, rates: dict) -> str:
    rows = []
    for name, some in tried.items():
        losses = [f"{pilots[f'{name}-at-{rate:g}'][0]['points'][-1]['loss']:.3f} at {rate:g}" for rate in some]
        rows.append((WORDS[name], *losses, f"{rates[name]:g}"))
    return table(("optimizer", "smallest rate", "second", "third", "largest rate", "taken"), rows)


def score_table(found: dict[str, list[dict]]) -> str:
    ends = {name: (curve(runs, "test_accuracy")[:, -1], curve(runs, "loss")[:, -1]) for name, runs in found.items()}
    rows = [
        (
            WORDS[name],
            mean_and_spread(100 * accuracy, ".1f"),
            "" if name == BASE else mean_difference(100 * accuracy, 100 * ends[BASE][0], ".1f"),
            mean_and_spread(loss),
            "" if name == BASE else mean_difference(loss, ends[BASE][1], ".3f"),
        )
        for name, (accuracy, loss) in ends.items()
    ]
    return table(("optimizer", "test accuracy, %", "difference", "training loss", "difference"), rows)


def cost_rows(found: dict[str, list[dict]], costs: dict[str, np.ndarray]) -> str:
    rows = []
    for name, runs in found.items():
        step, total = seconds_of_step(costs, name), runs[0]["points"][-1]["step"]
        ratio = np.median(costs[BASE if name == LONGER else name] / costs[BASE])
        rows.append((WORDS[name], f"{1e3 * step:.0f} ms", f"{ratio:.1f}", f"{total}", f"{total * step:.0f} s"))
    return table(("optimizer", "a step", "of Muon, flattened", "steps", "training"), rows)


def share_table(found: dict[str, list[dict]]) -> str:
    rows = []
    for name, runs in found.items():
        if runs[0]["shares"]:
            some = shares(runs)
            early, middle, late = np.median(some, axis=1)
            rows.append((WORDS[name], *(f"{v:.3f}" for v in (early, middle, late, np.median(some), np.min(some)))))
    return table(("optimizer", "early", "middle", "late", "median of all", "least"), rows)


def layer_table(found: dict[str, list[dict]]) -> str:
    rows = [
        (WORDS[name], *(mean_and_spread(medians(runs, entry)[:, at], ".2f") for entry in (0, 1) for at in (0, -1)))
        for name, runs in found.items()
    ]
    return table(("optimizer", "norm, first", "norm, last", "stable rank, first", "stable rank, last"), rows)


def sections_of(found, pilots, tried, rates, costs, about: str) -> dict[str, str]:
    runs = next(iter(found.values()))
    first, last = runs[0]["points"][0]["step"], runs[0]["points"][-1]["step"]
    return {
        "Setup": about,
        "Learning rates": paragraphs(
            "Every optimizer has one pilot run for each of four learning rates, on a seed that is not used again. The "
            f"one with the least training loss, the mean of the last {first} steps, is taken. Parameters other than "
            "the convolutions and the dense layer have Adam at 1e-3 under Muon and spectral_descent.",
            pilot_table(pilots, tried, rates),
        ),
        "Scores": paragraphs(
            f"At the end, over {len(runs)} seeds: mean and standard deviation. The training loss is the mean of the "
            f"last {first} steps, on augmented images. Differences are from flattened Muon, with the p-value of a "
            f"paired t-test. {UNCORRECTED}",
            score_table(found),
        ),
        "Time": paragraphs(
            "The median time of a step with all optimizers taking turns, on one core that other work shared.",
            cost_rows(found, costs),
        ),
        "How near the updates are to steepest descent": paragraphs(
            "The share `<M, K>` / dual norm: `M` is the Nesterov average (0.95) of the run's own gradients, `K` the "
            "update that the optimizer made, divided by its norm without edges. In place of the dual norm, the "
            "largest `<M, K>` of a kernel of norm 1, stands a proven upper bound, so that the shares are at least "
            "these. Medians over the convolutions of the first seed, at a sixth, half and five sixths of the steps.",
            share_table(found),
        ),
        "Weights": paragraphs(
            f"Medians over the convolutions, after {first} steps and at the end ({last} steps): norms and stable ranks "
            "of the whole layers, zero padding and strides included. Mean and standard deviation over seeds.",
            layer_table(found),
        ),
    }


def draw(found: dict[str, list[dict]], costs: dict[str, np.ndarray], output: Path) -> None:
    """Accuracy against steps and seconds; norms and stable ranks against steps."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (name, runs), color, line in zip(found.items(), COLORS, LINES, strict=False):
        steps = np.array([point["step"] for point in runs[0]["points"]])
        accuracy = 100 * curve(runs, "test_accuracy").mean(0)
        style = {"color": color, "ls": line, "marker": "o", "ms": 3, "label": WORDS[name]}
        axes[0, 1].plot(steps * seconds_of_step(costs, name), accuracy, **style)
        # Longer runs would squeeze the rest.
        if name != LONGER:
            axes[0, 0].plot(steps, accuracy, **style)
            axes[1, 0].plot(steps, medians(runs, 0).mean(0), **style)
            axes[1, 1].plot(steps, medians(runs, 1).mean(0), **style)
    axes[0, 0].set(xlabel="step", ylabel="test accuracy, %")
    axes[0, 1].set(xlabel="seconds of training", ylabel="test accuracy, %", xscale="log")
    axes[1, 0].set(xlabel="step", ylabel="norm, median of the layers", yscale="log")
    axes[1, 1].set(xlabel="step", ylabel="stable rank, median of the layers", yscale="log")
    for axis in (axes[0, 1].xaxis, axes[1, 0].yaxis, axes[1, 1].yaxis):
        # Plain numbers; matplotlib's own on a short logarithmic axis lie on each other.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, output / "optimizers.png", dpi=100)
