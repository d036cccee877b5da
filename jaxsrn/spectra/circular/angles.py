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

from jaxsrn._tools.linalg import einsum

__all__ = ["ROTATION", "Angles", "angles_of", "phases", "rotations", "waves"]

# A rotation by an angle, of its cosine and its sine: `(1, -i)` as matrices that act on real and imaginary parts.
ROTATION = np.moveaxis([[[1, 0], [0, 1]], [[0, 1], [-1, 0]]], 0, -1)


class Angles(NamedTuple):
    """How many units make a part of a step between neighbouring frequencies, per axis: a whole number and its rest."""

    whole: Int[Array, " axes"]
    rest: Float[Array, " axes"]


def angles_of(grid: tuple[int, ...], dtype, *, parts: int = 2) -> Angles:
    """The angles of a grid, for computations in a real dtype (static); by default those of halves of its steps."""
    turn = 2 ** jnp.finfo(dtype).bits
    wholes, rests = zip(*(divmod(turn, parts * n) for n in grid), strict=True)
    whole = np.array([whole % turn for whole in wholes], f"uint{jnp.finfo(dtype).bits}")
    rest = np.array([rest / (parts * n) for rest, n in zip(rests, grid, strict=True)], dtype)
    return Angles(whole.view(f"int{jnp.finfo(dtype).bits}"), rest)


def phases(angles: Angles, steps: Int[Array, "... axes"], exponents: np.ndarray) -> Float[Array, "... terms"]:
    """`<w, t>` up to full turns, as many steps of the angles away from 0, for the exponents `t`, `(terms, axes)`."""
    whole, rest = (jnp.asarray(part) for part in angles)
    steps = steps.astype(whole.dtype)
    shape = (1,) * (steps.ndim - 1) + whole.shape
    units = steps * whole.reshape(shape)
    # A static grid of a power of two has no rest.
    if not isinstance(angles.rest, np.ndarray) or np.any(angles.rest):
        units = units + jnp.round(steps.astype(rest.dtype) * rest.reshape(shape)).astype(whole.dtype)
    turns = lax.dot_general(units, jnp.asarray(exponents, whole.dtype), (((steps.ndim - 1,), (1,)), ((), ())))
    return turns.astype(rest.dtype) * (2 * math.pi * 2.0 ** -jnp.finfo(rest.dtype).bits)


def waves(angles: Angles, steps: Int[Array, "... axes"], exponents: np.ndarray) -> Complex[Array, "... terms"]:
    """`exp(-i <w, t>)`, as many steps of the angles away from 0."""
    turned = phases(angles, steps, exponents)
    return lax.complex(jnp.cos(turned), -jnp.sin(turned))


def rotations(turned: Float[Array, "... terms"]) -> Float[Array, "... 2 2 terms"]:
    """`exp(-i turned)` as matrices that act on real and imaginary parts, for products of real arrays alone."""
    parts = jnp.stack([jnp.cos(turned), jnp.sin(turned)], axis=-2)
    return einsum("pqs,...st->...pqt", jnp.asarray(ROTATION, turned.dtype), parts)
