"""Which operator a Flax layer is, read off the attributes that Linen's and NNX's layers share, without importing Flax.

`flax_kinds.py` says which of Flax's layers it is.

A transposed convolution is the adjoint of a convolution with the same kernel (`transpose_kernel=True`), or a
convolution with input dilation (`transpose_kernel=False`), which is the adjoint of a convolution with strides whose
kernel has its channels exchanged. An adjoint has the same singular values and the same Frobenius weights, so everything
that jaxsrn does to a kernel is the same for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxsrn._tools.checks import ensure, errors_named, int_tuple
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.flax_kinds import layer_name
from jaxsrn.operators.groups import exchanged
from jaxsrn.operators.unbounded import UnboundedConv

__all__ = ["LayerMap", "layer_map", "own_shape"]

# These fields are read off each kind of layer.
_READ = {
    "conv": ("mask", "strides", "kernel_dilation", "input_dilation", "feature_group_count", "padding"),
    "conv_transpose": ("mask", "strides", "kernel_dilation", "padding", "transpose_kernel"),
    "dense": (),
    "dense_general": ("axis",),
}


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """A layer's operator, and how its kernel is stored.

    Attributes:
      op: the operator of the layer, or of its adjoint.
      shape: the shape of the operator's kernel.
      stored_shape: the shape of the layer's kernel.
      swapped: whether the input and output channels of each group are exchanged. Taps are never mirrored, as mirrored
        taps are the same layer up to a mirrored image.
      output_axis: the axis of the layer's kernel that has the output channels of the layer.
    """

    op: Operator
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    swapped: bool = False
    output_axis: int = -1

    @property
    def is_stored_as_is(self) -> bool:
        """Whether the layer's kernel is the operator's, without a rearrangement."""
        return self.shape == self.stored_shape and not self.swapped

    @property
    def op_of_stack(self) -> Operator:
        """The operator, with a stride for each axis, so that a kernel of a stack is not taken for one of more axes."""
        if not isinstance(self.op, UnboundedConv):
            return self.op
        return dataclasses.replace(self.op, strides=self.op._axis_strides(self.shape))

    def to_operator(self, kernel: jax.Array) -> jax.Array:
        """The operator's kernel from the layer's."""
        return self._swap(kernel).reshape(self.shape)

    def to_layer(self, kernel: jax.Array) -> jax.Array:
        """The layer's kernel from the operator's."""
        return self._swap(kernel).reshape(self.stored_shape)

    def _swap(self, kernel: jax.Array) -> jax.Array:
        if not self.swapped:
            return kernel
        # One of the shapes has the channels of a group where the other has all.
        return exchanged(kernel, self.shape[-1] // self.stored_shape[-2])


def own_shape(layer, kernel_shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape of the kernel of one layer, as its fields say it, where the layer is a stack (`nnx.vmap` makes them).

    Layers that do not say how many axes their kernel has are taken for single ones. Those that say that, but not how
    many channels they have, are taken for stacks along the first axes. For all others the caller has to compare: a
    stack along another axis has a kernel whose shape does not end in the one returned.
    """
    names = {
        "dense": (),
        "dense_general": ("in_features", "out_features"),
        "conv": ("kernel_size",),
        "conv_transpose": ("kernel_size",),
    }[kind]
    if not all(hasattr(layer, name) for name in names):
        return tuple(kernel_shape)
    sizes = tuple(size for name in names for size in _sizes(getattr(layer, name)))
    axes = len(sizes) + (0 if kind == "dense_general" else 2)
    if len(kernel_shape) <= axes:
        return tuple(kernel_shape)
    return sizes if kind == "dense_general" else (*sizes, *(_channels(layer) or kernel_shape[-2:]))


def _sizes(field: int | Sequence[int]) -> tuple[int, ...]:
    """The entries of a field that Flax takes as an int or as a sequence of ints."""
    return (field,) if isinstance(field, int) else tuple(field)


def _channels(layer) -> tuple[int, int] | None:
    """The last two axes of the kernel of a layer of two features; `None` where its fields do not say them."""
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not (isinstance(inputs, int) and isinstance(outputs, int)):
        return None
    if getattr(layer, "transpose_kernel", False):
        return outputs, inputs
    return inputs // getattr(layer, "feature_group_count", 1), outputs


