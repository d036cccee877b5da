"""The wrappers for Flax NNX: layers whose stable rank and spectral norm are constrained while they train.

    import jaxsrn.nnx as jnnx

    self.conv = jnnx.StableRankNorm(nnx.Conv(3, 16, (3, 3), rngs=rngs), 0.5, rngs=rngs)

The wrappers hold no mathematics: every forward calls `jaxsrn.srnc_step` on the layer's kernel. `jaxsrn.linen` is the
same for Flax Linen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.normalization.training.flax_constraint import CallRecord, Constraint, each_kind_once, target_for, trace
from jaxsrn.operators.base import Operator
from jaxsrn.operators.flax_layers import FlaxLayers, LayerMap, kind_of, layer_map, layer_name, own_shape
from jaxsrn.operators.layers import LayerOperators

__all__ = [
    "SpectralNorm",
    "StableRankNorm",
    "StableRankState",
    "constrain",
    "fold",
    "layer_operators",
    "refresh",
    "restart",
]

_LAYERS = FlaxLayers(nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)


class StableRankState(nnx.Variable):
    """What a wrapper carries from step to step, in its attribute `state`: it is no parameter and has no gradient.

    Its value is a `jaxsrn.SRNCState` in float32 or wider, which `get_value()` reads. In `jaxsrn.linen` it is in the
    collection `"stable_rank"`. A checkpoint is restored with the state of such a model as the target, as every
    structure is that is no plain dictionary.
    """


class _Normalized(nnx.Module):
    """A layer whose kernel is normalized on the way into it; the stored kernel stays the raw parameter."""

    def __init__(self, layer: nnx.Module, norm, constraint: Constraint):
        self.layer = layer
        self.norm = norm
        self.constraint = nnx.static(constraint)
        # Module.train() and Module.eval() set this attribute, as they do for batch normalization.
        self.use_running_average = False
        self.state = StableRankState(self._start(layer.kernel[...]))

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

    def __call__(self, x, update_stats: bool = True, **options):
        """The layer with its normalized kernel.

        Args:
          x: the layer's input, of any spatial shape; the weights do not depend on it.
          update_stats: whether to store the stepped state afterwards. Without it, and after `model.eval()`, a forward
            only reads, so that any number of forwards see the same weights.
          **options: options of the layer itself, such as `out_sharding`.
        """
        kernel, state = self._step()
        if update_stats and not self.use_running_average:
            self.state.set_value(state)
        return _with_kernel(self.layer, kernel)(x, **options)

    def refresh(self) -> None:
        """One step of the state without a forward."""
        self.state.set_value(self._step()[1])

    def folded(self) -> nnx.Module:
        """The plain layer with the weights of a reading forward."""
        return _with_kernel(self.layer, self._step()[0])


class StableRankNorm(_Normalized):
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
        `beta`): that of `min(prod(in), prod(out))`, and without an `input_shape`, per output sample, of
        `min(c_in * prod(strides), c_out)` (per input sample, with the sides exchanged, where the input is dilated).
      input_shape: the spatial shape of the layer's input for which norm and stable rank are held; for convolutions.
      norm: the spectral norm. `None` keeps the layer's own; an `nnx.Param` is a gain that is learned with the rest.
      cap: whether the norm is only reduced, to the smaller of `norm` and the layer's own.
      gradient: `"frozen"` or `"implicit"`, as for `jaxsrn.srnc_step`.
      computes: the class above whose map `layer` computes with its parameter `kernel` as it is, where `layer` is of
        another class, or computes by functions of its own. You vouch for that; norm and stable rank are then those of
        that map.
      rngs: not needed, as the start is not random; taken so that the wrapper can be written like every Flax layer.

    Raises:
      ValueError: no kernel, a layer whose map may be another (`nnx.LoRALinear`), a fraction outside (0, 1] or below
        what the layer's taps allow, REFLECT, a mask, circular strides that do not divide the `input_shape`, strides
        beside input dilation without one; the message names the layer.
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


class SpectralNorm(_Normalized):
    """A layer with prescribed spectral norm: that of the linear map, not of the kernel flattened to a matrix.

    It is `StableRankNorm` without a target for the stable rank: the kernel is only rescaled, after two power steps of
    `jaxsrn.srnc_step`. The raw kernel stays the parameter and is never overwritten. The state is converged from the
    start, and follows the layer by frequency power iteration (unbounded, circular) or by power steps of a few images.

    Args, errors: as for `StableRankNorm`. The gradient is exact with either choice.
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
    kind = kind_of(layer, _LAYERS, {} if computes is None else {type(layer): computes})
    return layer_map(layer, own_shape(layer, layer.kernel.shape, kind), input_shape, kind)


