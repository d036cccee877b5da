"""One gradient of a penalty summed over every convolution of a network, beside the same penalty in PyTorch.

    python benchmarks/penalties.py               # the trained ResNet-50, on 2 quiet cores; records every penalty
    python benchmarks/penalties.py --only NAME   # one penalty: norm, four or tensor
    python benchmarks/penalties.py --fast    # small random layers, a minute, no download, nothing recorded

The penalty is the sum over all layers, `jaxsrn.penalties.total`: of the exact spectral norm (circular padding), of the
fantastic four by ten power steps, or of the tensor norm by ten sweeps from one start. PyTorch gets, layer by layer,
the same formula: SVDs of the symbol at half of the frequencies (one of the matrix where there is a single tap), the
same power steps, the same sweeps. Both are differentiated with respect to all kernels. It needs

    pip install -e ".[bench]" torch==2.13.0

The script fails where the two values or gradients differ, or PyTorch is faster.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import resnet50
from _clock import Timed, race
from _report import publish, table

import jaxsrn
from jaxsrn import CircularConv, bounds, penalties

try:
    import torch
except ImportError as error:
    raise SystemExit(f"The peer needs PyTorch: pip install torch ({error})") from error

STEPS = 10
SECONDS = 60.0  # of all calls of one method
# The exact norms must agree; estimates by few steps start from different random vectors.
AGREEMENT = {"norm": 1e-4, "four": 0.05, "tensor": 0.05}


class Layer(NamedTuple):
    """A float32 kernel in Flax's layout, and where it acts."""

    kernel: np.ndarray
    op: CircularConv


