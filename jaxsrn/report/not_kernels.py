"""Which arrays of a file are no kernels, by their types, names and shapes, and the reason that a report gives."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from jaxsrn.report.layouts import layout_by_name, leaf_of, parts_of
from jaxsrn.report.named_arrays import ArrayInfo

__all__ = ["OF_WRAPPER", "NoKernel", "check_is_read", "check_name_and_shape", "require"]

# The reason for leaving out the state of a wrapper of `jaxsrn.linen` or `jaxsrn.nnx`, and the names that NNX gives it.
OF_WRAPPER = "the state of a wrapper"
_STATE = re.compile(r"(^|/)state/(value/|raw_value/)?(normalized|own)/(pair|watch)(/|$)")
_STATISTICS = ("mean", "var", "moving_mean", "moving_variance", "running_mean", "running_var", "num_batches_tracked")
# Haiku has the statistics of its batch normalization in averages of these names.
_AVERAGES = re.compile(r"(.*_ema|exponential_moving_average(_\d+)?)/(average|hidden)")
_VECTORS = re.compile(r"b|bias.*|(.*_)?(bias|scale|gamma|beta|offset|mask)")
_OPTIMIZERS = (
    *("opt", "opt_state", "opt_states", "optim", "optim_state", "optimizer", "optimizer_state", "optimizer_states"),
    *("exp_avg", "exp_avg_sq", "momentum_buffer"),
)
# The state of an optax transformation is a tuple, in which the moments of one member have the names of the parameters.
_MOMENTS = re.compile(r"(^|/)\d+/(mu|nu|trace|momentum)/")


class NoKernel(Exception):
    """The array is no kernel; the message is the reason."""


def require(condition: bool, reason: str) -> None:
    """Raises `NoKernel` with the reason unless the condition holds."""
    if not condition:
        raise NoKernel(reason)


def check_is_read(info: ArrayInfo) -> None:
    """Raises `NoKernel` for arrays that are no numbers, or none that JAX computes with."""
    require(not isinstance(info.dtype, str), f"of type {info.dtype}, which is not read")
    require(
        jnp.issubdtype(info.dtype, jnp.floating),
        f"of type {info.dtype}, and kernels are real floating-point arrays",
    )
    require(np.dtype(info.dtype).itemsize <= 8, f"of type {info.dtype}, which JAX does not have")
    require(0 not in info.shape, "no entries")


def check_name_and_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raises `NoKernel` for arrays that by their name or their shape are no kernels."""
    leaf, parts = leaf_of(name), [part.lower() for part in parts_of(name)]
    require(not set(parts) & set(_OPTIMIZERS) and not _MOMENTS.search("/".join(parts)), "the state of an optimizer")
    require("stable_rank" not in parts and not _STATE.search("/".join(parts)), OF_WRAPPER)
    is_statistic = "batch_stats" in parts or leaf in _STATISTICS or _AVERAGES.fullmatch("/".join(parts[-2:]))
    require(not is_statistic, "a running statistic")
    require(len(shape) > 1, "a bias, a scale or another vector" if shape else "a number")
    require(not _VECTORS.fullmatch(leaf), "a bias or a scale of several axes")
    is_long = [size > 1 for size in shape]
    require(
        len(is_long) < 3 or sum(is_long) > 1 or layout_by_name(leaf) is not None,
        "a vector along one of its axes",
    )
    halves = ("weight_v", "weight_g", "original0", "original1")
    require(leaf not in halves, "one half of a weight normalization; save the weights with it removed")
    require(
        leaf != "weight_orig" and not (leaf == "original" and "parametrizations" in parts),
        "a weight before a normalization or a mask of PyTorch; save the weights with it removed",
    )
    require(
        not re.search("pos_?emb|position|token|cls", leaf) or leaf.endswith("weight") or len(shape) == 2,
        "positions or tokens, which are added to the input",
    )
