"""What the NNX and the Linen wrappers share: what a layer is held to, and how its states start and step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.core
import jax.numpy as jnp

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.normalization.training.start import srnc_state
from jaxsrn.normalization.training.state import SRNCState
from jaxsrn.normalization.training.step import check_gradient, srnc_step
from jaxsrn.operators.flax_kinds import layer_name
from jaxsrn.operators.flax_layers import LayerMap
from jaxsrn.spectra.ranks import target_of_fraction

__all__ = ["Constraint", "each_kind_once", "ensure_wrapper", "target_for"]


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
            axes, shape = self.stacked_axes(kernel), getattr(norm, "shape", ())
            ensure(
                shape in ((), kernel.shape[:axes]),
                f"norm: got shape {shape}, expected one number{' or one for each layer' if axes else ''}.",
            )
            start = functools.partial(self._start, norm=1.0 if _is_stacked(norm) else norm)
            for _ in range(axes):
                start = functools.partial(jax.lax.map, start)
            return start(kernel)

    def _start(self, kernel: jax.Array, norm) -> SRNCState:
        raw = self.layer_map.to_operator(kernel)
        return srnc_state(raw, self.layer_map.op, self.target, norm=norm, cap=self.cap)

    def step(self, kernel: jax.Array, state: SRNCState, norm) -> tuple[jax.Array, SRNCState]:
        """The kernel normalized by the state, and the next state; those of a stack at once."""
        axes, step = self.stacked_axes(kernel), self._step
        ensure(
            all(jnp.shape(leaf)[:axes] == kernel.shape[:axes] for leaf in jax.tree.leaves(state)),
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


def ensure_wrapper(wrapper, base: type) -> None:
    """Raises `ValueError` unless the result of a `wrap` is a wrapper of the library that `base` belongs to."""
    ensure(
        isinstance(wrapper, base),
        f"wrap: got a {type(wrapper).__name__}, expected a StableRankNorm or a SpectralNorm.",
    )


def target_for(layer, seen: LayerMap, fraction) -> float:
    """`target_of_fraction` for a layer; errors name the layer."""
    advice = (
        " Give this layer a fraction of its own, or exempt it: wrap it in SpectralNorm, or leave it out by the option "
        "where= of constrain."
    )
    with errors_named(layer_name(layer), advice):
        return target_of_fraction(fraction, seen.shape, seen.op)
