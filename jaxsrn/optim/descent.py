"""Steepest descent under every layer's own norm, as an optax transformation: Muon for convolutions.

Dense layers are `optax.contrib.muon`'s. Its momentum and its scale are those of the convolutions too, whose momentum is
replaced by the kernel of norm 1 along it (`projections/steepest_descent.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.checks import (
    check_choice,
    check_transformation,
    ensure,
    errors_named,
    float_dtype,
    positive_scalar,
    static_int,
)
from jaxsrn._tools.indexing import repeated
from jaxsrn._tools.linalg import by_largest, ratio
from jaxsrn._tools.programs import program
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.layers import (
    Layers,
    check_layers,
    in_turn,
    kernel_places,
    named_kernels,
    split_shape,
)
from jaxsrn.projections.frequency_passes import few_frequencies, first_stack, passes, unit_direction
from jaxsrn.projections.steepest_descent import METHODS, flattened, steepest
from jaxsrn.spectra.common_shapes import is_matrix
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import without_idle_taps

__all__ = [
    "SpectralDescentState",
    "spectral_descent",
]


# The passes of `"frequency"` by default: what more of them reach is in `benchmarks/results/steepest_network.md`.
_NUM_PASSES = 4


class SpectralDescentState(NamedTuple):
    """The state of the convolutions of `spectral_descent`.

    Attributes:
      count: steps taken.
      momentum: the moving average of the gradients.
      memory: one entry per layer, from which the passes of its next step start.
    """

    count: Int[Array, "..."]
    momentum: Any
    memory: Any


def spectral_descent(
    learning_rate,
    layers: Layers,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    method: str = "frequency",
    num_passes: int | None = None,
    weight_decay: float = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon with every layer's own norm: steps of given spectral norm along which the loss falls fastest.

    Dense layers get `optax.contrib.muon`'s update to the last bit; those of several axes get that of the matrix that
    they are. Convolutions get, for their momentum `M`, minus

        learning_rate * sqrt(max(1, outputs / inputs)) * argmax { <M, K> : ||T(K)||_2 <= 1 }

    with the norm of the whole layer, strides and groups included, where Muon would flatten the kernel to a matrix. Here
    `outputs` and `inputs` count the numbers that a layer writes and reads: for a convolution without edges `c_out` and
    `c_in * prod(strides)`.

    The scale is for learning rates that carry over from one width to another. Inputs whose entries are of size 1 have a
    norm of `sqrt(inputs)`. A change of the layer of norm `s` that is aligned with them changes the outputs by a vector
    of norm `s * sqrt(inputs)`, and so each output by `s * sqrt(inputs / outputs)`, which is the same at all widths for
    `s = sqrt(outputs / inputs)`. This is the spectral scaling of Yang, Simon, Bernstein 2023 ("A spectral condition for
    feature learning", arXiv:2310.17813). The maximum is that of Muon (Jordan et al. 2024), whose steps are not smaller
    than 1 where a layer has fewer outputs than inputs.

        layers = jaxsrn.nnx.layer_operators(model)
        optimizer = optax.chain(spectral_descent(0.02, layers), keep_spectral_norm(layers, 1.0, every=10))

    Decoupled from the step, `weight_decay` shrinks the kernels as in `optax.contrib.muon`. Parameters that `layers`
    does not name get `others`. The weights themselves are kept on the ball by `keep_spectral_norm` behind this
    transformation, and their stable rank high by `keep_stable_rank(..., upward=True)`.

    Args:
      learning_rate: a number or an optax schedule.
      layers: `{path: operator}`, as `jaxsrn.nnx.layer_operators` gives it. Without inputs that makes the operators
        unbounded, which is what this is fastest for. A path may name a stack of layers, as in `keep_spectral_norm`.
      momentum: the decay rate of the average of gradients, Muon's `beta`.
      nesterov: whether the average looks one gradient ahead, as in Muon.
      method: static; how convolutions find their step. `"exact"` is that of `projections.steepest`, for small layers.
        `"frequency"` goes on from the last step's stack of symbols by `num_passes` passes. Four of them reach
        about 0.91 of the largest `<M, K>` on gradients of a network, 16 reach 0.96, and Muon's step 0.55
        (`python benchmarks/steepest.py --only network`). `"flattened"` is `U V^T` of the flattened kernel. The latter
        two are divided by their norm. For unbounded layers and large circular ones that is the highest peak that
        climbing finds over all frequencies, since a proof that no other is higher would take most of the time; the norm
        can be above 1 by some tenths of a percent. For small circular layers and small zero-padded ones it is exact.
        For large zero-padded ones it is searched for, as in `spectral_norm`.
      num_passes: static; the passes of `"frequency"`, by default 4, one SVD of the symbol on a coarse grid each.
      weight_decay: of the layers in `layers`.
      others: the transformation of all other parameters, its learning rate included; by default
        `optax.adamw(learning_rate, weight_decay=0, nesterov=nesterov)`, as in `optax.contrib.muon`.

    Returns:
      The transformation. `update` needs `params`, as optax's weight decay does, and an update for every layer.
      For a schedule of an option beside the learning rate, `optax.inject_hyperparams` needs `static_args=("layers",
      "nesterov", "num_passes")`.

    Raises:
      ValueError: no layers, an unknown method, a bad number of passes or one for another method, a momentum outside [0,
        1), a weight decay that is negative, `others` that are no transformation; in `init`, naming the layer: a path
        that names no leaf of `params` or several, a kernel that does not fit its operator, aliased taps.
    """
    check_layers(layers)
    check_choice(method, "method", METHODS)
    ensure(
        num_passes is None or method == "frequency",
        f"num_passes: got {num_passes} with method={method!r}, which has no passes to count.",
    )
    num_passes = static_int(_NUM_PASSES if num_passes is None else num_passes, "num_passes")
    # Muon's updates are the same to the last bit only if it converts these numbers itself.
    positive_scalar(momentum, "momentum", jnp.float32, or_zero=True)
    is_traced = isinstance(momentum, jax.core.Tracer)
    ensure(is_traced or float(momentum) < 1, f"momentum: got {momentum}, expected a number below 1.")
    positive_scalar(weight_decay, "weight_decay", jnp.float32, or_zero=True)
    if others is not None:
        check_transformation(others, "others")
    dense = {path: op for path, op in layers.items() if isinstance(op, Dense)}
    convolutions = {path: op for path, op in layers.items() if path not in dense}
    rest = [optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)]
    parts = {"others": others or optax.adamw(learning_rate, weight_decay=0.0, nesterov=nesterov)}
    if dense:
        parts["dense"] = optax.chain(*_as_muon(dense, momentum, nesterov), *rest)
    if convolutions:
        steps = _scale_by_steepest(convolutions, momentum, nesterov, method, num_passes)
        parts["convolutions"] = optax.chain(steps, *rest)

    def labels(params):
        if not jax.tree.leaves(params):
            # Of `optax.tree_map_params`, as in `_scale_by_steepest`.
            return params
        kind = {
            place: "dense" if isinstance(layers[path], Dense) else "convolutions"
            for path, place in kernel_places(layers, params).items()
        }
        leaves, tree = jax.tree.flatten(params)
        return tree.unflatten([kind.get(i, "others") for i in range(len(leaves))])

    return optax.partition(parts, labels)


