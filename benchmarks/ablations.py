"""What does each heuristic and each constant buy? Errors, time and program size with it, and with another in its place.

    python benchmarks/ablations.py                  # all of them; about a quarter of an hour; recorded
    python benchmarks/ablations.py --only srnc      # subjects whose names hold this; nothing recorded
    python benchmarks/ablations.py --fast           # a minute or two: few small kernels, nothing recorded

A row replaces a constant or a function of the library, and compiles the call anew. The calls with and without it take
turns on the same kernels. No heuristic is part of a proof, so that on the torus errors must not change.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from _clock import interleaved
from _report import publish, table
from compilation.counts import operations_in
from norms.cases import gaussian, reference_norm, trained
from norms.kinds import gaussian_kernel, orthogonal_taps, peaked, waves
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, UnboundedConv, ZeroPaddedConv
from jaxsrn._tools import lanczos, tolerances
from jaxsrn.normalization import implicit, iteration, scan
from jaxsrn.normalization import starts as srnc_starts
from jaxsrn.projections import augmented_lagrangian, frequency_passes, nearest, steepest
from jaxsrn.spectra import values
from jaxsrn.spectra.circular import boxes, branch_and_bound, climbing, grams, leading
from jaxsrn.spectra.padded import starts as padded_starts

SETTING = """\
float32. `operations`: StableHLO operations of the program, with the heuristic and without it. `time`: how many times
longer the call takes without it, the median of interleaved rounds over all kernels, and the largest for one kernel.
`worst` and `worst without`: of norms the largest relative error against SVDs in NumPy's float64; of all others by how
much the number exceeds the smaller one of both. That number is the distance from the kernel for `srnc` and projections,
the gap for steepest descent, the sum of the singular values, and the norm of the implicit gradient."""


class Without(NamedTuple):
    """A heuristic, and what takes it away: `(module, name, other value)` for each constant or function."""

    heuristic: str
    changes: tuple[tuple[Any, str, Any], ...]


class Subject(NamedTuple):
    """A call on kernels of one shape.

    Attributes:
      name: the row's name.
      call: `f(kernel, op) -> array`, a norm, or a number that should be small.
      op, kernels: the layer, and its kernels.
      exact: the norm of each kernel; `None` where the call is no norm.
      rows: what is taken away.
    """

    name: str
    call: Callable
    op: Any
    kernels: list[np.ndarray]
    exact: list[float] | None
    rows: tuple[Without, ...]


class Program(NamedTuple):
    """A compiled call, and its StableHLO operations."""

    call: Callable
    operations: int


def built(subject: Subject, without: Without | None) -> Program:
    """The call compiled anew, without a heuristic or with all of them."""
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        for module, name, value in without.changes if without else ():
            stack.enter_context(mock.patch.object(module, name, value))
        kernel = jax.ShapeDtypeStruct(subject.kernels[0].shape, jnp.float32)
        lowered = jax.jit(lambda kernel: subject.call(kernel, subject.op)).lower(kernel)
    return Program(lowered.compile(), operations_in(lowered))


def deviations(subject: Subject, values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far each value is off: from the norm, or above the smaller one of both."""
    if subject.exact is not None:
        return np.abs(values / np.array(subject.exact) - 1)
    return values / np.minimum(values, others) - 1


