"""The tables, the sentences and the pictures of `reproduce_sanyal2020.py`."""

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from _report import paragraphs, requirement, save, table, write
from _studies import UNCORRECTED, compared, cost_table, mean_and_spread, p_value

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe, Ito: distinguishable with any colour vision.
COLORS = {"matrix": "#0072B2", "exact": "#D55E00", "plain": "#000000"}
# A difference is called one below this p-value.
SIGNIFICANT = 0.01


def end_of(run: dict) -> dict:
    return run["curve"][-1]


def gap_of(point: dict) -> float:
    """The generalization gap: the loss on new images less that on images that were trained on."""
    return point["test_loss"] - point["train_loss"]


def memorised(run: dict) -> float:
    """The accuracy on the labels that were trained on, at the end."""
    return end_of(run)["train_accuracy"]


def gap_at(curve: list[dict], loss: float) -> float:
    """The gap where the training loss first falls to `loss`, linear between two points of the curve; NaN if never."""
    for before, after in itertools.pairwise(curve):
        if after["train_loss"] <= loss < before["train_loss"]:
            share = (before["train_loss"] - loss) / (before["train_loss"] - after["train_loss"])
            return (1 - share) * gap_of(before) + share * gap_of(after)
    return float("nan")


class Study:
    """All runs, `{setting: [one for each seed]}`, by the kind of their labels."""

    def __init__(self, found: dict[str, list[dict]]):
        self.names = [name.removesuffix(", true") for name in found if name.endswith(", true")]
        self.runs = {labels: {name: found[f"{name}, {labels}"] for name in self.names} for labels in ("true", "random")}
        # The training loss that every run with true labels reaches.
        self.loss = max(end_of(run)["train_loss"] for runs in self.runs["true"].values() for run in runs)

    def values(self, name: str, labels: str, number: Callable[[dict], float]) -> np.ndarray:
        """A number of each seed's run."""
        return np.array([number(run) for run in self.runs[labels][name]])

    def gaps(self, name: str) -> np.ndarray:
        return self.values(name, "true", lambda run: gap_of(end_of(run)))

    def gaps_at_loss(self, name: str) -> np.ndarray:
        return self.values(name, "true", lambda run: gap_at(run["curve"], self.loss))

    def memorised(self, name: str) -> np.ndarray:
        return self.values(name, "random", memorised)

    def normalized(self, name: str) -> str | None:
        """The setting with the norm alone held, of the same kind."""
        return next((other for other in self.names if other.startswith("SN") and other[-6:] == name[-6:]), None)


# Tables


def score_table(study: Study) -> str:
    header = ("network", "train loss", "test loss", "gap", "train accuracy", "test accuracy", "gap at equal loss")

    def row(name):
        numbers = [
            study.values(name, "true", lambda run, key=key: end_of(run)[key]) for key in ("train_loss", "test_loss")
        ]
        shares = [
            study.values(name, "true", lambda run, key=key: end_of(run)[key])
            for key in ("train_accuracy", "test_accuracy")
        ]
        cells = [mean_and_spread(values, ".2f") for values in (*numbers, study.gaps(name))]
        cells += [mean_and_spread(100 * values, ".1f") for values in shares]
        return name, *cells, mean_and_spread(study.gaps_at_loss(name), ".2f")

    return table(header, map(row, study.names))


def memory_table(study: Study) -> str:
    header = ("network", "train loss", "train accuracy", "less than plain", "p", "less than SN", "p")

    def row(name):
        losses, own = study.values(name, "random", lambda run: end_of(run)["train_loss"]), 100 * study.memorised(name)
        cells = mean_and_spread(losses, ".2f"), mean_and_spread(own, ".1f")
        return (
            name,
            *cells,
            *_less(study, name, "plain", study.memorised, 100, ".1f"),
            *_less(study, name, study.normalized(name), study.memorised, 100, ".1f"),
        )

    return table(header, map(row, study.names))


def difference_table(study: Study) -> str:
    header = (
        "network",
        "gap: less than plain",
        "p",
        "less than SN",
        "p",
        "at equal loss: less than plain",
        "p",
        "less than SN",
        "p",
    )

    def row(name):
        pairs = [
            _less(study, name, other, values, 1, ".2f")
            for values in (study.gaps, study.gaps_at_loss)
            for other in ("plain", study.normalized(name))
        ]
        return name, *(cell for pair in pairs for cell in pair)

    return table(header, map(row, study.names[1:]))


