"""Is the stable rank really what was asked for, and how far from optimal can the result be?

    python benchmarks/exactness.py              # random kernels, and all 3x3 of the trained ResNet-50: half an hour
    python benchmarks/exactness.py --no-network # random kernels only: a quarter of that, no download
    python benchmarks/exactness.py --fast       # under a minute: few families, no download, nothing recorded

Every kernel is lowered to stable ranks from 1% to 99% of the way from the low end of `stable_rank_range` to its own.
What `jaxsrn.srnc` returns is then measured without `jaxsrn.srnc`: the explicit matrix, or for the ResNet-50 the
symbol by NumPy's FFT, in float64, and NumPy's SVD. The script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

# NumPy's and jaxlib's SVDs of many small matrices only wait for a second thread: 2 times slower on a quiet machine, 100
# on a busy one. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import resnet50
from _report import publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, ZeroPaddedConv

jax.config.update("jax_enable_x64", True)

FRACTIONS = (0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99)
DTYPES = ("float64", "float32")
# What is required of the residual. Beyond it a zero-padded result must at least say so itself.
REQUIRED = {
    ("circular", "float64"): 1e-10,
    ("circular", "float32"): 1e-4,
    ("zero padding", "float64"): 1e-8,
    ("zero padding", "float32"): 1e-4,
}
# How well the numbers of a result must agree with the measured ones, feasible or not.
AGREEMENT = {"float64": 1e-8, "float32": 1e-4}


class Family(NamedTuple):
    """Kernels that differ only in size: one row of the table per dtype."""

    name: str
    cases: tuple[tuple[jaxsrn.operators.Operator, tuple[int, ...]], ...]

    @property
    def padding(self) -> str:
        return "circular" if isinstance(self.cases[0][0], CircularConv) else "zero padding"


FAMILIES = (
    Family("circular 1-D, one channel", ((CircularConv((64,)), (3, 1, 1)), (CircularConv((33,)), (5, 1, 1)))),
    Family("circular 1-D", ((CircularConv((32,)), (3, 4, 4)), (CircularConv((17,)), (5, 2, 6)))),
    Family("circular 2-D, one channel", ((CircularConv((16, 16)), (3, 3, 1, 1)), (CircularConv((9, 9)), (3, 3, 1, 1)))),
    Family("circular 2-D, even", ((CircularConv((8, 8)), (3, 3, 4, 4)), (CircularConv((6, 10)), (3, 5, 6, 3)))),
    Family("circular 2-D, odd", ((CircularConv((7, 7)), (3, 3, 4, 4)), (CircularConv((9, 5)), (3, 3, 2, 5)))),
    Family("circular 3-D", ((CircularConv((4, 4, 4)), (3, 3, 3, 2, 2)), (CircularConv((5, 3, 5)), (2, 3, 3, 2, 1)))),
    Family(
        "circular, strided",
        ((CircularConv((8, 8), strides=2), (3, 3, 3, 4)), (CircularConv((24,), strides=3), (5, 2, 3))),
    ),
    Family(
        "circular, dilated",
        ((CircularConv((9, 9), kernel_dilation=2), (3, 3, 2, 3)), (CircularConv((32,), kernel_dilation=4), (3, 1, 1))),
    ),
    Family("circular, grouped", ((CircularConv((8, 8), feature_group_count=2), (3, 3, 2, 6)),)),
    Family("circular, depthwise", ((CircularConv((8, 8), feature_group_count=4), (3, 3, 1, 4)),)),
    Family("SAME, one channel", ((ZeroPaddedConv((10, 10)), (3, 3, 1, 1)), (ZeroPaddedConv((33,)), (5, 1, 1)))),
    Family("SAME", ((ZeroPaddedConv((7, 7)), (3, 3, 3, 4)), (ZeroPaddedConv((20,)), (3, 4, 3)))),
    Family("SAME, 3-D", ((ZeroPaddedConv((4, 4, 4)), (3, 3, 3, 2, 2)),)),
    Family("SAME, strided", ((ZeroPaddedConv((8, 8), strides=2), (3, 3, 3, 4)),)),
    Family("SAME, dilated", ((ZeroPaddedConv((8, 8), kernel_dilation=2), (3, 3, 2, 3)),)),
    Family("SAME, grouped", ((ZeroPaddedConv((7, 7), feature_group_count=2), (3, 3, 2, 4)),)),
    Family("SAME, depthwise", ((ZeroPaddedConv((8, 8), feature_group_count=4), (3, 3, 1, 4)),)),
    Family("VALID", ((ZeroPaddedConv((8, 8), padding="VALID"), (3, 3, 3, 3)),)),
    Family("CAUSAL", ((ZeroPaddedConv((16,), padding="CAUSAL"), (3, 3, 2)),)),
    Family(
        "explicit padding, input dilation",
        ((ZeroPaddedConv((5, 5), padding=((1, 2), (1, 2)), input_dilation=2), (3, 3, 2, 3)),),
    ),
)
FAST_FAMILIES = ("circular 1-D, one channel", "circular 2-D, odd", "SAME")

# Shapes of the 200 kernels each whose distance from the proven bound is looked at.
GAP_CASES = {
    "circular": [
        (CircularConv((n, n)), (3, 3, i, o))
        for n, i, o in ((8, 1, 2), (8, 4, 4), (9, 3, 5), (10, 2, 8), (11, 6, 6), (12, 5, 3), (14, 8, 1), (16, 8, 8))
    ],
    "zero padding": [
        (ZeroPaddedConv((n, n)), (3, 3, i, o))
        for n, i, o in ((5, 1, 1), (6, 2, 2), (6, 3, 1), (7, 2, 4), (8, 3, 3), (8, 1, 5), (10, 1, 1), (10, 2, 2))
    ],
}


class Outcome(NamedTuple):
    """Results (leaves stacked) with what was measured of them, all in NumPy.

    `refuted`: called infeasible although another kernel of the same shape got below the target. What stable ranks
    there are depends on the shape alone, and by continuity all those between two that are reached can be.
    """

    result: jaxsrn.SRNResult
    residual: np.ndarray
    misreported: np.ndarray
    refuted: np.ndarray


def judge(result, target, rank, norm, original_norm, distance) -> Outcome:
    """Compares results with the targets and with the measured numbers (arrays over the same problems)."""
    residual = np.maximum(np.abs(rank / target - 1), np.abs(norm / original_norm - 1))
    pairs = ((result.stable_rank, rank), (result.spectral_norm, norm), (1 + result.distance, 1 + distance))
    misreported = np.max([np.abs(claimed / found - 1) for claimed, found in pairs], axis=0)
    return Outcome(result, residual, misreported, ~result.feasible & (target > 1.0001 * np.min(rank)))


# Random kernels: the explicit matrix


def random_kernels(rng: np.random.Generator, shape, count: int) -> np.ndarray:
    """Kernels of three kinds and of very different scale: Gaussian, non-negative, and one strong tap."""
    kernels = rng.normal(size=(count, *shape))
    kernels[1::3] = np.abs(kernels[1::3])
    centre = tuple(k // 2 for k in shape[:-2])
    kernels[(slice(2, None, 3), *centre)] *= 5
    scale = 10.0 ** rng.uniform(-3, 3, size=count)
    return kernels * scale.reshape((-1, *(1,) * len(shape)))


def spectra(op, kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(matrices, squared Frobenius norms, spectral norms)` of a stack, in float64."""
    matrices = np.asarray(jax.jit(jax.vmap(op.to_dense))(kernels.astype(np.float64)))
    values = np.linalg.svd(matrices, compute_uv=False)
    return matrices, np.sum(values**2, axis=-1), values[:, 0]