def layer_map(layer, kernel_shape: tuple[int, ...], input_shape, kind: str) -> LayerMap:
    """The map of a layer.

    Args:
      layer: a Linen or NNX layer.
      kernel_shape: the shape of its stored kernel.
      input_shape: the spatial shape of its input, for convolutions. `None` is the unbounded operator, whose norm no
        image size and no padding exceeds.
      kind: a field of `FlaxLayers`.

    Raises:
      ValueError: a layer that is no such map (REFLECT, a mask, batch axes, circular strides that do not divide the
        image, strides beside input dilation without an `input_shape`), or an `input_shape` that does not fit; the
        message names the layer.
    """
    with errors_named(layer_name(layer)):
        found = _layer_map(layer, tuple(kernel_shape), input_shape, kind)
        outputs_first = kind == "conv_transpose" and layer.transpose_kernel
        return dataclasses.replace(found, output_axis=-2) if outputs_first else found


def _layer_map(layer, kernel_shape, input_shape, kind) -> LayerMap:
    missing = [name for name in _READ[kind] if not hasattr(layer, name)]
    ensure(not missing, f"layer: it has no {', '.join(missing)}, expected the fields of the layer that it computes.")
    if kind == "dense":
        return LayerMap(Dense(), kernel_shape, kernel_shape)
    if kind == "dense_general":
        return _general(layer, kernel_shape)
    ensure(layer.mask is None, "mask: got one, expected None; a masked kernel is not free to take its closest form.")
    if input_shape is None:
        return _unbounded(layer, kernel_shape, kind)
    num_axes, shape = len(kernel_shape) - 2, int_tuple(input_shape, None, "input_shape")
    ensure(
        len(shape) == num_axes,
        f"input_shape: got {shape}, expected {num_axes} spatial sizes, without batch and channels.",
    )
    return (_transposed if kind == "conv_transpose" else _convolution)(layer, kernel_shape, shape)


def _general(layer, kernel_shape) -> LayerMap:
    """The map of `LinearGeneral`, a matrix from its contracted axes to its features."""
    ensure(
        not getattr(layer, "batch_axis", None) and not getattr(layer, "batch_dims", None),
        "batch axes: got some, expected none; with them the layer is one matrix for each index.",
    )
    axes = layer.axis if isinstance(layer.axis, (tuple, list)) else (layer.axis,)
    return LayerMap(Dense(input_axes=len(axes), output_axes=len(kernel_shape) - len(axes)), kernel_shape, kernel_shape)


def _per_axis(value, num_axes: int) -> tuple[int, ...]:
    """A tuple with one entry per axis, in Flax's convention that `None` is 1 and an int stands for all axes."""
    return (value or 1,) * num_axes if value is None or isinstance(value, int) else tuple(value)


def _padding(layer, num_axes: int):
    """The padding as a name or as `(low, high)` pairs, which Flax also takes as an int, or as an int per axis."""
    padding = layer.padding
    if isinstance(padding, str):
        known = ("SAME", "VALID", "CAUSAL", "CIRCULAR")
        ensure(padding in known, f"padding: got {padding!r}, expected one of {known} or (low, high) pairs.")
        return padding
    per_axis = (padding,) * num_axes if isinstance(padding, int) else tuple(padding)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in per_axis)


def _input_dilation(layer, padding, num_axes: int) -> tuple[int, ...]:
    """The input dilation of a convolution."""
    dilation = _per_axis(layer.input_dilation, num_axes)
    ensure(
        padding != "CIRCULAR" or max(dilation) == 1,
        f"input_dilation: got {dilation} with padding='CIRCULAR', expected 1; Flax pads first and dilates the padded "
        "image, which is not circular.",
    )
    return dilation


