"""Layers of a model by path: the kernels that they name in a tree of parameters, and those of equal shape together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxsrn._tools.checks import ensure, errors_named, kernel_array
from jaxsrn.operators.base import Operator

__all__ = [
    "Layers",
    "Path",
    "Stack",
    "after",
    "find_kernels",
    "named_kernels",
    "stacked",
    "stacks",
]

Path = tuple[Any, ...]
# {path: operator}; checked entry by entry.
Layers = Mapping


class Stack(NamedTuple):
    """Kernels of one shape and dtype with one operator, along a new first axis, and their paths."""

    op: Operator
    paths: list[Path]
    kernels: Shaped[Array, "layers ..."]


def plain(path) -> Path:
    """A key path of `jax.tree_util` as plain keys: dictionary keys, indices, attribute names."""
    return tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)


def _names(path: Path, leaf) -> bool:
    """Whether a path is that of a leaf, or of the variable that holds it as an attribute."""
    rest = leaf[len(path) :]
    return plain(leaf[: len(path)]) == path and all(isinstance(key, jax.tree_util.GetAttrKey) for key in rest)


def find_kernels(layers: Layers, params) -> dict[Path, int]:
    """Which leaf of `params`, in the order of `jax.tree.leaves`, each path names.

    A path is that of the kernel itself, `("conv1", "kernel")`, also where a Flax variable holds it: those are nodes of
    their own, the array an attribute of them.

    Raises:
      ValueError: a path that names no leaf or several, a path that is no tuple, or an operator that is none.
    """
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {}
    for path, op in layers.items():
        ensure(isinstance(path, tuple), f"layers: got the path {path!r}, expected a tuple of plain keys.")
        ensure(isinstance(op, Operator), f"layers: got {op!r} for {path!r}, expected an operator, such as Dense().")
        below = [i for i, leaf in enumerate(leaves) if _names(path, leaf)]
        ensure(
            len(below) == 1,
            f"layers: the path {path!r} names {len(below)} arrays, expected one; params has "
            f"{', '.join(repr(plain(leaf)) for leaf in leaves[:8]) or 'none'}{', ...' if len(leaves) > 8 else ''}.",
        )
        found[path] = below[0]
    return found


def named_kernels(layers: Layers, params) -> dict[Path, Shaped[Array, "..."]]:
    """The kernels that `layers` names, by path.

    Raises:
      ValueError: as `find_kernels`, or a kernel that does not fit its operator.
    """
    leaves = jax.tree.leaves(params)
    kernels = {}
    for path, index in find_kernels(layers, params).items():
        with errors_named(f"layers: at {path!r}"):
            kernels[path] = kernel_array(leaves[index], layers[path])
    return kernels


def stacked(layers: Layers, kernels: Mapping) -> list[Stack]:
    """Kernels by path, those of equal operator, shape and dtype stacked."""
    groups: dict[tuple, list[Path]] = {}
    for path, kernel in kernels.items():
        groups.setdefault((layers[path], kernel.shape, kernel.dtype), []).append(path)
    return [Stack(op, paths, jnp.stack([kernels[path] for path in paths])) for (op, _, _), paths in groups.items()]


def stacks(layers: Layers, params) -> list[Stack]:
    """The kernels that `layers` names in `params`, stacked; raises as `named_kernels`."""
    return stacked(layers, named_kernels(layers, params))


def after(kernels: Shaped[Array, "..."], value: Shaped[Array, ""]) -> Shaped[Array, "..."]:
    """The same kernels, but not before `value` is known: for stacks that are to be worked on in turn.

    On CPUs jaxlib's batched SVDs can wait for each other forever where several run at once (0.10.2). An optimization
    barrier binds XLA's passes alone: the compiled program has none, and starts both sides of it as it likes. But XLA
    does not know that nothing is below minus infinity, and this it cannot compute before `value`.
    """
    return jnp.where(value < -jnp.inf, 0, kernels)
