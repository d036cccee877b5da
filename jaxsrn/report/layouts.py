"""In which order an array has its axes: what names say, what shapes say, and what the caller says.

A layout is a permutation of H, W, I and O for a kernel of two spatial axes, and stands for the same order with one or
three of them. Its last letters are those of a dense kernel: `"HWIO"` has `(c_in, c_out)`, as Flax and Keras store it,
`"OIHW"` has `(c_out, c_in)`, as PyTorch does. PyTorch's transposed convolutions are read as their adjoints, which have
the same singular values.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from jaxsrn._tools.checks import ensure

__all__ = [
    "LAYOUTS",
    "Axes",
    "axes_of",
    "check_layout",
    "layout_by_name",
    "leaf_of",
    "likely_layout",
    "parts_of",
    "split_name",
]

LAYOUTS = ("HWIO", "OIHW", "OHWI")
# The names that Flax, Haiku and Keras give to kernels, and that PyTorch and Equinox give to them.
_JAX_LEAVES = ("kernel", "embedding", "embeddings", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel", "w")
_TORCH_LEAVES = re.compile(r"(.*_)?weight(_(ih|hh|hr)(_l\d+)?(_reverse)?)?")
# An axis of more samples than this is one of channels, where nothing else is known.
_MOST_TAPS_BY_SHAPE = 32


class Axes(NamedTuple):
    """The places of the axes of a stored kernel: those of the taps, that of the inputs and that of the outputs."""

    taps: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation to `(*taps, c_in, c_out)`."""
        return (*self.taps, self.inputs, self.outputs)


def check_layout(layout: str | None) -> None:
    """Raises `ValueError` unless the layout is known, or `None`."""
    ensure(
        layout is None or layout in LAYOUTS,
        f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}; HWIO is that of Flax and Keras, OIHW that of "
        "PyTorch, OHWI that of MLX and TensorFlow Lite.",
    )


def axes_of(layout: str, ndim: int) -> Axes:
    """The places of the axes in an array of `ndim` axes."""
    num_taps = ndim - 2
    spread = layout.replace("HW", "T" * num_taps)
    taps = tuple(i for i, axis in enumerate(spread) if axis == "T")
    return Axes(taps, spread.index("I"), spread.index("O"))


def split_name(name: str) -> tuple[str, str, str]:
    """What stands before the leaf of a name, the leaf, and the ":0" of Keras: `("conv/", "kernel", ":0")`."""
    whole, leaf = name.removesuffix(":0"), leaf_of(name)
    return whole[: len(whole) - len(leaf)], leaf, name[len(whole) :]


def parts_of(name: str) -> list[str]:
    """The parts of a name, `["params", "conv", "kernel"]`, without the ":0" of Keras."""
    return re.split(r"[./]", name.removesuffix(":0"))


def leaf_of(name: str) -> str:
    """The last part of a name, in lower case."""
    return parts_of(name)[-1].lower()


def likely_layout(name: str, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """The layout that the name and the shape speak for, with the rule that decided; `None` where neither does.

    A name decides where the shape does not contradict it: where, of four axes or more, the other layout alone has at
    most 32 taps on each, the shape decides. Without a known name it does so too, then by equal numbers of taps, and
    then by fewer taps.
    """
    named = layout_by_name(leaf_of(name))
    if len(shape) == 2:
        return named or ("HWIO", "a matrix, whose singular values are those of its transpose")
    few = {layout: _has_few_taps(layout, shape) for layout in LAYOUTS[:2]}
    if named and (len(shape) == 3 or few[named[0]] or not any(few.values())):
        return named
    if sum(few.values()) == 1:
        return next(layout for layout in few if few[layout]), f"at most {_MOST_TAPS_BY_SHAPE} taps an axis"
    return None if named else _layout_by_shape(shape)


def layout_by_name(leaf: str) -> tuple[str, str] | None:
    """The layout of kernels of this name, with the rule; `None` for a name that no library gives to kernels."""
    if leaf in _JAX_LEAVES:
        return "HWIO", f"named {leaf}, as in Flax and Keras"
    if _TORCH_LEAVES.fullmatch(leaf):
        return "OIHW", f"named {leaf}, as in PyTorch"
    return None


def _taps(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes_of(layout, len(shape)).taps)


def _has_few_taps(layout: str, shape: tuple[int, ...]) -> bool:
    return max(_taps(layout, shape)) <= _MOST_TAPS_BY_SHAPE


def _layout_by_shape(shape: tuple[int, ...]) -> tuple[str, str] | None:
    first, last = (_taps(layout, shape) for layout in LAYOUTS[:2])
    if len(shape) > 3 and (len(set(first)) == 1) != (len(set(last)) == 1):
        layout = "HWIO" if len(set(first)) == 1 else "OIHW"
        return layout, "as many taps on every axis"
    if math.prod(first) != math.prod(last):
        return ("HWIO" if math.prod(first) < math.prod(last) else "OIHW"), "the fewer taps"
    return None