def _unbounded(layer, kernel_shape, kind) -> LayerMap:
    """The map of a convolution on an image without edges, where a padding has no effect."""
    num_axes = len(kernel_shape) - 2
    strides, padding = _per_axis(layer.strides, num_axes), _padding(layer, num_axes)
    if kind == "conv":
        groups, spread = layer.feature_group_count, _input_dilation(layer, padding, num_axes)
    else:
        _check_transposed_padding(padding)
        # With `transpose_kernel` the kernel is stored as that of the adjoint, a convolution with strides.
        groups, ones = 1, (1,) * num_axes
        strides, spread = (strides, ones) if layer.transpose_kernel else (ones, strides)
    swapped = max(spread) > 1
    ensure(
        not swapped or max(strides) == 1,
        f"input_dilation: got {spread} with strides={strides} and input_shape=None, expected one of the two; give "
        "input_shape=, the spatial shape of the input.",
    )
    op = UnboundedConv(
        strides=_of_all_axes(spread if swapped else strides),
        kernel_dilation=_of_all_axes(_per_axis(layer.kernel_dilation, num_axes)),
        feature_group_count=groups,
    )
    *taps, channels_in, channels_out = kernel_shape
    shape = (*taps, channels_out // groups, channels_in * groups) if swapped else kernel_shape
    op._check_kernel_shape(shape)
    return LayerMap(op, shape, kernel_shape, swapped)


def _of_all_axes(sizes: tuple[int, ...]):
    """The int that stands for all axes where they agree, so that equal operators compare equal."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _convolution(layer, kernel_shape, shape) -> LayerMap:
    num_axes = len(shape)
    strides, dilation = _per_axis(layer.strides, num_axes), _per_axis(layer.kernel_dilation, num_axes)
    options = {"strides": strides, "kernel_dilation": dilation, "feature_group_count": layer.feature_group_count}
    padding = _padding(layer, num_axes)
    input_dilation = _input_dilation(layer, padding, num_axes)
    if padding == "CIRCULAR":
        return LayerMap(CircularConv(shape, **options), kernel_shape, kernel_shape)
    op = ZeroPaddedConv(shape, padding=padding, input_dilation=input_dilation, **options)
    op._check_kernel_shape(kernel_shape)
    return LayerMap(op, kernel_shape, kernel_shape)


def _transposed(layer, kernel_shape, shape) -> LayerMap:
    num_axes = len(shape)
    strides, dilation = _per_axis(layer.strides, num_axes), _per_axis(layer.kernel_dilation, num_axes)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel_shape, dilation, strict=False)]
    padding = _padding(layer, num_axes)
    if padding == "CIRCULAR":
        # The operator is the adjoint's, on the larger image. Its channels are exchanged where the kernel is stored as
        # this layer's own.
        op = CircularConv(
            [n * s for n, s in zip(shape, strides, strict=True)], strides=strides, kernel_dilation=dilation
        )
        swapped = not layer.transpose_kernel and max(strides) > 1
        shape = (*kernel_shape[:-2], *kernel_shape[:-3:-1]) if swapped else kernel_shape
        return LayerMap(op, shape, kernel_shape, swapped)
    _check_transposed_padding(padding)
    pads = _transposed_pads(padding, extents, strides)
    if not layer.transpose_kernel:
        op = ZeroPaddedConv(shape, padding=pads, input_dilation=strides, kernel_dilation=dilation)
        op._check_kernel_shape(kernel_shape)
        return LayerMap(op, kernel_shape, kernel_shape)
    outputs = [
        (n - 1) * s + 2 + low + high - e for n, s, e, (low, high) in zip(shape, strides, extents, pads, strict=True)
    ]
    adjoint_pads = tuple((e - 1 - low, e - 1 - high) for e, (low, high) in zip(extents, pads, strict=True))
    op = ZeroPaddedConv(outputs, padding=adjoint_pads, strides=strides, kernel_dilation=dilation)
    op._check_kernel_shape(kernel_shape)
    return LayerMap(op, kernel_shape, kernel_shape)


def _check_transposed_padding(padding) -> None:
    ensure(padding != "CAUSAL", "padding: got 'CAUSAL', expected 'SAME', 'VALID', 'CIRCULAR' or (low, high) pairs.")


def _transposed_pads(padding, extents, strides) -> tuple[tuple[int, int], ...]:
    """The `(low, high)` padding of the dilated image, as `lax.conv_transpose` counts it."""
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
