"""Part `correctness`: is any norm off by more than 1e-5, over kinds of kernels and geometries of circular layers?"""

from __future__ import annotations

import itertools

import jax
import numpy as np
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv
from norms.cases import reference_norm, trained
from norms.in_jax import jax_call
from norms.kinds import KINDS
from norms.parts import TOLERANCE, Effort, Part, error_table

GEOMETRIES = {
    "even": (CircularConv((16, 16)), (3, 3, 8, 8)),
    "odd": (CircularConv((15, 15)), (3, 3, 8, 8)),
    "rectangular": (CircularConv((12, 9)), (3, 5, 6, 4)),
    "32 channels": (CircularConv((32, 32)), (3, 3, 32, 32)),
    "many to few channels": (CircularConv((14, 14)), (3, 3, 24, 6)),
    "strided": (CircularConv((16, 16), strides=2), (3, 3, 4, 8)),
    "strided, 7x7": (CircularConv((24, 24), strides=2), (7, 7, 3, 8)),
    "dilated": (CircularConv((15, 15), kernel_dilation=2), (3, 3, 4, 4)),
    "grouped": (CircularConv((12, 12), feature_group_count=2), (3, 3, 4, 8)),
    "depthwise": (CircularConv((16, 16), feature_group_count=8), (3, 3, 1, 8)),
    "1-D": (CircularConv((64,)), (5, 8, 8)),
    "1-D, one channel": (CircularConv((33,)), (5, 1, 1)),
    "3-D": (CircularConv((6, 6, 6)), (3, 3, 3, 4, 4)),
    "aliased": (CircularConv((4, 4)), (7, 7, 4, 4)),
    "aliased by dilation": (CircularConv((6, 5), kernel_dilation=3), (3, 3, 4, 4)),
}


def kernels_of(kind: str, rng, op: CircularConv, shape, count: int) -> list[np.ndarray]:
    """Kernels of one kind and of very different scales, whose groups are drawn one by one."""
    groups = op.feature_group_count
    kernels = []
    for _ in range(count):
        parts = [KINDS[kind](rng, (*shape[:-1], shape[-1] // groups)) for _ in range(groups)]
        if parts[0] is not None:
            kernels.append((np.concatenate(parts, axis=-1) * 10 ** rng.uniform(-3, 3)).astype(np.float32))
    return kernels


def kernel_errors(kernels: list[np.ndarray], op: CircularConv) -> np.ndarray:
    """Relative errors of `spectral_norm`: of one call a kernel and one of all under `vmap`, the larger error."""
    stack = np.stack(kernels)
    batched = jax.jit(jax.vmap(jaxsrn.spectral_norm, (0, None)), static_argnums=1)(stack, op)
    single = [jax_call(jaxsrn.spectral_norm, kernel, op)() for kernel in kernels]
    exact = np.array([reference_norm(kernel, op) for kernel in kernels])
    return np.max([np.abs(np.asarray(found, np.float64) / exact - 1) for found in (batched, single)], axis=0)


def correctness(effort: Effort) -> Part:
    """The part: every kind of kernel in every geometry, and the trained kernels at their true sizes."""
    fast = effort.fast
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_geometry: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    for name, (op, shape) in tqdm(list(GEOMETRIES.items())[:: 7 if fast else 1], desc="correctness", leave=False):
        drawn = []
        for kind in KINDS:
            count = 0 if kind == "trained" and not effort.network else 2 if fast else 6
            drawn += [(kind, kernel) for kernel in kernels_of(kind, rng, op, shape, count)]
        by_geometry[name] = kernel_errors([kernel for _, kernel in drawn], op).tolist()
        for (kind, _), error in zip(drawn, by_geometry[name], strict=True):
            by_kind[kind].append(error)
    if effort.network:
        cases = list(itertools.chain(*trained().values()))
        by_kind["trained, true size"] = [
            abs(float(jax_call(jaxsrn.spectral_norm, case.kernel, case.op)()) / case.norm - 1) for case in cases
        ]
    errors = list(itertools.chain(*by_kind.values()))
    misses = sum(not error <= TOLERANCE for error in errors)
    text = (
        "float32, scales from 1e-3 to 1e3, against NumPy's SVDs in float64; every kernel in a call of its own and\n"
        f"under `vmap`, the larger error of the two. Misses: errors above {TOLERANCE:g}, or NaN."
    )
    tables = error_table("kind", by_kind), error_table("geometry (circular)", by_geometry)
    check = misses == 0 and (fast or len(errors) >= 500), f"spectral_norm: {misses} misses in {len(errors)} kernels"
    return Part([("Correctness", "\n\n".join([text, *tables]))], [check], {})
