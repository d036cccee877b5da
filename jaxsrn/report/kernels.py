"""Which named array is which layer: kernels in Flax's layout with their operators, or the reason for leaving one out.

Every array is in one of the two lists. A kernel is a view of its array, so that writing to the view writes the array.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.operators import Dense, Operator, UnboundedConv, ZeroPaddedConv
from jaxsrn.operators.flax_layers import LayerMap
from jaxsrn.report.layouts import axes_of, check_layout, layout_by_name, leaf_of, likely_layout, parts_of
from jaxsrn.report.named_arrays import ArrayInfo
from jaxsrn.report.not_kernels import NoKernel, check_is_read, check_name_and_shape, require
from jaxsrn.report.recurrent import gates_of
from jaxsrn.report.stacks_and_heads import Scopes, heads_of

__all__ = ["GUESSED", "OF_MODEL", "NamedKernel", "Skipped", "find_kernels"]

# The rule of layers that a model knows; strides and groups of all others are assumed where they are not told.
OF_MODEL = "the layer of the model"

# The rule of groups that no name and no option says, but only shapes.
GUESSED = "depthwise, as several kernels read one channel and others have as many outputs"
# Longer axes of taps are taken for something else unless the layout is told.
_MOST_TAPS_UNTOLD = 1024
_DEPTHWISE = re.compile(r"depthwise|(^|[^a-z])dw_?(conv)?([^a-z]|$)")


class Skipped(NamedTuple):
    """An array that is not in the report, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


class NamedKernel(NamedTuple):
    """A kernel within an array.

    Attributes:
      name: that of its array, with the gate or the index of the layer in brackets where the array has several.
      array: the name of the array.
      op, shape: the operator, and the shape of its kernel.
      rule: how the array was taken for this layer.
      view: the kernel in Flax's layout, the output channels of the layer last, as a view of the array.
      num_outputs: the number of output channels.
      to_operator: the operator's kernel from that of `view`; they differ where the operator is that of the adjoint.
    """

    name: str
    array: str
    op: Operator
    shape: tuple[int, ...]
    rule: str
    view: Callable[[np.ndarray], np.ndarray]
    num_outputs: int
    to_operator: Callable[[np.ndarray], np.ndarray]


class _Part(NamedTuple):
    """A part of an array: what its name adds, its shape, and its view."""

    ending: str
    shape: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray]


def find_kernels(
    infos: Mapping[str, ArrayInfo],
    *,
    layout: str | None = None,
    input_shape: Sequence[int] | None = None,
    groups: Mapping[str, int] | None = None,
    strides: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
    known: Mapping[str, LayerMap] | None = None,
) -> tuple[list[NamedKernel], list[Skipped]]:
    """The kernels among named arrays, and the arrays that are none, each with the reason.

    Args:
      infos: the arrays.
      layout: that of all kernels; by default what names and shapes say.
      input_shape: the spatial shape at which convolutions of as many axes are taken, with zero padding `SAME`; without
        it, and for all other convolutions, it is the unbounded one.
      groups: `{name: feature_group_count}` of arrays whose names and shapes do not say it; the name is that of the
        array, or of its layer, `"conv1"` for `"conv1/kernel"` or `"conv1.weight"`.
      strides: `{name: stride}`. Strides are not stored with weights, and those of others are 1: the norm with stride 1
        bounds that with any other.
      stacked: the beginnings of the names of arrays whose first axis is one of layers.
      known: the layers of a model, if there is one; beside them only embeddings and other matrices are recognised.

    Raises:
      ValueError: an unknown layout, groups or strides of what is no convolution, stacks of arrays that are not there,
        or an `input_shape` that is none or that no convolution has the axes for.
    """
    check_layout(layout)
    groups, strides = _by_array(groups, infos, "groups"), _by_array(strides, infos, "strides")
    idle = [repr(start) for start in stacked if not any(name.startswith(start) for name in infos)]
    ensure(
        not idle,
        f"stacked: got {', '.join(idle)}, expected beginnings of names of arrays, such as {next(iter(infos), None)!r}.",
    )
    shape = None if input_shape is None else ZeroPaddedConv(input_shape).input_shape
    reader = _Reader(infos, layout, shape, groups, strides, Scopes(infos, stacked), known)
    kernels, skipped = [], []
    for name, info in infos.items():
        try:
            kernels += reader.kernels(name)
        except NoKernel as reason:
            skipped.append(Skipped(name, info.shape, str(reason)))
    others = {*groups, *strides} - {kernel.array for kernel in kernels if not isinstance(kernel.op, Dense)}
    ensure(not others, f"groups, strides: got {', '.join(sorted(others))}, expected names of convolutions.")
    axes = sorted({len(kernel.shape) - 2 for kernel in kernels if not isinstance(kernel.op, Dense)})
    ensure(
        shape is None or not axes or len(shape) in axes,
        f"input_shape: got {shape}, expected {' or '.join(map(str, axes))} integers, as the convolutions have axes.",
    )
    return kernels, skipped


