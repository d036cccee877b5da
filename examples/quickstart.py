"""Train a small CNN on the digits twice, plainly and with every layer's norm and stable rank constrained.

The stable rank of a layer, `||T||_F^2 / ||T||_2^2`, is that of the whole linear map `T`, padding and strides included,
and not that of the kernel flattened into a matrix. `jaxsrn.nnx.StableRankNorm` wraps a Flax layer and holds both while
it trains.

    pip install "jaxsrn[examples]"
    python examples/quickstart.py            # a minute or two, most of it compilation; writes quickstart.png
    python examples/quickstart.py --fast     # fewer epochs
"""

import argparse

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsrn
import jaxsrn.nnx as jnnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64
# From Okabe and Ito's palette, safe for colour-blind readers.
BEFORE, AFTER, MISSED = "#000000", "#0072B2", "#D55E00"


class CNN(nnx.Module):
    """Three convolutions and a dense layer on 8x8 images; `wrap(layer, input_shape)` may constrain each of them."""

    def __init__(self, rngs: nnx.Rngs, wrap=lambda layer, input_shape: layer):
        self.conv1 = wrap(nnx.Conv(1, 16, (3, 3), padding="CIRCULAR", rngs=rngs), (8, 8))
        self.conv2 = wrap(nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs), (8, 8))
        self.conv3 = wrap(nnx.Conv(32, 32, (3, 3), padding="CIRCULAR", rngs=rngs), (4, 4))
        self.dense = wrap(nnx.Linear(4 * 4 * 32, 10, rngs=rngs), None)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.dense(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train(model, x, y, *, epochs, seed, name):
    optimizer, rng = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param), np.random.default_rng(seed)
    for _ in (bar := tqdm(range(epochs), desc=name, unit="epoch")):
        # The last, smaller batch is left out, so that one compilation serves all.
        batches = rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        loss = np.mean([train_step(model, optimizer, x[batch], y[batch]) for batch in batches])
        bar.set_postfix(loss=f"{loss:.4f}")
    # From here on forwards only read: all see the same weights.
    model.eval()


