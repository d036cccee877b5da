"""The wrappers of `jaxsrn.linen`, the state that they carry, and its steps outside of any forward."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsrn._tools.checks import ensure, errors_named, float_dtype
from jaxsrn.normalization.training.wrapping import Constraint, target_for
from jaxsrn.operators.flax_layers import FlaxLayers, LayerMap, kind_of, layer_map, layer_name

__all__ = [
    "COLLECTION",
    "LAYERS",
    "LEARNED",
    "Normalized",
    "SpectralNorm",
    "StableRankNorm",
    "StableRankState",
    "nested",
    "over_stack",
    "stacked_axes",
    "stepped",
    "trace_keys",
    "written",
]

COLLECTION = "stable_rank"
LAYERS = FlaxLayers(nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
# In place of the norm of a wrapper that learns it.
LEARNED = "learned"
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


class Normalized(nn.Module):
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
        self.kind()
        if not self.layer.has_variable("params", "kernel"):
            # In `init`: only the layer itself knows how its parameters begin.
            self.layer(x, **options)
        raw = _raw_kernel(self.layer)
        norm = self._norm(float_dtype(raw.dtype))
        stored = self.variable(COLLECTION, "state", self._start, raw, norm)
        _check_state(stored.value, self.described(raw.shape), layer_name(self.layer))
        kernel, state = stored.value.step(raw, norm)
        if update_stats and self.is_mutable_collection(COLLECTION) and not self.is_initializing():
            stored.value = state
        return nn.map_variables(lambda layer: layer(x, **options), "params", lambda own: _with_kernel(own, kernel))(
            self.layer
        )

    @nn.nowrap
    def kind(self) -> str:
        """Which of Flax's maps the layer computes; raises where that is not known."""
        return kind_of(self.layer, LAYERS, {} if self.computes is None else {type(self.layer): self.computes})

    @nn.nowrap
    def _norm(self, dtype):
        if not callable(self.norm):
            return self.norm
        # The sign of a learned gain means nothing: a norm has none.
        return jnp.abs(self.param("norm", self.norm, (), dtype))

    @nn.nowrap
    def described(self, kernel_shape) -> StableRankState:
        """The state without its arrays, for a kernel of a shape."""
        seen = layer_map(self.layer, kernel_shape, self.input_shape, self.kind())
        constraint = Constraint(seen, self._target(seen), bool(self.cap), self.gradient)
        norm = self.norm if self.norm is None else LEARNED if callable(self.norm) else float(self.norm)
        own, other = self.path, self.layer.path
        shared = sum(1 for n in range(1, min(map(len, (own, other))) + 1) if own[:n] == other[:n])
        return StableRankState(None, constraint, norm, (len(own) - shared, other[shared:]))

    @nn.nowrap
    def _start(self, kernel, norm) -> StableRankState:
        blank = self.described(kernel.shape)
        return blank.replace(value=blank.constraint.start(self.layer, kernel, norm))

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        raise NotImplementedError


class StableRankNorm(Normalized):
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


class SpectralNorm(Normalized):
    """A layer with prescribed spectral norm: that of the whole linear map, not of the kernel flattened to a matrix.

    As `StableRankNorm` without a target for the stable rank: the kernel is only rescaled, after two power steps of
    `jaxsrn.srnc_step`. The raw kernel stays the parameter and is never overwritten; the state is converged from `init`
    on, and follows the layer by frequency power iteration (circular) or power steps of a few images.

    Args, errors: as `StableRankNorm`. The gradient is exact with either choice.
    """

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        return None


def _raw_kernel(layer: nn.Module) -> jax.Array:
    ensure(layer.has_variable("params", "kernel"), f"{layer_name(layer)}: it has no parameter 'kernel'.")
    return jnp.asarray(nn.meta.unbox(layer.get_variable("params", "kernel")))


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


def stepped(module: nn.Module, variables: Mapping) -> dict[tuple, tuple[tuple, Any, StableRankState]]:
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
        with errors_named(written(layer, module)):
            ensure((*layer, "kernel") in params, "wrapped, but variables['params'] has no kernel for it.")
            norm = params[(*wrapper, "norm")] if state.norm == LEARNED else state.norm
            found[wrapper] = (layer, *_stepped_kernel(params[(*layer, "kernel")], state, norm))
    return found


def _stepped_kernel(kernel, state: StableRankState, norm) -> tuple[Any, StableRankState]:
    """The kernel of a reading forward, boxed as it was, and the next state; for layers that are stacked, of all."""
    raw = jnp.asarray(nn.meta.unbox(kernel))
    axes = stacked_axes(raw, state)
    ensure(
        all(leaf.ndim >= axes for leaf in jax.tree.leaves(state)),
        f"got kernels of shape {raw.shape} and a state that is not stacked along axis 0 in {COLLECTION!r}.",
    )
    step = over_stack(lambda raw, norm, state: state.step(raw, norm), axes, state.norm, (0,))
    normalized, state = step(raw, nn.meta.unbox(norm), state)
    return nn.meta.replace_boxed(kernel, normalized), state


def stacked_axes(raw: jax.Array, state: StableRankState) -> int:
    """How many axes of layers stand before those of a kernel."""
    shape = state.constraint.layer_map.stored_shape
    axes = raw.ndim - len(shape)
    ensure(
        axes >= 0 and raw.shape[axes:] == shape,
        f"got kernels of shape {raw.shape}, expected {shape}, stacked along axis 0 in 'params' and {COLLECTION!r}.",
    )
    return axes


def over_stack(function, axes: int, norm, others: tuple[int, ...]):
    """`function(kernel, norm, ...)` over the layers of a stack, a learned norm without its sign."""
    is_learned = norm == LEARNED

    def one(raw, norm, *rest):
        return function(raw, jnp.abs(norm) if is_learned else norm, *rest)

    for _ in range(axes):
        one = jax.vmap(one, in_axes=(0, 0 if is_learned else None, *others))
    return one


def nested(leaves: Mapping[tuple, Any], name: str) -> dict:
    """`{path: leaf}` as nested dictionaries, the leaf under a name."""
    return unflatten_dict({(*path, name): leaf for path, leaf in leaves.items()})


def written(layer: tuple, module: nn.Module) -> str:
    """The path of a layer in an error message."""
    return "/".join(layer) or type(module).__name__


def trace_keys() -> dict[str, jax.Array]:
    """Keys for a trace that sees every call of a layer.

    Dropout and its like ask for a key; its value does not matter there. A key of a new name makes `nn.jit` trace again:
    from its cache it would call no layer.
    """
    key = jax.random.key(0)
    return {"params": key, f"trace_{next(_traces)}": key}
