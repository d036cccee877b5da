"""What the NNX and the Linen wrappers share: the constraints of layers, and the map of each layer in a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.normalization.training.step import SRNCState, check_gradient, srnc_state, srnc_step
from jaxsrn.operators.flax_layers import FlaxLayers, LayerMap, kind_of, layer_map, layer_name, own_shape
from jaxsrn.operators.layers import LayerOperators, Path
from jaxsrn.spectra.ranks import target_of_fraction

__all__ = ["CallRecord", "Constraint", "each_kind_once", "target_for", "trace"]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a wrapper holds its layer to; static. Its methods take and return kernels in the layer's own layout.

    A stack of layers is a batch of kernels along the first axes, whose states are stacked as well.

    Attributes:
      layer_map: the layer's operator, and how its kernel is stored.
      target: the stable rank; `None` where only the norm is held.
      cap, gradient: as for `jaxsrn.srnc_step`.
    """

    layer_map: LayerMap
    target: float | None
    cap: bool
    gradient: str

    def start(self, name: str, kernel: jax.Array, norm) -> SRNCState:
        """The converged state for a kernel, or those of a stack; errors have the name of the layer.

        The value of a norm takes no part in it, so that norms of a stack are not taken apart.
        """
        with errors_named(name):
            check_gradient(self.gradient)
            start = functools.partial(self._start, norm=1.0 if _is_stacked(norm) else norm)
            for _ in range(self.stacked_axes(kernel)):
                start = functools.partial(jax.lax.map, start)
            return start(kernel)

    def _start(self, kernel: jax.Array, norm) -> SRNCState:
        raw = self.layer_map.to_operator(kernel)
        return srnc_state(raw, self.layer_map.op, self.target, norm=norm, cap=self.cap)

    def step(self, kernel: jax.Array, state: SRNCState, norm) -> tuple[jax.Array, SRNCState]:
        """The kernel normalized by the state, and the next state; those of a stack at once."""
        axes, step = self.stacked_axes(kernel), self._step
        ensure(
            all(jnp.ndim(leaf) >= axes for leaf in jax.tree.leaves(state)),
            f"got kernels of shape {kernel.shape} and a state that is not stacked along axis 0.",
        )
        for _ in range(axes):
            step = jax.vmap(step, in_axes=(0, 0, 0 if _is_stacked(norm) else None))
        return step(kernel, state, norm)

    def _step(self, kernel: jax.Array, state: SRNCState, norm) -> tuple[jax.Array, SRNCState]:
        raw = self.layer_map.to_operator(kernel)
        options = {"norm": norm, "cap": self.cap, "gradient": self.gradient}
        normalized, state = srnc_step(raw, state, self.layer_map.op, self.target, **options)
        return self.layer_map.to_layer(normalized), state

    def stacked_axes(self, kernel: jax.Array) -> int:
        """How many axes of stacked layers stand before those of a kernel."""
        shape = self.layer_map.stored_shape
        axes = kernel.ndim - len(shape)
        ensure(
            axes >= 0 and kernel.shape[axes:] == shape,
            f"got kernels of shape {kernel.shape}, expected {shape}, stacked along axis 0.",
        )
        return axes


def _is_stacked(norm) -> bool:
    """Whether each layer of a stack has a norm of its own."""
    return norm is not None and jnp.ndim(norm) > 0