def kind_table(study: Study) -> str:
    """The two constraints side by side, at equal `c` and at equal stable ranks."""
    header = ("exact, against matrix", "gap: exact less matrix", "p", "memorised: exact less matrix", "p")

    def row(name):
        other = f"SRN {name.split(',')[0].split()[-1]}, matrix"
        pairs = [compared(values(name), values(other)) for values in (study.gaps, study.memorised)]
        (gap, p_gap), (memory, p_memory) = pairs
        return f"{name}, against {other}", f"{gap:+.3f}", p_value(p_gap), f"{100 * memory:+.1f}", p_value(p_memory)

    return table(header, [row(name) for name in study.names if name.startswith("SRN") and name.endswith("exact")])


def _less(study: Study, name: str, other: str | None, values, factor: float, form: str) -> tuple[str, str]:
    """By how much a number is less than that of another setting, and the p-value."""
    if other is None or other == name:
        return "", ""
    difference, p = compared(values(other), values(name))
    return f"{factor * difference:{form}}", p_value(p)


def layer_table(study: Study) -> str:
    """Means over seeds; of the norms the smallest and the largest of all seeds, over the convolutions."""
    layers = [layer["name"] for layer in study.runs["true"]["plain"][0]["layers"]]
    kept = layers if len(layers) <= 8 else [layers[i] for i in (0, len(layers) // 2, -1)]
    header = ("network", *(f"{name.removesuffix('/kernel')}" for name in kept), "sum", "norms of the convolutions")

    def row(name):
        runs = study.runs["true"][name]
        cells = []
        for layer in kept:
            i = layers.index(layer)
            share, matrix = (np.mean([run["layers"][i][key] for run in runs]) for key in ("share", "matrix_share"))
            cells.append(f"{share:.3f} / {matrix:.2f}")
        ranks = f"{np.mean([sum(layer['rank'] for layer in run['layers']) for run in runs]):.0f}"
        norms = [layer["norm"] for run in runs for layer in run["layers"] if not layer["name"].startswith("head")]
        return name, *cells, ranks, f"{min(norms):.2f} to {max(norms):.2f}"

    return table(header, map(row, study.names))


def measure_table(study: Study, labels: str) -> str:
    names = list(study.runs[labels]["plain"][0]["measures"])
    header = ("network", *names, "eLhist, 95th", "local, median", "local, largest")

    def row(name):
        cells = [
            mean_and_spread(study.values(name, labels, lambda run, key=key: run["measures"][key]), ".2f")
            for key in names
        ]
        for key in ("percentile", "local", "largest_local"):
            cells.append(
                mean_and_spread(study.values(name, labels, lambda run, key=key: run["constants"][-1][key]), ".3f")
            )
        return name, *cells

    return table(header, map(row, study.names))


# What came out, in words


def verdict(study: Study) -> str:
    """For each constraint whether gap and memorisation are less than those of the plain network and of SN."""
    if len(study.gaps("plain")) == 1:
        return "One seed has no spread: nothing is tested."
    quantities = {
        "Gap": study.gaps,
        "Gap at equal train loss": study.gaps_at_loss,
        "Accuracy on random labels": study.memorised,
    }
    lines, held = [], []
    for kind in ("matrix", "exact"):
        names = [name for name in study.names if name.startswith("SRN") and name.endswith(kind)]
        others = [name for name in study.names if name in ("plain", f"SN, {kind}")]
        lines += [
            _sentence(study, what, values, names, other) for what, values in quantities.items() for other in others
        ]
        for values in (study.gaps, study.memorised):
            names = [name for name in names if all(_is_less(study, name, other, values) for other in others)]
        held += [f"with the {kind} constraint for {', '.join(name.split(', ')[0] for name in names) or 'no c'}"]
    claim = f"""The paper's claim, a smaller gap and less memorisation than the plain network and than SN, holds
    {" and ".join(held)}."""
    return f"{paragraphs(claim)}\n\n{chr(10).join(lines)}"


def _is_less(study: Study, name: str, other: str, values) -> bool:
    difference, p = compared(values(other), values(name))
    return difference > 0 and p < SIGNIFICANT


def _sentence(study: Study, what: str, values, names: list[str], other: str) -> str:
    found = {"smaller": [], "larger": [], "not different": []}
    for name in names:
        difference, p = compared(values(other), values(name))
        found["not different" if not p < SIGNIFICANT else "smaller" if difference > 0 else "larger"].append(name)
    parts = [f"{how} with {', '.join(name.split(', ')[0] for name in own)}" for how, own in found.items() if own]
    return f"- {what}, {names[0].split(', ')[1]} constraint, against {other}: {'; '.join(parts)}."


# Pictures


# What the curves over epochs show, so that they can be told apart.
HIDDEN = ("SRN 0.5", "SRN 0.7", "SRN 0.9")


def draw_scores(study: Study, path: Path) -> None:
    """Gap and memorisation: over the training above, at the end for each `c` below."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 8.5), layout="constrained")
    for name in study.names:
        if not name.startswith(HIDDEN):
            true, random = study.runs["true"][name], study.runs["random"][name]
            _curve(axes[0, 0], true, "curve", gap_of, name)
            losses, gaps = (
                np.mean([[number(point) for point in run["curve"]] for run in true], axis=0)
                for number in (lambda point: point["train_loss"], gap_of)
            )
            axes[0, 1].plot(losses, gaps, lw=1.6, **_style(name))
            _curve(axes[0, 2], random, "curve", lambda point: point["train_accuracy"], name)
    axes[0, 1].axvline(study.loss, lw=0.8, color="0.6")
    axes[0, 1].invert_xaxis()
    _by_fraction(axes[1, 0], study, study.gaps)
    _by_fraction(axes[1, 1], study, study.gaps_at_loss)
    _by_fraction(axes[1, 2], study, study.memorised)
    axes[0, 0].set(title="gap: test loss - train loss, true labels", xlabel="epoch")
    axes[0, 1].set(title="gap against train loss; grey: equal loss", xlabel="train loss, falling")
    axes[0, 2].set(title="accuracy on random labels (memorised)", xlabel="epoch")
    for ax, title in zip(axes[1], ("gap", "gap at equal train loss", "accuracy on random labels"), strict=True):
        ax.set(title=f"{title}; ± standard deviation", xlabel="c")
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[1, 2].legend(frameon=False, fontsize=9)
    save(figure, path, dpi=80)


def _style(name: str) -> dict:
    """A colour for each kind of constraint, and a line for what is held."""
    lines = {"SN": "--", "SRN as": ":"}
    line = next((line for start, line in lines.items() if name.startswith(start)), "-")
    return {"color": COLORS[name.split(", ")[-1]], "ls": line}


def _curve(ax, runs: list[dict], key: str, number, name: str) -> None:
    values = np.array([[number(point) for point in run[key]] for run in runs])
    epochs, mean = [point["epoch"] for point in runs[0][key]], values.mean(0)
    style = _style(name) | ({"marker": "D", "ms": 4} if name.startswith("SRN as") else {})
    ax.plot(epochs, mean, lw=1.6, label=name, **style)
    if len(runs) > 1:
        spread = values.std(0, ddof=1)
        ax.fill_between(epochs, mean - spread, mean + spread, color=style["color"], alpha=0.12, lw=0)


def _by_fraction(ax, study: Study, values) -> None:
    """The settings with a `c` as points with their spread, the others as lines across."""
    for name in study.names:
        if not name.startswith("SRN"):
            ax.axhline(values(name).mean(), lw=1.4, label=name, **_style(name))
    for shift, kind in ((-0.006, "matrix"), (0.006, "exact")):
        names = [name for name in study.names if name.startswith("SRN 0") and name.endswith(kind)]
        _points(ax, names, 1, shift, values, {"marker": "o", "color": COLORS[kind], "label": f"SRN, {kind}"})
    names = [name for name in study.names if name.startswith("SRN as")]
    look = {"marker": "D", "ls": "", "mfc": "white", "color": COLORS["exact"], "label": "exact, stable ranks of matrix"}
    _points(ax, names, 2, 0.018, values, look)


def _points(ax, names: list[str], word: int, shift: float, values, look: dict) -> None:
    """Means and spreads at the `c` that is a word of each name."""
    places = [float(name.split()[word].rstrip(",")) + shift for name in names]
    own = [values(name) for name in names]
    spread = [np.std(seeds, ddof=1) if len(seeds) > 1 else 0 for seeds in own]
    ax.errorbar(places, [seeds.mean() for seeds in own], spread, capsize=3, **look)


def draw_constants(study: Study, path: Path) -> None:
    """Empirical Lipschitz constants: their histogram at the end above, and their course below."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    shown = [name for name in study.names if not name.startswith(HIDDEN)]
    for ax, labels in zip(axes[0], ("true", "random"), strict=True):
        ratios = {
            name: np.concatenate([run["constants"][-1]["ratios"] for run in study.runs[labels][name]]) for name in shown
        }
        edges = np.histogram_bin_edges(np.concatenate(list(ratios.values())), 50)
        for name, own in ratios.items():
            ax.stairs(np.histogram(own, edges)[0] / len(own), edges, lw=1.6, label=name, **_style(name))
            ax.axvline(np.percentile(own, 95), lw=0.8, **_style(name))
        ax.set(title=f"eLhist at the end, {labels} labels", xlabel="|f(x) - f(y)| / |x - y|", ylabel="share of pairs")
    for name in shown:
        _curve(axes[1, 0], study.runs["true"][name], "constants", lambda point: point["percentile"], name)
        _curve(axes[1, 1], study.runs["true"][name], "constants", lambda point: point["local"], name)
    axes[1, 0].set(title="95th percentile of eLhist, true labels", xlabel="epoch")
    axes[1, 1].set(title="norm of the Jacobian, median, true labels", xlabel="epoch")
    axes[0, 0].legend(frameon=False, fontsize=9)
    save(figure, path, dpi=90)


def write_report(found: dict[str, list[dict]], seconds, data_name: str, size, scored: int, output: Path) -> list[str]:
    """Writes the report and the figures; what misses its constraint, by run. `scored`: images of losses and scores."""
    study = Study(found)
    wrong = [
        f"{name}, seed {seed}: {text}"
        for name, runs in found.items()
        for seed, run in enumerate(runs)
        for text in run["wrong"]
    ]
    draw_scores(study, output / "figure1.png")
    draw_constants(study, output / "figure2.png")
    seeds = len(study.runs["true"]["plain"])
    scores = [min(scored, number) for number in (size.num_train, size.num_test)]
    kind = f"Convolutions of {', '.join(map(str, size.widths))} channels" if size.widths else "DenseNet-40"
    sections = {
        "What was trained": paragraphs(
            f"""{data_name}: {size.num_train} images to train on for each seed, other ones for each, averaged to
            {size.image}x{size.image} pixels, not augmented. {kind}, batch normalization, ReLU and a dense layer;
            gradient descent with momentum 0.9, first rate {size.rate}, {size.epochs} epochs of batches of {size.batch};
            {seeds} seeds, which fix images, random labels, first weights and batches. Losses and accuracies, that on
            random labels too, are of the first {scores[0]} images of training and of {scores[1]} of the test set.""",
            """Plain: no constraint. SN: every layer has norm 1. SRN c: it also has at most the share c of the largest
            stable rank. `matrix`: of the kernel reshaped to a matrix, as Sanyal et al. do; `exact`: of the linear map.
            `SRN as c, exact`: each layer is held to the true stable rank that `SRN c, matrix` had at the end with seed
            0 (equal effect). ± is the
            standard deviation over seeds.""",
        ),
        "What came out": f"{verdict(study)}\n\nPaired t-tests over seeds, two-sided; different: p < {SIGNIFICANT}. "
        f"{UNCORRECTED}",
        "True labels: generalization": paragraphs(
            f"""Gap: test loss less train loss. At equal loss: where the train loss first falls to {study.loss:.2f},
            which all runs reach.""",
            score_table(study),
            "Differences of the gaps, and p-values of the paired t-test.",
            difference_table(study),
        ),
        "Random labels: memorisation": paragraphs("After the same number of steps.", memory_table(study)),
        "The matrix and the map": kind_table(study),
        "Stable ranks at the end": paragraphs(
            """Shares of the largest stable rank of the linear map / of the reshaped matrix; means over seeds, true
            labels; sum: of the stable ranks of the linear maps. Norms: of the linear maps, over convolutions and
            seeds.""",
            layer_table(study),
        ),
        "Lipschitz constants and measures, true labels": paragraphs(
            """Decimal logarithms of Spec-Fro, Spec-L1, Jac-Norm and of the product of the layers' norms, with batch
            normalization folded into the convolutions where it follows one; margin: the median of training images, of
            which Spec-Fro and Spec-L1 take the square; Jac-Norm: the median, each with its own margin.""",
            measure_table(study, "true"),
        ),
        "Lipschitz constants and measures, random labels": measure_table(study, "random"),
        "Time of a training step": cost_table(seconds, ("network", "a step", "times plain")),
        **requirement("norm and stable rank of every constrained layer are within 1% of what was asked", wrong),
    }
    write(output, "Generalization and memorisation under stable rank constraints", sections)
    return wrong
