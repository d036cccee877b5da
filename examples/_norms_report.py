"""The tables and pictures of norms_in_training.py, from the results of its runs."""

from pathlib import Path

import matplotlib
import numpy as np
from _report import paragraphs, save, table
from _studies import UNCORRECTED, curve, mean_and_spread, mean_difference, misses_target, of_layers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["costs_section", "draw", "misses", "name_of", "sections_of"]

# What the tables call each constraint.
WORDS = {
    "plain": "nothing",
    "clip": "one pass of clipping",
    "projection": "projection",
    "tensor norm": "penalty on the tensor norm",
    "entries": "penalty on absolute entries",
    "spectral": "SpectralNorm",
    "stable rank": "StableRankNorm",
}
# Okabe, Ito: distinguishable with any colour vision.
COLORS = dict(zip(WORDS, ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7"), strict=True))


def name_of(constraint: str, strength: float, has_norms: bool) -> str:
    """The name of a setting, and of its files."""
    parts = [constraint.replace(" ", "-"), *([f"{strength:g}"] if strength else [])]
    return "-".join(parts) + ("" if has_norms else "-without")


def words_of(setting: dict) -> str:
    return WORDS[setting["constraint"]] + (f", {setting['strength']:g}" if setting["strength"] else "")


def seconds(runs: list[dict]) -> np.ndarray:
    return curve(runs, "steps") + curve(runs, "corrections")


def largest(runs: list[dict], name: str) -> list[float]:
    """The largest of the layers at the end, of every seed."""
    return [max(layer[name] for layer in run["points"][-1]["layers"].values()) for run in runs]


# What was asked


def misses(settings: dict[str, dict], found: dict[str, list[dict]]) -> list[str]:
    """The layers that are more than 1% from what was asked of them, by the report at the end of training."""
    return [
        f"{name}, seed {seed}, {layer}: {why}"
        for name, runs in found.items()
        for seed, run in enumerate(runs)
        for layer, values in run["report"].items()
        for why in wrong_with(settings[name], values)
    ]


def wrong_with(setting: dict, values: dict[str, float]) -> list[str]:
    """What is wrong with a layer; nothing is asked of one that was clipped or penalised."""
    constraint, strength = setting["constraint"], setting["strength"]
    norm, share = values["norm"], values["rank"] / values["largest"]
    wrong = []
    if constraint == "projection" and misses_target(norm, strength, at_most=True):
        wrong.append(f"norm {norm:.4f}, at most {strength:g} was asked")
    if constraint in ("spectral", "stable rank") and misses_target(norm, 1):
        wrong.append(f"norm {norm:.4f}, 1 was asked")
    if constraint == "stable rank" and misses_target(share, strength, at_most=True):
        wrong.append(f"stable rank {share:.4f} of the largest, at most {strength:g} was asked")
    return wrong


# Tables


def scores_table(settings: dict[str, dict], found: dict[str, list[dict]], has_norms: bool) -> str:
    """One row a setting: the scores at the end, their difference to the plain network, and the norms."""
    plain = found[name_of("plain", 0.0, has_norms)]
    rows = []
    for name, setting in settings.items():
        if setting["has_norms"] != has_norms:
            continue
        runs, errors = found[name], curve(found[name], "test_error")[:, -1]
        others = curve(plain, "test_error")[:, -1]
        difference = "-" if setting["constraint"] == "plain" else mean_difference(100 * errors, 100 * others, ".1f")
        gaps = curve(runs, "test_loss")[:, -1] - curve(runs, "loss")[:, -1]
        row = [words_of(setting), mean_and_spread(curve(runs, "loss")[:, -1]), mean_and_spread(100 * errors, ".1f")]
        row += [difference, mean_and_spread(gaps), mean_and_spread(largest(runs, "norm"), ".2f")]
        rows.append(row + ([mean_and_spread(largest(runs, "folded"), ".2f")] if has_norms else []))
    header = ["done to the convolutions", "training loss", "test error, %", "beside nothing", "test - training loss"]
    return table([*header, "largest norm", *(["with its batch norm"] if has_norms else [])], rows)


def passes_table(settings: dict[str, dict], found: dict[str, list[dict]]) -> str:
    """One pass of clipping and the projection at the same limit."""
    rows = []
    for name, setting in settings.items():
        limit, has_norms = setting["strength"], setting["has_norms"]
        once = found.get(name_of("clip", limit, has_norms))
        if setting["constraint"] != "projection" or once is None:
            continue
        norms = [mean_and_spread(np.array(largest(runs, "norm")) / limit) for runs in (once, found[name])]
        errors = [100 * curve(runs, "test_error")[:, -1] for runs in (found[name], once)]
        costs = [
            f"{np.mean(curve(runs, 'corrections')[:, -1] / corrections_in(setting)):.3f}"
            for runs in (once, found[name])
        ]
        rows.append(["with" if has_norms else "without", f"{limit:g}", *norms, mean_difference(*errors, ".1f"), *costs])
    header = ("batch norm", "limit c", "clipped: norm / c", "projected: norm / c", "test error, projected - clipped, %")
    return table((*header, "clipping, CPU s", "projection, CPU s"), rows)


def corrections_in(setting: dict) -> int:
    return setting["num_steps"] // setting["correct_every"]


def tightness_table(found: dict[str, list[dict]]) -> str:
    """The bounds over the exact norm in the plain network, over training: Figure 1, left, of Grishina et al."""
    runs = found[name_of("plain", 0.0, True)]
    norms = of_layers(runs, "norm")
    rows = []
    for name in ("tensor norm", "fantastic four"):
        # Of each run by itself: the least and the most are those of any seed.
        ratios = of_layers(runs, name) / norms
        means = ratios.mean((0, 2))[[0, -1]]
        rows.append([name, *(f"{ratio:.3f}" for ratio in (*means, ratios.min(), ratios.max()))])
    steps = [runs[0]["points"][i]["step"] for i in (0, -1)]
    return table(("bound / norm", *(f"mean, step {step}" for step in steps), "least", "most"), rows)


def layers_table(settings: dict, found: dict[str, list[dict]]) -> str:
    """Norms at the end, with batch norm: of each layer, and with the batch norm folded in."""
    shown = [name for name, setting in settings.items() if setting["has_norms"]]
    layers = list(found[shown[0]][0]["points"][0]["layers"])
    rows = []
    for name in shown:
        alone, folded = (of_layers(found[name], quantity).mean(0)[-1] for quantity in ("norm", "folded"))
        rows.append([words_of(settings[name]), *(f"{a:.2f} / {f:.2f}" for a, f in zip(alone, folded, strict=True))])
    return table(("norm / with the batch norm folded in", *layers), rows)


def costs_section(costs: dict[str, np.ndarray], settings: dict, found: dict) -> str:
    """The time of a step beside that of a plain one in the same round, and the CPU time of steps in the runs."""
    plain = cpu_per_step(found[name_of("plain", 0.0, True)])
    rows = []
    for name, setting in settings.items():
        constraint = setting["constraint"]
        if not setting["has_norms"]:
            continue
        times = costs.get(constraint)
        ratios = ["-" if times is None else f"{np.median(times / costs[base]):.2f}" for base in ("plain", "spectral")]
        own = cpu_per_step(found[name])
        every = f", every {setting['correct_every']} steps" if constraint in ("clip", "projection") else ""
        rows.append([words_of(setting) + every, *ratios, f"{1e3 * own:.1f} ms", f"{own / plain:.2f}"])
    header = ("a step with", "of plain", "of SpectralNorm", "CPU time in the runs", "of plain")
    return paragraphs(
        "With batch norm. First two numbers: steps of all methods in turn, the median over rounds of the ratio within "
        "a round. Last two: CPU time of the steps of the runs, corrections included, compilation and measuring not.",
        table(header, rows),
    )


def cpu_per_step(runs: list[dict]) -> float:
    return float(np.mean(seconds(runs)[:, -1] / curve(runs, "step")[:, -1]))


# Pictures


def draw_limits(settings: dict, found: dict, path: Path) -> None:
    """Sedghi et al., Figure 2: training loss and test error of every limit."""
    kinds = sorted({setting["has_norms"] for setting in settings.values()}, reverse=True)
    figure, axes = plt.subplots(len(kinds), 2, figsize=(13, 4.3 * len(kinds)), layout="constrained", squeeze=False)
    limits = sorted({s["strength"] for s in settings.values() if s["constraint"] in ("clip", "projection")})
    colors = dict(zip(limits, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(limits))), strict=True))
    for has_norms, (left, right) in zip(kinds, axes, strict=True):
        for name, setting in settings.items():
            constraint = setting["constraint"]
            if setting["has_norms"] != has_norms or constraint not in ("plain", "clip", "projection"):
                continue
            color = "0.5" if constraint == "plain" else colors[setting["strength"]]
            style = {"color": color, "ls": "--" if constraint == "projection" else "-", "marker": "o", "ms": 3}
            steps = curve(found[name], "step")[0]
            left.plot(steps, curve(found[name], "loss").mean(0), **style, label=words_of(setting))
            right.plot(steps, 100 * curve(found[name], "test_error").mean(0), **style, label=words_of(setting))
        kind = "with batch norm" if has_norms else "without batch norm"
        left.set(xlabel="step", ylabel="training loss", title=kind)
        right.set(xlabel="step", ylabel="test error, %", title=kind)
        right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    save(figure, path, dpi=100)


