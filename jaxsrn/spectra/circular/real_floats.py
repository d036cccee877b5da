"""Frequencies and amplitudes as real floating-point numbers: the form in which a pair is kept between training steps.

What keeps a model's state knows floats: a moving average mixes two of them, a cast rounds them, many file formats hold
nothing else. An index that was averaged is no integer any more, and a complex number that was cast to bfloat16 has lost
its imaginary part. So an index is kept as its share of a full turn, and an amplitude as its two parts.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, Int

__all__ = ["amplitudes_of", "group_of", "indices_of", "parts_of", "turns_of"]


def turns_of(indices: Int[Array, "... axes"], grid: tuple[int, ...], dtype) -> Float[Array, "... axes"]:
    """The indices of frequencies on a grid as shares of a full turn, from 0 to 1."""
    return indices.astype(dtype) * _filled(1 / np.array(grid), indices, dtype)


def indices_of(
    turns: Float[Array, "... axes"], grid: tuple[int, ...], lowest=0, highest=None
) -> Int[Array, "... axes"]:
    """The indices nearest to shares of a full turn, from `lowest` to `highest`, by default those of the whole grid."""
    scaled = turns * _filled(grid, turns, turns.dtype)
    highest = np.array(grid) - 1 if highest is None else highest
    lowest, highest = (_filled(limit, turns, jnp.int32) for limit in (lowest, highest))
    return lax.clamp(lowest, lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32), highest)


def _filled(values, like, dtype) -> Array:
    """A constant of the shape of an array, which takes one operation where a broadcast would take another."""
    return jnp.asarray(np.broadcast_to(values, like.shape), dtype)


def group_of(number: Float[Array, ""], groups: int) -> Int[Array, ""]:
    """The index of a group that was kept as a float."""
    if groups == 1:
        return jnp.zeros((), jnp.int32)
    rounded = lax.round(number, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
    return lax.clamp(np.int32(0), rounded, np.int32(groups - 1))


def parts_of(amplitudes: Complex[Array, "n ..."]) -> Float[Array, "2*n ..."]:
    """The real parts of the amplitudes, and behind them the imaginary ones, along the first axis.

    The last axis, that of channels, may be sharded over devices, and would be gathered.
    """
    return jnp.concatenate([amplitudes.real, amplitudes.imag])


def amplitudes_of(parts: Float[Array, "parts ..."]) -> Complex[Array, "n ..."]:
    """The amplitudes of real and imaginary parts."""
    return lax.complex(*jnp.split(parts, 2))
