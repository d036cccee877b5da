"""Idle axes: those of a single tap, along which the layer does the same to every sample.

One sample along each idle axis stands for all, so the leading pair is that of a smaller layer, and its images are zero
on every other sample.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "at_first_contact",
    "without_idle_axes",
]


# It takes up to 1 ms, which every eager call would pay.
@functools.lru_cache(maxsize=1024)
def without_idle_axes(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> ZeroPaddedConv:
    """The layer with a single sample along each idle axis; its norm is the same."""
    contacts = _idle_contacts(op, kernel_shape)

    def where(alone, otherwise):
        return tuple(value if axis is None else alone for axis, value in zip(contacts, otherwise, strict=True))

    return dataclasses.replace(
        op,
        input_shape=where(1, op.input_shape),
        padding=where((0, 0), op._pads(kernel_shape)),
        strides=where(1, op.strides),
        input_dilation=where(1, op.input_dilation),
    )


def _idle_contacts(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> list[tuple[int, int] | None]:
    """The first input and output sample that the tap of each idle axis joins; `None` for the other axes.

    An axis is idle if it has one tap and the tap meets the image. On other axes the first tap may meet no sample.
    """
    contacts = [(len(axis) == 1, axis[0]) for axis in op._axis_contacts(kernel_shape)]
    return [(int(tap.inputs[0]), int(tap.outputs[0])) if alone and len(tap.inputs) else None for alone, tap in contacts]


def at_first_contact(pair: Pair, op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> Pair:
    """A pair of the layer without idle axes in images of the whole layer: at the first contacts, and zero elsewhere."""
    contacts = _idle_contacts(op, kernel_shape)

    def placed(image, shape, side):
        place = tuple(slice(None) if axis is None else slice(axis[side], axis[side] + 1) for axis in contacts)
        return jnp.zeros(shape, image.dtype).at[place].set(image)

    inputs = placed(pair.input, op.in_shape(kernel_shape), 0)
    outputs = placed(pair.output, op.out_shape(kernel_shape), 1)
    return pair._replace(input=inputs, output=outputs)