def draw_time(settings: dict, found: dict, path: Path) -> None:
    """Sedghi et al., Figure 3: test error against time; one strength of each method, its limit or norm 1."""
    kinds = sorted({setting["has_norms"] for setting in settings.values()}, reverse=True)
    figure, axes = plt.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 4.5), layout="constrained", squeeze=False)
    for has_norms, ax in zip(kinds, axes[0], strict=True):
        for name, setting in settings.items():
            constraint = setting["constraint"]
            if setting["has_norms"] != has_norms or (constraint in ("clip", "projection") and setting["strength"] != 1):
                continue
            errors = 100 * curve(found[name], "test_error")
            style = {"color": COLORS[constraint], "marker": "osD^v<>"[list(WORDS).index(constraint)], "ms": 4}
            ax.plot(seconds(found[name]).mean(0), errors.mean(0), **style, lw=1.4, label=words_of(setting))
        ax.set(xlabel="CPU seconds", ylabel="test error, %", title=f"{'with' if has_norms else 'without'} batch norm")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    save(figure, path, dpi=100)


def draw_layers(settings: dict, found: dict, path: Path) -> None:
    """Grishina et al., Figures 1, 3 and 4: bounds, norms, and norms with the batch norm folded in, layer by layer."""
    plain = found[name_of("plain", 0.0, True)]
    layers, steps = list(plain[0]["points"][0]["layers"]), curve(plain, "step")[0]
    shown = {name: setting for name, setting in settings.items() if setting["has_norms"]}
    shown = {n: s for n, s in shown.items() if s["constraint"] not in ("clip", "projection") or s["strength"] == 1}
    figure, axes = plt.subplots(3, len(layers), figsize=(3.3 * len(layers), 9), layout="constrained", sharex=True)
    for name, style in (("fantastic four", ":"), ("tensor norm", "--"), ("norm", "-")):
        for ax, values in zip(axes[0], of_layers(plain, name).mean(0).T, strict=True):
            ax.plot(steps, values, style, color="k", marker="o", ms=3, label=name)
    for row, quantity in ((1, "norm"), (2, "folded")):
        for name, setting in shown.items():
            constraint = setting["constraint"]
            style = {"color": COLORS[constraint], "marker": "osD^v<>"[list(WORDS).index(constraint)], "ms": 3}
            for ax, values in zip(axes[row], of_layers(found[name], quantity).mean(0).T, strict=True):
                ax.plot(steps, values, **style, lw=1.2, label=words_of(setting))
    for ax, layer in zip(axes[0], layers, strict=True):
        ax.set_title(layer)
    for ax, text in zip(axes[:, 0], ("plain: norm and bounds", "norm", "norm, batch norm folded in"), strict=True):
        ax.set_ylabel(text)
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:2, -1]:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    save(figure, path, dpi=90)