def each_kind_once(
    starts: Sequence[Callable[[jax.Array], SRNCState]], kinds: Sequence[Hashable], kernels: Sequence[jax.Array]
) -> list[SRNCState]:
    """`[start(kernel) for start, kernel in zip(starts, kernels)]`, where equal kinds have the same function.

    XLA copies a function to every place that calls it, so a traced model of twenty layers would be a program with
    twenty starts. There, kernels of one kind and shape go through one start in a loop. Concrete kernels of one shape
    share a compiled program anyway; in a stack they would need another one, which is no faster.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (kind, kernel) in enumerate(zip(kinds, kernels, strict=True)):
        alike = (kind, kernel.shape, kernel.dtype) if isinstance(kernel, jax.core.Tracer) else i
        groups.setdefault(alike, []).append(i)
    states = {}
    for first, *others in groups.values():
        if not others:
            states[first] = starts[first](kernels[first])
            continue
        stacked = jax.lax.map(starts[first], jnp.stack([kernels[i] for i in (first, *others)]))
        states |= {i: jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n, i in enumerate((first, *others))}
    return [states[i] for i in range(len(kernels))]


def target_for(layer, seen: LayerMap, fraction) -> float:
    """`target_of_fraction` for a layer; errors name the layer."""
    advice = (
        " Give this layer a fraction of its own, or exempt it: wrap it in SpectralNorm, or leave it out by the option "
        "where= of constrain."
    )
    with errors_named(layer_name(layer), advice):
        return target_of_fraction(float(fraction), seen.shape, seen.op)


class CallRecord:
    """The map of every layer of a model, by the path of its kernel, noted while the model is traced.

    Attributes:
      found: `{path of the kernel: map}`.
      classes, computes: as for `kind_of`.
      unbounded: whether the maps are those without an image size.
    """

    def __init__(self, classes: FlaxLayers, computes: Mapping[type, type | None], *, unbounded: bool):
        self.found: dict[tuple, LayerMap] = {}
        self.classes, self.computes, self.unbounded = classes, computes, unbounded

    def concerns(self, module) -> bool:
        """Whether a module is a layer."""
        return isinstance(module, (*self.classes, *self.computes))

    def note(self, path: tuple, layer: Any, kernel_shape: tuple[int, ...], x=None) -> None:
        """Notes the map of a layer; the image size is that of `x`, on which it is called.

        Raises:
          ValueError: a layer that is no operator, or that was called with another image size; the message names it.
        """
        with errors_named(".".join(map(str, path[:-1])) or type(layer).__name__):
            kind = kind_of(layer, self.classes, self.computes)
            if kind is None:
                return
            is_sized = kind.startswith("conv") and not self.unbounded
            kernel_shape = own_shape(layer, kernel_shape, kind)
            shape = x.shape[-len(kernel_shape) + 1 : -1] if is_sized and x is not None else None
            seen = layer_map(layer, kernel_shape, shape, kind)
            known = self.found.setdefault(path, seen)
            ensure(known == seen, f"called as {known.op} and as {seen.op}, expected one image size.")

    def operators(self, shapes: Mapping[Path, tuple[int, ...]]) -> LayerOperators:
        """The operators of the layers that store their kernel in the operator's shape, and what was left out.

        Args:
          shapes: those of all parameters of the model, by path.
        """
        as_is = {
            path: seen.op if len(shapes[path]) == len(seen.stored_shape) else seen.op_of_stack
            for path, seen in self.found.items()
            if seen.is_stored_as_is
        }
        # What else a layer has, as its bias, is no map, however many axes it has.
        beside = {path for path in shapes if (*path[:-1], "kernel") in self.found and path not in self.found}
        left_out = [path for path, shape in shapes.items() if len(shape) > 1 and path not in {*as_is, *beside}]
        return LayerOperators(as_is, {path: self._reason(path) for path in left_out})

    def _reason(self, path: Path) -> str:
        """Why a parameter is the kernel of no operator."""
        if path in self.found:
            return (
                f"its channels are stored the other way round than those of {self.found[path].op}, which is that of "
                "its adjoint; the wrappers take it"
            )
        names = ", ".join(kind.__name__ for kind in self.classes)
        return f"of no layer in reach: of a module that is none of {names}, or the inputs miss it"


def trace(function: Callable[..., Any], *args, **options) -> None:
    """Calls a function on the shapes of its arguments; an argument without a shape, as a flag, is passed as it is."""
    leaves, treedef = jax.tree.flatten((args, options))
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def on_arrays(arrays):
        arrays = iter(arrays)
        filled = [next(arrays) if traced else leaf for leaf, traced in zip(leaves, is_array, strict=True)]
        args, options = treedef.unflatten(filled)
        function(*args, **options)

    jax.eval_shape(on_arrays, [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced])
