"""Whole models: wrapping the layers, stepping and starting the states, plain models with the normalized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.core
from flax import nnx

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.nnx.wrappers import CHANGING, LAYERS, Normalized
from jaxsrn.normalization.training.flax_constraint import each_kind_once, ensure_wrapper
from jaxsrn.operators.flax_calls import CallRecord, first_input, trace
from jaxsrn.operators.flax_kinds import ensure_own_kernel, shown
from jaxsrn.operators.layers import LayerOperators

__all__ = [
    "constrain",
    "fold",
    "layer_calls",
    "layer_operators",
    "refresh",
    "restart",
]


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


def _wrappers(model: nnx.Module) -> list[Normalized]:
    found = [module for _, module in nnx.iter_graph(model) if isinstance(module, Normalized)]
    ensure(
        bool(found),
        f"model: got a {type(model).__name__} without a StableRankNorm or a SpectralNorm, expected some; "
        "jaxsrn.nnx.constrain wraps layers.",
    )
    return found


def fold(model: nnx.Module) -> nnx.Module:
    """The plain Flax model with the very weights that a reading forward of `model` uses.

    The function is pure and differentiable: inside a loss, fold once and unroll a recurrence over the result.

    A kernel that several wrapped layers share becomes one of each, since every wrapper has its own state.

    Args:
      model: any module; its wrappers become the layers that they wrap.

    Returns:
      A new module; `model` is not touched.

    Raises:
      ValueError: a wrapper in an object that is no Pytree of NNX, list, tuple or dictionary, such as a dataclass.
    """
    plain = _rewritten(nnx.clone(model), lambda path, node: node.folded() if isinstance(node, Normalized) else node)
    _ensure_reached(plain, lambda path, node: isinstance(node, Normalized))
    return plain


def constrain(model: nnx.Module, wrap: Callable[[tuple, nnx.Module], nnx.Module], where: Any = LAYERS) -> nnx.Module:
    """The model with every matching layer wrapped.

        model = constrain(model, lambda path, layer: SpectralNorm(layer))

    With the norms at one image size:

        ops = layer_operators(model, x)
        shape = lambda path: getattr(ops[(*path, "kernel")], "input_shape", None)
        model = constrain(model, lambda path, layer: SpectralNorm(layer, input_shape=shape(path)))

    A wrapper is no layer of Flax: a model that asks `isinstance(layer, nnx.Conv)` in its call gets `False` afterwards.

    Args:
      model: any module; layers inside wrappers are left alone.
      wrap: `(path, layer) -> wrapper`, the path as `nnx.iter_graph` names it.
      where: which layers: an NNX filter, as a type, a tuple of types, or a predicate `(path, layer) -> bool`.

    Returns:
      A new model; `model` is not touched.

    Raises:
      ValueError: nothing matches, a layer in an object that is no Pytree of NNX, list, tuple or dictionary, such as a
        dataclass, or what `wrap` raises, with the path.
    """
    matches, found = nnx.filterlib.to_predicate(where), []

    def change(path, node):
        if isinstance(node, CHANGING) and any(
            isinstance(part, nnx.Module) and matches((*path, *below), part) for below, part in nnx.iter_graph(node)
        ):
            ensure_own_kernel(node, CHANGING, ".".join(map(str, path)))
        if isinstance(node, Normalized) or not isinstance(node, nnx.Module) or not matches(path, node):
            return node
        with errors_named(".".join(map(str, path)) or type(node).__name__):
            wrapper = wrap(path, node)
            ensure_wrapper(wrapper, Normalized)
        found.append(wrapper)
        return wrapper

    rewritten = _rewritten(nnx.clone(model), change)
    _ensure_reached(rewritten, lambda path, node: not isinstance(node, Normalized) and matches(path, node))
    ensure(
        bool(found),
        f"where: got {shown(where)}, which matches no layer of {type(model).__name__} outside of wrappers; "
        "expected some.",
    )
    # Where kernels are traced, what started the wrappers one by one is dead code, which JAX drops.
    _start_anew([wrapper for wrapper in found if isinstance(wrapper.layer.kernel[...], jax.core.Tracer)])
    return rewritten


def _ensure_reached(model: nnx.Module, was_to_change: Callable[[tuple, Any], bool]) -> None:
    """Raises `ValueError` where a module outside of wrappers is left that was to change (`nnx.iter_graph`)."""
    modules = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    wrappers = [path for path, node in modules if isinstance(node, Normalized)]

    def is_inside(path: tuple) -> bool:
        return any(path[: len(wrapper)] == wrapper and path != wrapper for wrapper in wrappers)

    left = [".".join(map(str, path)) for path, node in modules if not is_inside(path) and was_to_change(path, node)]
    ensure(not left, f"{', '.join(left)}: in an object that cannot be changed, expected layers in Pytrees of NNX.")


def _start_anew(wrappers: list[Normalized]) -> None:
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
      `{path to the kernel: operator}`, the paths as `nnx.to_flat_state` names them. Layers stacked by `nnx.vmap` along
      the first axes (`out_axes=0`) have the operator of one of them. It leaves out layers stacked along another axis,
      as far as the shape of the kernel shows it (where there are as many layers as channels, it does not), layers that
      the inputs, if there are any, do not reach, and layers that store the channels of their kernel the other way round
      than the operator: with strides and `transpose_kernel=False`, an `nnx.ConvTranspose` that is circular or without
      image size; without image size, an `nnx.Conv` with input dilation. The attribute `left_out` of the result lists
      these, and all other parameters of two axes or more, `{path: reason}`.

    Raises:
      ValueError: a layer called with images of different sizes, one that is no operator, or one whose map may be
        another; the message names it.
    """
    calls = layer_calls(model, *inputs, computes=computes, **options)
    # A kernel that is not trained may be a variable of another type.
    variables = [
        (path, variable)
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if isinstance(variable, nnx.Param) or path in calls.found
    ]
    return calls.operators({path: variable.shape for path, variable in variables})


