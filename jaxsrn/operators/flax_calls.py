"""The map of each layer in a model of Flax, noted while the model is traced: what NNX and Linen share.

How a call of a layer is seen differs between the two libraries (`nnx/models.py`, `linen/models.py`). What is noted of
it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.operators.flax_kinds import FlaxLayers, kind_of
from jaxsrn.operators.flax_layers import LayerMap, layer_map, own_shape
from jaxsrn.operators.layers import LayerOperators, Path

__all__ = ["CallRecord", "first_input", "trace"]


class CallRecord:
    """The map of every layer of a model, by the path of its kernel, noted while the model is traced.

    Attributes:
      found: `{path of the kernel: map}`.
      wrapped: the paths of kernels that a wrapper normalizes.
      classes, computes: as for `kind_of`.
      unbounded: whether the maps are those without an image size.
    """

    def __init__(self, classes: FlaxLayers, computes: Mapping[type, type | None], *, unbounded: bool):
        self.found: dict[tuple, LayerMap] = {}
        self.wrapped: set[tuple] = set()
        self.classes, self.computes, self.unbounded = classes, computes, unbounded

    def concerns(self, module) -> bool:
        """Whether a module is a layer."""
        return isinstance(module, (*self.classes, *self.computes))

    def note(self, path: tuple, layer: Any, kernel_shape: tuple[int, ...], x=None) -> None:
        """Notes the map of a layer; the image size is that of `x`, on which it is called.

        Raises:
          ValueError: a layer that is no operator, or that was called with another image size; the message names it.
        """
        with errors_named(".".join(map(str, path[:-1])) or type(layer).__name__, self._way_to_leave_out(layer)):
            kind = kind_of(layer, self.classes, self.computes)
            if kind is None:
                return
            is_sized = kind.startswith("conv") and not self.unbounded
            kernel_shape = own_shape(layer, kernel_shape, kind)
            shape = x.shape[-len(kernel_shape) + 1 : -1] if is_sized and x is not None else None
            self.note_map(path, layer_map(layer, kernel_shape, shape, kind))

    def note_wrapped(self, path: tuple, seen: LayerMap) -> None:
        """Notes the map of a raw kernel, which its wrapper knows."""
        self.wrapped.add(path)
        self.note_map(path, seen)

    def note_map(self, path: tuple, seen: LayerMap) -> None:
        """Notes the map of a kernel.

        Raises:
          ValueError: a kernel that has another map already.
        """
        known = self.found.setdefault(path, seen)
        advice = (
            " The operators that hold at every image size are those of jaxsrn.nnx.layer_operators(model) without "
            "inputs, or of jaxsrn.linen.layer_operators with unbounded=True."
        )
        ensure(
            known == seen,
            f"called as {known.op} and as {seen.op}, expected one image size and one map."
            f"{'' if self.unbounded else advice}",
        )

    def _way_to_leave_out(self, layer) -> str:
        """What an error says about leaving a layer out; a class of Flax is also that of the layers that stay."""
        name = type(layer).__name__
        if type(layer) not in self.classes:
            return f" To leave all layers of this class out, say computes={{{name}: None}}."
        return (
            f" To leave the layer out, make it of a class of its own, class Other({name}): pass, and say "
            "computes={Other: None}."
        )

    def operators(self, shapes: Mapping[Path, tuple[int, ...]]) -> LayerOperators:
        """The operators of the layers that store their kernel in the operator's shape, and what was left out.

        Args:
          shapes: those of all parameters of the model, by path.
        """
        as_is = {
            path: seen.op if shapes[path] == seen.stored_shape else seen.op_of_stack
            for path, seen in self.found.items()
            if seen.is_stored_as_is and _ends_in(shapes[path], seen.stored_shape)
        }
        # A bias is no map, however many axes it has.
        biases = {path for path in shapes if path[-1] == "bias" and (*path[:-1], "kernel") in self.found}
        left_out = [path for path, shape in shapes.items() if len(shape) > 1 and path not in {*as_is, *biases}]
        reasons = {path: self._reason(path, shapes[path]) for path in left_out}
        return LayerOperators(as_is, reasons, [path for path in as_is if path in self.wrapped])

    def _reason(self, path: Path, shape: tuple[int, ...]) -> str:
        """Why a parameter is the kernel of no operator."""
        if path in self.found and not _ends_in(shape, self.found[path].stored_shape):
            return (
                f"stacked along another axis than the first ones: its shape is {shape}, and the layer has a kernel of "
                f"{self.found[path].stored_shape}"
            )
        if path in self.found:
            return (
                f"its channels are stored the other way round than those of {self.found[path].op}, which is that of "
                "its adjoint; the wrappers take it"
            )
        if path[-1] == "embedding":
            return (
                "a table whose rows are looked up, which is no linear map of its input; of one-hot rows it is Dense()"
            )
        names = ", ".join(kind.__name__ for kind in self.classes)
        return f"of no layer in reach: of a module that is none of {names}, or the inputs miss it"


def _ends_in(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether an array of this shape is a kernel that is stored so, or a stack of such kernels along the first axes."""
    return shape[-len(stored) :] == stored


def first_input(args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The input of a call of a layer, which Flax's layers name `inputs`."""
    return args[0] if args else options.get("inputs", next(iter(options.values()), None))


def trace(function: Callable[..., Any], *args, **options) -> None:
    """Calls a function on the shapes of its arguments.

    An argument without a shape, as a flag, is passed as it is, and so is a scalar of NumPy, which may be a flag too.
    """
    leaves, treedef = jax.tree.flatten((args, options))
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def on_arrays(arrays):
        arrays = iter(arrays)
        filled = [next(arrays) if traced else leaf for leaf, traced in zip(leaves, is_array, strict=True)]
        args, options = treedef.unflatten(filled)
        function(*args, **options)

    jax.eval_shape(on_arrays, [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced])
