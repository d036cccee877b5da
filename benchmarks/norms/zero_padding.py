"""Part `zero-padding`: errors, products with the layer and times of norms with zero padding."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import scipy.sparse.linalg
import torch
from _report import table
from tqdm import tqdm

import jaxsrn
from jaxsrn import ZeroPaddedConv, bounds
from norms.cases import Case, gaussian, trained
from norms.clock import race
from norms.kinds import gaussian_kernel, peaked, waves
from norms.methods import ends, jax_call
from norms.parts import TOLERANCE, Effort, Part, duration, error_table
from norms.peers import DEVICE, torch_maps, torch_power
from norms.products import fewest_products, own_products, power_products

# Up to 512 x 512 entries norms are proven, above searched.
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
    """Relative errors of `spectral_norm` against the SVD of the explicit matrix."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle((gaussian_kernel, peaked, waves))
    errors = []
    for kind in itertools.islice(kinds, count):
        kernel = kind(rng, shape).astype(np.float32)
        # to_dense only moves entries: float32 loses nothing.
        exact = np.linalg.norm(np.asarray(op.to_dense(kernel), np.float64), 2)
        errors.append(abs(float(jax_call(jaxsrn.spectral_norm, kernel, op)()) / exact - 1))
    return errors


def errors_by_geometry(geometries: dict, effort: Effort) -> dict[str, list[float]]:
    chosen, count = (list(geometries.items())[:2], 3) if effort.fast else (geometries.items(), 60)
    return {name: dense_errors(*where, count) for name, where in tqdm(chosen, desc="zero padding", leave=False)}


def arpack_norm(kernel: np.ndarray, op: ZeroPaddedConv) -> float:
    """The norm with SAME padding and an odd number of taps, by ARPACK and PyTorch's convolution in float64."""
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), dtype=torch.float64)

    def product(convolution, channels):
        def apply(x):
            return convolution(torch.from_numpy(x.reshape((1, channels, *op.input_shape)))).numpy().reshape(-1)

        return apply

    sizes = [c * math.prod(op.input_shape) for c in weight.shape[:2]]
    forward, adjoint = map(product, torch_maps(weight, circular=False), weight.shape[1::-1])
    operator = scipy.sparse.linalg.LinearOperator(sizes, forward, adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(sizes))
    return float(scipy.sparse.linalg.svds(operator, k=1, tol=1e-9, v0=start, return_singular_vectors=False)[0])


def product_cases(effort: Effort) -> list[Case]:
    if effort.fast:
        return [gaussian(8, 4, 3)]
    cases = [gaussian(n, c, k) for n, c, k in ((14, 32, 3), (28, 32, 3), (32, 64, 3), (56, 16, 5), (112, 16, 3))]
    # The first of each stage: the float64 reference takes most of the time.
    return cases + ([stage[0] for stage in trained().values() if len(stage) > 1] if effort.network else [])


def padded_times(case: Case, op: ZeroPaddedConv, steps: int, effort: Effort) -> list[str]:
    """Of power iteration and of `spectral_norm`, and how many times longer the former takes."""
    weight = torch.tensor(case.kernel.transpose(3, 2, 0, 1).copy(), device=DEVICE)
    calls = {
        "power": functools.partial(torch_power, weight, op.input_shape, max(steps, 1), circular=False),
        "own": jax_call(jaxsrn.spectral_norm, case.kernel, op),
    }
    power, own = (run.seconds for run in race(calls, effort).values())
    return [duration(power), duration(own), f"{power / own:.1f}"]


def zero_padding(effort: Effort) -> Part:
    proven, searched = (errors_by_geometry(geometries, effort) for geometries in (PROVEN, SEARCHED))
    rows, times, shares, errors, inside = [], [], [], [], True
    for case in tqdm(product_cases(effort), desc="products", leave=False):
        op = ZeroPaddedConv(case.op.input_shape)
        exact = arpack_norm(case.kernel, op)
        value, own = own_products(case.kernel, op)
        fewest = fewest_products(case.kernel, op, exact)
        power = power_products(case.kernel, op, exact)
        errors.append(abs(value / exact - 1))
        shares.append((fewest / power, own / power) if fewest else (math.inf, math.inf))
        lower, upper = ends(jax_call(bounds.certified, case.kernel, op)())
        inside = inside and lower <= exact <= upper
        both = [f"{count:.0f} ({share:.0%})" for count, share in zip((fewest, own), shares[-1], strict=True)]
        rows.append([case.name, power, *both, f"{errors[-1]:.1e}", f"{upper / lower - 1:.1e}"])
        times.append([case.name, *padded_times(case, op, power // 2, effort)])
    header = ("kernel, SAME", "power iteration, to 1e-3", "Lanczos, to 1e-5", "spectral_norm", "error", "width")
    clock = ("kernel, SAME", "power iteration, to 1e-3 (PyTorch)", "spectral_norm", "ratio")
    text = (
        "float32; Gaussian, peaked kernels and sums of three waves, against the SVD of the whole matrix in float64.\n"
        "Small layers, whose norms are proven:\n\n"
        f"{error_table('geometry (zero padding)', proven)}\n\n"
        "Larger layers, whose norms are searched without a proof:\n\n"
        f"{error_table('geometry (zero padding)', searched)}\n\n"
        "Products with the operator or its adjoint, counted as they run, with their share of power iteration's. Those\n"
        "with the layer of few channels, in which a wide one is searched first, count as far as they multiply. Power\n"
        "iteration starts from a random image and stops 0.1% below the norm (or after 4000 products). Lanczos, the\n"
        "method of `leading_triplet`, stops at the largest `tolerance` of 1/2, 1/4, ... at which the norm is within\n"
        "1e-5. Both as only those can who know the norm; `spectral_norm` stops by itself, when the vectors are there,\n"
        "which are its gradient. Its error is against ARPACK in float64; the width is that of `bounds.certified`.\n\n"
        f"{table(header, rows)}\n\n"
        "Times; of power iteration, as published, with the number of steps that it takes to 1e-3:\n\n"
        f"{table(clock, times)}"
    )
    worst = {
        "small layers": max(itertools.chain(*proven.values())),
        "larger layers": max(itertools.chain(*searched.values())),
        "each of these kernels": max(errors),
    }
    checks = [
        *(
            (error <= TOLERANCE, f"zero padding, {name}: error {error:.1e}, at most {TOLERANCE:g}")
            for name, error in worst.items()
        ),
        (inside, "zero padding: certified holds ARPACK's norm of each of these kernels"),
    ]
    if not effort.fast:
        for name, own in zip(("to 1e-5", "spectral_norm"), zip(*shares, strict=True), strict=True):
            met = sum(share <= 0.2 for share in own)
            found = f"at most 20% for {met} of {len(own)} kernels; median {np.median(own):.0%}, largest {max(own):.0%}"
            checks.append((met == len(own), f"zero padding: products, {name}, of power iteration's for 1e-3: {found}"))
    return Part([("Zero padding", text)], checks, {})
