"""The norm as others compute, bound or estimate it: NumPy, PyTorch, flax.nnx and orthogonium."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from tqdm import tqdm

DEVICE = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def numpy_two_liner(kernel, size):
    """The two lines of Sedghi, Gupta, Long 2019: SVDs at all frequencies."""
    symbol = np.fft.fft2(kernel, size, axes=(0, 1))
    return np.max(np.linalg.svd(symbol, compute_uv=False))


def torch_weight(kernel: np.ndarray) -> torch.Tensor:
    """The kernel in PyTorch's layout, where PyTorch computes."""
    return torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), device=DEVICE)


@torch.inference_mode()
def torch_two_liner(kernel, size) -> float:
    """The two lines in PyTorch, on a kernel in Flax's layout."""
    symbol = torch.fft.fft2(kernel, size, dim=(0, 1))
    return torch.linalg.svdvals(symbol).max().item()


@torch.inference_mode()
def torch_gram(weight, size, steps: int) -> float:
    """Gram iteration (Delattre et al. 2023, algorithm 3), on half of the frequencies as in the authors' code."""
    if weight.shape[1] > weight.shape[0]:
        weight = weight.transpose(0, 1)
    gram = torch.fft.rfft2(weight, s=size).flatten(2).permute(2, 0, 1)
    log_scale = torch.zeros(len(gram), device=gram.device)
    for _ in range(steps):
        norm = gram.norm(dim=(1, 2))
        log_scale = 2 * (log_scale + norm.log())
        gram = gram / norm[:, None, None]
        gram = torch.bmm(gram.mH, gram)
    return ((gram.norm(dim=(1, 2)).log() + log_scale) / 2**steps).exp().max().item()


def torch_maps(weight, circular: bool) -> tuple[Callable, Callable]:
    """A layer with an odd number of taps, circular or SAME, and its adjoint."""
    reach = weight.shape[-1] - 1
    if not circular:
        same = {"weight": weight, "padding": reach // 2}
        return functools.partial(F.conv2d, **same), functools.partial(F.conv_transpose2d, **same)
    return (
        lambda x: F.conv2d(F.pad(x, (0, reach, 0, reach), mode="circular"), weight),
        lambda y: F.conv_transpose2d(F.pad(y, (reach, 0, reach, 0), mode="circular"), weight, padding=reach),
    )


@torch.inference_mode()
def torch_power(weight, size, steps: int, circular: bool = True) -> float:
    """Power iteration with the real operator (Ryu et al. 2019)."""
    forward, adjoint = torch_maps(weight, circular)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn((1, len(weight), *size), generator=generator).to(weight.device)
    for _ in range(steps):
        v = adjoint(u)
        v = v / v.norm()
        image = forward(v)
        u = image / image.norm()
    return (u * forward(v)).sum().item()


def flax_norm(steps: int, kernel, op):
    """What `flax.nnx.SpectralNorm` divides a layer by, from its fresh state: power iteration on a flattened kernel."""
    *taps, c_in, c_out = kernel.shape
    layer = nnx.Conv(c_in, c_out, taps, padding="CIRCULAR", use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    wrapper = nnx.SpectralNorm(layer, n_steps=steps, rngs=nnx.Rngs(0))
    # The norm does not depend on the image, and XLA drops the layer's output.
    wrapper(jnp.zeros((1, *op.input_shape, c_in)))
    return wrapper.batch_stats["kernel", "sigma"][...]


FLAX = {steps: functools.partial(flax_norm, steps) for steps in (1, 10)}


@functools.cache
def orthogonium_norm() -> Callable | None:
    """`orthogonium`'s `get_conv_sv`, or `None` with a note where it is not installed."""
    try:
        from orthogonium.layers.conv.singular_values import get_conv_sv
    except ImportError as error:
        tqdm.write(f"orthogonium is left out: {error} (pip install orthogonium)")
        return None
    return get_conv_sv


def orthogonium_call(weight, size, steps: int) -> Callable | None:
    """`get_conv_sv` of a circular layer with these weights, or `None` where orthogonium is not installed."""
    if orthogonium_norm() is None:
        return None
    layer = torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], padding_mode="circular", bias=False)
    layer.weight = torch.nn.Parameter(weight)

    @torch.inference_mode()
    def call() -> float:
        return orthogonium_norm()(layer, n_iter=steps, return_stab_rank=False, imsize=size[0]).item()

    return call