def solve_and_measure(op, kernels: np.ndarray, fractions: np.ndarray) -> Outcome:
    """Lowers each kernel to each of its fractions, `(kernels, fractions)`, and measures what came back."""
    matrices, squared, norms = spectra(op, kernels)
    low, _ = jaxsrn.stable_rank_range(kernels.shape[1:], op)
    targets = (low + fractions * (squared / norms**2 - low)[:, None]).reshape(-1).astype(kernels.dtype)
    repeated = np.repeat(np.arange(len(kernels)), fractions.shape[1])
    # One problem after the other, each as a single call would do it.
    solver = jax.jit(lambda ks, ts: jax.lax.map(lambda problem: jaxsrn.srnc(problem[0], op, problem[1]), (ks, ts)))
    result = jax.tree.map(np.asarray, solver(kernels[repeated], targets))
    assert result.kernel.dtype == kernels.dtype
    new_matrices, new_squared, new_norms = spectra(op, result.kernel)
    change = np.linalg.norm(new_matrices - matrices[repeated], axis=(-2, -1)) / np.sqrt(squared[repeated])
    return judge(result, targets, new_squared / new_norms**2, new_norms, norms[repeated], change)


# The trained network: the symbol


def fft_spectrum(kernel: np.ndarray, input_shape) -> tuple[float, float]:
    """`(squared Frobenius norm, spectral norm)` by Sedghi, Gupta, Long 2019, two lines of NumPy, in float64.

    The SVDs at half of the frequencies: those of a real kernel come in conjugate pairs.
    """
    symbol = np.fft.fft2(kernel.astype(np.float64), input_shape, axes=(0, 1))
    half = symbol[:, : input_shape[1] // 2 + 1]
    return np.sum(np.abs(symbol) ** 2), np.max(np.linalg.svd(half, compute_uv=False))


def solve_layer(layer: resnet50.Layer, dtype: str) -> Outcome:
    """One kernel of the network with circular padding at its true size, to all fractions."""
    op, kernel = CircularConv(layer.input_shape), layer.kernel.astype(dtype)
    squared, norm = fft_spectrum(kernel, layer.input_shape)
    low, _ = jaxsrn.stable_rank_range(kernel.shape, op)
    outcomes = []
    for fraction in FRACTIONS:
        target = np.asarray(low + fraction * (squared / norm**2 - low), dtype)
        result = jax.tree.map(np.asarray, jaxsrn.srnc(kernel, op, target))
        new_squared, new_norm = fft_spectrum(result.kernel, layer.input_shape)
        change = result.kernel.astype(np.float64) - kernel.astype(np.float64)
        distance = np.linalg.norm(change) / np.linalg.norm(kernel.astype(np.float64))
        outcomes.append(judge(result, target, new_squared / new_norm**2, new_norm, norm, distance))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outcomes)


