"""How other libraries are asked for the norm of a layer.

A case is one of `data/exact_norms.json` (`data/check_exact_norms.py` describes its fields). Every function returns the
library's number for a case, or None where the library does not offer the geometry. Libraries are imported when they are
asked, so that those that are not installed can be named.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jaxsrn

sys.path.append(str(Path(__file__).with_name("data")))
import check_exact_norms

# Power iteration on these small matrices: enough for 1e-7 where neighbouring singular values differ by 1%.
POWER_STEPS = 300
# Gram iterations. A circular layer's are cheap. With zero padding the taps on an axis double with each: after 5 (the
# default is 4) 7x7 taps have become 193x193, which takes gigabytes. What is too much is then a 32nd root.
CIRCULAR_GRAM_STEPS, PADDED_GRAM_STEPS = 12, 5
# Samples on each axis for layers of cases without edges, where a library needs an image.
SOME_SIZE = 8


# jaxsrn and NumPy.


def operator_of(case: dict) -> jaxsrn.Operator:
    """The operator of a case."""
    if not case["strides"]:
        return jaxsrn.Dense()
    options = {"kernel_dilation": case["kernel_dilation"], "feature_group_count": case["groups"]}
    options["strides"] = case["strides"]
    if case["boundary"] == "none":
        return jaxsrn.UnboundedConv(**options)
    if case["boundary"] == "circular":
        return jaxsrn.CircularConv(case["input_shape"], **options)
    padding = _padding_of(case)
    return jaxsrn.ZeroPaddedConv(case["input_shape"], padding=padding, input_dilation=case["input_dilation"], **options)


def ask_jaxsrn(case: dict) -> float:
    import jax.numpy as jnp

    return float(jaxsrn.spectral_norm(jnp.asarray(case["kernel"]), operator_of(case)))


def ask_two_lines(case: dict) -> float | None:
    """The two lines of Sedghi, Gupta, Long 2019, for any number of axes."""
    plain = all(value == 1 for name in ("strides", "kernel_dilation") for value in case[name])
    if case["boundary"] != "circular" or not plain or case["groups"] != 1:
        return None
    symbol = np.fft.fftn(case["kernel"], case["input_shape"], axes=range(len(case["input_shape"])))
    return np.linalg.svd(symbol, compute_uv=False).max()


def ask_reshaped(case: dict) -> float:
    return np.linalg.norm(case["kernel"].reshape(-1, case["kernel"].shape[-1]), 2)


# Flax.


def ask_flax(case: dict) -> float:
    import jax.numpy as jnp
    from flax import nnx

    c_in, c_out = case["kernel"].shape[-2] * case["groups"], case["kernel"].shape[-1]
    options = {"use_bias": False, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    if case["strides"]:
        # Without edges the layer has some padding, which its one number does not depend on.
        padding = "SAME" if case["padding"] is None else _padding_of(case)
        geometry = {name: case[name] for name in ("strides", "input_dilation", "kernel_dilation")}
        taps, groups = case["kernel"].shape[:-2], case["groups"]
        layer = nnx.Conv(c_in, c_out, taps, padding=padding, feature_group_count=groups, **geometry, **options)
    else:
        layer = nnx.Linear(c_in, c_out, **options)
    layer.kernel[...] = jnp.asarray(case["kernel"])
    _is_the_layer(case, layer)
    wrapper = nnx.SpectralNorm(layer, n_steps=POWER_STEPS, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    wrapper(jnp.zeros((2, *_image_shape(case), c_in)))
    return float(wrapper.batch_stats["kernel", "sigma"][...])


# PyTorch.


def ask_torch(case: dict) -> float | None:
    import torch

    *_, layer = torch_layers(case)
    before = layer.weight.norm()
    torch.manual_seed(0)
    torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=POWER_STEPS)
    return float((before / layer.weight.norm()).detach())


def torch_layers(case: dict):
    """A layer of PyTorch with the kernel of the case, behind one that pads where it must, in float64."""
    import torch

    axes, kernel = len(case["strides"]), torch.tensor(case["kernel"])
    c_in, c_out = kernel.shape[-2] * case["groups"], kernel.shape[-1]
    options = {"bias": False, "dtype": torch.float64}
    if not axes:
        return _loaded(torch.nn.Sequential(torch.nn.Linear(c_in, c_out, **options)), kernel.T)
    taps, order = tuple(kernel.shape[:-2]), range(axes)
    if set(case["input_dilation"]) != {1}:
        # The transposed layer crops what its taps reach beyond the padding, and holds its taps the other way round.
        crop = [k - 1 - low for k, (low, _) in zip(taps, case["padding"], strict=True)]
        make = getattr(torch.nn, f"ConvTranspose{axes}d")
        layer = make(c_in, c_out, taps, tuple(case["input_dilation"]), crop, **options)
        return _loaded(torch.nn.Sequential(layer), kernel.flip(*order).permute(axes, axes + 1, *order))
    make = getattr(torch.nn, f"Conv{axes}d")
    layer = make(
        c_in, c_out, taps, tuple(case["strides"]), dilation=tuple(case["kernel_dilation"]), groups=case["groups"],
        **options,
    )  # fmt: skip
    return _loaded(torch.nn.Sequential(*_padding(case, axes, torch.nn), layer), kernel.permute(axes + 1, axes, *order))


def _padding(case, axes, nn) -> list:
    """The padding that comes first; PyTorch lists the last axis first."""
    if case["boundary"] == "none" or not np.any(case["padding"]):
        return []
    kind = "Circular" if case["boundary"] == "circular" else "Zero"
    return [getattr(nn, f"{kind}Pad{axes}d")(tuple(np.ravel(case["padding"][::-1]).tolist()))]


def _loaded(layers, weight):
    layers[-1].weight.data[...] = weight
    return layers


# orthogonium.


def ask_orthogonium(case: dict) -> float | None:
    from orthogonium.layers.conv.singular_values import get_conv_sv

    taps, circular = case["kernel"].shape[:-2], case["boundary"] == "circular"
    if len(taps) != 2 or len(set(taps)) != 1 or (circular and len(set(case["input_shape"])) != 1):
        return None
    *_, layer = torch_layers(case)
    layer.padding_mode = "circular" if circular else "zeros"
    steps, size = (CIRCULAR_GRAM_STEPS, case["input_shape"][0]) if circular else (PADDED_GRAM_STEPS, None)
    return float(get_conv_sv(layer, n_iter=steps, return_stab_rank=False, imsize=size))


# deel-torchlip.


def ask_torchlip_layer(case: dict) -> float | None:
    return None if torchlip_kernel(case) is None else 1.0


def truth_of_torchlip_layer(case: dict) -> float:
    """The norm of the layer that deel-torchlip makes of the kernel."""
    own = case | {"kernel": torchlip_kernel(case)}
    return check_exact_norms.norm_of(own)


def torchlip_kernel(case: dict) -> np.ndarray | None:
    """The kernel, in Flax's layout, of the constrained layer whose parameter is that of the case."""
    import torch
    from deel import torchlip

    axes = len(case["strides"])
    dilated, transposed = {*case["kernel_dilation"]} - {1}, {*case["input_dilation"]} - {1}
    if axes == 3 or case["groups"] != 1 or (dilated and axes == 2) or (transposed and axes == 1):
        return None
    *_, plain = torch_layers(case)
    torch.manual_seed(0)
    if axes:
        make = getattr(torchlip, f"SpectralConv{'Transpose' if transposed else ''}{axes}d")
        # The constraint depends on the taps and the stride alone, not on padding or dilation.
        layer = make(plain.in_channels, plain.out_channels, plain.kernel_size, stride=plain.stride, bias=False)
    else:
        layer = torchlip.SpectralLinear(plain.in_features, plain.out_features, bias=False)
    layer.double().parametrizations.weight.original.data[...] = plain.weight.data
    # One power step each time that the weight is read in training.
    with torch.no_grad():
        for _ in range(POWER_STEPS):
            weight = layer.weight
    taps = range(axes)
    if transposed:
        return weight.permute(*range(2, 2 + axes), 0, 1).flip(*taps).numpy()
    return weight.permute(*range(2, 2 + axes), 1, 0).numpy()


