"""The wrappers of `jaxsrn.linen`, and the state that they carry."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxsrn._tools.checks import ensure, float_dtype
from jaxsrn.normalization.training.flax_constraint import Constraint, target_for
from jaxsrn.operators.flax_kinds import FlaxLayers, kind_of, layer_name
from jaxsrn.operators.flax_layers import LayerMap, layer_map

__all__ = [
    "CHANGING",
    "COLLECTION",
    "LAYERS",
    "LEARNED",
    "Normalized",
    "SpectralNorm",
    "StableRankNorm",
    "StableRankState",
    "States",
    "call_changed",
    "check_collection",
    "check_is_state",
    "trace_keys",
]

COLLECTION = "stable_rank"
LAYERS = FlaxLayers(nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
# Wrappers of Flax whose layers compute with another kernel than they store.
CHANGING = nn.SpectralNorm, nn.WeightNorm
# This stands in a state for the norm of a wrapper that learns it.
LEARNED = "learned"
_traces = itertools.count()


class StableRankState(struct.PyTreeNode):
    """What a wrapper carries from step to step, its variable `state` in the collection `"stable_rank"`.

    Its value is a `jaxsrn.SRNCState`, as in `jaxsrn.nnx`. The other fields are static: modules of Linen are
    descriptions, so `fold` and `refresh` find the layer and its constraint here. A checkpoint is restored with the
    variables of `init` as the target (with Orbax as the item), as every structure is that is no plain dictionary.

    Attributes:
      value: the `jaxsrn.SRNCState`, in float32 or wider.
      constraint: what the layer is held to.
      norm: the norm where it is fixed, `None` for the layer's own, or `"learned"` for a parameter.
      layer: where the layer's parameters are: the levels up from the wrapper, and the names down from there.
    """

    value: Any
    constraint: Constraint = struct.field(pytree_node=False)
    norm: float | str | None = struct.field(pytree_node=False)
    layer: tuple[int, tuple[str, ...]] = struct.field(pytree_node=False)

    def layer_path(self, wrapper: tuple) -> tuple:
        """The path of the layer whose wrapper is at the path `wrapper`."""
        levels, names = self.layer
        return (*wrapper[: len(wrapper) - levels], *names)

    def norm_of(self, learned: jax.Array | None):
        """The norm of the normalized kernel; `learned` is the parameter of a learned one, which has no sign."""
        return jnp.abs(learned) if self.norm == LEARNED else self.norm

    @property
    def norm_to_start(self):
        """The norm of a start, in which the value of a learned norm takes no part."""
        return 1.0 if self.norm == LEARNED else self.norm

    def step(self, kernel: jax.Array, norm) -> tuple[jax.Array, StableRankState]:
        """The kernel normalized by this state, and the next state."""
        kernel, value = self.constraint.step(kernel, self.value, norm)
        return kernel, self.replace(value=value)


# The states of a model, by their paths.
States = dict[tuple, StableRankState]


class Normalized(nn.Module):
    """A layer whose kernel is normalized on the way into it; the stored kernel stays the raw parameter."""

    layer: nn.Module
    input_shape: Any = dataclasses.field(default=None, kw_only=True)
    norm: Any = dataclasses.field(default=1.0, kw_only=True)
    cap: bool = dataclasses.field(default=False, kw_only=True)
    gradient: str = dataclasses.field(default="frozen", kw_only=True)
    computes: type | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, inputs, update_stats: bool = True, **options):
        """The layer with its normalized kernel.

        Args:
          inputs: the layer's input, of any spatial shape; the weights do not depend on it.
          update_stats: whether to store the stepped state afterwards, where the collection `"stable_rank"` is mutable.
            Without it a forward only reads, so that any number of forwards see the same weights.
          **options: options of the layer itself.
        """
        self.kind()
        is_made = self.layer.has_variable("params", "kernel")
        if not is_made:
            # This is `init`, and only the layer itself can initialise its parameters.
            self.layer(inputs, **options)
        raw = _raw_kernel(self.layer)
        norm = self._norm(float_dtype(raw.dtype))
        check_collection(self, "state", layer_name(self.layer))
        stored = self.variable(COLLECTION, "state", self._start, raw, norm)
        _check_state(stored.value, self.described(raw.shape), layer_name(self.layer))
        kernel, state = stored.value.step(raw, norm)
        if update_stats and self.is_mutable_collection(COLLECTION) and not self.is_initializing():
            stored.value = state
        change = functools.partial(_with_kernel, kernel=kernel)
        return call_changed(self.layer, change, lambda layer: layer(inputs, **options), stores=is_made)

    @nn.nowrap
    def kind(self) -> str | None:
        """The kind of map that the layer computes; raises `ValueError` where that is not known."""
        return kind_of(self.layer, LAYERS, {} if self.computes is None else {type(self.layer): self.computes})

    @nn.nowrap
    def _norm(self, dtype):
        if not callable(self.norm):
            return self.norm
        # A norm has no sign, so that of a learned gain is dropped.
        return jnp.abs(self.param("norm", self.norm, (), dtype))

    @nn.nowrap
    def described(self, kernel_shape) -> StableRankState:
        """The state for a kernel of this shape, without its arrays."""
        seen = layer_map(self.layer, kernel_shape, self.input_shape, self.kind())
        if not (self.norm is None or callable(self.norm)):
            ensure(jnp.ndim(self.norm) == 0, f"norm: got shape {jnp.shape(self.norm)}, expected one number.")
        constraint = Constraint(seen, self._target(seen), bool(self.cap), self.gradient)
        norm = self.norm if self.norm is None else LEARNED if callable(self.norm) else float(self.norm)
        return StableRankState(None, constraint, norm, self._way_to_layer())

    @nn.nowrap
    def _way_to_layer(self) -> tuple[int, tuple]:
        """How many levels up from the wrapper, and which names down from there, the variables of the layer are."""
        if self.layer.parent is self:
            # Also where `nn.share_scope` has lent the wrapper a scope, which its path does not show.
            return 0, (self.layer.name,)
        own, other = self.path, self.layer.path
        shared = sum(1 for n in range(1, min(map(len, (own, other))) + 1) if own[:n] == other[:n])
        return len(own) - shared, other[shared:]

    @nn.nowrap
    def _start(self, kernel, norm) -> StableRankState:
        blank = self.described(kernel.shape)
        return blank.replace(value=blank.constraint.start(layer_name(self.layer), kernel, norm))

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float | None:
        """The stable rank that the layer is held to; `None` for the norm alone."""
        return None


class StableRankNorm(Normalized):
    """A layer with prescribed stable rank and spectral norm: those of the linear map, not of the flattened kernel.

    Without an `input_shape` the map of a convolution is `jaxsrn.UnboundedConv`, with the layer's strides, dilation and
    groups: the layer's norm is then at most `norm` at every image size and with every padding, and close to it on large
    images. (Circular padding with strides that do not divide the image is no convolution, and can exceed it.) With an
    `input_shape` the map is exactly the layer's at that size, padding included.

    Every forward uses the closest kernel with `||T||_2 = norm` and a share `fraction` of the largest stable rank, by
    `jaxsrn.srnc_step`: for dense layers that is Algorithm 2 of Sanyal, Torr, Dokania 2020 (with two power steps),
    for convolutions Zheng et al. 2025, eq. 7. The raw kernel stays the parameter, in `"params"`, and is never
    overwritten. A layer whose own stable rank is below the target keeps it. The state, in the collection
    `"stable_rank"`, is converged from `init` on. Where `apply` has the collection mutable but no state in it, as around
    weights trained without the wrapper, the state starts there, converged as well.

    Args:
      layer: `nn.Conv`, `nn.ConvTranspose`, `nn.Dense` or `nn.DenseGeneral`, or a subclass that changes neither the call
        nor the parameter.
      fraction: the share, in (0, 1], of the largest stable rank that the layer's shapes allow (Sanyal's `c`, Zheng's
        `beta`): the upper end of `jaxsrn.stable_rank_range`. For most layers that is `min(prod(in), prod(out))`, and
        without an `input_shape`, per output sample, `min(c_in * prod(strides), c_out)` (per input sample, with the
        sides exchanged, where the input is dilated).
      input_shape: the spatial shape of the layer's input for which norm and stable rank are held; for convolutions.
      norm: the spectral norm. `None` keeps the layer's own; an initializer, such as `nn.initializers.ones`, makes it a
        gain that is learned with the rest, the parameter `"norm"` of the wrapper.
      cap: whether the norm is only reduced, to the smaller of `norm` and the layer's own.
      gradient: `"frozen"` or `"implicit"`, as for `jaxsrn.srnc_step`.
      computes: the class above whose map `layer` computes with its parameter `kernel` as it is, where `layer` is of
        another class, or computes by functions of its own. You vouch for that; norm and stable rank are then those of
        that map.

    Raises:
      ValueError: when called: another layer or one whose map may be another, a fraction outside (0, 1] or below what
        the layer's taps allow, REFLECT, a mask, circular strides that do not divide the `input_shape`, strides beside
        input dilation without one, a state that was made for another constraint; the message names the layer.
    """

    # The fields with defaults, in the base class, are for keywords alone.
    fraction: Any  # pyright: ignore[reportGeneralTypeIssues]

    @nn.nowrap
    def _target(self, seen: LayerMap) -> float:
        return target_for(self.layer, seen, self.fraction)


class SpectralNorm(Normalized):
    """A layer with prescribed spectral norm: that of the linear map, not of the kernel flattened to a matrix.

    It is `StableRankNorm` without a target for the stable rank: the kernel is only rescaled, after two power steps of
    `jaxsrn.srnc_step`. The raw kernel stays the parameter and is never overwritten. The state is converged from `init`
    on, and follows the layer by frequency power iteration (unbounded, circular) or by power steps of a few images.

    The arguments and errors are those of `StableRankNorm`. The gradient is exact with either choice.
    """


def call_changed(module: nn.Module, change: Callable[[Mapping], dict], call: Callable, *, stores: bool):
    """`call(module)`, for which the module has changed parameters.

    Args:
      module: the module.
      change: `variables -> variables`.
      call: the call, a function of the module.
      stores: whether what the call writes stays. It does not in `init`, where the call that made the parameters has
        written the other collections already, and a counter would be at two.
    """
    if stores:
        return nn.map_variables(call, "params", change)(module)
    return nn.map_variables(call, True, change, lambda _: {}, mutable=True)(module)


def _raw_kernel(layer: nn.Module) -> jax.Array:
    ensure(layer.has_variable("params", "kernel"), f"{layer_name(layer)}: it has no parameter 'kernel'.")
    return jnp.asarray(nn.meta.unbox(layer.get_variable("params", "kernel")))


def check_collection(module: nn.Module, variable: str, name: str) -> None:
    """Raises `ValueError` where a module has no state and can start none."""
    ensure(
        module.has_variable(COLLECTION, variable) or module.is_mutable_collection(COLLECTION),
        f"{name}: it has no state, and the collection {COLLECTION!r} is not mutable here; pass all variables that init "
        f"returns, or apply with mutable=[{COLLECTION!r}]. Inside nn.RNN, nn.scan or nn.vmap, name the collection "
        f"beside 'params', as in nn.RNN(cell, variable_broadcast=('params', {COLLECTION!r})).",
    )


def check_is_state(stored, name: str) -> None:
    """Raises `ValueError` unless what the collection has for a wrapper is a state."""
    ensure(
        isinstance(stored, StableRankState),
        f"{name}: the collection {COLLECTION!r} has a {type(stored).__name__}, expected a StableRankState; restore "
        "checkpoints with the variables of init as the target.",
    )


def _check_state(stored, expected: StableRankState, name: str) -> None:
    check_is_state(stored, name)
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


def trace_keys() -> dict[str, jax.Array]:
    """Keys for a trace that sees every call of a layer.

    Dropout and its like ask for a key, whose value does not matter in a trace. A key of a new name makes `nn.jit` trace
    again; from its cache it would call no layer.
    """
    key = jax.random.key(0)
    return {"params": key, f"trace_{next(_traces)}": key}
