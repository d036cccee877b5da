"""Is the projection on the spectral ball exact, how near is it, and how many SVDs does it take?

    python benchmarks/projections.py                     # everything; records every part, half an hour on 2 cores
    python benchmarks/projections.py --only gaussian     # one part of it (may be repeated)
    python benchmarks/projections.py --fast              # one small kernel, no download, nothing recorded

Every kernel is brought to half of its spectral norm, by `jaxsrn.project_spectral_ball`, by Dykstra's algorithm, and by
Sedghi's clip over and over until it is in the ball. A step of any of them is one SVD of the symbol at half of the
frequencies. The clips are plain NumPy, and so is all that is measured: norms by NumPy's FFT and SVD in float64. The
script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NamedTuple

# NumPy's and jaxlib's SVDs of many small matrices only wait for a second thread. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import resnet50
from _report import publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv

SHARE = 0.5  # of the kernel's own norm
OVERSHOOT = 1e-5  # relative, that a projection may have
EQUAL = 1.01  # Dykstra is as accurate when its residual is at most this times ours


class Case(NamedTuple):
    """A kernel, the image it acts on, the residual to stop at, and the most steps that each method may take."""

    name: str
    kernel: np.ndarray
    image: tuple[int, int]
    tolerance: float
    ours: int
    others: int


class Ball(NamedTuple):
    """The spectral ball of a circular layer in plain NumPy: the half spectrum, and what belongs to it."""

    image: tuple[int, int]
    taps: tuple[int, int]
    limit: float
    dtype: np.dtype

    @property
    def counts(self) -> np.ndarray:
        """How many frequencies each column of the half spectrum stands for."""
        last = np.arange(self.image[1] // 2 + 1)
        counts = np.where((last == 0) | (2 * last == self.image[1]), 1, 2)
        return counts[:, None, None].astype(self.dtype)

    def stack(self, kernel: np.ndarray) -> np.ndarray:
        """The symbol at half of the frequencies, in this dtype (NumPy's FFT works in float64)."""
        return np.fft.rfft2(kernel, self.image, axes=(0, 1)).astype(np.result_type(self.dtype, np.complex64))

    def taps_of(self, stack: np.ndarray) -> np.ndarray:
        """The kernel nearest to a stack: transformed back, cut to its support."""
        whole = np.fft.irfft2(stack, self.image, axes=(0, 1))
        return whole[: self.taps[0], : self.taps[1]].astype(self.dtype)

    def clip(self, stack: np.ndarray) -> np.ndarray:
        u, s, vh = np.linalg.svd(stack, full_matrices=False)
        return (u * np.minimum(s, self.limit)[..., None, :]) @ vh

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sum(self.counts * (np.conj(a) * b).real, dtype=np.float64))


class Found(NamedTuple):
    """What a method ended with: the residual is that of `ProjectionResult`, nan where there is no proof."""

    kernel: np.ndarray
    residual: float
    steps: int
    seconds: float


