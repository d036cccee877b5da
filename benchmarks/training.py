"""What does a constraint on every layer cost in training, and what does it leave as norm and stable rank?

    python benchmarks/training.py                # everything, on 2 quiet cores; records every part
    python benchmarks/training.py --only steps   # one part of it (may be repeated)
    python benchmarks/training.py --fast         # tiny networks, a few minutes, records nothing

Peers: flax.nnx.SpectralNorm; PyTorch's spectral_norm parametrization and orthogonium's AdaptiveOrthoConv2d, each
against PyTorch's own plain step. They need

    pip install -e ".[bench,examples]" torch==2.13.0 orthogonium==0.0.4

Every variant is compiled before the clock starts; then all take one step in turn, round after round, in an order that
rotates, so that whatever else the machine does hits all of them. A ratio is the median over rounds of a variant's
time over its plain step's in the same round. Norms and stable ranks are from all singular values of the explicit
matrix in float64. The script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _clock import interleaved
from _report import publish, table
from _training_step import TrainingStep, descent, training_step
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import optim

try:
    import torch
except ImportError as error:
    raise SystemExit(f"The peers need PyTorch: pip install torch ({error})") from error

MOST_OVERHEAD = 1.15
MOST_DEVIATION = 0.01
NUM_LAYERS = 4
STEPS = 200


# Step time


def identity(layer, shape):
    return layer


def spectral(layer, shape):
    return jnnx.SpectralNorm(layer, input_shape=shape)


def stable(layer, shape, gradient="frozen"):
    """Half of the stable rank that the raw layer has."""
    image = jax.ShapeDtypeStruct((1, *(shape or ()), layer.in_features), jnp.float32)
    kernel, (op,) = layer.kernel[...], jnnx.layer_operators(layer, image).values()
    largest = min(np.prod(op.in_shape(kernel.shape)), np.prod(op.out_shape(kernel.shape)))
    fraction = 0.5 * float(jaxsrn.stable_rank(kernel, op)) / float(largest)
    return jnnx.StableRankNorm(layer, fraction, input_shape=shape, gradient=gradient)


def stable_implicit(layer, shape):
    return stable(layer, shape, "implicit")


def flattened(layer, shape):
    return nnx.SpectralNorm(layer, rngs=nnx.Rngs(0))


class Stack(nnx.Module):
    """3x3 convolutions of equal width, and a mean over the image."""

    def __init__(self, wrap, padding: str, size: int, width: int):
        rngs = nnx.Rngs(0)
        layers = [nnx.Conv(width, width, (3, 3), padding=padding, rngs=rngs) for _ in range(NUM_LAYERS)]
        self.layers = nnx.List([wrap(layer, (size, size)) for layer in layers])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x.mean(axis=(1, 2))


def jax_step(wrap, padding: str, size: int, width: int, batch: int, transformation=descent) -> TrainingStep:
    """One step of training the stack, compiled."""
    x = jax.random.normal(jax.random.key(0), (batch, size, size, width))
    return training_step(Stack(wrap, padding, size, width), x, transformation)


def torch_step(make: Callable, size: int, width: int, batch: int):
    """The same in PyTorch."""
    layers = [part for _ in range(NUM_LAYERS) for part in (make(width), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(batch, width, size, size)

    def run():
        optimizer.zero_grad()
        model(x).mean(dim=(2, 3)).square().mean().backward()
        optimizer.step()

    return run, None


def torch_conv(width: int, **options):
    return torch.nn.Conv2d(width, width, 3, padding="same", **options)


def torch_variants():
    """`{name: (plain's name, maker)}`."""
    variants = {
        "PyTorch, plain, SAME": ("PyTorch, plain, SAME", torch_conv),
        "PyTorch, spectral_norm parametrization, SAME": (
            "PyTorch, plain, SAME",
            lambda width: torch.nn.utils.parametrizations.spectral_norm(torch_conv(width)),
        ),
    }
    try:
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
    except ImportError as error:
        tqdm.write(f"orthogonium is left out: {error} (pip install orthogonium)")
        return variants
    plain = "PyTorch, plain, circular"
    circular = {"padding_mode": "circular"}
    return variants | {
        plain: (plain, lambda width: torch_conv(width, **circular)),
        "PyTorch, orthogonium AdaptiveOrthoConv2d, circular": (
            plain,
            lambda width: AdaptiveOrthoConv2d(width, width, 3, padding="same", **circular),
        ),
    }


JAX_VARIANTS = {
    "plain, SAME": (identity, "SAME"),
    "flax.nnx.SpectralNorm, SAME": (flattened, "SAME"),
    "jaxsrn SpectralNorm, SAME": (spectral, "SAME"),
    "jaxsrn StableRankNorm, SAME": (stable, "SAME"),
    "plain, circular": (identity, "CIRCULAR"),
    "jaxsrn SpectralNorm, circular": (spectral, "CIRCULAR"),
    "jaxsrn StableRankNorm, circular": (stable, "CIRCULAR"),
}
IMPLICIT_VARIANTS = {
    "plain, SAME": (identity, "SAME"),
    "StableRankNorm, implicit gradient, SAME": (stable_implicit, "SAME"),
    "plain, circular": (identity, "CIRCULAR"),
    "StableRankNorm, implicit gradient, circular": (stable_implicit, "CIRCULAR"),
}


def timed(variants, peers, size: int, width: int, batch: int, rounds: int):
    """The table, and the median ratios to the plain steps."""
    plains, runs, flops = {}, {}, {}
    for name, (wrap, padding) in tqdm(variants.items(), desc="compiling"):
        runs[name], flops[name] = jax_step(wrap, padding, size, width, batch)
        plains[name] = "plain, SAME" if padding == "SAME" else "plain, circular"
    for name, (plain, make) in peers.items():
        runs[name], flops[name] = torch_step(make, size, width, batch)
        plains[name] = plain
    times = interleaved(runs, rounds)
    ratios = {name: float(np.median(times[name] / times[plains[name]])) for name in runs}
    rows = [
        (
            name,
            f"{1e3 * np.median(times[name]):.0f}",
            f"{ratios[name]:.3f}",
            f"{flops[name] / flops[plains[name]]:.4f}" if flops[name] else "",
        )
        for name in runs
    ]
    head = (
        f"{NUM_LAYERS} convolutions of 3x3 taps, batch {batch}, {size}x{size}x{width}, SGD, float32; {rounds} rounds.\n"
    )
    return head, table(("step", "ms", "time", "FLOPs"), rows), ratios


def step_times(*size_width_batch_rounds):
    head, rows, ratios = timed(JAX_VARIANTS, torch_variants(), *size_width_batch_rounds)
    text = (
        f"{head}`time` and `FLOPs`: as multiples of the plain step of the same framework and padding (time: the\n"
        f"median over rounds of the ratio within a round; FLOPs: XLA's cost analysis).\n\n{rows}"
    )
    checks = [
        (ratios[name] <= MOST_OVERHEAD, f"{name}: {ratios[name]:.3f} times the plain step, at most {MOST_OVERHEAD}")
        for name in ("jaxsrn StableRankNorm, SAME", "jaxsrn StableRankNorm, circular")
    ]
    return [("Step time", text)], checks


def implicit_times(*size_width_batch_rounds):
    head, rows, _ = timed(IMPLICIT_VARIANTS, {}, *size_width_batch_rounds)
    text = f"{head}XLA counts the body of a loop once: these FLOPs are those of one iteration of GMRES.\n\n{rows}"
    return [("Step time with the true gradient", text)], []


# What is left after training


def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels


class Digits(nnx.Module):
    """Three convolutions and a dense layer on 8x8 images."""

    def __init__(self, wrap=identity, width: int = 16):
        rngs = nnx.Rngs(0)
        self.conv1 = wrap(nnx.Conv(1, width, (3, 3), padding="CIRCULAR", rngs=rngs), (8, 8))
        self.conv2 = wrap(nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs), (8, 8))
        self.conv3 = wrap(nnx.Conv(width, width, (3, 3), rngs=rngs), (4, 4))
        self.dense = wrap(nnx.Linear(16 * width, 10, rngs=rngs), None)

    def __call__(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(layer(x))
        return self.dense(x.reshape(len(x), -1))


def measured(layer, in_shape) -> tuple[float, float]:
    """Norm and stable rank of a layer as it computes, from the outputs at every basis image."""
    basis = jnp.eye(int(np.prod(in_shape))).reshape((-1, *in_shape))
    outputs = np.asarray(layer(basis) - layer(jnp.zeros((1, *in_shape))), np.float64)
    values = np.linalg.svd(outputs.reshape(len(basis), -1), compute_uv=False)
    return values[0], np.sum(values**2) / values[0] ** 2


@nnx.jit
def digits_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train_digits(wrap, width: int):
    """The network after `STEPS` steps, in eval mode, and its loss and accuracy on all images."""
    images, labels = digits()
    model, rng = Digits(wrap, width), np.random.default_rng(0)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    for _ in range(STEPS):
        batch = rng.choice(len(images), 64, replace=False)
        digits_step(model, optimizer, images[batch], labels[batch])
    model.eval()
    logits = model(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return model, float(loss), float(np.mean(np.argmax(logits, axis=-1) == labels))


def what_is_left(width: int):
    shapes = {"conv1": (8, 8, 1), "conv2": (8, 8, width), "conv3": (4, 4, width), "dense": (16 * width,)}
    plain = Digits(width=width)
    targets = {name: 0.5 * measured(getattr(plain, name), shape)[1] for name, shape in shapes.items()}
    variants = {
        "plain": identity,
        "flax.nnx.SpectralNorm": flattened,
        "jaxsrn SpectralNorm": spectral,
        "jaxsrn StableRankNorm": stable,
        "the same, implicit gradient": stable_implicit,
    }
    rows, trained, worst = [], [], {}
    for variant, wrap in tqdm(variants.items(), desc="training"):
        model, loss, accuracy = train_digits(wrap, width)
        trained.append((variant, f"{loss:.4f}", f"{accuracy:.1%}"))
        for name, shape in shapes.items():
            norm, rank = measured(getattr(model, name), shape)
            layer, row = getattr(model, name), (f"{variant}, {name}", f"{norm:.4f}", f"{rank:.3f}")
            deviations = [abs(norm - 1)]
            if isinstance(layer, jnnx.StableRankNorm):
                own = measured(layer.layer, shape)[1]
                row += f"{targets[name]:.3f}", f"{own:.3f}"
                # Where the raw kernel is below its target, that one meets the constraint, and so does the target.
                deviations.append(abs(rank / np.clip(rank, min(targets[name], own), targets[name]) - 1))
            rows.append(row + ("", "") * (len(row) == 3))
            worst[variant] = max(worst.get(variant, 0.0), *deviations)
    text = (
        f"A CNN on the digits after {STEPS} steps of Adam, norm 1 asked for, and where there is a target, half of the\n"
        "stable rank that the raw layer started with; a raw kernel that training itself brings below that (`own`) is\n"
        "left there, or still normalized to the target. From the explicit matrix of each layer in eval mode.\n\n"
        + table(("layer", "norm", "stable rank", "target", "own"), rows)
        + "\n\nThe effect on training, over all 1,797 images:\n\n"
        + table(("network", "loss", "accuracy"), trained)
    )
    checks = [
        (worst[name] <= MOST_DEVIATION, f"{name}: norm and stable rank within {worst[name]:.2%}, at most 1%")
        for name in list(variants)[2:]
    ]
    return [("What is left after 200 steps", text)], checks


# Kernels projected after the optimizer's step

EVERY = 100
# Below what the layers start with, so that there is something to project.
KEPT_NORM, KEPT_FRACTION = 1.0, 0.15
KEEPERS = {
    "keep_spectral_norm": lambda layers, every: optim.keep_spectral_norm(layers, KEPT_NORM, every=every),
    "keep_stable_rank": lambda layers, every: optim.keep_stable_rank(layers, KEPT_FRACTION, every=every),
}


def adam(keeper=None, every: int = 1):
    """Adam, and a projection after it: what `jax_step` takes."""

    def transformation(model, x):
        steps = optax.adam(1e-3)
        return optax.chain(steps, keeper(jnnx.layer_operators(model, x), every)) if keeper else steps

    return transformation


def keeping_times(padding: str, size: int, width: int, batch: int, rounds: int):
    """Rows of step times: the plain step, and with a projection in every step and in one of `EVERY`."""
    transformations = {"plain": adam()}
    for name, keeper in KEEPERS.items():
        transformations[name] = adam(keeper)
        # In fewer rounds than that none of its steps projects: what the others cost.
        transformations[f"{name}, between"] = adam(keeper, max(EVERY, 2 * rounds + 5))
    shape = padding, size, width, batch
    runs = {name: jax_step(identity, *shape, t)[0] for name, t in tqdm(transformations.items(), desc="compiling")}
    times = interleaved(runs, rounds)
    ratios = {name: float(np.median(times[name] / times["plain"])) for name in runs}
    rows = [(f"plain, {padding}", "", f"{1e3 * np.median(times['plain']):.1f}", "1.000")]
    for name in KEEPERS:
        each, between = ratios[name], ratios[f"{name}, between"]
        rare = ((EVERY - 1) * between + each) / EVERY
        rows += [
            (f"{name}, {padding}", "1", f"{1e3 * np.median(times[name]):.1f}", f"{each:.3f}"),
            (f"{name}, {padding}", EVERY, "", f"{rare:.3f}"),
        ]
    return rows


def drift(name: str, width: int):
    """`(layer, right after a projection, the most in the steps to the next)`, relative to what is kept."""
    images, labels = digits()
    model, rng = Digits(width=width), np.random.default_rng(0)
    layers = jnnx.layer_operators(model, images[:1])
    optimizer = nnx.Optimizer(model, adam(KEEPERS[name], EVERY)(model, images[:1]), wrt=nnx.Param)
    found = {path: [] for path in layers}
    for i in tqdm(range(1, 2 * EVERY), desc=name):
        batch = rng.choice(len(images), 64, replace=False)
        digits_step(model, optimizer, images[batch], labels[batch])
        if i >= EVERY:
            for path, op in layers.items():
                layer = getattr(model, path[0])
                shape = op.in_shape(layer.kernel.shape)
                norm, rank = measured(layer, shape)
                largest = min(np.prod(shape), np.prod(op.out_shape(layer.kernel.shape)))
                excess = norm / KEPT_NORM if name == "keep_spectral_norm" else rank / (KEPT_FRACTION * largest)
                found[path].append(excess - 1)
    return [(f"{name}, {path[0]}", f"{values[0]:.1e}", f"{max(values):.1%}") for path, values in found.items()]


def keeping(width: int, *stacks):
    """`stacks`: of `keeping_times`."""
    rows = [row for stack in stacks for row in keeping_times(*stack)]
    drifts = [row for name in KEEPERS for row in drift(name, width)]
    sizes = "; ".join(f"{padding}: {n}x{n}x{c}, batch {batch}" for padding, n, c, batch, _ in stacks)
    text = (
        f"{NUM_LAYERS} convolutions of 3x3 taps, Adam, float32, kept at norm {KEPT_NORM:g} or at\n"
        f"{KEPT_FRACTION:.0%} of the largest stable rank. {sizes}. `time` is a multiple of the plain step\n"
        f"(medians over rounds of the ratio within a round). A step in {EVERY}: the mean of {EVERY - 1}\n"
        f"steps without a projection, as measured, and one with.\n\n"
        f"{table(('step', 'every', 'ms', 'time'), rows)}\n\n"
        f"The CNN on the digits, Adam at 1e-3, a projection every {EVERY} steps: how far above what is kept each\n"
        f"layer is, right after the first projection and at most in the {EVERY - 1} steps from there (below 0:\n"
        f"never reached).\n\n" + table(("layer", "at once", "drift"), drifts)
    )
    return [("Kernels projected after the optimizer's step", text)], []


# A recurrence


def recurrence(size: int, width: int, length: int):
    """A wrapped convolution inside nnx.scan, and a folded one in lax.scan."""
    layer = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    wrapped = jnnx.SpectralNorm(layer, input_shape=(size, size))
    wrapped.eval()
    graphdef, state = nnx.split(wrapped)
    x = jax.random.normal(jax.random.key(0), (1, size, size, width))

    @jax.jit
    def live(state, x):
        @nnx.scan(in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=length)
        def body(x, model):
            return jnp.tanh(model(x) + 1)

        return body(x, nnx.merge(graphdef, state))

    @jax.jit
    def folded(state, x):
        plain = jnnx.fold(nnx.merge(graphdef, state))
        return jax.lax.scan(lambda x, _: (jnp.tanh(plain(x) + 1), None), x, length=length)[0]

    programs = {name: f.lower(state, x).compile() for name, f in (("live", live), ("folded", folded))}
    runs = {name: lambda f=f: jax.block_until_ready(f(state, x)) for name, f in programs.items()}
    difference = float(jnp.max(jnp.abs(runs["live"]() - runs["folded"]())))
    times = interleaved(runs, 5)
    memory = {name: f.memory_analysis().temp_size_in_bytes / 2**20 for name, f in programs.items()}
    rows = [
        (name, f"{1e3 * np.median(times[key]):.1f}", f"{memory[key]:.2f}")
        for name, key in (("wrapped, nnx.scan", "live"), ("folded, lax.scan", "folded"))
    ]
    text = (
        f"{length} steps of one 3x3 convolution, {size}x{size}x{width}, batch 1. Largest difference of the results:\n"
        f"{difference:.1e}.\n\n" + table(("recurrence", "ms", "temporary MiB"), rows)
    )
    return [("A recurrence", text)], [(difference <= 1e-4, f"wrapped and folded recurrences agree to {difference:.1e}")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny networks; records nothing")
    parser.add_argument("--only", action="append", choices=("steps", "implicit", "left", "keeping", "recurrence"))
    parser.add_argument("--rounds", type=int, default=21, help="of the step times (default: %(default)s)")
    args = parser.parse_args()
    stack = (8, 8, 4, 3) if args.fast else (32, 64, 32, args.rounds)
    kept = ("CIRCULAR", 16, 16, 32, args.rounds), ("SAME", 8, 4, 32, args.rounds)
    if args.fast:
        kept = ("CIRCULAR", 8, 4, 3, 2), ("SAME", 4, 4, 3, 2)
    parts = {
        "steps": lambda: step_times(*stack),
        "implicit": lambda: implicit_times(*stack),
        "left": lambda: what_is_left(4 if args.fast else 16),
        "keeping": lambda: keeping(4 if args.fast else 16, *kept),
        "recurrence": lambda: recurrence(*(8, 4, 50) if args.fast else (32, 16, 1000)),
    }
    all_met = True
    for name in args.only or parts:
        sections, checks = parts[name]()
        title = f"Training under a constraint: {name}"
        all_met &= publish(f"training_{name}", title, sections, checks, not args.fast, name)
    sys.exit(0 if all_met or args.fast else 1)


if __name__ == "__main__":
    main()
