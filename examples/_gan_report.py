"""The report of `srn_gan.py`: tables, pictures, and whether the layers are what was asked."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from _report import paragraphs, requirement, save, table, write
from _studies import compared, mean_and_spread

from jaxsrn.plots import lipschitz_histogram
from jaxsrn.plots.canvas import styles

__all__ = ["report"]

# How far a norm or a stable rank may be from what was asked.
TOLERANCE = 0.01
REFERENCE = "SN"


def last_look(result: dict) -> dict:
    return list(result["looks"].values())[-1]


def percentile(look: dict) -> float:
    """That of the paper's Figure 2: 95% of the pairs have a smaller ratio."""
    return float(np.percentile(look["ratios"], 95))


def jacobian(look: dict, kind: int) -> float:
    """The median over real (0) or generated (1) images."""
    return float(np.median(look["jacobians"][kind]))


def unrest(result: dict) -> float:
    """The standard deviation of the discriminator's loss over the second half of the training, mean over 20 steps.

    Averages of 20 steps leave out what the draw of a batch does.
    """
    losses = np.asarray(result["loss"][len(result["loss"]) // 2 :])
    steps = max(1, min(20, len(losses) // 2))
    means = losses[: len(losses) // steps * steps].reshape(-1, steps).mean(1)
    return float(means.std(ddof=1))


def product(result: dict) -> float:
    return float(np.prod([layer["norm"] for layer in result["layers"]]))


MEASURES = {
    "Fréchet distance": (lambda result: result["frechet"], ".3f"),
    "class score": (lambda result: result["score"], ".3f"),
    "neural divergence": (lambda result: result["divergence"], ".3f"),
    "eLhist, 95%": (lambda result: percentile(last_look(result)), ".3f"),
    "Jacobian, real": (lambda result: jacobian(last_look(result), 0), ".3f"),
    "Jacobian, generated": (lambda result: jacobian(last_look(result), 1), ".3f"),
    "product of norms": (product, ".2f"),
    "unrest of the loss": (unrest, ".3f"),
}


def values(results: list[dict], measure: str) -> list[float]:
    return [MEASURES[measure][0](result) for result in results]


# Tables


def score_table(found: dict) -> str:
    rows = [
        (name, *(mean_and_spread(values(results, measure), form) for measure, (_, form) in MEASURES.items()))
        for name, results in found.items()
    ]
    return table(("discriminator", *MEASURES), rows)


def difference_table(found: dict, reference: str) -> str:
    def cell(results, measure):
        difference, p = compared(values(results, measure), values(found[reference], measure))
        return f"{difference:+.3f} (p {p:.2g})"

    measures = [measure for measure in MEASURES if measure != "product of norms"]
    rows = [
        (name, *(cell(results, measure) for measure in measures))
        for name, results in found.items()
        if name != reference
    ]
    return table((f"minus {reference}", *measures), rows)


def layer_table(found: dict) -> str:
    """Of the first seed; what is asked stands in brackets where it binds."""
    rows = []
    for name, results in found.items():
        for layer in results[0]["layers"]:
            norm, rank = ("", "") if layer["asked"] is None else layer["asked"]
            rank = f"{rank:.2f}" + (" (own)" if not layer["binds"] else "") if layer["asked"] else ""
            numbers = (f"{layer['norm']:.4f}", norm, f"{layer['rank']:.2f}", rank, f"{layer['largest']:.0f}")
            rows.append((name, layer["operator"], *numbers, f"{layer['reshaped norm']:.3f}"))
    head = ("discriminator", "layer", "norm", "asked", "stable rank", "asked", "largest", "norm, reshaped")
    return table(head, rows)


def missed(found: dict) -> list[str]:
    """The layers whose norm or stable rank is not what was asked, at the end of any run."""
    return [
        f"{name}, seed {seed}, {layer['operator']}: {what} {layer[what]:.4f}, asked {asked:.4f}"
        for name, results in found.items()
        for seed, result in enumerate(results)
        for layer in result["layers"]
        if layer["asked"]
        for what, asked in zip(("norm", "rank"), layer["asked"], strict=True)
        if not abs(layer[what] / asked - 1) <= TOLERANCE
    ]


def cost_table(costs: dict) -> str:
    plain = np.asarray(costs["plain"])
    rows = [
        (name, f"{1e3 * np.median(seconds):.1f} ms", f"{np.median(np.asarray(seconds) / plain):.2f}")
        for name, seconds in costs.items()
    ]
    return table(("discriminator", "an update of both networks", "of plain"), rows)


# Pictures


def draw_histograms(found: dict, path: Path) -> None:
    """Figure 2: stable ranks at left, approaches at right; pairs of all seeds."""
    pooled = {
        name: np.concatenate([last_look(result)["ratios"] for result in results]) for name, results in found.items()
    }
    exact = {name: ratios for name, ratios in pooled.items() if "reshaped" not in name and "GP" not in name}
    start = np.concatenate([next(iter(result["looks"].values()))["ratios"] for result in next(iter(found.values()))])
    others = {"untrained": start} | {name: ratios for name, ratios in pooled.items() if name not in exact}
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.2), layout="constrained")
    lipschitz_histogram(exact, ax=axes[0])
    lipschitz_histogram(others | {next(iter(exact)): next(iter(exact.values()))}, ax=axes[1])
    axes[0].set(title="exact constraints")
    axes[1].set(title="other discriminators")
    save(figure, path, dpi=90)


def draw_training(found: dict, path: Path) -> None:
    """Means over seeds, against the updates."""
    curves = {
        "eLhist, 95th percentile": lambda look: percentile(look),
        "Jacobian at real images, median": lambda look: jacobian(look, 0),
        "Fréchet distance of features": lambda look: look["frechet"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for (name, results), style in zip(found.items(), styles(len(found)), strict=True):
        losses = np.mean([result["loss"] for result in results], axis=0)
        steps = max(1, len(losses) // 50)
        means = losses[: len(losses) // steps * steps].reshape(-1, steps).mean(1)
        line = style | {"markevery": max(1, len(means) // 8)}
        axes[0, 0].plot(np.arange(1, len(means) + 1) * steps, means, label=name, **line)
        for (title, of), ax in zip(curves.items(), axes.flat[1:], strict=True):
            updates = [int(update) for update in results[0]["looks"]]
            mean = np.mean([[of(look) for look in result["looks"].values()] for result in results], axis=0)
            ax.plot(updates, mean, **style)
            ax.set(title=title, xlabel="updates", yscale="log")
    axes[0, 0].set(title="discriminator's loss", xlabel="updates")
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path, dpi=80)


def draw_samples(found: dict, path: Path) -> None:
    """A row of images for each discriminator, of the first seed."""
    figure, axes = plt.subplots(len(found), 1, figsize=(9, 0.75 * len(found)), layout="constrained")
    for ax, (name, results) in zip(axes, found.items(), strict=True):
        row = np.concatenate(results[0]["samples"], axis=1).astype(np.uint8)
        ax.imshow(np.broadcast_to(row, (*row.shape[:2], 3)))
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    save(figure, path, dpi=90)


# All of it


def report(found: dict, costs: dict, about: dict[str, str], command: str, output: Path) -> list[str]:
    """Writes report and pictures; what is wrong. `about`: the paragraphs on data and scores."""
    draw_histograms(found, output / "elhist.png")
    draw_training(found, output / "training.png")
    draw_samples(found, output / "samples.png")
    wrong = missed(found)
    reference = REFERENCE if REFERENCE in found else next(iter(found))
    sections = {
        "What was trained": paragraphs(about["data"]),
        "Scores": paragraphs(about["scores"], score_table(found)),
        f"Differences from {reference}": paragraphs(
            "Mean difference over seeds, and the p-value of the two-sided paired t-test.",
            difference_table(found, reference),
        ),
        "Empirical Lipschitz constants": paragraphs(
            "Ratios over pairs of a real and a generated image, all seeds.", "![eLhist](elhist.png)"
        ),
        "Training": paragraphs("Means over seeds.", "![Training](training.png)"),
        "Samples": paragraphs("Of the first seed, not selected.", "![Samples](samples.png)"),
        "Layers at the end": paragraphs(about["layers"], layer_table(found)),
        "Cost": paragraphs(about["cost"], cost_table(costs)),
    } | requirement(
        f"every norm and stable rank of the exact constraints within {TOLERANCE:.0%} of what was asked", wrong
    )
    write(output, "Stable rank normalization of a discriminator", command, sections)
    return wrong
