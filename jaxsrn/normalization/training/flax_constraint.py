"""What the NNX and the Linen wrappers share: the constraints of layers, and the map of each layer in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.normalization.training.step import SRNCState, check_gradient, srnc_state, srnc_step
from jaxsrn.operators.base import Operator
from jaxsrn.operators.flax_layers import FlaxLayers, LayerMap, kind_of, layer_map, layer_name
from jaxsrn.spectra.ranks import target_of_fraction

__all__ = ["CallRecord", "Constraint", "each_kind_once", "target_for", "trace"]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a wrapper holds its layer to; static. Its methods take and return kernels in the layer's own layout.

    Attributes:
      layer_map: the layer's operator, and how its kernel is stored.
      target: the stable rank; `None` where only the norm is held.
      cap, gradient: as for `jaxsrn.srnc_step`.
    """

    layer_map: LayerMap
    target: float | None
    cap: bool
    gradient: str

    def start(self, layer, kernel: jax.Array, norm) -> SRNCState:
        """The converged state for a kernel; errors name the layer."""
        with errors_named(layer_name(layer)):
            check_gradient(self.gradient)
            op, raw = self.layer_map.op, self.layer_map.to_operator(kernel)
            return srnc_state(raw, op, self.target, norm=norm, cap=self.cap)

    def step(self, kernel: jax.Array, state: SRNCState, norm) -> tuple[jax.Array, SRNCState]:
        """The kernel normalized by the state, and the next state."""
        op, raw = self.layer_map.op, self.layer_map.to_operator(kernel)
        options = {"norm": norm, "cap": self.cap, "gradient": self.gradient}
        normalized, state = srnc_step(raw, state, op, self.target, **options)
        return self.layer_map.to_layer(normalized), state


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
    with errors_named(layer_name(layer)):
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
            shape = x.shape[-len(kernel_shape) + 1 : -1] if is_sized and x is not None else None
            seen = layer_map(layer, kernel_shape, shape, kind)
            known = self.found.setdefault(path, seen)
            ensure(known == seen, f"called as {known.op} and as {seen.op}, expected one image size.")

    def operators(self) -> dict[tuple, Operator]:
        """The operators of the layers that store their kernel in the operator's shape."""
        return {path: seen.op for path, seen in self.found.items() if seen.is_stored_as_is}


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