def _by_array(counts: Mapping[str, int] | None, infos: Mapping[str, ArrayInfo], option: str) -> dict[str, int]:
    """The counts by the whole names of arrays; that of a layer stands for its kernel."""
    whole = {}
    for name, count in (counts or {}).items():
        kernels = [full for full in infos if leaf_of(full) in ("kernel", "weight")]
        found = [name] if name in infos else [full for full in kernels if parts_of(full)[:-1] == parts_of(name)]
        example = next((full for full, info in infos.items() if len(info.shape) > 2), next(iter(infos), None))
        ensure(len(found) > 0, f"{option}: got {name!r}, expected names of arrays or layers, such as {example!r}.")
        ensure(found[0] not in whole, f"{option}: got {found[0]!r} twice, expected once.")
        whole[found[0]] = count
    return whole


class _Reader:
    """The reading of one array after the other, with all of them in sight."""

    def __init__(self, infos, layout, input_shape, groups, strides, scopes: Scopes, known):
        self.infos, self.layout, self.input_shape = infos, layout, input_shape
        self.groups, self.strides, self.scopes, self.known = groups, strides, scopes, known
        self._common = self._common_layout()
        self._depthwise = self._depthwise_by_shape()

    def kernels(self, name: str) -> list[NamedKernel]:
        """The kernels in an array; raises `NoKernel` where there is none."""
        info = self.infos[name]
        check_is_read(info)
        if self.known is not None and name in self.known:
            return list(self._of_known(name, self.known[name]))
        self._check_is_weight(name)
        if self.known is not None:
            # A matrix is a dense layer wherever it stands, as the kernels within Linen's recurrent cells are.
            is_matrix = leaf_of(name) in ("embedding", "embeddings") or (
                leaf_of(name) == "kernel" and len(info.shape) == 2
            )
            require(is_matrix, "of no layer in reach: of a module that is none of Flax's layers, or the inputs miss it")
        return [kernel for part in self._layers(name) for kernel in self._of_part(name, part)]

    def _check_is_weight(self, name: str) -> None:
        """Raises `NoKernel` for arrays that no layer multiplies with, by themselves or by what stands beside them."""
        shape, named = self.infos[name].shape, layout_by_name(leaf_of(name))
        check_name_and_shape(name, shape)
        # PyTorch alone gives one name to kernels and to scales.
        is_kernel = named is not None and named[0] == "HWIO"
        require(
            is_kernel or self.scopes.bias.get(tuple(parts_of(name)[:-1])) != shape,
            "a scale of several axes, whose bias has as many",
        )

    # Models

    def _of_known(self, name: str, layer: LayerMap) -> Iterable[NamedKernel]:
        shape = self.infos[name].shape
        stack = len(shape) - len(layer.stored_shape)
        require(
            shape[stack:] == layer.stored_shape,
            f"stacked otherwise than along the first axes, where the layer has a kernel of {layer.stored_shape}",
        )
        gates, axis = gates_of(name, self.infos), layer.output_axis
        outputs_last = functools.partial(np.moveaxis, source=axis, destination=-1)
        op, operator_shape, of_stored = _flattened(layer)
        to_operator = _then(functools.partial(np.moveaxis, source=-1, destination=axis), of_stored)
        for index in np.ndindex(shape[:stack]):
            ending = f"[{','.join(map(str, index))}]" if stack else ""
            if gates:
                whole = _Part(ending, operator_shape, _then(_at(index), of_stored))
                yield from (_named(name, part, op, OF_MODEL) for part in _split(whole, gates, -1))
            else:
                view, outputs = _then(_at(index), outputs_last), layer.stored_shape[axis]
                yield NamedKernel(f"{name}{ending}", name, op, operator_shape, OF_MODEL, view, outputs, to_operator)

    # Bare weights

    def _layers(self, name: str) -> list[_Part]:
        """The array, or each of the layers that are stacked in it."""
        shape = self.infos[name].shape
        if len(shape) < 3 or not self.scopes.is_stack(name, shape):
            return [_Part("", shape, _same)]
        return [_Part(f"[{i}]", shape[1:], _at((i,))) for i in range(shape[0])]

    def _of_part(self, name: str, part: _Part) -> list[NamedKernel]:
        shape = part.shape
        require(len(shape) > 1, "a vector for each of several layers")
        require(len(shape) <= 5, f"{len(shape)} axes, and a kernel has at most three of taps and two of channels")
        bias = self.scopes.bias.get(tuple(parts_of(name)[:-1]))
        bias = bias[1:] if bias is not None and part.ending else bias
        heads = heads_of(name, shape, bias) if len(shape) == 3 and leaf_of(name) == "kernel" else None
        if heads:
            view = _then(part.view, lambda array: array.reshape(heads))
            return [_named(name, _Part(part.ending, heads, view), Dense(), "the heads of attention beside each other")]
        layout, rule = self._layout_of(name, shape)
        axes, gates = axes_of(layout, len(shape)), gates_of(name, self.infos)
        parts = [_moved(gate, axes.order) for gate in _split(part, gates, axes.outputs)]
        rule = f"{rule}; a kernel for each gate" if gates else rule
        if len(shape) == 2:
            return [_named(name, gate, Dense(), rule) for gate in parts]
        return [self._convolution(name, gate, layout, rule) for gate in parts]

    def _convolution(self, name: str, moved: _Part, layout: str, rule: str) -> NamedKernel:
        """The kernel of an array whose axes are `(*taps, inputs, outputs)` already."""
        *taps, inputs, outputs = moved.shape
        require(
            self.layout is not None or max(taps) <= _MOST_TAPS_UNTOLD,
            f"{max(taps)} taps on an axis if it were a convolution; name its layout, or say that it is stacked",
        )
        if layout == "HWIO" and _has_multipliers(name, outputs):
            # Keras has the outputs of each input on an axis of their own.
            shape = (*taps, 1, inputs * outputs)
            moved = _Part(moved.ending, shape, _then(moved.view, lambda array: array.reshape(shape)))
            count, how = inputs, "depthwise as in Keras"
        else:
            count, how = self._groups_of(name, moved.shape)
        with errors_named(name):
            op = self._operator(len(taps), feature_group_count=count, strides=self.strides.get(name, 1))
            op._check_kernel_shape(moved.shape)
        return _named(name, moved, op, f"{rule}; {how}" if how else rule)

    def _operator(self, num_axes: int, **options: int) -> Operator:
        if self.input_shape is not None and len(self.input_shape) == num_axes:
            return ZeroPaddedConv(self.input_shape, **options)
        return UnboundedConv(**options)

    def _groups_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, str]:
        """The number of groups, and what says so."""
        *_, inputs, outputs = shape
        if name in self.groups:
            return self.groups[name], "groups as told"
        if inputs == 1 and _DEPTHWISE.search(name.lower()):
            return outputs, "depthwise by its name"
        if name in self._depthwise:
            return outputs, GUESSED
        return 1, ""

    def _depthwise_by_shape(self) -> set[str]:
        """The kernels that read one channel and have as many outputs as others, if a network has several.

        At most one layer of a network reads an image of one channel, and the input of a depthwise layer comes from a
        layer with as many outputs. Several networks in one file are told apart by the first parts of their names.
        """
        channels = {name: found for name in self.infos if (found := self._channels_of(name))}
        others = {outputs for inputs, outputs in channels.values() if inputs > 1}
        thin = [name for name, (inputs, outputs) in channels.items() if inputs == 1 and outputs in others]
        network_of = _networks(self.infos)
        counts = collections.Counter(network_of[name] for name in thin)
        return {name for name in thin if counts[network_of[name]] > 1}

    def _channels_of(self, name: str) -> tuple[int, int] | None:
        """The input and output channels of a group of a convolution, as stored; `None` for other arrays."""
        try:
            check_is_read(self.infos[name])
            self._check_is_weight(name)
            shape = self._layers(name)[0].shape
            axes = axes_of(self._layout_of(name, shape)[0], len(shape)) if 3 <= len(shape) <= 5 else None
        except NoKernel:
            return None
        return None if axes is None else (shape[axes.inputs], shape[axes.outputs])

    def _layout_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        if self.layout is not None:
            return self.layout, f"{self.layout} as told"
        found = likely_layout(name, shape)
        if found:
            return found
        require(self._common is not None, "neither name nor shape say which axes are the taps; name its layout")
        assert self._common is not None
        return self._common, "as the other arrays"

    def _common_layout(self) -> str | None:
        """The layout of all convolutions whose name or shape says it, if it is one."""
        found = {
            likely[0]
            for name, info in self.infos.items()
            if 3 <= len(info.shape) <= 5 and (likely := likely_layout(name, info.shape))
        }
        return found.pop() if len(found) == 1 else None


