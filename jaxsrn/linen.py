"""Flax Linen: layers whose stable rank and spectral norm are constrained while they train.

    import jaxsrn.linen as jlinen

    x = jlinen.StableRankNorm(nn.Conv(16, (3, 3)), 0.5, input_shape=(32, 32))(x)

    variables = model.init(key, x)
    y, changed = model.apply(variables, x, mutable=["stable_rank"])

The twin of `jaxsrn.nnx`, with the same numbers. The wrappers hold no mathematics: every forward calls
`jaxsrn.srnc_step` on the layer's kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsrn._tools.checks import ensure, errors_named, float_dtype
from jaxsrn.operators.flax_layers import FlaxLayers, LayerMap, kind_of, layer_map, layer_name
from jaxsrn.normalization.training.wrapping import CallRecord, Constraint, target_for, trace
from jaxsrn.operators.base import Operator

__all__ = ["SpectralNorm", "StableRankNorm", "StableRankState", "fold", "layer_operators", "refresh"]

COLLECTION = "stable_rank"
_LAYERS = FlaxLayers(nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
_LEARNED = "learned"
_traces = itertools.count()


@struct.dataclass
class StableRankState:
    """What a wrapper carries from step to step, one a wrapper, its variable `state` in the collection `"stable_rank"`.

    Its value is the `jaxsrn.SRNCState`, as in `jaxsrn.nnx`. Beside it there are static fields: modules of Linen are
    descriptions, so `fold` and `refresh` find the layer and its constraint here. To restore a checkpoint, give the
    variables of `init` as the target (with Orbax as the item), as for every structure that is no plain dictionary.

    Attributes:
      value: the `jaxsrn.SRNCState`, float32 or wider.
      constraint: what the layer is held to.
      norm: the norm where it is fixed, `None` for the layer's own, `"learned"` for a parameter.
      layer: where the layer's parameters are: how many levels above the wrapper, and the names from there.
    """

    value: Any
    constraint: Constraint = struct.field(pytree_node=False)
    norm: float | str | None = struct.field(pytree_node=False)
    layer: tuple[int, tuple[str, ...]] = struct.field(pytree_node=False)

    def layer_path(self, wrapper: tuple) -> tuple:
        """The path of the layer whose wrapper is at the given one."""
        levels, names = self.layer
        return (*wrapper[: len(wrapper) - levels], *names)

    def step(self, kernel: jax.Array, norm) -> tuple[jax.Array, StableRankState]:
        """The normalized kernel by this state, and the next state."""
        kernel, value = self.constraint.step(kernel, self.value, norm)
        return kernel, self.replace(value=value)


class _Normalized(nn.Module):
    """A layer whose kernel is normalized on the way into it; the stored kernel stays the raw parameter."""

    layer: nn.Module
    input_shape: Any = dataclasses.field(default=None, kw_only=True)
    norm: Any = dataclasses.field(default=1.0, kw_only=True)
    cap: bool = dataclasses.field(default=False, kw_only=True)
    gradient: str = dataclasses.field(default="frozen", kw_only=True)
    computes: type | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, update_stats: bool = True, **options):
        """The layer with its normalized kernel.

        Args:
          x: the layer's input, of any spatial shape: the weights are those of `input_shape`.
          update_stats: whether to store the stepped state afterwards, where the collection `"stable_rank"` is mutable.
            Without it the forward only reads: any number of them see the same weights.
          **options: of the layer itself.
        """
        kind = kind_of(self.layer, _LAYERS, {} if self.computes is None else {type(self.layer): self.computes})
        if not self.layer.has_variable("params", "kernel"):
            # In `init`: only the layer itself knows how its parameters begin.
            self.layer(x, **options)
        ensure(self.layer.has_variable("params", "kernel"), f"{layer_name(self.layer)}: it has no parameter 'kernel'.")
        raw = jnp.asarray(nn.meta.unbox(self.layer.get_variable("params", "kernel")))
        norm = self._norm(float_dtype(raw.dtype))
        stored = self.variable(COLLECTION, "state", self._start, kind, raw, norm)
        _check_state(stored.value, self._blank(kind, raw.shape), layer_name(self.layer))
        kernel, state = stored.value.step(raw, norm)
        if update_stats and self.is_mutable_collection(COLLECTION) and not self.is_initializing():
            stored.value = state
        return nn.map_variables(lambda layer: layer(x, **options), "params", lambda own: _with_kernel(own, kernel))(
            self.layer
        )

    @nn.nowrap
    def _norm(self, dtype):
        if not callable(self.norm):
            return self.norm
        # The sign of a learned gain means nothing: a norm has none.
        return jnp.abs(self.param("norm", self.norm, (), dtype))

    @nn.nowrap
    def _blank(self, kind: str, kernel_shape) -> StableRankState:
        """The state without its arrays."""
        seen = layer_map(self.layer, kernel_shape, self.input_shape, kind)
        constraint = Constraint(seen, self._target(seen), bool(self.cap), self.gradient)
        norm = self.norm if self.norm is None else _LEARNED if callable(self.norm) else float(self.norm)
        own, other = self.path, self.layer.path
        shared = sum(1 for n in range(1, min(map(len, (own, other))) + 1) if own[:n] == other[:n])
        return StableRankState(None, constraint, norm, (len(own) - shared, other[shared:]))

    @nn.nowrap
    def _start(self, kind: str, kernel, norm) -> StableRankState:
        blank = self._blank(kind, kernel.shape)
        return blank.replace(value=blank.constraint.start(self.layer, kernel, norm))

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        raise NotImplementedError


class StableRankNorm(_Normalized):
    """A layer with prescribed stable rank and spectral norm, those of the whole map, padding and strides included.

    Every forward uses the closest kernel with `||T||_2 = norm` and stable rank `fraction * min(prod(in), prod(out))`,
    by `jaxsrn.srnc_step`: Sanyal, Torr, Dokania 2020, Algorithm 2 (two power steps), for dense layers,
    Zheng et al. 2025, eq. 7, for convolutions. The raw kernel stays the parameter, in `"params"`, and is never
    overwritten. A layer whose own stable rank is below the target keeps it. The state, in the collection
    `"stable_rank"`, is converged from `init` on; where it is missing and mutable it is born then, converged as well
    (around weights trained without it).

    Args:
      layer: `nn.Conv`, `nn.ConvTranspose`, `nn.Dense` or `nn.DenseGeneral`, or a subclass that changes neither the call
        nor the parameter.
      fraction: in (0, 1], of the largest stable rank that the layer's shapes allow (Sanyal's `c`, Zheng's `beta`).
      input_shape: spatial shape of the layer's input at which norm and stable rank are meant; needed for convolutions.
      norm: the spectral norm; `None` keeps the layer's own; an initializer, such as `nn.initializers.ones`, is that of
        a gain that is learned with the rest, the parameter `"norm"` of the wrapper.
      cap: only reduce the norm: the smaller of `norm` and the layer's own.
      gradient: `"frozen"` or `"implicit"`, see `jaxsrn.srnc_step`.
      computes: where `layer` is of another class, or computes by functions of its own: the class above whose map it
        computes with its parameter `kernel` as it is. You vouch for that; norm and stable rank are then those of that
        map.

    Raises:
      ValueError: when called, naming the layer: another layer or one whose map may be another, no `input_shape`, a
        fraction outside (0, 1] or below what its taps allow, REFLECT, a mask, circular strides that do not divide the
        image; a state that was made for another constraint.
    """

    fraction: Any

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        return target_for(self.layer, seen, self.fraction)


class SpectralNorm(_Normalized):
    """A layer with prescribed spectral norm: that of the whole linear map, not of the kernel flattened to a matrix.

    As `StableRankNorm` without a target for the stable rank: the kernel is only rescaled, by one pass of
    `jaxsrn.srnc_step`. The raw kernel stays the parameter and is never overwritten; the state is converged from `init`
    on, and follows the layer by frequency power iteration (circular) or power steps of a few images.

    Args, errors: as `StableRankNorm`. The gradient is exact with either choice.
    """

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        return math.inf


def _check_state(stored, expected: StableRankState, name: str) -> None:
    ensure(
        isinstance(stored, StableRankState),
        f"{name}: the collection {COLLECTION!r} has a {type(stored).__name__}, expected a StableRankState; restore "
        "checkpoints with the variables of init as the target.",
    )
    ensure(
        stored.replace(value=None) == expected,
        f"{name}: the collection {COLLECTION!r} was made for {stored.constraint}, norm={stored.norm}, expected "
        f"{expected.constraint}, norm={expected.norm}; leave the collection out of the variables, and apply with it "
        "mutable to start anew.",
    )


def _with_kernel(variables: Mapping, kernel: jax.Array) -> dict:
    """A layer's variables with another kernel."""
    params = variables["params"]
    return {**variables, "params": {**params, "kernel": nn.meta.replace_boxed(params["kernel"], kernel)}}


