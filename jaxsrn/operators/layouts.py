"""XLA's convolution in Flax's layout, written so that its transposes are fast as well."""

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
    """In which order XLA sees the axes of images, kernels and outputs, with `*` for the spatial ones."""

    images: str
    kernels: str
    outputs: str


# Flax's: one batch axis and channels last for images, (*taps, in, out) for kernels. On CPUs it is the only one in which
# XLA is fast within loops, by far (jaxlib 0.10.2). The transposes of the other two have it.
PLAIN = Layout("N*C", "*IO", "N*C")
TO_TRANSPOSE_IN_IMAGES = Layout("N*C", "*OI", "N*C")
TO_TRANSPOSE_IN_KERNELS = Layout("C*N", "I*O", "*NC")


def convolve(kernel: Shaped[Array, "..."], x: Shaped[Array, "..."], layout: Layout, **options) -> Shaped[Array, "..."]:
    """`lax.conv_general_dilated` of `(n, *spatial, c_in)` with `(*taps, c_in // groups, c_out)`, in a layout."""
    spatial = _SPATIAL[x.ndim - 2]
    plain, seen = ([axes.replace("*", spatial) for axes in order] for order in (PLAIN, layout))
    x, kernel = _rearranged(x, plain[0], seen[0]), _rearranged(kernel, plain[1], seen[1])
    return _rearranged(lax.conv_general_dilated(x, kernel, dimension_numbers=tuple(seen), **options), seen[2], plain[2])


def _rearranged(array: Shaped[Array, "..."], axes: str, wanted: str) -> Shaped[Array, "..."]:
    return jnp.transpose(array, [axes.index(axis) for axis in wanted])
