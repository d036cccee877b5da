"""The report of `srn_gan.py`: tables, pictures, and whether the layers are what was asked."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from _report import paragraphs, requirement, save, table, write
from _studies import UNCORRECTED, cost_table, mean_and_spread, mean_difference, misses_target

from jaxsrn.plots import lipschitz_histogram
from jaxsrn.plots.canvas import styles

__all__ = ["report"]

# The settings with the norm alone held, with which those of the same norm are compared.
REFERENCES = ("SN", "SN, norm 1.36")


def first_look(result: dict) -> dict:
    return next(iter(result["looks"].values()))


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


UNREST = "unrest of the loss"
MEASURES = {
    "Fréchet distance": (lambda result: result["frechet"], ".3f"),
    "class score": (lambda result: result["score"], ".3f"),
    "neural divergence": (lambda result: result["divergence"], ".3f"),
    "eLhist, 95%": (lambda result: percentile(last_look(result)), ".3f"),
    "Jacobian, real": (lambda result: jacobian(last_look(result), 0), ".3f"),
    "Jacobian, generated": (lambda result: jacobian(last_look(result), 1), ".3f"),
    "product of norms": (product, ".2f"),
    UNREST: (unrest, ".3f"),
}


def values(results: list[dict], measure: str) -> list[float]:
    return [MEASURES[measure][0](result) for result in results]


def has_other_loss(name: str) -> bool:
    """Whether the discriminator has another loss than the hinge loss of all others: its values are no hinge losses."""
    return "GP" in name


# Tables


def score_table(found: dict) -> str:
    rows = [
        (name, *(mean_and_spread(values(results, measure), form) for measure, (_, form) in MEASURES.items()))
        for name, results in found.items()
    ]
    return table(("discriminator", *MEASURES), rows)


def difference_table(found: dict, reference: str) -> str:
    def cell(name, measure):
        if measure == UNREST and has_other_loss(name):
            return ""
        return mean_difference(values(found[name], measure), values(found[reference], measure), ".3f")

    measures = [measure for measure in MEASURES if measure != "product of norms"]
    rows = [(name, *(cell(name, measure) for measure in measures)) for name in found if name != reference]
    return table((f"minus {reference}", *measures), rows)


def untrained_table(found: dict) -> str:
    """What training does to the ratios: before the first update and after the last."""
    rows = [
        (
            name,
            *(
                mean_and_spread([percentile(look(result)) for result in results], ".3f")
                for look in (first_look, last_look)
            ),
        )
        for name, results in found.items()
    ]
    return table(("eLhist, 95%", "untrained", "trained"), rows)


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
        if misses_target(layer[what], asked)
    ]


# Pictures


def draw_histograms(found: dict, path: Path) -> None:
    """Figure 2: stable ranks at left, approaches at right; pairs of all seeds."""
    pooled = {
        name: np.concatenate([last_look(result)["ratios"] for result in results]) for name, results in found.items()
    }
    first = next(iter(found))
    start = np.concatenate([first_look(result)["ratios"] for result in found[first]])
    exact = {name: pooled[name] for name in found if not any(word in name for word in ("reshaped", "norm", "GP"))}
    others = {f"{first}, untrained": start, first: pooled[first]}
    others |= {name: ratios for name, ratios in pooled.items() if name not in exact}
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.2), layout="constrained")
    for ax, ratios, title in zip(axes, (exact, others), ("norm 1, exact", "the others"), strict=True):
        lipschitz_histogram(ratios, ax=ax)
        ax.set(title=title)
    save(figure, path, dpi=90)


def draw_training(found: dict, path: Path) -> None:
    """Means over seeds, against the updates."""
    curves = {
        "eLhist, 95th percentile": percentile,
        "Jacobian at real images, median": lambda look: jacobian(look, 0),
        "Fréchet distance of features": lambda look: look["frechet"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for (name, results), style in zip(found.items(), styles(len(found)), strict=True):
        for (title, of), ax in zip(curves.items(), axes.flat[1:], strict=True):
            updates = [int(update) for update in results[0]["looks"]]
            mean = np.mean([[of(look) for look in result["looks"].values()] for result in results], axis=0)
            ax.plot(updates, mean, label=name, **style)
            ax.set(title=title, xlabel="updates", yscale="log")
        losses = np.mean([result["loss"] for result in results], axis=0)
        steps = max(1, len(losses) // 30)
        means = losses[: len(losses) // steps * steps].reshape(-1, steps).mean(1)
        if not has_other_loss(name):
            axes[0, 0].plot(np.arange(1, len(means) + 1) * steps, means, **style | {"markevery": 5})
    axes[0, 0].set(title="discriminator's hinge loss (2 where it cannot tell)", xlabel="updates")
    for which in (axes[1, 1].yaxis.set_major_formatter, axes[1, 1].yaxis.set_minor_formatter):
        which("{x:g}")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(figure, path, dpi=80)


def draw_samples(real, found: dict, path: Path) -> None:
    """A row of images for each discriminator, of the first seed, and one of real images."""
    rows = {"real": real} | {name: results[0]["samples"] for name, results in found.items()}
    figure, axes = plt.subplots(len(rows), 1, figsize=(11, 0.7 * len(rows)), layout="constrained")
    for ax, (name, images) in zip(axes, rows.items(), strict=True):
        # A white line between images.
        framed = np.pad(np.asarray(images), ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
        row = np.concatenate(framed, axis=1).astype(np.uint8)
        ax.imshow(np.broadcast_to(row, (*row.shape[:2], 3)))
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    save(figure, path, dpi=90)


# All of it


def report(found: dict, costs: dict, about: dict[str, str], real, output: Path) -> list[str]:
    """Writes report and pictures; what is wrong. `about`: the paragraphs on data and scores; `real`: some images."""
    draw_histograms(found, output / "elhist.png")
    draw_training(found, output / "training.png")
    draw_samples(real, found, output / "samples.png")
    wrong = missed(found)
    references = [name for name in REFERENCES if name in found] or [next(iter(found))]
    sections = {
        "What was trained": paragraphs(about["data"]),
        "Scores": paragraphs(about["scores"], score_table(found)),
        "Differences": paragraphs(
            f"Mean difference over seeds, and the p-value of the two-sided paired t-test. {UNCORRECTED}",
            *(difference_table(found, reference) for reference in references),
        ),
        "Empirical Lipschitz constants": paragraphs(
            "Ratios over pairs of a real and a generated image, all seeds.",
            "![eLhist](elhist.png)",
            untrained_table(found),
        ),
        "Training": paragraphs("Means over seeds.", "![Training](training.png)"),
        "Samples": paragraphs("Of the first seed, not selected.", "![Samples](samples.png)"),
        "Layers at the end": paragraphs(about["layers"], layer_table(found)),
        "Cost": paragraphs(
            about["cost"], cost_table(costs, ("discriminator", "an update of both networks", "of plain"))
        ),
    } | requirement("every norm and stable rank of the exact constraints within 1% of what was asked", wrong)
    write(output, "Stable rank normalization of a discriminator", sections)
    return wrong