# Whole models


def fold(module: nn.Module, variables: Mapping) -> dict:
    """The variables of the plain model, with the very weights that a reading forward of `module` uses.

    Pure and differentiable: inside a loss, fold once and unroll a recurrence over the result.

    Paths: where a wrapper holds its layer (`.../wrapper/layer/kernel`: made in `setup`, or outside of any module), the
    layer takes the wrapper's place (`.../wrapper/kernel`), as it does where the plain model is written without the
    wrapper. In a compact method Flax makes the layer a neighbour of its wrapper (`.../Conv_0/kernel`), so there it
    keeps its path. Learned norms and the collection `"stable_rank"` are gone; all else stays.

    Args:
      module: the model with wrappers.
      variables: its variables, `"stable_rank"` included. Layers stacked by `nn.vmap` or `nn.scan` are stacked along
        axis 0 in both collections.

    Returns:
      Variables for `apply` of the same architecture written without wrappers.

    Raises:
      ValueError: no collection `"stable_rank"`, a layer wrapped twice, or kernels that are stacked otherwise.
    """
    params, places = dict(flatten_dict(variables["params"])), {}
    for wrapper, (layer, kernel, state) in _stepped(module, variables).items():
        ensure(layer not in places, f"{_written(layer, module)}: it has several wrappers, expected one.")
        places[layer] = wrapper if state.layer[0] == 0 else layer
        if state.norm == _LEARNED:
            del params[(*wrapper, "norm")]
        params[(*layer, "kernel")] = kernel
    plain = unflatten_dict({_replaced(path, places): leaf for path, leaf in params.items()})
    return {**{name: variables[name] for name in variables if name != COLLECTION}, "params": plain}