def stages() -> dict[str, list[resnet50.Layer]]:
    """The 3x3 kernels of the network by their shape: table rows, `{name: layers}`."""
    found: dict[str, list[resnet50.Layer]] = {}
    for layer in resnet50.load().values():
        if layer.kernel.shape[:2] == (3, 3):
            name = f"ResNet-50, 3x3, {layer.kernel.shape[-1]} channels, n = {layer.input_shape[0]}"
            found.setdefault(name, []).append(layer)
    return found


# Tables


class Row(NamedTuple):
    """Everything found in one family and dtype."""

    family: str
    padding: str
    dtype: str
    outcomes: list[Outcome]

    def column(self, pick) -> np.ndarray:
        return np.concatenate([np.ravel(pick(outcome)) for outcome in self.outcomes])

    @property
    def required(self) -> float:
        return REQUIRED[self.padding, self.dtype]

    @property
    def feasible(self) -> np.ndarray:
        return self.column(lambda o: o.result.feasible)

    @property
    def residual(self) -> np.ndarray:
        return self.column(lambda o: o.residual)

    @property
    def not_converged(self) -> np.ndarray:
        """Feasible, and the result itself says that the constraints are missed by more than is required."""
        return self.feasible & ~(self.column(lambda o: o.result.residual) <= self.required)

    @property
    def violations(self) -> int:
        """Results that miss the requirement; with zero padding only those that do not say so themselves."""
        missed = self.feasible & ~(self.residual <= self.required)
        return int(np.sum(missed if self.padding == "circular" else missed & ~self.not_converged))

    def cells(self) -> list:
        solved = self.feasible if self.padding == "circular" else self.feasible & ~self.not_converged
        gap, steps = self.column(lambda o: o.result.gap)[solved], self.column(lambda o: o.result.num_steps)[solved]
        residual = self.residual[solved]
        return [
            self.family,
            self.dtype,
            len(solved),
            np.sum(~self.feasible),
            np.sum(self.not_converged),
            f"{np.max(residual, initial=0):.1e}",
            f"{median(residual):.1e}",
            f"{median(gap):.1e}",
            f"{np.max(gap, initial=0):.1e}",
            f"{median(steps):.0f}",
            np.max(steps, initial=0),
        ]


