"""Train a small CNN on the digits, look at the true spectra of its layers, and halve their stable ranks.

The stable rank of a layer, `||T||_F^2 / ||T||_2^2`, is that of the whole linear map `T`, padding and strides included,
and not that of the kernel flattened into a matrix. `jaxsrn.srnc` finds the closest kernel with a prescribed one.

    pip install "jaxsrn[examples]"
    python examples/quickstart.py            # under a minute, most of it compilation; writes quickstart.png
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

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64
ADAM = optax.adam(1e-3)
# From Okabe and Ito's palette, safe for colour-blind readers.
BEFORE, AFTER, MISSED = "#000000", "#0072B2", "#D55E00"


class CNN(nnx.Module):
    """Three convolutions and a dense layer on 8x8 images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(32, 32, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.dense(x.reshape(len(x), -1))


# Which linear map each layer of `CNN` is: the arguments of the layer, and the size of the image that reaches it.
OPERATORS = {
    "conv1": jaxsrn.CircularConv((8, 8)),
    "conv2": jaxsrn.ZeroPaddedConv((8, 8), strides=2),
    "conv3": jaxsrn.CircularConv((4, 4)),
    "dense": jaxsrn.Dense(),
}


def kernels(model):
    return {name: getattr(model, name).kernel[...] for name in OPERATORS}


def check_operators(model):
    """Each operator is its layer: the same output on random numbers, but for the bias."""
    for name, op in OPERATORS.items():
        layer = getattr(model, name)
        x = np.random.default_rng(0).normal(size=(1, *op.in_shape(layer.kernel.shape))).astype(np.float32)
        np.testing.assert_allclose(op.apply(layer.kernel[...], x) + layer.bias[...], layer(x), atol=1e-4)


def choose_targets(model, share):
    """`share` of every stable rank, moved up to just above the least possible where it would fall below."""
    targets = {}
    for name, kernel in kernels(model).items():
        wanted = share * float(jaxsrn.stable_rank(kernel, OPERATORS[name]))
        low, _ = jaxsrn.stable_rank_range(kernel.shape, OPERATORS[name])
        targets[name] = max(wanted, 1.05 * low)
        if targets[name] > wanted:
            print(f"\n{name}: {wanted:.2f} is too close to the least possible, {low:.2f}: {targets[name]:.2f} instead.")
    return targets


def normalize(model, targets):
    """Replaces every kernel by the closest with the target stable rank and the same norm, and returns the results."""
    results = {name: jaxsrn.srnc(kernel, OPERATORS[name], targets[name]) for name, kernel in kernels(model).items()}
    for name, result in results.items():
        getattr(model, name).kernel[...] = result.kernel
    return results


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train(model, x, y, *, epochs, rng, targets=None):
    """Adam; with `targets` projected: steps leave the constraint, and after each epoch `normalize` leads back to it."""
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    results = None
    for _ in (bar := tqdm(range(epochs), desc="fine-tuning" if targets else "training", unit="epoch")):
        # The last, smaller batch is left out, so that one compilation serves all.
        batches = rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        loss = np.mean([train_step(model, optimizer, x[batch], y[batch]) for batch in batches])
        if targets:
            results = normalize(model, targets)
        bar.set_postfix(loss=f"{loss:.4f}")
    return results


@nnx.jit
def accuracy(model, x, y):
    return jnp.mean(model(x).argmax(-1) == y)


def print_table(title, *lines):
    lines = [tuple(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_layers(model):
    table = [("layer", "kernel", "operator", "norm", "flattened", "stable rank", "feasible range")]
    for name, kernel in kernels(model).items():
        op = OPERATORS[name]
        flattened = jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
        numbers = jaxsrn.spectral_norm(kernel, op), flattened, jaxsrn.stable_rank(kernel, op)
        low, high = jaxsrn.stable_rank_range(kernel.shape, op)
        shape = "x".join(map(str, kernel.shape))
        table.append((name, shape, str(op), *(f"{number:.4f}" for number in numbers), f"{low:.2f} to {high:.0f}"))
    print_table("The trained layers ('flattened': the kernel's norm as a matrix, which nnx.SpectralNorm sees)", *table)


def print_results(title, trained, results, targets):
    table = [("layer", "target", "achieved", "norm trained", "now", "distance", "gap", "residual", "feasible")]
    for name, result in results.items():
        # Measured on the new kernel by itself, not taken from the result.
        rank = jaxsrn.stable_rank(result.kernel, OPERATORS[name])
        norms = [jaxsrn.spectral_norm(kernel, OPERATORS[name]) for kernel in (trained[name], result.kernel)]
        numbers = [f"{number:.4f}" for number in (targets[name], rank, *norms, result.distance, result.gap)]
        table.append((name, *numbers, f"{result.residual:.1e}", str(result.feasible)))
    print_table(title, *table)


def draw(trained, normalized, path):
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    mosaic = [["conv1", "conv2", "paper"], ["conv3", "dense", "paper"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(14, 6.5), layout="constrained", width_ratios=[1, 1, 1.5])
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for name, op in OPERATORS.items():
        cases = (trained[name], "trained", BEFORE), (normalized[name], "normalized with srnc", AFTER)
        for kernel, label, color in cases:
            values = jaxsrn.singular_values(kernel, op)
            # A dot on the leading value, which stays; where there are few, on each.
            marks = [0] if len(values) > 10 else None
            axes[name].plot(np.arange(len(values)) + 1, values, color=color, label=label, marker="o", markevery=marks)
        ranks = [f"{jaxsrn.stable_rank(kernel, op):.1f}" for kernel, *_ in cases]
        axes[name].set_title(f"{name}: {op}\nstable rank {' → '.join(ranks)}")
        axes[name].set(xlabel="index", ylabel="singular value", ylim=(0, None))
    axes["conv1"].legend(frameon=False, loc="lower left")
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
    parser.add_argument("--share", type=float, default=0.5, help="of each stable rank to keep (default: %(default)s)")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, random_state=0, stratify=labels)
    epochs, tuning_epochs = (5, 2) if args.fast else (30, 5)
    model, rng, scores = CNN(nnx.Rngs(args.seed)), np.random.default_rng(args.seed), {}
    check_operators(model)

    train(model, x_train, y_train, epochs=epochs, rng=rng)
    trained, scores["trained"] = kernels(model), accuracy(model, x_test, y_test)
    print_layers(model)

    targets = choose_targets(model, args.share)
    results = normalize(model, targets)
    normalized, scores["normalized"] = kernels(model), accuracy(model, x_test, y_test)
    print_results(f"Normalized to {args.share:.0%} of each stable rank", trained, results, targets)

    results = train(model, x_train, y_train, epochs=tuning_epochs, rng=rng, targets=targets)
    scores["fine-tuned"] = accuracy(model, x_test, y_test)
    print_results("Fine-tuned (distance, gap, residual: of the last normalization)", trained, results, targets)
    print(
        f"Fine-tuning: {tuning_epochs} epochs over all parameters. After each, also the last, every kernel was "
        "normalized again to the\nsame target, with the norm it had then. A layer that training itself has brought "
        "below its target stays as it is;\nits residual says how far below."
    )

    print_table(f"Test accuracy, {len(y_test)} images", scores, [f"{score:.1%}" for score in scores.values()])
    draw(trained, normalized, args.figure)
    print(f"\nThe spectra, and a case where the original SRN-C misses norm and stable rank, are in {args.figure}.")


if __name__ == "__main__":
    main()
