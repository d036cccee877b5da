"""The experiments of Sanyal, Torr, Dokania (2020) on generalization and memorisation, with two stable ranks.

Section 4.1 of "Stable Rank Normalization for Improved Generalization in Neural Networks and GANs" says that a network
whose layers have a low stable rank has a smaller generalization gap, and learns random labels less, than a plain one
and one with spectral normalization (SN). Its stable rank of a convolution is that of the kernel reshaped to a matrix.
This trains a network on CIFAR-10, with true and with random labels, and holds either that stable rank or the one of the
linear map (`jaxsrn.nnx.StableRankNorm`), each at several `c` and both at equal effect.

    pip install -e ".[examples]"
    python examples/reproduce_sanyal2020.py           # under an hour of one core; writes to sanyal2020/
    python examples/reproduce_sanyal2020.py --fast    # a stand-in for CIFAR-10, a tiny network, no download
    python examples/reproduce_sanyal2020.py --full    # the paper's DenseNet-40 on all images, for a GPU

Every run is kept in a file, and a study that was stopped goes on with the runs that are missing. Exits with code 1
where a layer misses the norm or the stable rank that was asked for by more than 1%.
"""

import functools
import json
import sys
from pathlib import Path

import _cifar10
import _sanyal_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import command_line, interleaved, prepared
from _sanyal_network import FAST, FULL, SMALL, Size, constrained, network, optimizer_of, plain_of, train, train_step
from _studies import misses_target, runs_of
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import lipschitz
from jaxsrn.report import analyze

FRACTIONS = (0.3, 0.5, 0.7, 0.9)
# The `c` of Sanyal's constraint whose stable ranks the exact one takes over.
MATCHED = 0.3
# Of the measures on data: images for losses, pairs for ratios, images for norms of Jacobians.
SCORED, PAIRS, POINTS = 1000, 500, 64


def settings_of(fast: bool) -> dict[str, dict]:
    """The settings by name: how a constraint is made, its `c`, and whose stable ranks it takes over."""
    kinds, fractions = {"plain": {}}, (MATCHED,) if fast else FRACTIONS
    for how in () if fast else ("matrix", "exact"):
        kinds[f"SN, {how}"] = {"how": how}
    for how in ("matrix", "exact"):
        kinds |= {f"SRN {c}, {how}": {"how": how, "c": c} for c in fractions}
    if not fast:
        kinds[f"SRN as {MATCHED}, exact"] = {"how": "exact", "like": f"SRN {MATCHED}, matrix"}
    return {
        f"{name}, {labels}": kind | {"labels": labels} for labels in ("true", "random") for name, kind in kinds.items()
    }


# Data


def images_of(pixels: np.ndarray, size: Size) -> np.ndarray:
    """The images averaged over squares of pixels to the network's size; 0 is grey, and the deviation about 1."""
    return ((_cifar10.averaged(pixels, size.image) / 255 - 0.47) * 4).astype(np.float32)


def data_of_seed(data, size: Size, labels: str, seed: int):
    """Images and labels to train on, other ones for each seed, and to test; random labels are true ones shuffled."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(data.x_train))[: size.num_train]
    y = data.y_train[chosen]
    test = slice(size.num_test)
    x_train, x_test = images_of(data.x_train[chosen], size), images_of(data.x_test[test], size)
    return x_train, y if labels == "true" else rng.permutation(y), x_test, data.y_test[test]


# Measuring, always on the plain network with the weights that the constrained one computes with


@functools.cache
def function_of(size: Size):
    """The network in evaluation as `f(params, x, tap)`; one function for all runs, whose programs they share."""
    graph = nnx.graphdef(plain_of(network(size, 0)))

    def f(params, x, tap=lambda h: h):
        return nnx.merge(graph, params)(x, tap)

    return f


@functools.partial(jax.jit, static_argnums=0)
def logits_of(f, params, x):
    return f(params, x)


def scores(logits, y) -> tuple[float, float]:
    """Loss and accuracy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), y)
    return float(losses.mean()), float(np.mean(np.argmax(logits, 1) == y))