def refresh(module: nn.Module, variables: Mapping) -> dict:
    """The variables after one step of the state of every wrapper in `module`, without a forward.

    Pure: as `jaxsrn.nnx.refresh`, but that the new variables are returned.

    Args, errors: as `fold`, and a layer may have several wrappers.
    """
    states = {(*wrapper, "state"): state for wrapper, (_, _, state) in _stepped(module, variables).items()}
    return {**variables, COLLECTION: unflatten_dict(states)}


def _stepped(module: nn.Module, variables: Mapping) -> dict[tuple, tuple[tuple, Any, StableRankState]]:
    """`{path of a wrapper: (path of its layer, normalized kernel, next state)}`."""
    states, params = flatten_dict(variables.get(COLLECTION, {})), flatten_dict(variables["params"])
    ensure(
        bool(states),
        f"variables: got the collections {sorted(variables)} for {type(module).__name__}, expected {COLLECTION!r} "
        "among them; pass all that init and apply return.",
    )
    found = {}
    for (*names, _), state in states.items():
        wrapper = tuple(names)
        layer = state.layer_path(wrapper)
        with errors_named(_written(layer, module)):
            ensure((*layer, "kernel") in params, "wrapped, but variables['params'] has no kernel for it.")
            norm = params[(*wrapper, "norm")] if state.norm == _LEARNED else state.norm
            found[wrapper] = (layer, *_stepped_kernel(params[(*layer, "kernel")], state, norm))
    return found


def _stepped_kernel(kernel, state: StableRankState, norm) -> tuple[Any, StableRankState]:
    """The kernel of a reading forward, boxed as it was, and the next state; for layers that are stacked, of all."""
    raw = jnp.asarray(nn.meta.unbox(kernel))
    axes = _stacked_axes(raw, state)
    ensure(
        all(leaf.ndim >= axes for leaf in jax.tree.leaves(state)),
        f"got kernels of shape {raw.shape} and a state that is not stacked along axis 0 in {COLLECTION!r}.",
    )
    step = _over_stack(lambda raw, norm, state: state.step(raw, norm), axes, state.norm, (0,))
    normalized, state = step(raw, nn.meta.unbox(norm), state)
    return nn.meta.replace_boxed(kernel, normalized), state