def layer_calls(model: nnx.Module, *inputs, computes: Mapping[type, type | None], **options) -> CallRecord:
    """The maps of the layers of a model, those in another shape than the operator's too; as `layer_operators`."""
    is_called = bool(inputs or options)
    calls = CallRecord(LAYERS, computes, unbounded=not is_called)
    graphdef, state = nnx.split(model)
    places = _places_in_state(model)

    def place_of(kernel_path: tuple) -> tuple:
        return places.get(kernel_path, kernel_path)

    def record(path, node):
        ensure_own_kernel(node, CHANGING, ".".join(map(str, path)))
        if isinstance(node, Normalized):
            calls.note_wrapped(place_of((*path, "layer", "kernel")), node.constraint.layer_map)
        elif calls.concerns(node):
            place = place_of((*path, "kernel"))
            if not is_called:
                calls.note(place, node, node.kernel.shape)
            return _Recorder(node, place, calls)
        return node

    def run(state, inputs, options):
        recorded = _rewritten(nnx.merge(graphdef, state, copy=True), record)
        if is_called:
            recorded(*inputs, **options)

    trace(run, state, inputs, options)
    return calls


def _places_in_state(model: nnx.Module) -> dict[tuple, tuple]:
    """`{path of a kernel: its path in the state of the model}`; they differ for layers that share a variable."""
    nodes = list(nnx.iter_graph(model))
    held = {id(node): path for path, node in nodes if isinstance(node, nnx.Variable)}
    kernels = [(path, getattr(node, "kernel", None)) for path, node in nodes if isinstance(node, nnx.Module)]
    return {(*path, "kernel"): held[id(kernel)] for path, kernel in kernels if id(kernel) in held}


class _Recorder(nnx.Module):
    """Stands in for a layer while its model is traced, and notes the map of the layer."""

    def __init__(self, layer: Any, path: tuple, calls: CallRecord):
        self.layer, self.path, self.calls = layer, nnx.static(path), nnx.static(calls)

    @property
    def __class__(self):
        # Models that ask `isinstance(part, nnx.Conv)` call the stand-in as they call the layer.
        return type(self.layer)

    def __getattr__(self, name: str):
        # Python calls this only for what the stand-in does not have: the layer's own attributes.
        if name.startswith("_") or name == "layer":
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __call__(self, *args, **options):
        self.calls.note(self.path, self.layer, self.layer.kernel.shape, first_input(args, options))
        return self.layer(*args, **options)


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
            if isinstance(node, nnx.Pytree) and not isinstance(node, (nnx.List, nnx.Dict)):
                setattr(node, key, changed)
            else:
                node[key] = changed
    return new


def _children(node) -> list[tuple]:
    if isinstance(node, (list, nnx.List)):
        return list(enumerate(node))
    if isinstance(node, (dict, nnx.Dict)):
        return list(node.items())
    if isinstance(node, nnx.Pytree) and not isinstance(node, Normalized):
        return list(vars(node).items())
    return []