def exact_norm(kernel: np.ndarray, image) -> float:
    symbol = np.fft.rfft2(kernel.astype(np.float64), image, axes=(0, 1))
    return float(np.max(np.linalg.svd(symbol, compute_uv=False)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to `b`; with stride 1 that of the layers."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def ours(case: Case, limit: float) -> Found:
    start = time.perf_counter()
    result = jaxsrn.project_spectral_ball(
        case.kernel, CircularConv(case.image), limit, tolerance=case.tolerance, max_steps=case.ours
    )
    kernel = np.asarray(result.kernel)
    return Found(kernel, float(result.gap), int(result.num_steps), time.perf_counter() - start)


def dykstra(case: Case, limit: float, residual: float) -> Found:
    """Dykstra's algorithm between the ball and the kernels of the support, until its residual is as small."""
    ball = Ball(case.image, case.kernel.shape[:2], limit, case.kernel.dtype)
    op, kernel, correction = CircularConv(case.image), case.kernel, 0.0
    start, proven = time.perf_counter(), np.inf
    best = kernel
    for steps in range(1, case.others + 1):  # noqa: B007
        stack = ball.stack(kernel) + correction
        clipped = ball.clip(stack)
        correction = stack - clipped
        kernel = ball.taps_of(clipped)
        factor = min(1.0, limit / float(jaxsrn.spectral_norm(kernel, op)))
        found = certify(ball, case.kernel, kernel, correction, clipped, factor)
        if found < proven:
            best, proven = factor * kernel, found
        if proven <= residual:
            break
    return Found(best, proven, steps, time.perf_counter() - start)


def certify(ball: Ball, target, kernel, multiplier, clipped, factor: float) -> float:
    """The residual of `factor * kernel` by the duality gap of the multiplier, as `ProjectionResult` defines it."""
    size = np.prod(ball.image)
    change = size * np.sum((factor * kernel - target).astype(np.float64) ** 2)
    squared = size * np.sum(kernel.astype(np.float64) ** 2)
    gap = 0.5 * (1 - factor) ** 2 * squared + ball.inner(clipped - factor * ball.stack(kernel), multiplier)
    least = np.sqrt(max(change - 2 * gap, 0))
    return float((np.sqrt(change) - least) / np.sqrt(size * np.sum(target.astype(np.float64) ** 2)))


def repeated_clips(case: Case, limit: float) -> Found:
    """Sedghi's pass over and over until the norm is right; scaled into the ball where that takes too many."""
    ball = Ball(case.image, case.kernel.shape[:2], limit, case.kernel.dtype)
    op, kernel, start = CircularConv(case.image), case.kernel, time.perf_counter()
    for steps in range(1, case.others + 1):  # noqa: B007
        kernel = ball.taps_of(ball.clip(ball.stack(kernel)))
        norm = float(jaxsrn.spectral_norm(kernel, op))
        if norm <= limit * (1 + OVERSHOOT):
            break
    return Found(min(1.0, limit / norm) * kernel, float("nan"), steps, time.perf_counter() - start)


# Cases


def gaussian_cases(fast: bool) -> list[Case]:
    rng = np.random.default_rng(0)
    sizes = ((8, 2),) if fast else ((16, 4), (16, 16), (32, 16))
    cases = []
    for n, c in sizes:
        kernel = rng.standard_normal((3, 3, c, c)).astype(np.float32)
        cases.append(Case(f"Gaussian, {c} channels, n = {n}", kernel, (n, n), 1e-3, 200, 60 if fast else 500))
    return cases


def trained_cases(channels: int) -> list[Case]:
    """The first 3x3 kernel of the stage with so many channels."""
    name, layer = next(
        (name, layer)
        for name, layer in resnet50.load().items()
        if layer.kernel.shape[:2] == (3, 3) and layer.kernel.shape[-1] == channels
    )
    title = f"ResNet-50 {name}, {channels} channels, n = {layer.input_shape[0]}"
    # An SVD of all frequencies takes seconds. On the smallest images repeated clips, too, come near the projection.
    tolerance = 2e-4 if channels == 512 else 5e-3
    return [Case(title, layer.kernel, layer.input_shape, tolerance, 30, 40)]


PARTS = {
    "gaussian": lambda: gaussian_cases(False),
    **{f"resnet-{c}": lambda c=c: trained_cases(c) for c in (64, 128, 256, 512)},
}
HEADER = ("kernel", "method", "steps", "seconds", "norm / c - 1", "distance", "residual")


def compare(case: Case) -> tuple[list[list], list[tuple[bool, str]]]:
    """Table rows and requirements of one kernel."""
    norm = exact_norm(case.kernel, case.image)
    limit = SHARE * norm
    mine = ours(case, limit)
    runs = {
        f"project_spectral_ball, to {case.tolerance:g}": mine,
        "Dykstra": dykstra(case, limit, EQUAL * mine.residual),
        "clips to feasibility": repeated_clips(case, limit),
    }
    rows, far, over = [], {}, {}
    for name, found in runs.items():
        far[name] = distance(found.kernel, case.kernel)
        over[name] = exact_norm(found.kernel, case.image) / limit - 1
        rows.append(
            [
                case.name,
                name,
                found.steps,
                f"{found.seconds:.1f}",
                f"{over[name]:.1e}",
                f"{far[name]:.6f}",
                f"{found.residual:.1e}",
            ]
        )
    first, second, third = runs
    checks = [
        (over[first] <= OVERSHOOT, f"{case.name}: norm / c - 1 = {over[first]:.1e}, at most {OVERSHOOT:g}"),
        (mine.residual <= case.tolerance, f"{case.name}: residual {mine.residual:.1e}, at most {case.tolerance:g}"),
        (far[first] < far[third], f"{case.name}: nearer than repeated clips ({far[first]:.6f}, {far[third]:.6f})"),
        (
            runs[second].steps > mine.steps,
            f"{case.name}: {mine.steps} steps; Dykstra {runs[second].steps}"
            + ("" if runs[second].residual <= EQUAL * mine.residual else ", and not there yet"),
        ),
    ]
    return rows, checks


ABOUT = f"""\
float32; c is {SHARE:g} times the kernel's own norm. A step is one SVD of the symbol at half of the frequencies; ours
also solves linear systems by conjugate gradients between two of them, which `seconds` contains (the first call
compiles, too). The residual is a proven bound, relative to the kernel: how much nearer any kernel of the ball can be
at most. Dykstra stops at our residual, the clips at `norm / c - 1 <= {OVERSHOOT:g}`; where the number of steps given to
both runs out first, the kernel is scaled into the ball."""


def run(name: str, cases: list[Case], keep: bool) -> bool:
    rows, checks = [], []
    for case in tqdm(cases, desc=name):
        some_rows, some_checks = compare(case)
        rows, checks = rows + some_rows, checks + some_checks
    sections = [("Steps and distances", f"{ABOUT}\n\n{table(HEADER, rows)}")]
    return publish(f"projections_{name.replace('-', '_')}", f"Projections: {name}", sections, checks, keep, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one small kernel, no download, nothing recorded")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    args = parser.parse_args()
    if args.fast:
        sys.exit(0 if run("gaussian", gaussian_cases(True), False) else 1)
    met = [run(name, PARTS[name](), True) for name in args.only or PARTS]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