def _with_kernel(layer: nnx.Module, kernel: jax.Array) -> nnx.Module:
    """A copy of the layer with another kernel; the layer itself is not touched."""
    graphdef, state = nnx.split(layer)
    state["kernel"] = state["kernel"].replace(kernel)
    return nnx.merge(graphdef, state, copy=True)


# Whole models


def refresh(model: nnx.Module) -> None:
    """Steps the state of every wrapper in `model` once, without a forward, in place.

    Raises:
      ValueError: no wrapper.
    """
    for wrapper in _wrappers(model):
        wrapper.refresh()


def restart(model: nnx.Module) -> None:
    """Starts the state of every wrapper in `model` anew from its kernel, in place; it is then converged.

    That is for kernels that were replaced since the state was made: by weights of a file, or by an average of weights.
    A forward finds that out by itself and takes the passes that it needs, but in evaluation it stores nothing, so that
    every forward takes them again. And with a target it keeps to a local solution, which a new start would improve.

    Raises:
      ValueError: no wrapper.
    """
    _start_anew(_wrappers(model))


def _wrappers(model: nnx.Module) -> list[_Normalized]:
    found = [module for _, module in nnx.iter_graph(model) if isinstance(module, _Normalized)]
    ensure(
        bool(found),
        f"model: got a {type(model).__name__} without a StableRankNorm or a SpectralNorm, expected some; "
        "jaxsrn.nnx.constrain wraps layers.",
    )
    return found


def fold(model: nnx.Module) -> nnx.Module:
    """The plain Flax model with the very weights that a reading forward of `model` uses.

    The function is pure and differentiable: inside a loss, fold once and unroll a recurrence over the result.

    Args:
      model: any module; its wrappers become the layers that they wrap.

    Returns:
      A new module; `model` is not touched.
    """
    return _rewritten(nnx.clone(model), lambda path, node: node.folded() if isinstance(node, _Normalized) else node)


def constrain(model: nnx.Module, wrap: Callable[[tuple, nnx.Module], nnx.Module], where: Any = _LAYERS) -> nnx.Module:
    """The model with every matching layer wrapped.

        model = constrain(model, lambda path, layer: SpectralNorm(layer))

    With the norms at one image size:

        ops = layer_operators(model, x)
        shape = lambda path: getattr(ops[(*path, "kernel")], "input_shape", None)
        model = constrain(model, lambda path, layer: SpectralNorm(layer, input_shape=shape(path)))

    Args:
      model: any module; layers inside wrappers are left alone.
      wrap: `(path, layer) -> wrapper`, the path as `nnx.iter_graph` names it.
      where: which layers: an NNX filter, as a type, a tuple of types, or a predicate `(path, layer) -> bool`.

    Returns:
      A new model; `model` is not touched.

    Raises:
      ValueError: nothing matches, or what `wrap` raises, with the path.
    """
    matches, found = nnx.filterlib.to_predicate(where), []

    def change(path, node):
        if isinstance(node, _Normalized) or not isinstance(node, nnx.Module) or not matches(path, node):
            return node
        with errors_named(".".join(map(str, path))):
            found.append(wrap(path, node))
        return found[-1]

    rewritten = _rewritten(nnx.clone(model), change)
    ensure(bool(found), f"where: got {where!r}, which matches no layer of {type(model).__name__}; expected some.")
    wrappers = [node for node in found if isinstance(node, _Normalized)]
    # Where kernels are traced, what started the wrappers one by one is dead code, which JAX drops.
    _start_anew([wrapper for wrapper in wrappers if isinstance(wrapper.layer.kernel[...], jax.core.Tracer)])
    return rewritten


def _start_anew(wrappers: list[_Normalized]) -> None:
    """Starts wrappers together."""
    kinds = [(wrapper.constraint, wrapper.norm is None) for wrapper in wrappers]
    kernels = [wrapper.layer.kernel[...] for wrapper in wrappers]
    states = each_kind_once([wrapper._start for wrapper in wrappers], kinds, kernels)
    for wrapper, state in zip(wrappers, states, strict=True):
        wrapper.state.set_value(state)


