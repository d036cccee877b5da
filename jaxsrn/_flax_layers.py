"""Which operator a Flax layer is: read off the attributes that Linen's and NNX's layers share, without importing Flax.

A transposed convolution is the adjoint of a convolution with the same kernel (`transpose_kernel=True`), or a
convolution with input dilation (`transpose_kernel=False`). An adjoint has the same singular values and the same
Frobenius weights, so everything that jaxsrn does to a kernel is the same for both.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from jaxsrn._checks import ensure, errors_named
from jaxsrn.operators import CircularConv, Dense, Operator, ZeroPaddedConv

__all__ = ["LayerMap", "layer_map", "layer_name"]

_CONV = ("Conv",)
_CONV_TRANSPOSE = ("ConvTranspose",)
_DENSE = ("Linear", "Dense")
_DENSE_GENERAL = ("LinearGeneral", "DenseGeneral")


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """A layer's operator, and how its kernel is stored.

    Attributes:
      op: the operator, or that of the adjoint.
      shape: of the operator's kernel.
      stored_shape: of the layer's.
      swapped: whether the two channel axes are exchanged (and no taps are: mirrored taps are the same layer up to a
        mirrored image).
    """

    op: Operator
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    swapped: bool = False

    @property
    def is_stored_as_is(self) -> bool:
        """Whether the layer's kernel is the operator's."""
        return self.shape == self.stored_shape and not self.swapped

    def to_operator(self, kernel: jax.Array) -> jax.Array:
        """The operator's kernel from the layer's."""
        return (kernel.swapaxes(-1, -2) if self.swapped else kernel).reshape(self.shape)

    def to_layer(self, kernel: jax.Array) -> jax.Array:
        """The layer's kernel from the operator's."""
        return (kernel.swapaxes(-1, -2) if self.swapped else kernel).reshape(self.stored_shape)


def layer_name(layer) -> str:
    """A layer in an error message: its class and its features."""
    features = [
        f"{name}={getattr(layer, name)}"
        for name in ("in_features", "out_features", "features", "kernel_size")
        if hasattr(layer, name)
    ]
    return f"{type(layer).__name__}({', '.join(features)})"


def layer_map(layer, kernel_shape: tuple[int, ...], input_shape) -> LayerMap:
    """The map of a `Conv`, `ConvTranspose`, `Linear` / `Dense`, `LinearGeneral` / `DenseGeneral`, or a subclass.

    Args:
      layer: a Linen or NNX layer.
      kernel_shape: of its stored kernel.
      input_shape: spatial shape of its input; needed for convolutions.

    Raises:
      ValueError: a layer that is no such map (another class, REFLECT, a mask, batch axes, circular strides that do
        not divide), or an `input_shape` that is missing or does not fit; the message names the layer.
    """
    with errors_named(layer_name(layer)):
        return _layer_map(layer, tuple(kernel_shape), input_shape)


def _layer_map(layer, kernel_shape, input_shape) -> LayerMap:
    classes = {base.__name__ for base in type(layer).__mro__}
    if classes.intersection(_DENSE):
        return LayerMap(Dense(), kernel_shape, kernel_shape)
    if classes.intersection(_DENSE_GENERAL):
        return _general(layer, kernel_shape)
    is_transposed = bool(classes.intersection(_CONV_TRANSPOSE))
    ensure(
        is_transposed or bool(classes.intersection(_CONV)),
        f"layer: got {type(layer).__name__}, expected a Conv, ConvTranspose, Linear or LinearGeneral; wrap the layer "
        "that has the kernel.",
    )
    ensure(layer.mask is None, "mask: got one, expected None; a masked kernel is not free to take its closest form.")
    num_axes = len(kernel_shape) - 2
    ensure(
        input_shape is not None,
        f"input_shape: got None, expected the spatial shape ({num_axes} axes) that the layer's norm is taken at.",
    )
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    ensure(
        len(shape) == num_axes,
        f"input_shape: got {shape}, expected {num_axes} spatial sizes, without batch and channels.",
    )
    return (_transposed if is_transposed else _convolution)(layer, kernel_shape, shape)


def _general(layer, kernel_shape) -> LayerMap:
    """`LinearGeneral`: the contracted axes first, then the features."""
    ensure(
        not getattr(layer, "batch_axis", None) and not getattr(layer, "batch_dims", None),
        "batch axes: got some, expected none; with them the layer is one matrix for each index.",
    )
    axes = layer.axis if isinstance(layer.axis, (tuple, list)) else (layer.axis,)
    rows = math.prod(kernel_shape[: len(axes)])
    return LayerMap(Dense(), (rows, math.prod(kernel_shape[len(axes) :])), kernel_shape)


def _per_axis(value, num_axes: int) -> tuple[int, ...]:
    """Flax's convention: `None` is 1, an int stands for all axes."""
    return (value or 1,) * num_axes if value is None or isinstance(value, int) else tuple(value)