def _networks(names: Collection[str]) -> dict[str, str]:
    """The network of every array: the first part in which the names differ, but for the layer's own and the leaf's.

    A layer outside of all scopes is of a network without a name.
    """
    scopes = {name: parts_of(name)[:-2] for name in names}
    shared = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*scopes.values(), strict=False))))
    return {name: next(iter(scope[shared:]), "") for name, scope in scopes.items()}


def _has_multipliers(name: str, outputs: int) -> bool:
    """Whether a kernel is a depthwise one of Keras, `(*taps, channels, multiplier)`."""
    *_, scope, leaf = ["", *(part.lower() for part in parts_of(name))]
    return leaf == "depthwise_kernel" or (leaf == "kernel" and "depthwise" in scope and outputs == 1)


# Views


def _flattened(layer: LayerMap) -> tuple[Operator, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]:
    """The operator of a layer as of a matrix of two axes or of a convolution, its kernel's shape, and its kernel."""

    def flattened(stored: jax.Array):
        return layer.op._flattened(layer.to_operator(stored))

    def to_operator(stored: np.ndarray) -> np.ndarray:
        return np.asarray(flattened(jnp.asarray(stored))[0])

    kernel, op = jax.eval_shape(flattened, jax.ShapeDtypeStruct(layer.stored_shape, jnp.float32))
    return op, kernel.shape, to_operator


def _same(array):
    return array


def _at(index: tuple[int, ...]) -> Callable:
    return (lambda array: array[index]) if index else _same


def _then(first: Callable, second: Callable) -> Callable:
    return lambda array: second(first(array))


def _moved(part: _Part, order: tuple[int, ...]) -> _Part:
    shape = tuple(part.shape[axis] for axis in order)
    return _Part(part.ending, shape, _then(part.view, lambda array: array.transpose(order)))


def _split(part: _Part, gates: str, axis: int) -> list[_Part]:
    """The gates of a kernel along an axis, or the kernel as it is."""
    if not gates:
        return [part]
    axis %= len(part.shape)
    width = part.shape[axis] // len(gates)
    shape = tuple(width if i == axis else size for i, size in enumerate(part.shape))

    def gate(number: int) -> Callable:
        index = (slice(None),) * axis + (slice(number * width, (number + 1) * width),)
        return lambda array: part.view(array)[index]

    return [_Part(f"{part.ending}[{letter}]", shape, gate(number)) for number, letter in enumerate(gates)]


def _named(name: str, part: _Part, op: Operator, rule: str) -> NamedKernel:
    return NamedKernel(f"{name}{part.ending}", name, op, part.shape, rule, part.view, part.shape[-1], _same)
