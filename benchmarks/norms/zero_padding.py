"""Part `zero-padding`: errors of norms with zero padding, the products with the layer that they take, and times."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from _clock import race
from _report import duration, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import ZeroPaddedConv, bounds
from norms.cases import Case, gaussian, trained
from norms.in_jax import jax_call
from norms.kinds import gaussian_kernel, peaked, waves
from norms.parts import TOLERANCE, Checks, Effort, Part, error_table
from norms.peers import torch_power, torch_weight
from norms.products import Search, probabilistic, search

ERRORS = """\
float32; Gaussian, peaked kernels and sums of three waves, against the SVD of the whole matrix in float64.
Small layers, whose norms are proven:"""
LARGER = "Larger layers, whose norms are searched without a proof:"
PRODUCTS = """\
Products with the operator or its adjoint, counted as they run, with their share of power iteration's. Power
iteration starts from a random image and stops 0.1% below the norm (or after 4000 products). Lanczos, the
method of `leading_triplet`, stops at the largest `tolerance` of 1/2, 1/4, ... at which the norm is within
1e-5. Both as only those can who know the norm; `spectral_norm` stops by itself, when the vectors are there,
which are its gradient. Its error is against ARPACK in float64. The widths are those of the intervals of
`bounds.certified` and of `bounds.probabilistic`, which fails with a probability of at most 1e-9."""
TIMES = "Times; of power iteration, as published, with the number of steps that it takes to 1e-3:"
# The norm is proven where the matrix has at most 512 x 512 entries, and searched where it has more.
PROVEN = {
    "SAME, even": (ZeroPaddedConv((8, 8)), (3, 3, 4, 4)),
    "SAME, odd": (ZeroPaddedConv((9, 7)), (3, 3, 6, 3)),
    "SAME, 5x5": (ZeroPaddedConv((8, 8)), (5, 5, 3, 3)),
    "VALID": (ZeroPaddedConv((10, 10), padding="VALID"), (3, 3, 4, 4)),
    "CAUSAL": (ZeroPaddedConv((48,), padding="CAUSAL"), (5, 4, 4)),
    "strided": (ZeroPaddedConv((12, 12), strides=2), (3, 3, 3, 6)),
    "dilated": (ZeroPaddedConv((10, 10), kernel_dilation=2), (3, 3, 3, 3)),
    "transposed": (ZeroPaddedConv((5, 5), padding=((1, 2), (1, 2)), input_dilation=2), (3, 3, 4, 3)),
    "grouped": (ZeroPaddedConv((8, 8), feature_group_count=2), (3, 3, 3, 6)),
    "3-D": (ZeroPaddedConv((4, 4, 4)), (3, 3, 3, 3, 3)),
}
SEARCHED = {
    "SAME, even": (ZeroPaddedConv((10, 10)), (3, 3, 6, 6)),
    "SAME, odd": (ZeroPaddedConv((15, 9)), (3, 3, 6, 4)),
    "SAME, 5x5": (ZeroPaddedConv((14, 14)), (5, 5, 3, 3)),
    "VALID": (ZeroPaddedConv((16, 16), padding="VALID"), (3, 3, 3, 4)),
    "CAUSAL": (ZeroPaddedConv((160,), padding="CAUSAL"), (5, 4, 4)),
    "strided": (ZeroPaddedConv((24, 24), strides=2), (3, 3, 2, 4)),
    "dilated": (ZeroPaddedConv((15, 15), kernel_dilation=2), (3, 3, 3, 3)),
    "transposed": (ZeroPaddedConv((9, 9), padding=((1, 2), (1, 2)), input_dilation=2), (3, 3, 8, 2)),
    "grouped": (ZeroPaddedConv((12, 12), feature_group_count=2), (3, 3, 2, 4)),
    "3-D": (ZeroPaddedConv((6, 6, 6)), (3, 3, 3, 3, 3)),
}


def dense_errors(op: ZeroPaddedConv, shape, count: int) -> list[float]:
    """Relative errors of `spectral_norm` against the SVD of the explicit matrix, for `count` kernels of a shape."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle((gaussian_kernel, peaked, waves))
    errors = []
    for kind in itertools.islice(kinds, count):
        kernel = kind(rng, shape).astype(np.float32)
        # `to_dense` only moves entries: float32 loses nothing.
        exact = np.linalg.norm(np.asarray(op.to_dense(kernel), np.float64), 2)
        errors.append(abs(float(jax_call(jaxsrn.spectral_norm, kernel, op)()) / exact - 1))
    return errors