def draw(settings: dict, found: dict, output: Path) -> None:
    draw_limits(settings, found, output / "limits.png")
    draw_time(settings, found, output / "time.png")
    draw_layers(settings, found, output / "layers.png")


# The report


def sections_of(settings: dict, found: dict, about: str) -> dict[str, str]:
    kinds = sorted({setting["has_norms"] for setting in settings.values()}, reverse=True)
    setting, num_seeds = next(iter(settings.values())), len(next(iter(found.values())))
    scores = {
        f"Scores {'with' if has_norms else 'without'} batch norm": paragraphs(
            "At the end, mean and standard deviation over seeds; `beside nothing` is the difference of the test errors "
            f"and its p-value by a paired t-test. {UNCORRECTED} The training loss is that of the batches of the last "
            f"{setting['measure_every']} steps, augmented and without a penalty. Norms are those of the layers as they "
            "are, padding and strides included.",
            scores_table(settings, found, has_norms),
        )
        for has_norms in kinds
    }
    return {
        "Setting": paragraphs(
            about,
            f"{setting['num_steps']} steps of SGD on batches of {setting['batch']}, {num_seeds} seeds. Clipping and "
            f"projection every {setting['correct_every']} steps, with circular padding as in the paper, the last one "
            "at the end. StableRankNorm and SpectralNorm hold norm 1. Before the network is scored, its batch norms "
            "take the statistics of its own weights.",
        ),
        **scores,
        "Limits (Sedghi et al., Figure 2)": paragraphs("![Loss and error of every limit](limits.png)"),
        "Error against time (Sedghi et al., Figure 3)": paragraphs(
            "CPU seconds of steps and corrections, without compilation and measuring; limits of 1.",
            "![Error against time](time.png)",
        ),
        "One pass of clipping and the projection": paragraphs(
            "The largest norm of a layer over the limit, after the correction at the end; CPU seconds are those of one "
            "correction of all convolutions.",
            passes_table(settings, found),
        ),
        "Norms over training (Grishina et al., Figures 1, 3 and 4)": paragraphs(
            "With batch norm. Pictures and norms are means over seeds, ratios of the bounds those of every run. First "
            "row: the network without a constraint, its exact norms and the two bounds. Second row: norms under each "
            "method. Third row: the same with the batch norm that follows folded into the convolution.",
            "![Norms over training](layers.png)",
            tightness_table(found),
            f"At the end, after {setting['num_steps']} steps:",
            layers_table(settings, found),
        ),
    }