def _padding(layer, num_axes: int):
    """A name, or `(low, high)` pairs (Flax also takes an int, or an int per axis)."""
    padding = layer.padding
    if isinstance(padding, str):
        known = ("SAME", "VALID", "CAUSAL", "CIRCULAR")
        ensure(padding in known, f"padding: got {padding!r}, expected one of {known} or (low, high) pairs.")
        return padding
    per_axis = (padding,) * num_axes if isinstance(padding, int) else tuple(padding)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in per_axis)


def _convolution(layer, kernel_shape, shape) -> LayerMap:
    num_axes = len(shape)
    strides, dilation = _per_axis(layer.strides, num_axes), _per_axis(layer.kernel_dilation, num_axes)
    input_dilation = _per_axis(layer.input_dilation, num_axes)
    options = {"strides": strides, "kernel_dilation": dilation, "feature_group_count": layer.feature_group_count}
    padding = _padding(layer, num_axes)
    if padding == "CIRCULAR":
        ensure(
            max(input_dilation) == 1,
            f"input_dilation: got {input_dilation} with padding='CIRCULAR', expected 1; Flax pads first and dilates "
            "the padded image, which is not circular.",
        )
        return LayerMap(CircularConv(shape, **options), kernel_shape, kernel_shape)
    op = ZeroPaddedConv(shape, padding=padding, input_dilation=input_dilation, **options)
    op.check_kernel_shape(kernel_shape)
    return LayerMap(op, kernel_shape, kernel_shape)


def _transposed(layer, kernel_shape, shape) -> LayerMap:
    num_axes = len(shape)
    strides, dilation = _per_axis(layer.strides, num_axes), _per_axis(layer.kernel_dilation, num_axes)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel_shape, dilation, strict=False)]
    padding = _padding(layer, num_axes)
    if padding == "CIRCULAR":
        # The adjoint reads the larger image; its channels are exchanged where the kernel is stored for this layer.
        op = CircularConv(
            [n * s for n, s in zip(shape, strides, strict=True)], strides=strides, kernel_dilation=dilation
        )
        swapped = not layer.transpose_kernel and max(strides) > 1
        shape = (*kernel_shape[:-2], *kernel_shape[:-3:-1]) if swapped else kernel_shape
        return LayerMap(op, shape, kernel_shape, swapped)
    ensure(padding != "CAUSAL", "padding: got 'CAUSAL', expected 'SAME', 'VALID', 'CIRCULAR' or (low, high) pairs.")
    pads = _transposed_pads(padding, extents, strides)
    if not layer.transpose_kernel:
        op = ZeroPaddedConv(shape, padding=pads, input_dilation=strides, kernel_dilation=dilation)
        op.check_kernel_shape(kernel_shape)
        return LayerMap(op, kernel_shape, kernel_shape)
    outputs = [
        (n - 1) * s + 2 + low + high - e for n, s, e, (low, high) in zip(shape, strides, extents, pads, strict=True)
    ]
    adjoint_pads = tuple((e - 1 - low, e - 1 - high) for e, (low, high) in zip(extents, pads, strict=True))
    op = ZeroPaddedConv(outputs, padding=adjoint_pads, strides=strides, kernel_dilation=dilation)
    op.check_kernel_shape(kernel_shape)
    return LayerMap(op, kernel_shape, kernel_shape)


def _transposed_pads(padding, extents, strides) -> tuple[tuple[int, int], ...]:
    """The padding of the dilated image, as `lax.conv_transpose` counts it."""
    if not isinstance(padding, str):
        return padding
    pads = []
    for extent, stride in zip(extents, strides, strict=True):
        total = extent + stride - 2
        low = extent - 1 if padding == "VALID" or stride > extent - 1 else -(-total // 2)
        if padding == "VALID":
            total += max(extent - stride, 0)
        pads.append((low, total - low))
    return tuple(pads)