def errors_by_geometry(geometries: dict, effort: Effort) -> dict[str, list[float]]:
    """The errors in each geometry, by its name."""
    chosen, count = (list(geometries.items())[:2], 3) if effort.fast else (geometries.items(), 60)
    return {name: dense_errors(*where, count) for name, where in tqdm(chosen, desc="zero padding", leave=False)}


def product_cases(effort: Effort) -> list[Case]:
    """The kernels for which products are counted and times taken."""
    if effort.fast:
        return [gaussian(8, 4, 3)]
    cases = [gaussian(n, c, k) for n, c, k in ((14, 32, 3), (28, 32, 3), (32, 64, 3), (56, 16, 5), (112, 16, 3))]
    # The first of each stage: the float64 reference takes most of the time.
    return cases + ([stage[0] for stage in trained().values() if len(stage) > 1] if effort.network else [])


def padded_times(case: Case, op: ZeroPaddedConv, steps: int, effort: Effort) -> list[str]:
    """The times of power iteration, of `spectral_norm` and of both intervals, and the ratio of the first two."""
    calls = {
        "power": functools.partial(
            torch_power, torch_weight(case.kernel), op.input_shape, max(steps, 1), circular=False
        ),
        "own": jax_call(jaxsrn.spectral_norm, case.kernel, op),
        "certified": jax_call(bounds.certified, case.kernel, op),
        "probabilistic": jax_call(probabilistic, case.kernel, op),
    }
    power, own, *intervals = (run.seconds for run in race(calls, effort.rounds, effort.seconds).values())
    return [duration(power), duration(own), f"{power / own:.1f}", *map(duration, intervals)]


def product_row(case: Case, found: Search) -> list[str]:
    """The products of each method, with their shares of power iteration's, the error and the width."""
    counts = zip((found.fewest, found.own), found.shares, strict=True)
    both = [f"{count:.0f} ({share:.0%})" for count, share in counts]
    return [case.name, str(found.power), *both, *(f"{number:.1e}" for number in (found.error, *found.widths))]


def error_checks(proven: dict, searched: dict, found: list[Search]) -> Checks:
    """Every error is within the tolerance, and every interval holds the norm."""
    worst = {
        "small layers": max(itertools.chain(*proven.values())),
        "larger layers": max(itertools.chain(*searched.values())),
        "each of these kernels": max(one.error for one in found),
    }
    within = [
        (error <= TOLERANCE, f"zero padding, {name}: error {error:.1e}, at most {TOLERANCE:g}")
        for name, error in worst.items()
    ]
    inside = all(one.inside for one in found)
    return [*within, (inside, "zero padding: both intervals hold ARPACK's norm of each of these kernels")]


def product_checks(found: list[Search]) -> Checks:
    """Every search takes at most a fifth of power iteration's products."""
    checks = []
    by_method = zip(*(one.shares for one in found), strict=True)
    for name, shares in zip(("to 1e-5", "spectral_norm"), by_method, strict=True):
        met = sum(share <= 0.2 for share in shares)
        text = f"at most 20% for {met} of {len(shares)} kernels; median {np.median(shares):.0%}"
        text = f"{text}, largest {max(shares):.0%}"
        checks.append((met == len(shares), f"zero padding: products, {name}, of power iteration's for 1e-3: {text}"))
    return checks


def zero_padding(effort: Effort) -> Part:
    """The part: errors in every geometry, then products and times of some kernels with SAME padding."""
    proven, searched = (errors_by_geometry(geometries, effort) for geometries in (PROVEN, SEARCHED))
    rows, times, found = [], [], []
    for case in tqdm(product_cases(effort), desc="products", leave=False):
        op = ZeroPaddedConv(case.op.input_shape)
        found.append(search(case.kernel, op))
        rows.append(product_row(case, found[-1]))
        times.append([case.name, *padded_times(case, op, found[-1].power // 2, effort)])
    methods = ("power iteration, to 1e-3", "Lanczos, to 1e-5", "spectral_norm")
    header = ("kernel, SAME", *methods, "error", "certified", "probabilistic")
    clock = ("kernel, SAME", "power iteration, to 1e-3 (PyTorch)", "spectral_norm", "ratio", *header[-2:])
    errors = (error_table("geometry (zero padding)", geometries) for geometries in (proven, searched))
    tables = (*errors, table(header, rows), table(clock, times))
    body = itertools.chain(*zip((ERRORS, LARGER, PRODUCTS, TIMES), tables, strict=True))
    checks = error_checks(proven, searched, found) + ([] if effort.fast else product_checks(found))
    return Part([("Zero padding", "\n\n".join(body))], checks, {})