def curve_point(size: Size, model, data, epoch: int) -> dict:
    """Loss and accuracy on images that were trained on and on others."""
    f, params, (x, y, x_test, y_test) = function_of(size), nnx.state(plain_of(model)), data
    found = {"epoch": epoch}
    for part, images, labels in (("train", x, y), ("test", x_test, y_test)):
        images, labels = images[:SCORED], labels[:SCORED]
        logits = lipschitz.over_batches(lambda x: logits_of(f, params, x), images, batch_size=250)
        found[f"{part}_loss"], found[f"{part}_accuracy"] = scores(logits, labels)
    return found


def lipschitz_point(size: Size, model, data, epoch: int) -> dict:
    """Empirical Lipschitz constants and stable ranks."""
    plain, f = plain_of(model), function_of(size)
    params, x = nnx.state(plain), data[0]
    others = np.random.default_rng(0).permutation(len(x))[:PAIRS]
    ratios = np.asarray(lipschitz.pairwise(f, params, x[:PAIRS], x[others]))
    local = np.asarray(lipschitz.local(f, params, x[:POINTS], tolerance=1e-3).value)
    kernels = dict(nnx.to_flat_state(params))
    ranks = [float(jaxsrn.stable_rank(kernels[path][...], op)) for path, op in operators_of(size).items()]
    return {
        "epoch": epoch,
        "ratios": np.round(ratios, 4).tolist(),
        "percentile": lipschitz.histogram(ratios).percentile,
        "local": float(np.median(local)),
        "largest_local": float(local.max()),
        "stable_ranks": ranks,
    }


@functools.cache
def operators_of(size: Size):
    """The linear map of every layer of the plain network at its image size."""
    image = jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32)
    return jnnx.layer_operators(network(size, 0), image)


def measures(size: Size, model, data) -> dict:
    """The measures of the paper's kind, as decimal logarithms: infinite where the median margin is not positive."""
    plain, f, (x, y, _, _) = plain_of(model), function_of(size), data
    params, x, y = nnx.state(plain), x[:PAIRS], y[:PAIRS]
    kernels, operators = plain.without_batch_norm(), operators_of(size)
    margins = np.asarray(lipschitz.margins(logits_of(f, params, x), y))
    margin = float(np.median(margins))
    logs = {
        "Spec-Fro": lipschitz.spec_fro(operators, kernels, margin, log=True),
        "Spec-L1": lipschitz.spec_l1(operators, kernels, margin, log=True),
        "Jac-Norm": np.log(np.median(lipschitz.jac_norm(f, params, x, y))),
        "product of norms": lipschitz.upper_bound(operators, kernels, log=True),
    }
    return {name: float(value) / np.log(10) for name, value in logs.items()} | {"margin": margin}


def layers_of(size: Size, model, how: str | None, shares) -> tuple[list[dict], list[str]]:
    """Every layer at the end by `report.analyze`, as a map and as a matrix; and what misses the constraint."""
    plain = plain_of(model)
    kernels = {path: np.asarray(kernel[...]) for path, kernel in nnx.to_flat_state(nnx.state(plain, nnx.Param))}
    operators = operators_of(size)
    # Numbers as names, which `analyze` lists in their order.
    matrices = {
        f"{i:03}": {"kernel": kernels[path].reshape(-1, kernels[path].shape[-1])} for i, path in enumerate(operators)
    }
    image = jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32)
    maps, flat = analyze(plain, image, progress=False).layers, analyze(matrices, progress=False).layers
    found, wrong = [], []
    for i, (own, matrix) in enumerate(zip(maps, flat, strict=True)):
        found.append(
            {
                "name": own.name,
                "norm": own.spectral_norm,
                "rank": own.stable_rank,
                "share": own.stable_rank / own.stable_rank_high,
                "matrix_norm": matrix.spectral_norm,
                "matrix_share": matrix.stable_rank / matrix.stable_rank_high,
            }
        )
        held = {"matrix": matrix, "exact": own}.get(how)
        if held is not None and misses_target(held.spectral_norm, 1):
            wrong.append(f"{own.name} has norm {held.spectral_norm:.4f} for 1")
        if held is not None and shares is not None:
            target = max(shares[i] * held.stable_rank_high, held.stable_rank_low)
            if misses_target(held.stable_rank, target, at_most=True):
                wrong.append(f"{own.name} has stable rank {held.stable_rank:.4f} for {target:.4f}")
    return found, wrong


