"""Does steepest descent under the layers' own norms train better, for each step and for each second?

    python examples/compare_optimizers.py                    # every optimizer, three seeds: hours on two cores
    python examples/compare_optimizers.py --small            # 128 steps each, half an hour on two cores
    python examples/compare_optimizers.py --fast             # a minute or two, synthetic images, no download

Runs examples/train_cifar10.py --method plain for every optimizer and seed, one after the other, and writes report.md
and curves.png to the folder of --output: accuracies against steps and seconds, norms and stable ranks of the weights.
A run that is there already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import _optimizers
import matplotlib
import numpy as np
from _report import paragraphs, save, table, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCRIPT = Path(__file__).with_name("train_cifar10.py")
# Checkpoints are for the ends of epochs alone.
SIZES = {
    "full": {"save-every": 100000},
    "small": {"save-every": 100000, "blocks": 1, "epochs": 4, "images": 2048, "batch": 64},
    "fast": {"save-every": 100000, "images": 64},
}
FLAGS = {"full": [], "small": ["--widths", "8", "16", "32"], "fast": ["--fast", "--stand-in"]}


def run(name: str, seed: int, size: str, folder: Path) -> tuple[dict, list[float]]:
    """The curve of one run, and the seconds of its epochs."""
    output = folder / f"{name}-{seed}"
    if not (output / "seconds.json").exists():
        command = [sys.executable, SCRIPT, "--method", "plain", "--optimizer", name, "--seed", str(seed)]
        # All runs measure the same layers: compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        options = [f"--{option}={value}" for option, value in SIZES[size].items()]
        subprocess.run([*command, *options, *FLAGS[size], "--output", output], check=True, env=os.environ | cache)
    return tuple(json.loads((output / file).read_text()) for file in ("curve.json", "seconds.json"))


def per_step(curve: dict, seconds: list[float]) -> float:
    """Seconds of a step, without the first epoch, which compiles."""
    later = seconds[1:] or seconds
    return float(np.mean(later)) / (len(curve["loss"]) / len(curve["epochs"]))


def layers_at(curve: dict, epoch: int) -> tuple[float, float]:
    """The medians of the layers' norms and stable ranks."""
    return tuple(np.median(list(curve["epochs"][epoch]["layers"].values()), axis=0))


def accuracy_table(runs: dict) -> str:
    rows = []
    for name, some in runs.items():
        test, train = ([c["epochs"][-1][f"{part}_accuracy"] for c, _ in some] for part in ("test", "train"))
        loss = [np.mean(c["loss"][-50:]) for c, _ in some]
        time = np.mean([per_step(*one) for one in some])
        spread = f" ± {np.std(test):.1%}" if len(test) > 1 else ""
        rows.append(
            (
                _optimizers.ABOUT[name],
                f"{np.mean(test):.1%}{spread}",
                f"{np.mean(train):.1%}",
                f"{np.mean(loss):.3f}",
                f"{1e3 * time:.0f} ms",
            )
        )
    return table(("optimizer", "test accuracy", "train accuracy", "loss, last 50 steps", "a step"), rows)


def layer_table(runs: dict) -> str:
    rows = []
    for name, some in runs.items():
        ends = [np.mean([layers_at(c, epoch) for c, _ in some], axis=0) for epoch in (0, -1)]
        rows.append((_optimizers.ABOUT[name], *(f"{value:.2f}" for end in ends for value in end)))
    return table(
        ("optimizer", "norm, first epoch", "stable rank, first epoch", "norm, at the end", "stable rank, at the end"),
        rows,
    )


def draw(runs: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for name, some in runs.items():
        number = len(some[0][0]["epochs"])
        accuracy = np.mean([[e["test_accuracy"] for e in c["epochs"]] for c, _ in some], axis=0)
        layers = np.mean([[layers_at(c, epoch) for epoch in range(number)] for c, _ in some], axis=0)
        steps = np.arange(1, number + 1) * len(some[0][0]["loss"]) / number
        time = np.mean([per_step(*one) for one in some])
        label = _optimizers.ABOUT[name]
        for axis, x, y in zip(axes, (steps, steps * time, steps, steps), (accuracy, accuracy, *layers.T), strict=True):
            axis.plot(x, y, "o-", ms=3, label=label)
    axes[0].set(title="test accuracy", xlabel="step")
    axes[1].set(title="test accuracy", xlabel="seconds", xscale="log")
    axes[2].set(title="norm, median of the layers", xlabel="step", yscale="log")
    axes[3].set(title="stable rank, median of the layers", xlabel="step", yscale="log")
    axes[0].legend(frameon=False, fontsize=7)
    save(figure, path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", choices=_optimizers.RATES, help="default: all but descent-exact")
    parser.add_argument("--seeds", type=int, help="default: 3, with --small and --fast 1")
    parser.add_argument("--small", action="store_true", help="a small network, 4 epochs of 2048 images")
    parser.add_argument("--fast", action="store_true", help="a tiny network, synthetic images, no download")
    parser.add_argument("--output", default="optimizers", help="folder for runs and report (default: %(default)s)")
    args = parser.parse_args()
    size = "fast" if args.fast else "small" if args.small else "full"
    # The exact step takes seconds to minutes.
    names = args.optimizers or [name for name in _optimizers.RATES if name != "descent-exact"]
    names = names[:1] + names[-1:] if args.fast and not args.optimizers else names
    seeds, folder = args.seeds or (3 if size == "full" else 1), Path(args.output)
    runs = {name: [run(name, seed, size, folder) for seed in range(seeds)] for name in names}
    draw(runs, folder / "curves.png")
    sections = {
        "Accuracy": paragraphs(
            f"Means over {seeds} seed{'s' * (seeds > 1)}, {len(runs[names[0]][0][0]['loss'])} steps each. "
            "Times leave out the first epoch, which compiles, and all measuring.",
            accuracy_table(runs),
        ),
        "Weights": paragraphs("Medians of the layers; true norms and stable ranks at 32x32.", layer_table(runs)),
    }
    options = f" --{size}" * (size != "full")
    write(folder, "Optimizers on CIFAR-10", f"python examples/compare_optimizers.py{options}", sections)


if __name__ == "__main__":
    main()
