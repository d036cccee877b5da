"""Layers of a model by path: the kernels that paths name in a tree of parameters, and stacks of kernels of one shape.

A path is the tuple of plain keys from the root of the tree to the kernel, such as `("conv1", "kernel")`. The kernels of
a stack share one compiled program. A path may also name a **stack of layers**, as `nn.scan` and `nnx.vmap` make them:
then the array has the kernels of as many layers along axes before those of a kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxsrn._tools.checks import ensure, errors_named, kernel_array
from jaxsrn.operators.base import Operator

__all__ = [
    "LayerOperators",
    "Layers",
    "Path",
    "check_layers",
    "in_turn",
    "kernel_places",
    "named_kernels",
    "one_number",
    "plain",
    "split_shape",
    "values_of_stacks",
]

Path = tuple[Any, ...]
# The type is {path: operator}; `kernel_places` checks it entry by entry.
Layers = Mapping


@jax.tree_util.register_pytree_node_class
class LayerOperators(dict):
    """The layers of a model, `{path of the kernel: operator}`, and the kernels that are none of them.

    Attributes:
      left_out: `{path: reason}` of all other parameters of two axes or more. No constraint holds them.
      wrapped: the paths of raw kernels, which wrappers of jaxsrn normalize at every forward. Functions that tell norms
        of a model from its parameters refuse them; optimizers take them, and step on the raw kernels.
    """

    def __init__(self, found: Layers, left_out: Mapping[Path, str], wrapped: Collection[Path] = ()):
        super().__init__(found)
        self.left_out, self.wrapped = dict(left_out), tuple(wrapped)

    def tree_flatten(self):
        """The operators, which are static, as a dictionary's values are flattened."""
        return tuple(self.values()), (tuple(self), tuple(self.left_out.items()), self.wrapped)

    @classmethod
    def tree_unflatten(cls, static, operators):
        """The inverse of `tree_flatten`."""
        paths, left_out, wrapped = static
        return cls(dict(zip(paths, operators, strict=True)), dict(left_out), wrapped)


class _Stack(NamedTuple):
    """Kernels of one operator, shape and dtype along a first axis, with their paths.

    Attributes:
      op: the operator.
      paths: where the kernels are.
      outer: for each path, the shape of the stack of layers that it names; `()` for one layer.
      kernels: those of all paths.
    """

    op: Operator
    paths: list[Path]
    outer: list[tuple[int, ...]]
    kernels: Shaped[Array, "layers ..."]

    def joined(self, trees: Sequence):
        """The trees of all paths, whose arrays have the axes of stacks first, as one along the axis of layers."""
        return jax.tree.map(lambda *leaves: _joined(leaves, self.outer), *trees)

    def parted(self, tree) -> list:
        """The inverse of `joined`: a tree for each path."""
        ends = np.cumsum([math.prod(outer) for outer in self.outer])
        places = zip([0, *ends], ends, self.outer, strict=False)
        return [
            jax.tree.map(lambda leaf, a=a, b=b, outer=outer: leaf[a:b].reshape((*outer, *leaf.shape[1:])), tree)
            for a, b, outer in places
        ]


def _joined(leaves, outer) -> Shaped[Array, "layers ..."]:
    shaped = zip(leaves, outer, strict=True)
    return jnp.concatenate([leaf.reshape((-1, *leaf.shape[len(axes) :])) for leaf, axes in shaped])