@nnx.jit
def score(model, x, y):
    """Accuracy and loss."""
    logits = model(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return jnp.mean(logits.argmax(-1) == y), loss


def print_table(title, *lines):
    lines = [tuple(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def kernels(model, operators):
    """The kernels that a model computes with: those of its plain form."""
    folded = dict(nnx.to_flat_state(nnx.state(jnnx.fold(model))))
    return {path[0]: folded[path][...] for path in operators}


def print_layers(models, operators):
    table = [
        ("layer", "operator", *(f"{what}, {name}" for what in ("norm", "stable rank") for name in models), "range")
    ]
    found = {name: kernels(model, operators) for name, model in models.items()}
    for (layer, _), op in operators.items():
        versions = [found[name][layer] for name in models]
        norms = [f"{jaxsrn.spectral_norm(kernel, op):.4f}" for kernel in versions]
        ranks = [f"{jaxsrn.stable_rank(kernel, op):.4f}" for kernel in versions]
        low, high = jaxsrn.stable_rank_range(versions[0].shape, op)
        table.append((layer, str(op), *norms, *ranks, f"{low:.2f} to {high:.0f}"))
    print_table("The layers as they compute ('range': the stable ranks that their kernels can have)", *table)


def print_scores(models, train_set, test_set):
    table = [("", "accuracy, train", "accuracy, test", "gap", "loss, train", "loss, test", "gap")]
    for name, model in models.items():
        (seen, seen_loss), (new, new_loss) = score(model, *train_set), score(model, *test_set)
        numbers = f"{seen:.1%}", f"{new:.1%}", f"{seen - new:.1%}", f"{seen_loss:.3f}", f"{new_loss:.3f}"
        table.append((name, *numbers, f"{new_loss - seen_loss:.3f}"))
    print_table(f"Train and test, {len(train_set[1])} and {len(test_set[1])} images", *table)


def draw(models, operators, path):
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    mosaic = [["conv1", "conv2", "paper"], ["conv3", "dense", "paper"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(14, 6.5), layout="constrained", width_ratios=[1, 1, 1.5])
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for (name, model), color in zip(models.items(), (BEFORE, AFTER), strict=True):
        for layer, kernel in kernels(model, operators).items():
            values = jaxsrn.singular_values(kernel, operators[layer, "kernel"])
            # Of the largest, as norms differ; a dot on the leading value, and where there are few, on each.
            marks = [0] if len(values) > 10 else None
            label = f"{name}: stable rank {jaxsrn.stable_rank(kernel, operators[layer, 'kernel']):.1f}"
            ax = axes[layer]
            ax.plot(
                np.arange(len(values)) + 1, values / values[0], color=color, label=label, marker="o", markevery=marks
            )
    for layer, _ in operators:
        axes[layer].set_title(f"{layer}: {operators[layer, 'kernel']}")
        axes[layer].set(xlabel="index", ylabel="singular value / norm", ylim=(0, None))
        axes[layer].legend(frameon=False, loc="upper right")
    draw_paper_case(axes["paper"])
    figure.savefig(path, dpi=150)


def draw_paper_case(ax):
    """The identity on 64 samples, lowered to stable rank 24 within three taps (Zheng et al. 2025)."""
    op, target = jaxsrn.CircularConv((64,)), 24.0
    identity = jnp.array([1.0, 0.0, 0.0]).reshape(3, 1, 1)
    frequencies = np.arange(-32, 33)
    for name, kernel, style, color, place in (
        ("identity", identity, "-", BEFORE, (-32, 1.06)),
        ("srnc_tanay", jaxsrn.srnc_tanay(identity, op, target).kernel, "--", MISSED, (9, 1.8)),
        ("srnc", jaxsrn.srnc(identity, op, target).kernel, "-", AFTER, (-9, 0.1)),
    ):
        magnitudes = np.abs(jaxsrn.symbol(kernel, op)).ravel()
        ax.plot(frequencies, magnitudes[frequencies], style, color=color, lw=2)
        ax.plot(33.5, np.sqrt(np.mean(magnitudes**2)), "<", color=color, ms=8, clip_on=False)
        taps = ", ".join(f"{tap:.3g}" for tap in kernel.ravel())
        numbers = f"norm {magnitudes.max():.3f}\nstable rank {jaxsrn.stable_rank(kernel, op):.2f}"
        ax.text(*place, f"{name}\ntaps ({taps})\n{numbers}", color=color, linespacing=1.3)
    for level, text in ((1.0, "norm\nto keep"), (np.sqrt(target / 64), "root mean\nsquare\nto reach")):
        ax.axhline(level, color="0.7", lw=1, ls=":", zorder=0)
        ax.text(35, level, text, va="center")
    ax.set_title("Taps (1, 0, 0) on 64 samples, lowered to stable rank 24\n(triangles: root mean square of each curve)")
    ax.set(xlabel="frequency", ylabel="magnitude of the symbol", xlim=(-33.5, 33.5), ylim=(0, 2.3))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few epochs only")
    parser.add_argument("--figure", default="quickstart.png", help="where to save the figure (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument("--fraction", type=float, default=0.2, help="of the largest stable rank (default: %(default)s)")
    parser.add_argument("--norm", type=float, default=3.0, help="spectral norm of every layer (default: %(default)s)")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, random_state=0, stratify=labels)

    def constrained(layer, input_shape):
        return jnnx.StableRankNorm(layer, args.fraction, input_shape=input_shape, norm=args.norm, rngs=rngs)

    models, rngs = {"plain": CNN(nnx.Rngs(args.seed))}, nnx.Rngs(args.seed)
    models["constrained"] = CNN(rngs, constrained)
    for name, model in models.items():
        train(model, x_train, y_train, epochs=3 if args.fast else 30, seed=args.seed, name=name)

    # Which linear map each layer is, traced on one image.
    operators = jnnx.layer_operators(models["plain"], images[:1])
    print_layers(models, operators)
    print(
        f"Asked for: norm {args.norm:g} and {args.fraction:.0%} of the largest stable rank. A layer whose raw kernel "
        "is below that keeps its stable rank."
    )
    print_scores(models, (x_train, y_train), (x_test, y_test))
    draw(models, operators, args.figure)
    print(f"\nThe spectra, and a case where the original SRN-C misses norm and stable rank, are in {args.figure}.")


if __name__ == "__main__":
    main()