def rows_of(subject: Subject, rounds: int) -> list[list[str]]:
    """The rows of a subject, one for each heuristic."""
    usual, kernels = built(subject, None), [jnp.asarray(kernel) for kernel in subject.kernels]
    found = []
    for without in tqdm(subject.rows, desc=subject.name, leave=False):
        other = built(subject, without)
        values = [np.array([float(program.call(kernel)) for kernel in kernels]) for program in (usual, other)]
        times = []
        for kernel in kernels[:: max(1, len(kernels) // 6)]:
            runs = {
                "with": functools.partial(usual.call, kernel),
                "without": functools.partial(other.call, kernel),
            }
            seconds = interleaved(runs, rounds)
            times.append(float(np.median(seconds["without"] / seconds["with"])))
        worst = [float(np.max(deviations(subject, *pair))) for pair in (values, values[::-1])]
        found.append(
            [
                subject.name,
                without.heuristic,
                f"{usual.operations:,}",
                f"{other.operations:,}",
                f"{np.median(times):.2f}",
                f"{max(times):.2f}",
                *(f"{deviation:.1e}" for deviation in worst),
            ]
        )
    return found


# What is taken away


def climbers(count: int) -> tuple[tuple[Any, str, Any], ...]:
    """`count` climbers, whatever the layer."""
    return ((leading, "num_climbers", lambda *_: count),)


BY_PROOF = Without("branch and bound (SVDs at half of the frequencies)", ((tolerances, "_SVD_WORK", math.inf),))
ON_GRID = (
    BY_PROOF,
    Without("four climbers (one)", climbers(1)),
    Without("four climbers (sixteen)", climbers(16)),
    Without("eight power steps for an estimate (one)", ((climbing, "_POWER_STEPS", 1),)),
    Without("three power steps that follow a frequency (one)", ((climbing, "_FOLLOWING_STEPS", 1),)),
    Without("boxes of phi 0.6 (0.3)", ((boxes, "_WIDEST", 0.3),)),
    Without("boxes of phi 0.6 (1.2)", ((boxes, "_WIDEST", 1.2),)),
    Without("chunks of 2**18 entries (2**16)", ((climbing, "CHUNK", 2**16),)),
    Without("chunks of 2**18 entries (2**20)", ((climbing, "CHUNK", 2**20),)),
)
ON_TORUS = (Without("sixteen climbers (four)", climbers(4)),)
WIDE_ON_TORUS = (
    Without("four climbers (sixteen)", climbers(16)),
    Without("branch and bound climbs on (it does not)", ((branch_and_bound, "_moved", lambda poly, grid, peak: peak),)),
    Without("forty moves to the best frequency (ten)", ((branch_and_bound, "_MOVES", 10),)),
)
WIDE = (
    *ON_GRID[:2],
    Without("the best pair polished by the Lanczos method (an SVD)", ((branch_and_bound, "_LANCZOS_FROM", math.inf),)),
)
REDUCED = (
    *WIDE,
    Without("reduced Gram matrices (whole ones)", ((leading, "is_reduced", lambda *_: False),)),
    Without("three steps for the reducing basis (one)", ((grams, "_BASIS_STEPS", 1),)),
)
PADDED = (
    Without("a sum of four waves (one)", ((padded_starts, "_MOST_WAVES", 1),)),
    Without("noise beside the waves (1e-3 of it)", ((padded_starts, "_NOISE", 5e-4),)),
    Without("the rival phase (none)", ((padded_starts, "_RIVALS", 0.0), (padded_starts, "_FEW_SAMPLES", 0))),
    Without("eight Ritz vectors kept in a restart (one)", ((lanczos, "_KEPT", 1),)),
    Without("four steps between residuals (one)", ((lanczos, "_BETWEEN_CHECKS", 1),)),
)
DISTANCES = (
    Without("Anderson's acceleration", ((iteration, "_anderson", lambda memory, _, x, r: (memory, x + r)),)),
    Without("four starts (one)", ((scan, "_NUM_STARTS", 1),)),
    Without("rounds, each from where a larger value was found (one)", ((iteration, "_MAX_ROUNDS", 1),)),
    Without("starts compared at a change of 0.01 (1e-4)", ((iteration, "_COMPARED_AT", 1e-4),)),
    Without("seven zooms into sixteen phases (three)", ((scan, "_PHASE_ZOOMS", 3),)),
)
DISTANCES_ON_TORUS = (
    *DISTANCES,
    Without("eight pairs climb on (one)", ((srnc_starts, "_NUM_CLIMBERS", 1),)),
    Without("sixteen angles per degree for starts (eight)", ((srnc_starts, "_TORUS_ANGLES", 8),)),
)
BALLS = (
    Without("a first penalty of 10 (1)", ((augmented_lagrangian, "_FIRST_PENALTY", 1.0),)),
    Without("a first penalty of 10 (100)", ((augmented_lagrangian, "_FIRST_PENALTY", 100.0),)),
    Without("penalties that grow by 4 (2)", ((augmented_lagrangian, "_PENALTY_GROWTH", 2.0),)),
    Without("penalties that grow by 4 (10)", ((augmented_lagrangian, "_PENALTY_GROWTH", 10.0),)),
    Without("rounds end at 0.5 of the infeasibility (0.1)", ((augmented_lagrangian, "_ROUND_ENDS", 0.1),)),
)
COVERED_BALLS = (Without("six radii of the cover's ball (two)", ((nearest, "_NUM_RADII", 2),)),)
PASSES = (
    Without("an over-relaxation of 1.9 (1)", ((frequency_passes, "_RELAXATION", 1.0),)),
    Without("steps of 0.1 along the gradient (0.02)", ((frequency_passes, "_STEP", 0.02),)),
    Without("steps of 0.1 along the gradient (0.5)", ((frequency_passes, "_STEP", 0.5),)),
    Without("steps balanced at a ratio of 0.3 (1)", ((frequency_passes, "_PREFERENCE", 1.0),)),
)
SORTED = (Without("sorted as integers (as floats)", ((values, "_descending", lambda found: jnp.sort(found)[::-1]),)),)
IN_REVERSE = (Without("rules of reverse mode for products (JAX's)", ((implicit, "in_reverse", lambda op: op),)),)


# What it is taken away from


def norm_subject(name: str, op, kernels, exact, rows) -> Subject:
    return Subject(name, jaxsrn.spectral_norm, op, kernels, exact, rows)


def torus_subjects(fast: bool) -> list[Subject]:
    """Norms with circular padding: Gaussian and trained kernels."""
    cases = [[gaussian(56, 16, 3)]] if fast else [[gaussian(32, 64, 3)], *trained().values()]
    found = []
    for group in cases:
        wide = min(group[0].kernel.shape[-2:])
        rows = REDUCED if wide >= 256 else WIDE if wide >= 128 else ON_GRID
        found.append(norm_subject(group[0].name, group[0].op, [c.kernel for c in group], [c.norm for c in group], rows))
    if not fast:
        # The stem with stride 1, whose highest peak eight climbers miss, on its image and without edges.
        stem, op = next(group for group in cases if group[0].op.strides != (1, 1))[0].kernel, CircularConv((224, 224))
        found.append(norm_subject("the stem with stride 1", op, [stem], [reference_norm(stem, op)], ON_GRID))
        found.append(norm_subject("the stem, unbounded", UnboundedConv(), [stem], [norm_on_torus(stem)], ON_TORUS))
        # Random kernels of many channels have many peaks of nearly the same height; here climbing misses the highest.
        wide = np.random.default_rng(0).standard_normal((3, 3, 256, 256), np.float32)
        exact = [norm_on_torus(wide, 64)]
        found.append(norm_subject("Gaussian (256, 3), unbounded", UnboundedConv(), [wide], exact, WIDE_ON_TORUS))
    return found


def norm_on_torus(kernel: np.ndarray, size: int = 224, starts: int = 4) -> float:
    """The norm without edges in float64: SciPy climbs between the frequencies of a grid, from its highest ones."""
    places = np.indices(kernel.shape[:2])

    def value(angles):
        symbol = np.einsum("kl,klio->io", np.exp(-1j * np.tensordot(angles, places, 1)), kernel.astype(np.float64))
        return np.linalg.norm(symbol, 2)

    def climbed(place):
        start = 2 * np.pi / size * np.array(np.unravel_index(place, values.shape))
        return -scipy.optimize.minimize(lambda angles: -value(angles), start, method="Nelder-Mead", tol=1e-10).fun

    rows = np.fft.rfft2(kernel, (size, size), axes=(0, 1))
    # Row by row, as the singular values of all frequencies at once take as much memory again.
    values = np.stack([np.linalg.svd(row, compute_uv=False)[:, 0] for row in rows])
    return float(max(climbed(place) for place in np.argsort(values, axis=None)[-starts:]))


def drawn(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Gaussian kernels, peaked ones, sums of waves, and kernels whose singular values all are 1 on the torus."""
    rng, kinds = np.random.default_rng(0), (gaussian_kernel, peaked, waves, orthogonal_taps)
    return [kinds[i % 4](rng, shape).astype(np.float32) for i in range(count)]


def padded_subjects(fast: bool) -> list[Subject]:
    """Norms with zero padding, above the size up to which they are proven."""
    layers = [((10, 10), (3, 3, 6, 6), PADDED), ((14, 14), (5, 5, 3, 3), PADDED), ((7, 7), (3, 3, 32, 32), PADDED[:1])]
    found = []
    for image, shape, rows in layers[: 1 if fast else None]:
        op, kernels = ZeroPaddedConv(image), drawn(shape, 3 if fast else 60)
        exact = [float(np.linalg.norm(np.asarray(op.to_dense(k), np.float64), 2)) for k in kernels]
        found.append(norm_subject(f"SAME, {image[0]}x{image[1]}, {shape}", op, kernels, exact, rows))
    return found


def distance(kernel, op):
    """The distance of `srnc`, with a target at 40% of the way from the smallest stable rank to the kernel's own."""
    smallest = jaxsrn.stable_rank_range(kernel.shape, op).low
    return jaxsrn.srnc(kernel, op, smallest + 0.4 * (jaxsrn.stable_rank(kernel, op) - smallest)).distance


def distance_subjects(fast: bool) -> list[Subject]:
    """The distances of `srnc`."""
    layers = [CircularConv((8, 8)), UnboundedConv(), ZeroPaddedConv((8, 8))]
    kernels = drawn((3, 3, 4, 4), 3 if fast else 12)
    return [
        Subject(
            f"srnc, {type(op).__name__}, {kernels[0].shape}",
            distance,
            op,
            kernels,
            None,
            DISTANCES_ON_TORUS if isinstance(op, UnboundedConv) else DISTANCES,
        )
        for op in layers[: 1 if fast else None]
    ]


def moved(kernel, op):
    """How far the projection on the ball of half of the kernel's norm is."""
    projected = jaxsrn.project_spectral_ball(kernel, op, jaxsrn.spectral_norm(kernel, op) / 2)
    return jnp.linalg.norm(projected.kernel - kernel)


def step_gap(kernel, op):
    """The gap of thirty passes of steepest descent, with the kernel as the gradient."""
    return steepest(kernel, op, method="frequency").gap


def sum_of_values(kernel, op):
    return jnp.sum(jaxsrn.singular_values(kernel, op))


def implicit_gradient(kernels, op) -> Callable:
    """The norm of the implicit gradient of a training step, whose state is that of the first kernel."""
    target = 0.3 * jaxsrn.stable_rank_range(kernels[0].shape, op).high
    state = jaxsrn.srnc_state(jnp.asarray(kernels[0]), op, target)

    def call(kernel, op):
        def loss(kernel):
            return jnp.sum(jaxsrn.srnc_step(kernel, state, op, target, gradient="implicit")[0] ** 3)

        return jnp.linalg.norm(jax.grad(loss)(kernel))

    return call


def other_subjects(fast: bool) -> list[Subject]:
    """Projections, steepest descent, all singular values, and the implicit gradient of a training step."""
    small, wide = drawn((3, 3, 8, 8), 2 if fast else 4), drawn((3, 3, 16, 16), 2 if fast else 4)
    circular, padded = CircularConv((16, 16)), ZeroPaddedConv((16, 16))
    found = [
        Subject("ball, circular 16x16, (3, 3, 8, 8)", moved, circular, small, None, BALLS),
        Subject("30 passes, unbounded, (3, 3, 16, 16)", step_gap, UnboundedConv(), wide, None, PASSES),
    ]
    if not fast:
        layer, kernels = ZeroPaddedConv((32, 32)), drawn((3, 3, 32, 32), 1)
        call = implicit_gradient(kernels, layer)
        found += [
            Subject("ball, SAME 16x16, (3, 3, 8, 8)", moved, padded, small[:2], None, COVERED_BALLS),
            Subject("all values, 56x56, (3, 3, 16, 16)", sum_of_values, CircularConv((56, 56)), wide, None, SORTED),
            Subject("implicit gradient, SAME 32x32, (3, 3, 32, 32)", call, layer, kernels, None, IN_REVERSE),
        ]
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few small kernels; nothing is recorded")
    parser.add_argument("--only", default="", help="subjects whose names hold this; nothing is recorded")
    options = parser.parse_args(argv)
    fast = options.fast
    every = [*torus_subjects(fast), *padded_subjects(fast), *distance_subjects(fast), *other_subjects(fast)]
    subjects = [subject for subject in every if options.only in subject.name]
    rows = [row for subject in subjects for row in rows_of(subject, 3 if fast else 5)]
    header = ("search", "heuristic (in its place)", "operations", "without", "time", "largest", "worst",
              "worst without")  # fmt: skip
    body = f"{SETTING}\n\n{table(header, rows)}"
    publish("ablations", "Ablations", [("What each heuristic buys", body)], [], keep=not (fast or options.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
