"""The functions that are counted and timed, the layer that they are given, and the operators of its columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsrn
from compilation.parts import Effort
from jaxsrn import CircularConv, UnboundedConv, ZeroPaddedConv, bounds


class Function(NamedTuple):
    """A function `call(kernel, op, *prepared)`, and what is computed for it beforehand by `prepare(kernel, op)`."""

    call: Callable
    prepare: Callable = lambda kernel, op: ()


def target(kernel, op, fraction: float = 0.1) -> float:
    """Below the stable rank of a Gaussian kernel, which is about a quarter of the largest."""
    return jaxsrn.target_of_fraction(fraction, kernel.shape, op)


def lowered(kernel, op):
    return jaxsrn.srnc(kernel, op, target(kernel, op))


def raised(kernel, op):
    return jaxsrn.srnc(kernel, op, target(kernel, op, 0.4), raise_rank=True)


def started(kernel, op):
    return jaxsrn.srnc_state(kernel, op, target(kernel, op))


def stepped(kernel, op, state):
    """One training step from a state that is an argument, as in training."""
    return jaxsrn.srnc_step(kernel, state, op, target(kernel, op))


def projected(kernel, op):
    return jaxsrn.project_spectral_ball(kernel, op, 1.0)


FUNCTIONS = {
    "spectral_norm": Function(jaxsrn.spectral_norm),
    "stable_rank": Function(jaxsrn.stable_rank),
    "bounds.certified": Function(bounds.certified),
    "srnc": Function(lowered),
    "srnc, raising": Function(raised),
    "srnc_state": Function(started),
    "srnc_step": Function(stepped, lambda kernel, op: (started(kernel, op),)),
    "project_spectral_ball": Function(projected),
}


class Layer(NamedTuple):
    """A square kernel's taps, channels and image; `operators` are the columns of the tables."""

    taps: int
    channels: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.taps, self.taps, self.channels, self.channels

    @property
    def operators(self) -> dict[str, CircularConv | ZeroPaddedConv | UnboundedConv]:
        image = (self.size, self.size)
        return {"circular": CircularConv(image), "SAME": ZeroPaddedConv(image), "unbounded": UnboundedConv()}

    def kernel(self) -> jax.Array:
        """The Gaussian kernel, always the same one; JAX's backend has started when it is there."""
        kernel = np.random.default_rng(0).standard_normal(self.shape, np.float32)
        return jax.block_until_ready(jnp.asarray(kernel))

    def __str__(self) -> str:
        k, c, n = self
        return f"{k}x{k} taps, {c} to {c} channels, {n}x{n} samples, float32"


def layer_of(effort: Effort) -> Layer:
    return Layer(3, 4, 8) if effort.fast else Layer(3, 64, 32)
