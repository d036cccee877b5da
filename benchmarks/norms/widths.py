"""Part `widths`: how wide is the interval of `bounds.certified` at its default resolution?"""

from __future__ import annotations

import numpy as np
from _report import table
from tqdm import tqdm

from jaxsrn import CircularConv, bounds
from norms.cases import trained
from norms.in_jax import jax_call, relative_width
from norms.parts import Effort, Part


def width_cases(effort: Effort) -> dict[str, tuple[CircularConv, list[np.ndarray]]]:
    """Families of kernels, each of one shape, as `{name: (operator, kernels)}`."""
    rng = np.random.default_rng(0)
    shapes = {
        "Gaussian (8, 8, 3)": (CircularConv((8, 8)), (3, 3, 8, 8)),
        "Gaussian (16, 16, 3)": (CircularConv((16, 16)), (3, 3, 16, 16)),
        "Gaussian (32, 4, 3)": (CircularConv((32, 32)), (3, 3, 4, 4)),
        "Gaussian (33, 32, 3)": (CircularConv((33, 33)), (3, 3, 32, 32)),
        "Gaussian (64, 16, 5)": (CircularConv((64, 64)), (5, 5, 16, 16)),
        "Gaussian (64, 8, 7), stride 2": (CircularConv((64, 64), strides=2), (7, 7, 8, 8)),
        "Gaussian 1-D (64, 16, 5)": (CircularConv((64,)), (5, 16, 16)),
    }
    count = 2 if effort.fast else 20
    chosen = dict(list(shapes.items())[:2]) if effort.fast else shapes
    families = {
        name: (op, [rng.standard_normal(shape).astype(np.float32) for _ in range(count)])
        for name, (op, shape) in chosen.items()
    }
    for cases in trained().values() if effort.network else ():
        if len(cases) > 1:
            for n in (32, 64):
                name = f"ResNet-50 kernels ({n}, {cases[0].kernel.shape[-1]}, 3)"
                families[name] = CircularConv((n, n)), [case.kernel for case in cases]
    return families


def widths(effort: Effort) -> Part:
    """The part: a row is a family of kernels; the median over all those on images of at least 32 is required."""
    rows, large = [], []
    for name, (op, kernels) in tqdm(width_cases(effort).items(), desc="widths", leave=False):
        width = np.array([relative_width(jax_call(bounds.certified, kernel, op)()) for kernel in kernels])
        rows.append([name, len(width), f"{np.median(width):.1e}", f"{np.max(width):.1e}"])
        if op.input_shape[0] >= 32:
            large.append(width)
    text = "`upper / lower - 1` of `bounds.certified` at its default resolution, circular padding."
    text = f"{text}\n\n{table(('kernels', 'number', 'median', 'maximum'), rows)}"
    if not large:
        return Part([("Width of the interval", text)], [], {})
    median, largest = np.median(np.concatenate(large)), np.max(np.concatenate(large))
    check = f"certified, n >= 32: width {median:.1e} in the median, at most 1e-2 required; maximum {largest:.1e}"
    return Part([("Width of the interval", text)], [(median <= 0.01, check)], {})
