"""Wrappers around single layers, and the state that they carry."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsrn._tools.checks import ensure
from jaxsrn.normalization.training.flax_constraint import Constraint, target_for
from jaxsrn.operators.base import Operator
from jaxsrn.operators.flax_kinds import FlaxLayers, kind_of, layer_name
from jaxsrn.operators.flax_layers import LayerMap, layer_map, own_shape

__all__ = [
    "CHANGING",
    "LAYERS",
    "Normalized",
    "SpectralNorm",
    "StableRankNorm",
    "StableRankState",
]

LAYERS = FlaxLayers(nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
# Wrappers of Flax whose layers compute with another kernel than they store.
CHANGING = nnx.SpectralNorm, nnx.WeightNorm


class StableRankState(nnx.Variable):
    """What a wrapper carries from step to step, in its attribute `state`: it is no parameter and has no gradient.

    Its value is a `jaxsrn.SRNCState` in float32 or wider, which `get_value()` reads. In `jaxsrn.linen` it is in the
    collection `"stable_rank"`. A checkpoint is restored with the state of such a model as the target, as every
    structure is that is no plain dictionary.
    """


class Normalized(nnx.Module):
    """A layer whose kernel is normalized on the way into it; the stored kernel stays the raw parameter."""

    def __init__(self, layer: nnx.Module, norm, constraint: Constraint):
        # The layers of Flax share no class that has a kernel.
        self.layer: Any = layer
        self.norm = norm
        self.constraint = nnx.static(constraint)
        # Module.train() and Module.eval() set this attribute, as they do for batch normalization.
        self.use_running_average = False
        self.state = StableRankState(self._start(self.layer.kernel[...]))

    @property
    def operator(self) -> Operator:
        """The operator whose norm and stable rank are held; a transposed layer may have the operator of its adjoint."""
        return self.constraint.layer_map.op

    def _norm(self):
        # A norm has no sign, so that of a learned gain is dropped.
        return jnp.abs(self.norm[...]) if isinstance(self.norm, nnx.Variable) else self.norm

    def _start(self, kernel):
        """The converged state for a kernel, in the layer's layout."""
        return self.constraint.start(layer_name(self.layer), kernel, self._norm())

    def _step(self):
        """The kernel normalized by the stored state, in the layer's layout, and the next state."""
        return self.constraint.step(self.layer.kernel[...], self.state.get_value(), self._norm())

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls, as it does for batch normalization: with `True` forwards only read."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, inputs, update_stats: bool = True, **options):
        """The layer with its normalized kernel.

        Args:
          inputs: the layer's input, of any spatial shape; the weights do not depend on it.
          update_stats: whether to store the stepped state afterwards. Without it, and after `model.eval()`, a forward
            only reads, so that any number of forwards see the same weights.
          **options: options of the layer itself, such as `out_sharding`.
        """
        kernel, state = self._step()
        if update_stats and not self.use_running_average:
            self.state.set_value(state)
        return _with_kernel(self.layer, kernel)(inputs, **options)

    def refresh(self) -> None:
        """One step of the state without a forward."""
        self.state.set_value(self._step()[1])

    def folded(self) -> nnx.Module:
        """The plain layer with the weights of a reading forward."""
        return _with_kernel(self.layer, self._step()[0])