def _as_muon(dense, momentum: float, nesterov: bool):
    """Muon's momentum and polar factor of dense layers, and its scale."""

    def mapped(one, updates):
        """`one(operator, update)` of all layers."""
        leaves, tree = jax.tree.flatten(updates)
        ops = {place: dense[path] for path, place in kernel_places(dense, updates).items()}
        return tree.unflatten([one(ops[place], leaf) for place, leaf in enumerate(leaves)])

    def axes(op, update):
        first = len(split_shape(op, update.shape)[0])
        all_axes = tuple(range(first, first + op.input_axes + op.output_axes))
        return optax.contrib.MuonDimensionNumbers(all_axes[: op.input_axes], all_axes[op.input_axes :])

    dimensions = functools.partial(mapped, axes)
    polar = optax.contrib.scale_by_muon(beta=momentum, nesterov=nesterov, weight_dimension_numbers=dimensions)
    return polar, optax.stateless(lambda steps, _: mapped(_scaled, steps))


def _scaled(op: Operator, step: Float[Array, "..."]) -> Float[Array, "..."]:
    """The step times `sqrt(max(1, outputs / inputs))`, by which features change alike at every width."""
    inputs, outputs = op._sizes(split_shape(op, step.shape)[1])
    return jnp.sqrt(jnp.maximum(1, outputs / inputs)).astype(step.dtype) * step


