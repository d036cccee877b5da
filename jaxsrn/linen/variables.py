"""The wrapped layers among the variables of a model, and the steps of their states outside of a forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.linen.wrappers import COLLECTION, StableRankState, States, check_is_state
from jaxsrn.normalization.training.flax_constraint import each_kind_once

__all__ = ["nested", "params_of", "started", "stepped", "written"]


def params_of(variables: Mapping, module: nn.Module) -> Mapping:
    """The parameters among the variables; raises `ValueError` where parameters alone are given."""
    ensure(
        "params" in variables,
        f"variables: got the collections {sorted(variables)} for {type(module).__name__}, expected 'params' among "
        "them; pass all that init and apply return.",
    )
    return variables["params"]


class _WrappedLayer(NamedTuple):
    """A wrapped layer as the variables have it: its path, its kernel, the state of its wrapper, and its norm."""

    layer: tuple
    kernel: Any
    state: StableRankState
    norm: Any


def _wrapped_layers(module: nn.Module, variables: Mapping) -> dict[tuple, _WrappedLayer]:
    """All wrapped layers, by the paths of their wrappers."""
    states = cast(States, flatten_dict(variables.get(COLLECTION, {})))
    params = flatten_dict(params_of(variables, module))
    ensure(
        bool(states),
        f"variables: got the collections {sorted(variables)} for {type(module).__name__}, expected {COLLECTION!r} "
        "among them; pass all that init and apply return.",
    )
    found = {}
    for (*names, _), state in states.items():
        wrapper = tuple(names)
        check_is_state(state, "/".join(wrapper) or type(module).__name__)
        layer = state.layer_path(wrapper)
        with errors_named(written(layer, module)):
            ensure((*layer, "kernel") in params, "wrapped, but variables['params'] has no kernel for it.")
            norm = state.norm_of(nn.meta.unbox(params.get((*wrapper, "norm"))))
            found[wrapper] = _WrappedLayer(layer, params[(*layer, "kernel")], state, norm)
    return found


def stepped(module: nn.Module, variables: Mapping) -> dict[tuple, tuple[tuple, Any, StableRankState]]:
    """One step of all wrappers: `{path of a wrapper: (path of its layer, normalized kernel, next state)}`."""
    found = {}
    for wrapper, (layer, kernel, state, norm) in _wrapped_layers(module, variables).items():
        with errors_named(written(layer, module)):
            found[wrapper] = (layer, *_stepped_kernel(kernel, state, norm))
    return found


def _stepped_kernel(kernel, state: StableRankState, norm) -> tuple[Any, StableRankState]:
    """The kernel of a reading forward, boxed as it was, and the next state; a stack of layers is stepped at once."""
    raw = jnp.asarray(nn.meta.unbox(kernel))
    normalized, state = state.step(raw, norm)
    return nn.meta.replace_boxed(kernel, normalized), state


def started(module: nn.Module, variables: Mapping) -> dict[tuple, StableRankState]:
    """The states of all wrappers, each started anew from its kernel: `{path of a wrapper: state}`."""
    found = _wrapped_layers(module, variables)
    starts, kinds, kernels = [], [], []
    for layer, kernel, state, _ in found.values():
        starts.append(functools.partial(state.constraint.start, written(layer, module), norm=state.norm_to_start))
        kinds.append((state.constraint, state.norm))
        kernels.append(jnp.asarray(nn.meta.unbox(kernel)))
    values = each_kind_once(starts, kinds, kernels)
    return {path: one.state.replace(value=value) for (path, one), value in zip(found.items(), values, strict=True)}


def nested(leaves: Mapping[tuple, Any], name: str) -> dict:
    """`{path: leaf}` as nested dictionaries, with each leaf under `name` at its path."""
    return unflatten_dict({(*path, name): leaf for path, leaf in leaves.items()})


def written(layer: tuple, module: nn.Module) -> str:
    """The path of a layer in an error message."""
    return "/".join(layer) or type(module).__name__