HEADER = (
    "family",
    "dtype",
    "problems",
    "infeasible",
    "not converged",
    "residual, worst",
    "median",
    "gap, median",
    "max",
    "passes, median",
    "max",
)


def median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def random_rows(families, count: int, progress) -> list[Row]:
    rows = []
    for dtype in DTYPES:
        for i, family in enumerate(families):
            progress.set_description(f"{family.name}, {dtype}")
            rng = np.random.default_rng(i)
            outcomes = []
            for op, shape in family.cases:
                kernels = random_kernels(rng, shape, count).astype(dtype)
                outcomes.append(solve_and_measure(op, kernels, np.tile(FRACTIONS, (count, 1))))
            rows.append(Row(family.name, family.padding, dtype, outcomes))
            progress.update()
    return rows


def network_rows(layers: dict[str, list[resnet50.Layer]], progress) -> list[Row]:
    rows = []
    for dtype in DTYPES:
        for name, members in layers.items():
            progress.set_description(f"{name}, {dtype}")
            rows.append(Row(name, "circular", dtype, [solve_layer(layer, dtype) for layer in members]))
            progress.update()
    return rows


def gap_table(num_cases: int, per_case: int, progress) -> str:
    """Kernels of both paddings with one random target each: how often the result is provably optimal."""
    lines = []
    for padding, cases in GAP_CASES.items():
        progress.set_description(f"gap, {padding}")
        rng = np.random.default_rng(0)
        outcomes = []
        for op, shape in cases[:num_cases]:
            kernels = rng.normal(size=(per_case, *shape))
            outcomes.append(solve_and_measure(op, kernels, rng.uniform(0.01, 0.99, size=(per_case, 1))))
        row = Row(padding, padding, "float64", outcomes)
        gap = row.column(lambda o: o.result.gap)[row.feasible]
        share = np.mean(gap < 1e-9) if len(gap) else float("nan")
        lines.append(
            [
                padding,
                len(row.feasible),
                np.sum(~row.feasible),
                f"{median(gap):.1e}",
                f"{np.max(gap, initial=0):.1e}",
                f"{share:.1%}",
            ]
        )
        progress.update()
    return table(("padding", "kernels", "infeasible", "gap, median", "max", "gap < 1e-9"), lines)


def paper_table() -> str:
    """The example of Zheng et al. 2025, and a 3x3 kernel: the exact solution beside the original SRN-C."""
    example = np.asarray([1.0, 0.0, 0.0]).reshape(3, 1, 1)
    square = np.random.default_rng(0).normal(size=(3, 3, 1, 1))
    cases = [
        ("(1, 0, 0), N = 64", example, CircularConv((64,)), 24.0),
        ("(1, 0, 0), N = 64", example, CircularConv((64,)), 32.0),
        ("3x3 Gaussian, n = 16", square, CircularConv((16, 16)), 40.0),
    ]
    lines = []
    for name, kernel, op, target in cases:
        _, squared, norms = spectra(op, kernel[None])
        for method in (jaxsrn.srnc, jaxsrn.srnc_tanay):
            result = method(kernel, op, target)
            _, new_squared, new_norms = spectra(op, np.asarray(result.kernel)[None])
            lines.append(
                [
                    f"{name}, srank {squared[0] / norms[0] ** 2:.2f}",
                    method.__name__,
                    f"{target:g}",
                    f"{new_squared[0] / new_norms[0] ** 2:.6f}",
                    f"{new_norms[0] / norms[0]:.6f}",
                    f"{float(result.distance):.6f}",
                ]
            )
    return table(("kernel", "method", "target", "stable rank reached", "norm / original", "distance"), lines)