# Runs


def shares_of(size: Size, folder: Path, labels: str, c: float | None, like: str | None) -> tuple[float, ...] | None:
    """The share of the largest stable rank for each layer: `c`, or what another setting ended with at seed 0."""
    if like is not None:
        layers = json.loads((folder / f"{like}, {labels}-0.json").read_text())["result"]["layers"]
        return tuple(round(layer["share"], 4) for layer in layers)
    return None if c is None else (c,) * len(operators_of(size))


def run(data, size: Size, folder: Path, *, seed: int, labels: str, how=None, c=None, like=None) -> dict:
    """One network, trained and measured."""
    own, shares = data_of_seed(data, size, labels, seed), shares_of(size, folder, labels, c, like)
    model = constrained(network(size, seed), size, how, shares)
    curve, constants = [curve_point(size, model, own, 0)], [lipschitz_point(size, model, own, 0)]
    for epoch in train(model, own[0], own[1], size, np.random.default_rng(seed)):
        if epoch % size.score_every == 0 or epoch == size.epochs:
            curve.append(curve_point(size, model, own, epoch))
        if epoch in (size.epochs // 2, size.epochs):
            constants.append(lipschitz_point(size, model, own, epoch))
    layers, wrong = layers_of(size, model, how, shares)
    ends = measures(size, model, own)
    return {"curve": curve, "constants": constants, "layers": layers, "measures": ends, "wrong": wrong}


def seconds_of_step(size: Size, fast: bool) -> dict[str, np.ndarray]:
    """Seconds of a training step, `(rounds,)` for each constraint, side by side."""
    x = np.zeros((size.batch, size.image, size.image, 3), np.float32)
    y = np.zeros(size.batch, np.int32)
    kinds = {"plain": (None, None), "SRN 0.3, matrix": ("matrix", 0.3), "SRN 0.3, exact": ("exact", 0.3)}
    kinds |= {} if fast else {"SN, matrix": ("matrix", None), "SN, exact": ("exact", None)}

    def step_of(how, c):
        shares = None if c is None else (c,) * len(operators_of(size))
        model = constrained(network(size, 0), size, how, shares)
        optimizer = optimizer_of(model, size)

        def step():
            train_step(model, optimizer, x, y)
            return nnx.state(model)

        return step

    return interleaved({name: step_of(*kind) for name, kind in kinds.items()}, 3 if fast else 30)


def main():
    parser = command_line(__doc__, "a stand-in for CIFAR-10, a tiny network, no download", "sanyal2020")
    parser.add_argument("--full", action="store_true", help="DenseNet-40, all images and epochs")
    parser.add_argument("--seeds", type=int, help="default: 5, with --fast 2")
    args = parser.parse_args()
    size = FAST if args.fast else FULL if args.full else SMALL
    output, num_seeds = prepared(args.output), args.seeds or (2 if args.fast else 5)
    data = _cifar10.load(stand_in=args.fast)
    folder, made_with = output / "runs", {"data": data.name, "size": size._asdict()}
    found = runs_of(settings_of(args.fast), num_seeds, folder, functools.partial(run, data, size, folder), made_with)
    seconds = seconds_of_step(size, args.fast)
    wrong = _sanyal_report.write_report(found, seconds, data.name, size, SCORED, output)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
