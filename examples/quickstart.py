"""Why constrain layers? Train on digits of which 30% have a label drawn at random, plainly and constrained.

A network that is trained plainly learns the random labels by heart, and is worse on new images for it. The same network
with norm and stable rank of every layer held, by one line of `jaxsrn.nnx`, learns the digits and not the noise.

    pip install -e ".[examples]"
    python examples/quickstart.py              # about a minute, most of it compilation; writes quickstart.png
    python examples/quickstart.py --seeds 3    # three times: other weights, batches and random labels
    python examples/quickstart.py --fast       # two epochs, to see that it runs

The picture of the README is `python examples/quickstart.py --figure docs/images/quickstart.png`.
"""

import argparse
from typing import NamedTuple

import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsrn.nnx as jnnx
from jaxsrn import plots
from jaxsrn.report import Report, analyze

BATCH, RATE = 64, 3e-3


class CNN(nnx.Module):
    """Three convolutions and a dense layer on 8x8 images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.dense(x.reshape(len(x), -1))


def constrained(model: CNN, norm: float, fraction: float) -> CNN:
    """The model with this norm, and at most this share of the largest stable rank, in every layer."""
    return jnnx.constrain(model, lambda path, layer: jnnx.StableRankNorm(layer, fraction, norm=norm))


class Data(NamedTuple):
    """Digits, images `(number, 8, 8, 1)`; `noisy` are the labels to train on."""

    x_train: np.ndarray
    y_train: np.ndarray
    noisy: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(seed: int, share: float) -> Data:
    """This share of the labels to train on is drawn at random; one in ten of them happens to be right."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, random_state=0, stratify=labels)
    rng = np.random.default_rng(seed)
    noisy = np.where(rng.random(len(y_train)) < share, rng.integers(10, size=len(y_train)), y_train)
    return Data(x_train, y_train, noisy, x_test, y_test)


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


@nnx.jit
def predicted(model, x):
    return model(x).argmax(-1)


# The plain network with the constrained weights: to look at it changes nothing. Compiled, since run operation by
# operation it would also compile the next state, which nobody reads here.
folded = nnx.jit(jnnx.fold)


class Scores(NamedTuple):
    """Accuracies: on the labels that were trained on, on the true ones of the same images, and on new images."""

    noisy: float
    true: float
    test: float


def scores(model: CNN, data: Data) -> Scores:
    answers = predicted(folded(model), np.concatenate([data.x_train, data.x_test]))
    seen, new = np.split(np.asarray(answers), [len(data.x_train)])
    return Scores(np.mean(seen == data.noisy), np.mean(seen == data.y_train), np.mean(new == data.y_test))


def train(model: CNN, data: Data, epochs: int, seed: int, name: str) -> list[Scores]:
    """Trains the model in place; the scores after each epoch."""
    optimizer, rng = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param), np.random.default_rng(seed)
    history = []
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        # The last, smaller batch is left out, so that one compilation serves all.
        batches = rng.permutation(len(data.noisy))[: len(data.noisy) // BATCH * BATCH].reshape(-1, BATCH)
        for batch in batches:
            train_step(model, optimizer, data.x_train[batch], data.noisy[batch])
        history.append(scores(model, data))
    return history


def print_table(title: str, *rows: tuple) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_layers(found: dict[str, Report]) -> None:
    rows = [("layer", "network", "norm", "stable rank", "feasible", "share")]
    for versions in zip(*(report.layers for report in found.values()), strict=True):
        for name, layer in zip(found, versions, strict=True):
            feasible = f"{layer.stable_rank_low:.3f} to {layer.stable_rank_high:g}"
            numbers = f"{layer.spectral_norm:.3f}", f"{layer.stable_rank:.3f}", feasible, f"{layer.share:.0%}"
            rows.append((layer.name, name, *numbers))
    print_table("The layers ('share': where the stable rank lies in its feasible range)", *rows)


def print_scores(ends: list[dict[str, Scores]], share: float) -> None:
    rows = [("seed", "network", "labels trained on", "their true labels", "test")]
    for seed, end in enumerate(ends):
        rows += [(str(seed), name, *(f"{score:.1%}" for score in scores)) for name, scores in end.items()]
    print_table(f"Accuracies (labels trained on: {share:.0%} of them are random)", *rows)


def draw(histories: dict[str, list[Scores]], found: dict[str, Report], path: str) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.stable_ranks(found, ax=right)
    right.set_title("The layers after training")
    # The same colours for the same networks.
    for (name, history), marks in zip(histories.items(), right.lines, strict=True):
        epochs, color = np.arange(1, len(history) + 1), marks.get_color()
        left.plot(epochs, [scores.test for scores in history], "-", color=color, label=f"{name}: test")
        left.plot(epochs, [scores.noisy for scores in history], "--", color=color, label=f"{name}: labels trained on")
    left.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02), title="Some of the labels trained on are random")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=100)


def run(seed: int, args) -> tuple[dict[str, list[Scores]], dict[str, CNN]]:
    """The scores over the epochs, and the trained models, of one seed."""
    data, epochs = digits(seed, args.random), 2 if args.fast else args.epochs
    models = {"plain": CNN(nnx.Rngs(seed))}
    models["constrained"] = constrained(CNN(nnx.Rngs(seed)), args.norm, args.fraction)
    return {name: train(model, data, epochs, seed, name) for name, model in models.items()}, models


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="two epochs only")
    parser.add_argument("--seeds", type=int, default=1, help="how many networks of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--random", type=float, default=0.3, help="share of random labels (default: %(default)s)")
    parser.add_argument("--norm", type=float, default=3.0, help="spectral norm of every layer (default: %(default)s)")
    parser.add_argument("--fraction", type=float, default=0.15, help="of the largest stable rank (%(default)s)")
    parser.add_argument("--figure", default="quickstart.png", help="where to save the figure (default: %(default)s)")
    args = parser.parse_args()

    runs = [run(seed, args) for seed in range(args.seeds)]
    histories, models = runs[0]
    found = {name: analyze(model) for name, model in models.items()}
    print_layers(found)
    print(
        f"Asked for: norm {args.norm:g} and a stable rank of at most {args.fraction:.0%} of the largest. As no image "
        "size was named,\nthe norm holds at every size, and the stable rank is that per output sample."
    )
    print_scores([{name: history[-1] for name, history in histories.items()} for histories, _ in runs], args.random)
    print(f"\nThe accuracies over the epochs, and the stable ranks, are in {args.figure}.")
    draw(histories, found, args.figure)


if __name__ == "__main__":
    main()