def requirements(rows: list[Row]) -> list[tuple[bool, str]]:
    checks = []
    for (padding, dtype), limit in REQUIRED.items():
        chosen = [row for row in rows if (row.padding, row.dtype) == (padding, dtype)]
        bad = [f"{row.family} ({row.violations})" for row in chosen if row.violations]
        excuse = "" if padding == "circular" else ", or the result says otherwise"
        checks.append((not bad, f"{padding}, {dtype}: measured residual <= {limit:g}{excuse}{tell(bad)}"))
    checks.append(no_wrong_infeasible(rows, "circular", lambda row: ~row.feasible, "every target is called feasible"))
    refuted = "no target is called infeasible that lies above a stable rank reached with another kernel of its shape"
    checks.append(no_wrong_infeasible(rows, "zero padding", lambda row: row.column(lambda o: o.refuted), refuted))
    for dtype, limit in AGREEMENT.items():
        worst = {row.family: row.column(lambda o: o.misreported).max() for row in rows if row.dtype == dtype}
        bad = [f"{name} ({error:.1e})" for name, error in worst.items() if not error <= limit]
        text = f"{dtype}: stable rank, norm and distance in the results agree with the measured ones to {limit:g}"
        checks.append((not bad, f"{text}{tell(bad)}"))
    return checks


def no_wrong_infeasible(rows: list[Row], padding: str, wrong, text: str) -> tuple[bool, str]:
    counts = {f"{row.family}, {row.dtype}": int(np.sum(wrong(row))) for row in rows if row.padding == padding}
    bad = [f"{name} ({count})" for name, count in counts.items() if count]
    return not bad, f"{padding}: {text}{tell(bad)}"


def tell(bad: list[str]) -> str:
    return f"; missed by {', '.join(bad)}" if bad else ""


ABOUT = """\
Targets from 1% to 99% of the way from the low end of `stable_rank_range` to the kernel's own stable rank. The residual
is the larger of the relative errors of stable rank and spectral norm, measured with NumPy in float64. With zero padding
the low end is only a certified lower bound, so some low targets are truly infeasible: they are counted apart, as are
results whose own `residual` says that they did not converge; neither enters the columns to the right. `gap` is relative
to the norm of the original layer, and an upper bound on what could be gained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few families, no download, nothing recorded")
    parser.add_argument("--no-network", action="store_true", help="without the trained ResNet-50, nothing recorded")
    args = parser.parse_args()
    count = 2 if args.fast else 6
    families = FAMILIES
    if args.fast:
        families = [family._replace(cases=family.cases[:1]) for family in FAMILIES if family.name in FAST_FAMILIES]
    layers = {} if args.fast or args.no_network else stages()
    total = (len(families) + len(layers)) * len(DTYPES) + len(GAP_CASES)
    with tqdm(total=total) as progress:
        rows = random_rows(families, count, progress) + network_rows(layers, progress)
        gaps = gap_table(*(1, 10) if args.fast else (8, 25), progress)
    checks = requirements(rows)
    sections = [
        ("Constraints", f"{ABOUT}\n\n{table(HEADER, [row.cells() for row in rows])}"),
        ("Distance from the proven optimum", f"Gaussian 3x3 kernels, targets drawn evenly, float64.\n\n{gaps}"),
        ("Against the original SRN-C", paper_table()),
    ]
    keep = not (args.fast or args.no_network)
    sys.exit(0 if publish("exactness", "Exactness of stable rank normalization", sections, checks, keep) else 1)


if __name__ == "__main__":
    main()
