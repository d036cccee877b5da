"""Whole models of Flax Linen: their layers wrapped, stepped or folded, and the operators of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsrn._tools.checks import ensure
from jaxsrn.linen.constrained import Constrained, Trace, Wrapping
from jaxsrn.linen.variables import nested, params_of, started, stepped, written
from jaxsrn.linen.wrappers import CHANGING, COLLECTION, LAYERS, LEARNED, Normalized, trace_keys
from jaxsrn.operators.flax_calls import CallRecord, first_input, trace
from jaxsrn.operators.flax_kinds import ensure_own_kernel
from jaxsrn.operators.layers import LayerOperators

__all__ = ["constrain", "fold", "layer_calls", "layer_operators", "refresh", "restart"]


def constrain(module: nn.Module, wrap: Callable[[tuple, nn.Module], nn.Module], where: Any = LAYERS) -> nn.Module:
    """The model with every matching layer wrapped.

        model = constrain(module, lambda path, layer: SpectralNorm(layer))

    With the norms at one image size:

        ops = layer_operators(module, variables, x)
        shape = lambda path: getattr(ops[(*path, "kernel")], "input_shape", None)
        model = constrain(module, lambda path, layer: SpectralNorm(layer, input_shape=shape(path)))

    Modules of Linen are descriptions, and most have no layers before they are called. So the result is a module around
    `module` that, when it is called, hands it parameters whose kernels are normalized. The state of a layer is stepped
    once a call, even where the call uses the layer several times. Paths of the parameters stay those of `module`;
    states, and learned norms among the parameters, are under `"constrained"`. The weights for methods other than
    `__call__` are those of `fold`.

    Args:
      module: any module; layers inside wrappers, or inside constrained modules, are left alone.
      wrap: `(path, layer) -> wrapper`, the path as `flax.traverse_util.flatten_dict(variables["params"])` names it. It
        is called where the states start: in `init`, or in the first `apply` with `"stable_rank"` missing and mutable.
        Layers that this `init` or `apply` does not reach stay as they are.
      where: which layers: an NNX filter, as a type, a tuple of types, or a predicate `(path, layer) -> bool`.

    Returns:
      A module that is called as `module` is, for `init`, `apply`, `refresh`, `fold` and `layer_operators`. In `apply`
      the states are stepped where the collection `"stable_rank"` is mutable.

    Raises:
      ValueError: when called: nothing matches, or what `wrap` raises, with the path.
    """
    if isinstance(module, Constrained):
        return Constrained(module.module, (*module.wrappings, Wrapping(wrap, where)))
    return Constrained(module, (Wrapping(wrap, where),))


def fold(module: nn.Module, variables: Mapping) -> dict:
    """The variables of the plain model, with the very weights that a reading forward of `module` uses.

    The function is pure and differentiable: inside a loss, fold once and unroll a recurrence over the result.

    A layer that its wrapper holds (`.../wrapper/layer/kernel`: made in `setup`, or outside of any module) takes the
    wrapper's place (`.../wrapper/kernel`), where the plain model without the wrapper has it. In a compact method Flax
    makes the layer a neighbour of its wrapper (`.../Conv_0/kernel`), so there it keeps its path. Learned norms and the
    collection `"stable_rank"` are dropped; all else stays.

    Args:
      module: the model with wrappers.
      variables: its variables, `"stable_rank"` included. Layers stacked by `nn.vmap` or `nn.scan` are stacked along
        axis 0 in both collections.

    Returns:
      Variables for `apply` of the same architecture written without wrappers.

    Raises:
      ValueError: no collection `"stable_rank"`, a layer wrapped twice, or kernels that are stacked otherwise.
    """
    params, places = dict(flatten_dict(params_of(variables, module))), {}
    for wrapper, (layer, kernel, state) in stepped(module, variables).items():
        ensure(layer not in places, f"{written(layer, module)}: it has several wrappers, expected one.")
        places[layer] = wrapper if state.layer[0] == 0 else layer
        if state.norm == LEARNED:
            del params[(*wrapper, "norm")]
        params[(*layer, "kernel")] = kernel
    plain = unflatten_dict({_replaced(path, places): leaf for path, leaf in params.items()})
    return {**{name: variables[name] for name in variables if name != COLLECTION}, "params": plain}


def refresh(module: nn.Module, variables: Mapping) -> dict:
    """The variables after one step of the state of every wrapper in `module`, without a forward.

    The function is pure: it returns the new variables, where `jaxsrn.nnx.refresh` changes the model.

    Args:
      module: a model with wrappers; a layer may have several.
      variables: its variables.

    Returns:
      The variables with new states.

    Raises:
      ValueError: what `fold` raises it for, but for several wrappers of a layer.
    """
    states = {wrapper: state for wrapper, (_, _, state) in stepped(module, variables).items()}
    return {**variables, COLLECTION: nested(states, "state")}


def restart(module: nn.Module, variables: Mapping) -> dict:
    """The variables with the state of every wrapper in `module` started anew from its kernel; it is then converged.

    That is for kernels that were replaced since the state was made: by weights of a file, or by an average of weights.
    A forward finds that out by itself and takes the passes that it needs, but where `"stable_rank"` is not mutable it
    stores nothing, so that every forward takes them again. And with a target it keeps to a local solution, which a new
    start would improve. The function is pure, as `refresh` is.

    Args:
      module: a model with wrappers; a layer may have several.
      variables: its variables.

    Returns:
      The variables with new states.

    Raises:
      ValueError: what `refresh` raises it for.
    """
    return {**variables, COLLECTION: nested(started(module, variables), "state")}


def _replaced(path: tuple, places: Mapping[tuple, tuple]) -> tuple:
    """The path in the plain model of what is at a path in the wrapped one; `places` is where the layers go."""
    return next((places[path[:n]] + path[n:] for n in range(len(path)) if path[:n] in places), path)


def layer_operators(
    module: nn.Module,
    variables: Mapping,
    *inputs,
    unbounded: bool = False,
    computes: Mapping[type, type | None] = MappingProxyType({}),
    **options,
) -> LayerOperators:
    """The operator of every layer of a model, found by tracing the model on the shapes of its inputs.

    Modules of Linen have no layers before they are called. So inputs are needed even where their image size does not
    matter; `jaxsrn.nnx.layer_operators` does without.

    Args:
      module: any module. Wrapped layers appear with the operator of their wrapper.
      variables: those that `init` returns, or their shapes.
      *inputs: as for `module.apply(variables, *inputs, **options)`: arrays or `jax.ShapeDtypeStruct`s, and whatever
        else the module takes (a flag `train`), which is passed on as it is.
      unbounded: whether convolutions have the operators of no image size, `jaxsrn.UnboundedConv`.
      computes: `{class: class of Flax}`, the class whose map the layers of another class compute (as the option of the
        wrappers), or `None` to leave these layers out.
      **options: keyword arguments of `module.apply`, passed on as the inputs are.

    Returns:
      `{path to the kernel: operator}`, the paths as `flax.traverse_util.flatten_dict(variables["params"])` names them.
      Layers stacked by `nn.vmap` or `nn.scan` along the first axes (`variable_axes={"params": 0}`) have the operator of
      one of them. It leaves out layers stacked along another axis, as far as the shape of the kernel shows it (where
      there are as many layers as channels, it does not), layers that the inputs do not reach, and layers that store the
      channels of their kernel the other way round than the operator: with strides and `transpose_kernel=False`, an
      `nn.ConvTranspose` that is circular or without image size; without image size, an `nn.Conv` with input dilation.
      The attribute `left_out` of the result lists these, and all other parameters of two axes or more,
      `{path: reason}`.

    Raises:
      ValueError: no inputs, a layer called with images of different sizes, one that is no operator, or one whose map
        may be another (as those of `nn.vmap(nn.Dense)`); the message names it.
    """
    ensure(
        bool(inputs or options),
        f"inputs: got none, expected those of {type(module).__name__} or their shapes, as a module of Linen has no "
        "layers before it is called; unbounded=True gives the operators of no image size.",
    )
    params = flatten_dict(nn.meta.unbox(params_of(variables, module)))
    shapes = {path: jnp.shape(leaf) for path, leaf in params.items()}
    return layer_calls(module, variables, *inputs, unbounded=unbounded, computes=computes, **options).operators(shapes)


def layer_calls(
    module: nn.Module, variables: Mapping, *inputs, unbounded: bool, computes: Mapping[type, type | None], **options
) -> CallRecord:
    """The maps of the layers of a model, those in another shape than the operator's too; as `layer_operators`."""
    calls = CallRecord(LAYERS, computes, unbounded=unbounded)
    inside, constrained = [], []

    def called(stack, layer, call, args, kwargs):
        stack.append(layer)
        outputs = call(*args, **kwargs)
        stack.pop()
        return outputs

    def record(call, args, kwargs, context):
        layer = context.module
        if inside or context.method_name != "__call__":
            return call(*args, **kwargs)
        ensure_own_kernel(layer, CHANGING, ".".join(layer.path))
        if isinstance(layer, Constrained):
            return called(constrained, layer, call, args, kwargs)
        if isinstance(layer, Trace):
            return called(inside, layer, call, args, kwargs)
        if isinstance(layer, Normalized):
            outputs = called(inside, layer, call, args, kwargs)
            held = layer.get_variable(COLLECTION, "state").constraint.layer_map
            calls.note_wrapped((*layer.layer.path, "kernel"), held)
            return outputs
        outputs = call(*args, **kwargs)
        path = (*layer.path, "kernel")
        held = {path: seen for outer in constrained for path, seen in outer.layer_maps().items()}
        if path in held:
            calls.note_wrapped(path, held[path])
        elif calls.concerns(layer):
            kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
            calls.note(path, layer, kernel.shape, first_input(args, kwargs))
        return outputs

    def run(variables, inputs, options):
        rngs = {**trace_keys(), **options.get("rngs", {})}
        with nn.intercept_methods(record):
            module.apply(variables, *inputs, **{"mutable": nn.DenyList("params"), **options, "rngs": rngs})

    trace(run, variables, inputs, options)
    return calls
