"""Every method by its name in the tables, as a call without arguments that has been compiled for one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

import jaxsrn
from jaxsrn import bounds
from norms.cases import Case
from norms.in_jax import jax_call, two_liner
from norms.peers import (
    DEVICE,
    FLAX,
    numpy_two_liner,
    orthogonium_call,
    torch_gram,
    torch_power,
    torch_two_liner,
    torch_weight,
)

NORM, CERTIFIED = "jaxsrn.spectral_norm", "jaxsrn.bounds.certified"
BOUNDS = {CERTIFIED: bounds.certified, "jaxsrn.bounds.gram_iteration": bounds.gram_iteration}
EXACT_PEERS = ("NumPy", "JAX", "PyTorch")
# Every approximate method, in the order of the tables, and on which side of the norm its result is known to be.
GUARANTEED = {
    CERTIFIED: "both ends, in floating point",
    "jaxsrn.bounds.gram_iteration": "above, in floating point",
    "Gram, T = 5 (PyTorch)": "above",
    "Gram, T = 6 (PyTorch)": "above",
    "orthogonium get_conv_sv, 6": "above",
    "power, 1 (PyTorch)": "below",
    "power, 10 (PyTorch)": "below",
    "power, 100 (PyTorch)": "below",
    "flax.nnx.SpectralNorm, 1": "no",
    "flax.nnx.SpectralNorm, 10": "no",
}


def exact_calls(case: Case) -> dict[str, Callable]:
    """The methods that compute the norm, compiled for one kernel."""
    kernel, op = case.plain
    tensor = torch.tensor(kernel, device=DEVICE)
    return {
        "NumPy": functools.partial(numpy_two_liner, kernel.astype(np.float64), op.input_shape),
        "JAX": jax_call(two_liner, kernel, op),
        "PyTorch": functools.partial(torch_two_liner, tensor, op.input_shape),
        NORM: jax_call(jaxsrn.spectral_norm, case.kernel, case.op),
    }


def approximate_calls(case: Case) -> dict[str, Callable]:
    """The methods that bound or estimate the norm, compiled for one kernel; without those that are not installed."""
    kernel, op = case.plain
    weight, size = torch_weight(kernel), op.input_shape
    calls = {name: jax_call(bound, case.kernel, case.op) for name, bound in BOUNDS.items()}
    for steps in (5, 6):
        calls[f"Gram, T = {steps} (PyTorch)"] = functools.partial(torch_gram, weight, size, steps)
    calls["orthogonium get_conv_sv, 6"] = orthogonium_call(weight, size, 6)
    for steps in (1, 10, 100):
        calls[f"power, {steps} (PyTorch)"] = functools.partial(torch_power, weight, size, steps)
    for steps, function in FLAX.items():
        calls[f"flax.nnx.SpectralNorm, {steps}"] = jax_call(function, kernel, op)
    return {name: call for name, call in calls.items() if call is not None}