def _scale_by_steepest(layers, momentum, nesterov: bool, method: str, num_passes: int):
    """Muon's momentum, and in its place the kernel of norm 1 along it times the scale of its shape."""

    def init(params):
        if not jax.tree.leaves(params):
            # `optax.tree_map_params` asks for the structure of the state with a tree that has no leaves.
            memory = tuple(0 if method == "frequency" else () for _ in layers)
            return SpectralDescentState(0, params, memory)
        memory = []
        for path, kernel in named_kernels(layers, params).items():
            outer, shape = split_shape(layers[path], kernel.shape)
            with errors_named(f"layers: at {path!r}"):
                layers[path]._check_not_aliased(shape)
            memory.append(repeated(_no_memory(layers[path], shape, kernel.dtype, method), *outer))
        return SpectralDescentState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), tuple(memory))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = optax.safe_increment(state.count)
        average = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        ahead = optax.tree.bias_correction(average, momentum, optax.safe_increment(count) if nesterov else count)
        if nesterov:
            now = optax.tree.bias_correction(updates, momentum, count)
            ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        momenta = tuple(named_kernels(layers, ahead).values())
        steps, memory = _all_steps(momenta, state.memory, tuple(layers.items()), method, num_passes)
        leaves, tree = jax.tree.flatten(updates)
        for place, step in zip(kernel_places(layers, updates).values(), steps, strict=True):
            leaves[place] = step
        return tree.unflatten(leaves), SpectralDescentState(count, average, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _no_memory(op: Operator, kernel_shape: tuple[int, ...], dtype, method: str):
    """The memory before the first step, from which no passes can go on."""
    if method != "frequency":
        return ()
    zeros = jnp.zeros(kernel_shape, float_dtype(dtype))
    return jnp.zeros_like(few_frequencies(op, kernel_shape, zeros.dtype).stack(zeros))


@functools.partial(program, static_argnums=(2, 3, 4))
def _all_steps(momenta: tuple, memory: tuple, layers: tuple, method: str, num_passes: int):
    """The steps and the new memories of all layers, `((path, operator), ...)`, in their order."""
    ops, steps = dict(layers), {}
    by_path, memories = dict(zip(ops, momenta, strict=True)), dict(zip(ops, memory, strict=True))
    one = functools.partial(_one_step, method=method, num_passes=num_passes)

    def of_stack(momenta, op: Operator, memories):
        wide = momenta.astype(float_dtype(momenta.dtype))
        return lax.map(lambda layer: one(*layer, op=op), (wide, memories))

    for path, step, new in in_turn(of_stack, ops, by_path, memories):
        steps[path], memories[path] = _scaled(ops[path], step), new
    return tuple(steps[path] for path in ops), tuple(memories[path] for path in ops)


def _one_step(momentum: Float[Array, "..."], memory, *, op: Operator, method: str, num_passes: int):
    """The kernel of norm 1 along the momentum, and the memory of the next step."""
    # The step does not depend on the scale, and squares of very small or large momenta are no numbers of the dtype.
    momentum, _ = by_largest(momentum)
    if method == "exact":
        return steepest(momentum, op).kernel, memory
    if method == "flattened" or is_matrix(momentum.shape, op):
        found = flattened(momentum)
    else:
        stack_map = few_frequencies(op, momentum.shape, momentum.dtype)
        direction, _ = unit_direction(momentum, stack_map)
        # There is nothing to go on from before the first momentum that is not zero.
        start = jnp.where(jnp.any(memory != 0), memory, first_stack(direction, stack_map))
        found, _, _, memory = passes(direction, stack_map, num_passes, start)
    # An allowed excess of 1 is met by the highest peak that climbing finds.
    norm = pair_value(found, op, leading_pair(found, op, excess=1.0))
    nothing = jnp.all(momentum == 0)
    return jnp.where(nothing, 0.0, ratio(without_idle_taps(found, op), norm)), memory