def split_shape(op: Operator, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the stack of layers, `()` for one layer, and that of a kernel, from the shape of an array."""
    axes = 0 if op._kernel_axes is None else max(len(shape) - op._kernel_axes, 0)
    return shape[:axes], shape[axes:]


def plain(path) -> Path:
    """The plain keys of a key path of `jax.tree_util`: dictionary keys, indices, attribute names."""
    return tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)


def _names(path: Path, leaf) -> bool:
    """Whether a path leads to a leaf, or to the variable that holds the leaf as an attribute."""
    rest = leaf[len(path) :]
    return plain(leaf[: len(path)]) == path and all(isinstance(key, jax.tree_util.GetAttrKey) for key in rest)


def check_layers(layers: Layers) -> None:
    """Raises `ValueError` unless layers are given by path, and at least one, so that no constraint holds nothing."""
    ensure(
        isinstance(layers, Layers),
        f"layers: got a {type(layers).__name__}, expected {{path: operator}}, as layer_operators gives it.",
    )
    left_out = getattr(layers, "left_out", {})
    reasons = "".join(f"\n  {path!r}: {reason}" for path, reason in left_out.items())
    ensure(
        len(layers) > 0,
        "layers: got none, expected {path: operator}, as layer_operators gives it."
        + (f" It left out:{reasons}" if left_out else ""),
    )


def kernel_places(layers: Layers, params) -> dict[Path, int]:
    """The index, in the order of `jax.tree.leaves(params)`, of the leaf that each path names.

    A path ends at the kernel's name, `("conv1", "kernel")`, also where the tree has a Flax variable there: the variable
    is a node of its own, and the array is an attribute of it.

    Raises:
      ValueError: no layers, a path that names no leaf or several, a path that is no tuple, or a value that is no
        operator.
    """
    check_layers(layers)
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {}
    for path, op in layers.items():
        ensure(isinstance(path, tuple), f"layers: got the path {path!r}, expected a tuple of plain keys.")
        ensure(isinstance(op, Operator), f"layers: got {op!r} for {path!r}, expected an operator, such as Dense().")
        below = [i for i, leaf in enumerate(leaves) if _names(path, leaf)]
        ensure(
            len(below) == 1,
            f"layers: the path {path!r} names {len(below)} arrays, expected one; params has "
            f"{', '.join(repr(plain(leaf)) for leaf in leaves[:8]) or 'none'}{', ...' if len(leaves) > 8 else ''}.",
        )
        found[path] = below[0]
    return found


def named_kernels(layers: Layers, params) -> dict[Path, Shaped[Array, "..."]]:
    """The kernels that `layers` names in `params`, by path.

    Raises:
      ValueError: what `kernel_places` refuses, or a kernel that does not fit its operator.
    """
    leaves = jax.tree.leaves(params)
    kernels = {}
    for path, index in kernel_places(layers, params).items():
        with errors_named(f"layers: at {path!r}"):
            checked = functools.partial(kernel_array, op=layers[path])
            for _ in split_shape(layers[path], jnp.shape(leaves[index]))[0]:
                checked = jax.vmap(checked)
            kernels[path] = checked(leaves[index])
    return kernels


def _stacked(layers: Layers, kernels: Mapping) -> list[_Stack]:
    """The given kernels, with those of equal operator, shape and dtype stacked."""
    groups: dict[tuple, list[Path]] = {}
    for path, kernel in kernels.items():
        _, shape = split_shape(layers[path], kernel.shape)
        groups.setdefault((layers[path], shape, kernel.dtype), []).append(path)
    found = []
    for (op, _, _), paths in groups.items():
        outer = [split_shape(op, kernels[path].shape)[0] for path in paths]
        found.append(_Stack(op, paths, outer, _joined([kernels[path] for path in paths], outer)))
    return found


def _after(kernels: Shaped[Array, "..."], value: Shaped[Array, ""]) -> Shaped[Array, "..."]:
    """The same kernels, but not before `value` is known, for stacks that must be worked on in turn.

    Batched SVDs of jaxlib 0.10.2 can wait for each other forever on CPUs where several run at once. An optimization
    barrier does not prevent that: it binds XLA's passes alone, and the compiled program has none. The result here does
    depend on `value`, because XLA does not know that no number is below minus infinity.
    """
    return jnp.where(value < -jnp.inf, 0, kernels)


def in_turn(
    function: Callable, layers: Layers, kernels: Mapping, memory: Mapping
) -> Iterator[tuple[Path, Shaped[Array, "..."], Any]]:
    """`function(kernels, op, memories)` of every stack, one stack after the other, and its parts for each path.

    Args:
      function: from the kernels of a stack, and the memories of its layers as one tree with a first axis of layers, to
        arrays of the kernels' shape and new memories.
      layers: the operators.
      kernels: `{path: kernel}`.
      memory: `{path: tree}`; of a stack of layers, the axes of the stack come first in every array.

    Yields:
      `(path, array, memory)`.
    """
    latest = jnp.zeros(())
    for stack in _stacked(layers, kernels):
        memories = stack.joined([memory[path] for path in stack.paths])
        found, memories = function(_after(stack.kernels, latest), stack.op, memories)
        latest = found.reshape(-1)[0]
        for path, (array, new) in zip(stack.paths, stack.parted((found, memories)), strict=True):
            yield path, array, new


def one_number(function: Callable) -> Callable:
    """The function of `(kernel, op)`, with a `ValueError` where it has several numbers for a layer."""

    @functools.wraps(function)
    def checked(kernel, op):
        value = function(kernel, op)
        ensure(
            value is None or jax.tree.structure(value) == jax.tree.structure(0),
            f"function: got a {type(value).__name__} for each layer, expected one number; take one of its fields.",
        )
        return value

    return checked


def values_of_stacks(function: Callable, layers: Layers, params) -> list:
    """`function(kernel, op)` of every layer: for each stack the tree of its values, along a first axis.

    The stacks are worked on in turn, and `function` is compiled once for each.

    Raises:
      ValueError: what `named_kernels` refuses, raw kernels of wrapped layers, or a function whose values are not
        floating-point scalars.
    """
    for path in getattr(layers, "wrapped", ()):
        ensure(
            path not in layers,
            f"layers: at {path!r}: got the raw kernel of a wrapped layer, which has other weights in a forward; take "
            "layer_operators and the parameters of the plain model that fold gives, or dict(layers) where the "
            "parameters are folded already or raw kernels are meant.",
        )
    latest, found = jnp.zeros(()), []
    for stack in _stacked(layers, named_kernels(layers, params)):
        values = jax.vmap(function, (0, None))(_after(stack.kernels, latest), stack.op)
        leaves = jax.tree.leaves(values)
        ensure(len(leaves) > 0, f"function: got nothing for {stack.paths[0]!r}, expected a scalar.")
        for leaf in leaves:
            ensure(
                jnp.shape(leaf) == (len(stack.kernels),),
                f"function: got a value of shape {jnp.shape(leaf)[1:]} for {stack.paths[0]!r}, expected a scalar.",
            )
            ensure(
                jnp.issubdtype(leaf.dtype, jnp.floating),
                f"function: got {leaf.dtype} for {stack.paths[0]!r}, expected a real floating-point number.",
            )
        latest = jnp.sum(leaves[0])
        found.append(values)
    return found