class StableRankNorm(Normalized):
    """A layer with prescribed stable rank and spectral norm: those of the linear map, not of the flattened kernel.

    Without an `input_shape` the map of a convolution is `jaxsrn.UnboundedConv`, with the layer's strides, dilation and
    groups: the layer's norm is then at most `norm` at every image size and with every padding, and close to it on large
    images. (Circular padding with strides that do not divide the image is no convolution, and can exceed it.) With an
    `input_shape` the map is exactly the layer's at that size, padding included.

    Every forward uses the closest kernel with `||T||_2 = norm` and a share `fraction` of the largest stable rank, by
    `jaxsrn.srnc_step`: for dense layers that is Algorithm 2 of Sanyal, Torr, Dokania 2020 (with two power steps),
    for convolutions Zheng et al. 2025, eq. 7. The raw kernel stays the parameter and is never overwritten. A layer
    whose own stable rank is below the target keeps it. The state is converged from the start.

    Args:
      layer: `nnx.Conv`, `nnx.ConvTranspose`, `nnx.Linear` or `nnx.LinearGeneral`, or a subclass that changes neither
        the call nor the parameter.
      fraction: the share, in (0, 1], of the largest stable rank that the layer's shapes allow (Sanyal's `c`, Zheng's
        `beta`): the upper end of `jaxsrn.stable_rank_range`. For most layers that is `min(prod(in), prod(out))`, and
        without an `input_shape`, per output sample, `min(c_in * prod(strides), c_out)` (per input sample, with the
        sides exchanged, where the input is dilated).
      input_shape: the spatial shape of the layer's input for which norm and stable rank are held; for convolutions.
      norm: the spectral norm. `None` keeps the layer's own; an `nnx.Param` is a gain that is learned with the rest.
      cap: whether the norm is only reduced, to the smaller of `norm` and the layer's own.
      gradient: `"frozen"` or `"implicit"`, as for `jaxsrn.srnc_step`.
      computes: the class above whose map `layer` computes with its parameter `kernel` as it is, where `layer` is of
        another class, or computes by functions of its own. You vouch for that; norm and stable rank are then those of
        that map.
      rngs: not needed, as the start is not random; taken so that the wrapper can be written like every Flax layer.

    Raises:
      ValueError: no kernel or one without values (`nnx.eval_shape`), a layer whose map may be another
        (`nnx.LoRALinear`), a stack along another axis than the first ones, a fraction outside (0, 1] or below what the
        layer's taps allow, REFLECT, a mask, circular strides that do not divide the `input_shape`, strides beside input
        dilation without one; the message names the layer.
    """

    def __init__(
        self,
        layer: nnx.Module,
        fraction: float,
        *,
        input_shape=None,
        norm=1.0,
        cap: bool = False,
        gradient: str = "frozen",
        computes: type | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        seen = _map_of(layer, input_shape, computes)
        super().__init__(layer, norm, Constraint(seen, target_for(layer, seen, fraction), bool(cap), gradient))


class SpectralNorm(Normalized):
    """A layer with prescribed spectral norm: that of the linear map, not of the kernel flattened to a matrix.

    It is `StableRankNorm` without a target for the stable rank: the kernel is only rescaled, after two power steps of
    `jaxsrn.srnc_step`. The raw kernel stays the parameter and is never overwritten. The state is converged from the
    start, and follows the layer by frequency power iteration (unbounded, circular) or by power steps of a few images.

    The arguments and errors are those of `StableRankNorm`. The gradient is exact with either choice.
    """

    def __init__(
        self,
        layer: nnx.Module,
        *,
        input_shape=None,
        norm=1.0,
        cap: bool = False,
        gradient: str = "frozen",
        computes: type | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(layer, norm, Constraint(_map_of(layer, input_shape, computes), None, bool(cap), gradient))


def _map_of(layer, input_shape, computes) -> LayerMap:
    has_kernel = isinstance(getattr(layer, "kernel", None), nnx.Variable)
    inside = any(hasattr(node, "kernel") for _, node in nnx.iter_graph(layer))
    advice = "Wrap the layers inside, or use jaxsrn.nnx.constrain." if inside else "There is nothing to hold."
    ensure(
        has_kernel or hasattr(layer, "num_embeddings"),
        f"{layer_name(layer)}: it has no kernel; expected nnx.Conv, nnx.ConvTranspose, nnx.Linear or "
        f"nnx.LinearGeneral. {advice}",
    )
    ensure(
        not (has_kernel and isinstance(layer.kernel.get_value(), jax.ShapeDtypeStruct)),
        f"{layer_name(layer)}: got a kernel without values, as nnx.eval_shape makes it, expected an array, from which "
        "the state starts; make the wrapped model inside, nnx.eval_shape(lambda: constrain(make(), ...)).",
    )
    kind = kind_of(layer, LAYERS, {} if computes is None else {type(layer): computes})
    return layer_map(layer, own_shape(layer, layer.kernel.shape, kind), input_shape, kind)


def _with_kernel(layer: nnx.Module, kernel: jax.Array) -> nnx.Module:
    """A copy of the layer with another kernel; the layer itself is not touched."""
    graphdef, state = nnx.split(layer)
    state["kernel"] = cast(nnx.Variable, state["kernel"]).replace(kernel)
    return nnx.merge(graphdef, state, copy=True)