def layer_operators(
    model: nnx.Module, *inputs, computes: Mapping[type, type | None] = MappingProxyType({}), **options
) -> LayerOperators:
    """The operator of every layer of a model: without inputs that of no image size, with inputs that of theirs.

    Args:
      model: any module. Wrapped layers appear with the operator of their wrapper.
      *inputs: none, for `jaxsrn.UnboundedConv`s; or as for `model(*inputs, **options)`, to trace the model on their
        shapes: arrays or `jax.ShapeDtypeStruct`s, and whatever else the model takes (a flag `train`), which is passed
        on as it is.
      computes: `{class: class of Flax}`, the class whose map the layers of another class compute (as the option of the
        wrappers), or `None` to leave these layers out.
      **options: keyword arguments of `model`, passed on as the inputs are.

    Returns:
      `{path to the kernel: operator}`, the paths as `nnx.to_flat_state` names them. Layers stacked by `nnx.vmap` have
      the operator of one of them. It leaves out layers that the inputs, if there are any, do not reach, and layers that
      store the channels of their kernel the other way round than the operator: with strides and
      `transpose_kernel=False`, an `nnx.ConvTranspose` that is circular or without image size; without image size, an
      `nnx.Conv` with input dilation. The attribute `left_out` of the result lists these, and all other parameters of
      two axes or more, `{path: reason}`.

    Raises:
      ValueError: a layer called with images of different sizes, one that is no operator, or one whose map may be
        another; the message names it.
    """
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    return layer_calls(model, *inputs, computes=computes, **options).operators(shapes)


def layer_calls(model: nnx.Module, *inputs, computes: Mapping[type, type | None], **options) -> CallRecord:
    """The maps of the layers of a model, those in another shape than the operator's too; as `layer_operators`."""
    is_called = bool(inputs or options)
    calls = CallRecord(_LAYERS, computes, unbounded=not is_called)
    graphdef, state = nnx.split(model)

    def record(path, node):
        if isinstance(node, _Normalized):
            calls.found[(*path, "layer", "kernel")] = node.constraint.layer_map
        elif calls.concerns(node):
            if not is_called:
                calls.note((*path, "kernel"), node, node.kernel.shape)
            return _Recorder(node, (*path, "kernel"), calls)
        return node

    def run(state, inputs, options):
        recorded = _rewritten(nnx.merge(graphdef, state, copy=True), record)
        if is_called:
            recorded(*inputs, **options)

    trace(run, state, inputs, options)
    return calls


class _Recorder(nnx.Module):
    """Stands in for a layer while its model is traced, and notes the map of the layer."""

    def __init__(self, layer: nnx.Module, path: tuple, calls: CallRecord):
        self.layer, self.path, self.calls = layer, nnx.static(path), nnx.static(calls)

    def __getattr__(self, name: str):
        # Python calls this only for what the stand-in does not have: the layer's own attributes.
        if name.startswith("_") or name == "layer":
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __call__(self, x, *args, **kwargs):
        self.calls.note(self.path, self.layer, self.layer.kernel.shape, x)
        return self.layer(x, *args, **kwargs)


def _rewritten(node, change: Callable[[tuple, Any], Any], path: tuple = (), memo: dict | None = None) -> Any:
    """The node with every part replaced by `change(path, part)`; a part that is replaced is not entered.

    Parts are replaced in place, except in tuples.
    """
    memo = {} if memo is None else memo
    if id(node) in memo:
        return memo[id(node)][0]
    new = change(path, node)
    # The memo keeps the original, so that Python gives its id to no other object.
    memo[id(node)] = new, node
    if new is not node:
        return new
    if isinstance(node, tuple):
        parts = [_rewritten(child, change, (*path, i), memo) for i, child in enumerate(node)]
        if any(part is not child for part, child in zip(parts, node, strict=True)):
            new = type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
            memo[id(node)] = new, node
        return new
    for key, child in _children(node):
        changed = _rewritten(child, change, (*path, key), memo)
        if changed is not child:
            if isinstance(node, nnx.Module) and not isinstance(node, (nnx.List, nnx.Dict)):
                setattr(node, key, changed)
            else:
                node[key] = changed
    return new


def _children(node) -> list[tuple]:
    if isinstance(node, (list, nnx.List)):
        return list(enumerate(node))
    if isinstance(node, (dict, nnx.Dict)):
        return list(node.items())
    if isinstance(node, nnx.Module) and not isinstance(node, _Normalized):
        return list(vars(node).items())
    return []