def _stacked_axes(raw: jax.Array, state: StableRankState) -> int:
    """How many axes of layers stand before those of a kernel."""
    shape = state.constraint.layer_map.stored_shape
    axes = raw.ndim - len(shape)
    ensure(
        axes >= 0 and raw.shape[axes:] == shape,
        f"got kernels of shape {raw.shape}, expected {shape}, stacked along axis 0 in 'params' and {COLLECTION!r}.",
    )
    return axes


def _over_stack(function, axes: int, norm, others: tuple[int, ...]):
    """`function(kernel, norm, ...)` over the layers of a stack, a learned norm without its sign."""
    is_learned = norm == _LEARNED

    def one(raw, norm, *rest):
        return function(raw, jnp.abs(norm) if is_learned else norm, *rest)

    for _ in range(axes):
        one = jax.vmap(one, in_axes=(0, 0 if is_learned else None, *others))
    return one


def _written(layer: tuple, module: nn.Module) -> str:
    return "/".join(layer) or type(module).__name__


def _replaced(path: tuple, places: Mapping[tuple, tuple]) -> tuple:
    """A path in the plain model."""
    return next((places[path[:n]] + path[n:] for n in range(len(path)) if path[:n] in places), path)


def layer_operators(
    module: nn.Module,
    variables: Mapping,
    *inputs,
    computes: Mapping[type, type | None] = MappingProxyType({}),
    **options,
) -> Mapping[tuple, Operator]:
    """Which operator every layer of a model is, by tracing the model on the shapes of its inputs.

    Args:
      module: any module. Wrapped layers appear with the operator of their wrapper.
      variables: of `init`, or their shapes.
      *inputs: as for `module.apply(variables, *inputs, **options)`; arrays or `jax.ShapeDtypeStruct`s, and whatever
        else the module takes (a flag `train`), which is passed on as it is.
      computes: `{class: class of Flax}`: whose map the layers of another class compute (as the wrappers' option), or
        `None` to leave them out.
      **options: keyword arguments of `module.apply`, passed on as the inputs are.

    Returns:
      `{path to the kernel: operator}`, the paths as `flax.traverse_util.flatten_dict(variables["params"])` names them;
      for layers stacked by `nn.vmap` or `nn.scan`, that of one of them. Left out: layers that the inputs do not reach,
      and those whose kernel is stored in another shape than the operator's (`nn.DenseGeneral` of several axes, a
      circular `nn.ConvTranspose` with strides and `transpose_kernel=False`).

    Raises:
      ValueError: a layer called with images of different sizes, one that is no operator, or one whose map may be
        another (as those of `nn.vmap(nn.Dense)`); the message names it.
    """
    calls = CallRecord(_LAYERS, computes)
    inside: list[nn.Module] = []

    def record(call, args, kwargs, context):
        layer = context.module
        if inside or context.method_name != "__call__" or not (isinstance(layer, _Normalized) or calls.concerns(layer)):
            return call(*args, **kwargs)
        if isinstance(layer, _Normalized):
            inside.append(layer)
            outputs = call(*args, **kwargs)
            inside.pop()
            held = layer.get_variable(COLLECTION, "state").constraint.layer_map
            calls.found[(*layer.layer.path, "kernel")] = held
            return outputs
        outputs = call(*args, **kwargs)
        kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
        calls.note((*layer.path, "kernel"), layer, kernel.shape, next(iter((*args, *kwargs.values()))))
        return outputs

    def run(variables, inputs, options):
        # Dropout and its like ask for a key; the values do not matter here. One of a new name makes `nn.jit` trace
        # again: from its cache it would call no layer.
        key = jax.random.key(0)
        rngs = {"params": key, **options.get("rngs", {}), f"layer_operators_{next(_traces)}": key}
        with nn.intercept_methods(record):
            module.apply(variables, *inputs, **{"mutable": nn.DenyList("params"), **options, "rngs": rngs})

    trace(run, variables, inputs, options)
    return calls.operators()