def trained() -> dict[str, Layer]:
    """Every convolution of ResNet-50, its image where it must be cropped or grown by one to fit the strides."""
    found = {}
    for name, layer in resnet50.load().items():
        size = tuple(-(-n // s) * s for n, s in zip(layer.input_shape, layer.strides, strict=True))
        found[name] = Layer(layer.kernel, CircularConv(size, strides=layer.strides))
    return found


def small() -> dict[str, Layer]:
    rng, shapes = np.random.default_rng(0), [(3, 3, 4, 6), (3, 3, 4, 6), (1, 1, 6, 8), (5, 5, 3, 4)]
    kernels = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return {f"layer{i}": Layer(kernel, CircularConv((8, 8), strides=1 + i // 3)) for i, kernel in enumerate(kernels)}


# PyTorch


def polyphase(kernel: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """`(terms, terms, phases * c_in, c_out)`, each axis filled up to a multiple of its stride."""
    (s, t), (c_in, c_out) = strides, kernel.shape[2:]
    kernel = torch.nn.functional.pad(kernel, (0, 0, 0, 0, 0, -kernel.shape[1] % t, 0, -kernel.shape[0] % s))
    split = kernel.reshape(kernel.shape[0] // s, s, kernel.shape[1] // t, t, c_in, c_out)
    return split.permute(0, 2, 1, 3, 4, 5).reshape(split.shape[0], split.shape[2], -1, c_out)


def torch_norm(kernel: torch.Tensor, grid) -> torch.Tensor:
    if kernel.shape[:2] == (1, 1):
        return torch.linalg.matrix_norm(kernel[0, 0], 2)
    symbol = torch.fft.rfft2(kernel, s=grid, dim=(1, 0))
    return torch.linalg.svdvals(symbol).max()


def torch_matrix_norm(matrix: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        v = torch.nn.functional.normalize(torch.randn(matrix.shape[1]), dim=0)
        for _ in range(STEPS):
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    return u @ matrix @ v


def torch_four(kernel: torch.Tensor, grid) -> torch.Tensor:
    h, w, i, o = kernel.shape
    if h * w == 1:
        return torch_matrix_norm(kernel[0, 0])
    matrices = (
        kernel.permute(2, 0, 1, 3).reshape(i * h * w, o),
        kernel.permute(2, 0, 3, 1).reshape(i * h, o * w),
        kernel.permute(2, 1, 3, 0).reshape(i * w, o * h),
        kernel.permute(2, 3, 0, 1).reshape(i, o * h * w),
    )
    return (h * w) ** 0.5 * torch.stack([torch_matrix_norm(matrix) for matrix in matrices]).min()


def torch_tensor(kernel: torch.Tensor, grid) -> torch.Tensor:
    """The higher-order power method, complex, with two steps on the channels for each on the taps."""
    h, w, _, o = kernel.shape
    if h * w == 1:
        return torch.linalg.matrix_norm(kernel[0, 0], 2)

    def unit(vector):
        return torch.nn.functional.normalize(vector.conj(), dim=0)

    with torch.no_grad():
        fixed = kernel.to(torch.complex64)
        x, y = (torch.ones(k, dtype=torch.complex64) / k**0.5 for k in (h, w))
        v = unit(torch.randn(o, dtype=torch.complex64))
        for _ in range(STEPS):
            matrix = torch.einsum("h,w,hwio->io", x, y, fixed)
            for _ in range(2):
                u = unit(matrix @ v)
                v = unit(matrix.T @ u)
            taps = torch.einsum("hwio,i,o->hw", fixed, u, v)
            for _ in range(2):
                x = unit(taps @ y)
                y = unit(taps.T @ x)
        outer = torch.einsum("h,w,i,o->hwio", x, y, u, v)
        value = (outer * fixed).sum()
        outer = (outer * value.conj() / value.abs()).real
    return (h * w) ** 0.5 * (outer * kernel).sum()


class Penalty(NamedTuple):
    """What is summed over layers, here and there."""

    title: str
    ours: Callable
    theirs: Callable


PENALTIES = {
    "norm": Penalty("exact spectral norm", jaxsrn.spectral_norm, torch_norm),
    "four": Penalty(
        f"fantastic four, {STEPS} power steps", functools.partial(bounds.fantastic_four, num_steps=STEPS), torch_four
    ),
    "tensor": Penalty(
        f"tensor norm, one start, {STEPS} sweeps",
        functools.partial(bounds.tensor_norm, num_starts=1, num_steps=STEPS),
        torch_tensor,
    ),
}


# Measuring


class Measured(NamedTuple):
    """Median seconds of a gradient, the value, and the gradients of all layers as one vector."""

    seconds: float
    value: float
    gradient: np.ndarray


def measured(run: Timed) -> Measured:
    value, gradients = run.result
    return Measured(run.seconds, float(value), np.concatenate([np.asarray(g).ravel() for g in gradients]))


def ours(penalty: Penalty, layers: dict[str, Layer]) -> Callable:
    """The compiled value and gradients."""
    params = {name: {"kernel": jnp.asarray(layer.kernel)} for name, layer in layers.items()}
    ops = {(name, "kernel"): layer.op for name, layer in layers.items()}
    compiled = jax.jit(jax.value_and_grad(lambda params: penalties.total(penalty.ours, ops, params)))
    compiled = compiled.lower(params).compile()

    def call():
        value, gradient = compiled(params)
        return value, [gradient[name]["kernel"] for name in layers]

    return call


def theirs(penalty: Penalty, layers: dict[str, Layer]) -> Callable:
    """The same in PyTorch."""
    kernels = [torch.tensor(layer.kernel, requires_grad=True) for layer in layers.values()]

    def call():
        torch.manual_seed(0)
        value = sum(
            penalty.theirs(polyphase(kernel, layer.op.strides), layer.op.grid[::-1])
            for kernel, layer in zip(kernels, layers.values(), strict=True)
        )
        return value.item(), [gradient.numpy() for gradient in torch.autograd.grad(value, kernels)]

    return call


def compare(name: str, layers: dict[str, Layer], rounds: int):
    """A row of the table and the requirements."""
    penalty = PENALTIES[name]
    runs = race({"jaxsrn": ours(penalty, layers), "PyTorch": theirs(penalty, layers)}, rounds, SECONDS)
    mine, peer = map(measured, runs.values())
    error = abs(mine.value / peer.value - 1)
    cosine = float(mine.gradient @ peer.gradient / np.linalg.norm(mine.gradient) / np.linalg.norm(peer.gradient))
    row = [penalty.title, f"{mine.seconds:.3f} s", f"{peer.seconds:.3f} s", f"{peer.seconds / mine.seconds:.1f}"]
    row += [f"{error:.1e}", f"{1 - cosine:.1e}"]
    checks = [
        (error <= AGREEMENT[name], f"{penalty.title}: values within {AGREEMENT[name]:g} ({error:.1e})"),
        (peer.seconds >= mine.seconds, f"{penalty.title}: not slower than PyTorch ({row[3]} times as fast)"),
    ]
    if name == "norm":
        checks.append((1 - cosine <= 1e-3, f"{penalty.title}: the same gradient, 1 - cosine {1 - cosine:.1e} <= 1e-3"))
    return row, checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small random layers, nothing recorded")
    parser.add_argument("--only", action="append", choices=PENALTIES, help="this penalty; may be repeated")
    args = parser.parse_args()
    layers = small() if args.fast else trained()
    met = [run(name, layers, args.fast) for name in args.only or PENALTIES]
    sys.exit(0 if all(met) else 1)


def run(name: str, layers: dict[str, Layer], fast: bool) -> bool:
    """Compares, prints and records one penalty; whether all that is required holds."""
    rounds = 2 if fast else 5
    row, checks = compare(name, layers, rounds)
    shapes = {(layer.op, layer.kernel.shape) for layer in layers.values()}
    about = (
        f"Value and gradient of the sum over {len(layers)} layers ({len(shapes)} distinct shapes, "
        f"{sum(layer.kernel.size for layer in layers.values()):,} parameters), medians of at most {rounds} calls in "
        f"turns, fewer where they would take more than {SECONDS:g} s, after one that warms up. `value`: relative "
        "difference of the two sums; `1 - cosine`: of the two gradients, all layers as one vector. "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads."
    )
    if fast:  # times of tiny layers say nothing
        checks = [check for check in checks if "not slower" not in check[1]]
    body = table(("penalty", "jaxsrn", "PyTorch", "PyTorch / jaxsrn", "value", "1 - cosine"), [row])
    sections = [("One gradient", f"{about}\n\n{body}")]
    return publish(f"penalties_{name}", f"Penalties over a network: {name}", sections, checks, not fast, name)


if __name__ == "__main__":
    main()
