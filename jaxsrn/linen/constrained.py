"""`Constrained`, the module that `jaxsrn.linen.constrain` makes: it hands another one parameters of normalized kernels.

Modules of Linen are descriptions, and most have no layers before they are called. So nothing in a model can be replaced
by a wrapper beforehand, as `jaxsrn.nnx.constrain` does; the layers are found in a trace of a call (`Trace`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsrn._tools.checks import ensure, errors_named, float_dtype
from jaxsrn.linen.variables import nested, stepped
from jaxsrn.linen.wrappers import (
    CHANGING,
    COLLECTION,
    LEARNED,
    Normalized,
    StableRankState,
    States,
    call_changed,
    check_collection,
    trace_keys,
)
from jaxsrn.normalization.training.flax_constraint import each_kind_once, ensure_wrapper
from jaxsrn.normalization.training.state import SRNCState
from jaxsrn.operators.flax_calls import trace
from jaxsrn.operators.flax_kinds import ensure_own_kernel, layer_name, shown
from jaxsrn.operators.flax_layers import LayerMap

__all__ = ["Constrained", "Trace", "Wrapping"]

# The name of the states in their collection, and of the learned norms among the parameters.
_CONSTRAINED = "constrained"


@dataclasses.dataclass(frozen=True)
class Wrapping:
    """The arguments of one `constrain`: which layers are wrapped, and in what."""

    wrap: Callable[[tuple, nn.Module], nn.Module]
    where: Any

    def matches(self, path: tuple, layer: nn.Module) -> bool:
        """Whether a layer at a path is wrapped."""
        return nnx.filterlib.to_predicate(self.where)(path, layer)


class _Wrapped(NamedTuple):
    """What a wrapping makes of a layer: its state without arrays and its norm; the layer itself is for messages."""

    wrapping: Wrapping
    layer: nn.Module
    blank: StableRankState
    norm: Any

    @property
    def kind(self) -> tuple:
        """What a start depends on beside the kernel; the value of a learned norm takes no part in it."""
        return self.blank.constraint, self.blank.norm

    def start(self, raw: jax.Array) -> SRNCState:
        """The converged state, for every layer of a stack."""
        return self.blank.constraint.start(layer_name(self.layer), raw, self.blank.norm_to_start)


class Constrained(nn.Module):
    """A module around another one, whose call sees normalized kernels. They share a scope, so that paths stay."""

    module: nn.Module
    wrappings: tuple[Wrapping, ...]

    def setup(self):
        nn.share_scope(self, self.module)

    def __getattr__(self, name: str) -> Any:
        # Python calls this for what the object has not. `hasattr`, which Flax calls too, expects an `AttributeError`.
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            kind = type(vars(self).get("module"))
            if not hasattr(kind, name):
                raise
            raise AttributeError(
                f"{name}: got it of a constrained {kind.__name__}, expected __call__ alone; the weights for other "
                f"methods are those of fold: module.apply(jaxsrn.linen.fold(constrained, variables), ..., "
                f"method={name!r})."
            ) from error

    @nn.compact
    def __call__(self, *args, **options):
        if self.is_initializing():
            # Only the module itself can initialise its parameters.
            self.module(*args, **options)
        wrapped = {} if self.has_variable(COLLECTION, _CONSTRAINED) else self._wrapped(args, options)
        if any(one.blank.norm == LEARNED for one in wrapped.values()) and self.is_initializing():
            self.param(_CONSTRAINED, self._first_norms, wrapped)
        check_collection(self, _CONSTRAINED, type(self.module).__name__)
        stored = self.variable(COLLECTION, _CONSTRAINED, self._first_states, wrapped)
        variables = {"params": self.variables["params"], COLLECTION: {_CONSTRAINED: stored.value}}
        steps = stepped(self.module, variables)
        if self.is_mutable_collection(COLLECTION) and not self.is_initializing():
            stored.value = nested({wrapper: state for wrapper, (_, _, state) in steps.items()}, "state")[_CONSTRAINED]
        kernels = {(*layer, "kernel"): kernel for layer, kernel, _ in steps.values()}

        def with_kernels(own: Mapping) -> dict:
            return {**own, "params": unflatten_dict({**flatten_dict(own["params"]), **kernels})}

        return call_changed(
            self.module, with_kernels, lambda module: module(*args, **options), stores=not self.is_initializing()
        )

    @nn.nowrap
    def layer_maps(self) -> dict[tuple, LayerMap]:
        """The maps of the wrapped layers, by the paths of their kernels from the root of the whole model."""
        states = cast(States, flatten_dict({_CONSTRAINED: self.get_variable(COLLECTION, _CONSTRAINED)}))
        return {
            (*self.path, *state.layer_path(path[:-1]), "kernel"): state.constraint.layer_map
            for path, state in states.items()
        }

    @nn.nowrap
    def _wrapped(self, args, options) -> dict[tuple, _Wrapped]:
        """What the wrappings make of each layer, found by tracing a copy of the module."""
        found: dict[tuple, _Wrapped] = {}
        copy, _ = self.module.unbind()

        def run(args, options):
            Trace(copy, self.wrappings, found.__setitem__).init(trace_keys(), *args, **options)

        trace(run, args, options)
        for wrapping in self.wrappings:
            ensure(
                any(one.wrapping is wrapping for one in found.values()),
                f"where: got {shown(wrapping.where)}, which matches no layer of {type(copy).__name__}; expected some.",
            )
        return found

    @nn.nowrap
    def _first_norms(self, key, wrapped: Mapping[tuple, _Wrapped]) -> dict:
        learned = {layer: one for layer, one in wrapped.items() if one.blank.norm == LEARNED}
        norms = {}
        keys = jax.random.split(key, len(learned))
        for key, (layer, one) in zip(keys, learned.items(), strict=True):
            raw = self._raw(layer)
            norms[layer] = one.norm(key, raw.shape[: one.blank.constraint.stacked_axes(raw)], float_dtype(raw.dtype))
        return nested(norms, "norm")

    @nn.nowrap
    def _first_states(self, wrapped: Mapping[tuple, _Wrapped]) -> dict:
        norms = flatten_dict(self.variables["params"].get(_CONSTRAINED, {}))
        for layer, one in wrapped.items():
            ensure(
                one.blank.norm != LEARNED or (*layer, "norm") in norms,
                f"variables: 'params' has no norm for {'/'.join(layer)} under {_CONSTRAINED!r}; take it from init.",
            )
        starts, kinds = ([getattr(one, name) for one in wrapped.values()] for name in ("start", "kind"))
        values = each_kind_once(starts, kinds, [self._raw(layer) for layer in wrapped])
        started = zip(wrapped, wrapped.values(), values, strict=True)
        return nested({layer: one.blank.replace(value=value) for layer, one, value in started}, "state")

    @nn.nowrap
    def _raw(self, layer: tuple) -> jax.Array:
        return jnp.asarray(nn.meta.unbox(flatten_dict(self.variables["params"])[(*layer, "kernel")]))


class Trace(nn.Module):
    """Calls a module and notes what the wrappings make of its layers. It is traced once and thrown away."""

    module: nn.Module
    wrappings: tuple[Wrapping, ...]
    note: Callable[[tuple, _Wrapped], None]

    @nn.compact
    def __call__(self, *args, **options):
        inside, matched = [], {}

        def record(call, args, options, context):
            layer, path = context.module, context.module.path[1:]
            if inside or context.method_name != "__call__":
                return call(*args, **options)
            ensure_own_kernel(layer, CHANGING, ".".join(path))
            is_held = isinstance(layer, (Normalized, Constrained))
            fitting = [] if is_held else [wrapping for wrapping in self.wrappings if wrapping.matches(path, layer)]
            if not fitting and not is_held:
                return call(*args, **options)
            inside.append(layer)
            outputs = call(*args, **options)
            inside.pop()
            if fitting:
                matched[path] = fitting[0], layer.clone(parent=None, name=None), layer.get_variable("params", "kernel")
            return outputs

        with nn.intercept_methods(record):
            self.module(*args, **options)
        for path, (wrapping, layer, kernel) in matched.items():
            with errors_named(".".join(path) or type(layer).__name__):
                wrapper = wrapping.wrap(path, layer)
                ensure_wrapper(wrapper, Normalized)
                wrapper.kind()
                ensure(kernel is not None, "it has no parameter 'kernel'.")
                blank = wrapper.described(jnp.shape(nn.meta.unbox(kernel)))
            # The path of the state is that of the layer with one more name in front.
            self.note(path, _Wrapped(wrapping, layer, blank.replace(layer=(len(path) + 1, path)), wrapper.norm))
