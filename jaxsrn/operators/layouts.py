"""XLA's convolution in Flax's layout, in forms whose transposes are fast as well.

A transpose of `lax.conv_general_dilated` is a convolution in another layout than the map's. That layout depends on the
layout in which the map is written, so the map has three forms: one for itself, and one for each of its adjoints.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

__all__ = [
    "PLAIN",
    "TO_TRANSPOSE_IN_IMAGES",
    "TO_TRANSPOSE_IN_KERNELS",
    "Layout",
    "convolve",
]

_SPATIAL = {1: "W", 2: "HW", 3: "DHW"}


class Layout(NamedTuple):
    """The order in which XLA sees the axes of images, kernels and outputs; `*` stands for the spatial ones."""

    images: str
    kernels: str
    outputs: str


# Flax's layout has one batch axis and channels last for images, and (*taps, in, out) for kernels. It is the only one in
# which XLA is fast within loops on CPUs (jaxlib 0.10.2). The transposes of the other two forms are in this layout.
PLAIN = Layout("N*C", "*IO", "N*C")
TO_TRANSPOSE_IN_IMAGES = Layout("N*C", "*OI", "N*C")
TO_TRANSPOSE_IN_KERNELS = Layout("C*N", "I*O", "*NC")


def convolve(kernel: Shaped[Array, "..."], x: Shaped[Array, "..."], layout: Layout, **options) -> Shaped[Array, "..."]:
    """`lax.conv_general_dilated` of `(n, *spatial, c_in)` with `(*taps, c_in // groups, c_out)`, in a form."""
    spatial = _SPATIAL[x.ndim - 2]
    plain, seen = ([axes.replace("*", spatial) for axes in order] for order in (PLAIN, layout))
    x, kernel = _rearranged(x, plain[0], seen[0]), _rearranged(kernel, plain[1], seen[1])
    return _rearranged(lax.conv_general_dilated(x, kernel, dimension_numbers=tuple(seen), **options), seen[2], plain[2])


def _rearranged(array: Shaped[Array, "..."], axes: str, wanted: str) -> Shaped[Array, "..."]:
    """The array with its axes, named by letters, in the wanted order."""
    return jnp.transpose(array, [axes.index(axis) for axis in wanted])
