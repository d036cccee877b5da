"""Angles of frequencies in fixed point, so that products with tap offsets keep their full precision.

An angle is kept as a whole number of units, of which `2**32` (float64: `2**64`) make a full turn. The overflow of
integers is then the reduction modulo a full turn, and the grid of an image may be an argument of a compiled program.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, Int

__all__ = ["Angles", "angles_of", "phases", "waves"]


class Angles(NamedTuple):
    """How many units make half a step between neighbouring frequencies, per axis: a whole number and the rest of it."""

    whole: Int[Array, " axes"]
    rest: Float[Array, " axes"]


def angles_of(grid: tuple[int, ...], dtype) -> Angles:
    """The angles of a grid, for computations in a real dtype (static)."""
    bits = jnp.finfo(dtype).bits
    halves = [divmod(2**bits, 2 * n) for n in grid]
    whole = np.array([whole for whole, _ in halves], f"uint{bits}").view(f"int{bits}")
    return Angles(whole, np.array([rest / (2 * n) for (_, rest), n in zip(halves, grid, strict=True)], dtype))


def phases(angles: Angles, doubled: Int[Array, "... axes"], exponents: np.ndarray) -> Float[Array, "... terms"]:
    """`<w, t>` up to full turns, at halves of the doubled indices, for the exponents `t`, `(terms, axes)`."""
    whole, rest = (jnp.asarray(part) for part in angles)
    steps = doubled.astype(whole.dtype)
    shape = (1,) * (doubled.ndim - 1) + whole.shape
    units = steps * whole.reshape(shape)
    # A static grid of a power of two has no rest.
    if not isinstance(angles.rest, np.ndarray) or np.any(angles.rest):
        units = units + jnp.round(steps.astype(rest.dtype) * rest.reshape(shape)).astype(whole.dtype)
    turns = lax.dot_general(units, jnp.asarray(exponents, whole.dtype), (((doubled.ndim - 1,), (1,)), ((), ())))
    return turns.astype(rest.dtype) * (2 * math.pi * 2.0 ** -jnp.finfo(rest.dtype).bits)


def waves(angles: Angles, doubled: Int[Array, "... axes"], exponents: np.ndarray) -> Complex[Array, "... terms"]:
    """`exp(-i <w, t>)` at halves of the doubled indices."""
    turned = phases(angles, doubled, exponents)
    return lax.complex(jnp.cos(turned), -jnp.sin(turned))