def ask_torchlip_jacobian(case: dict) -> float | None:
    import torch
    from deel.torchlip.utils import evaluate_lip_const

    if case["boundary"] == "none":
        return None
    layers = torch_layers(case)
    channels = case["kernel"].shape[-2] * case["groups"]
    _is_the_layer(case, lambda x: np.moveaxis(layers(_channels_first(x)).detach().numpy(), 1, -1))
    torch.manual_seed(0)
    image = torch.randn((1, channels, *case["input_shape"]), dtype=torch.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate_lip_const(layers, image, evaluation_type="jacobian_norm")


# weightwatcher.


def ask_weightwatcher(case: dict) -> float | None:
    import weightwatcher

    with contextlib.redirect_stdout(io.StringIO()):
        details = weightwatcher.WeightWatcher(model=torch_layers(case)).analyze(min_evals=1, conv2d_norm=False)
    if not len(details):
        return None
    # Its spectral norm is an eigenvalue of W^T W.
    return float(np.sqrt(details["spectral_norm"].iloc[0]))


# What they are asked with.


def _padding_of(case: dict) -> str | list[tuple[int, int]]:
    """The padding as JAX and Flax take it, by its name where it has one."""
    return case["padding_name"] or [(low, high) for low, high in case["padding"]]


def _image_shape(case: dict) -> tuple[int, ...]:
    return (SOME_SIZE,) * len(case["strides"]) if case["input_shape"] is None else tuple(case["input_shape"])


def _channels_first(x):
    import torch

    return torch.tensor(np.moveaxis(x, -1, 1))


def _is_the_layer(case: dict, layer: Callable) -> None:
    """A peer must be asked about the very map whose norm is in the file."""
    if case["boundary"] == "none":
        return
    channels = case["kernel"].shape[-2] * case["groups"]
    images = np.random.default_rng(0).standard_normal((2, *case["input_shape"], channels))
    np.testing.assert_allclose(layer(images), check_exact_norms.applied(case, images), atol=1e-10)
