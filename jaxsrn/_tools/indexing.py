"""Indexing and choosing in trees of arrays.

No index is negative, so that the code for negative ones, which takes 12 operations, is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

__all__ = [
    "chosen",
    "first_of",
    "joined",
    "picked",
    "place_of_largest",
    "put",
    "put_from",
    "repeated",
    "slice_from",
    "stack_of_one",
]

_VALID = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def picked(tree, index: Int[Array, "..."] | Int[np.ndarray, "..."]):
    """`leaf[index]` of every array of a tree, for one index or an array of them."""

    def of_leaf(leaf):
        # The only row is taken without a search for it, and without a copy.
        return leaf[0] if len(leaf) == 1 and jnp.ndim(index) == 0 else leaf.at[index].get(**_VALID)

    return jax.tree.map(of_leaf, tree)


def place_of_largest(values, axis: int = 0) -> Int[Array, "..."] | Int[np.ndarray, "..."]:
    """The index of the (first) largest number along an axis; a static 0 where it is the only one."""
    if values.shape[axis] == 1:
        return np.zeros(np.delete(values.shape, axis), np.int32)
    return lax.argmax(values, axis, jnp.int32)


def chosen(condition: Bool[Array, ""], a, b):
    """The tree `a` where the condition holds, else the tree `b`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def joined(first, second):
    """Two trees of stacks as one, the second after the first."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def repeated(tree, *axes: int):
    """A stack of copies of a tree, with these axes in front of every array; without axes, the tree."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*axes, *leaf.shape)), tree)


def stack_of_one(tree):
    """The tree as a stack that holds nothing else."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def first_of(stack):
    """The first tree of a stack."""
    return jax.tree.map(lambda leaf: leaf[0], stack)


def put(array, index: Int[Array, " n"], rows):
    """The array with `rows` in the places of the indices; indices beyond the end are dropped."""
    return array.at[index].set(rows, mode="drop", wrap_negative_indices=False)


def slice_from(array, start: Int[Array, ""] | int, count: int, axis: int = 0):
    """`array[start : start + count]` along an axis."""
    return lax.dynamic_slice_in_dim(array, start, count, axis, allow_negative_indices=False)


def put_from(array, start: Int[Array, ""] | int, rows):
    """The array with `rows` in the places from `start` on along the first axis."""
    corner = (np.int32(0),) * (array.ndim - 1)
    return lax.dynamic_update_slice(array, rows, (jnp.int32(start), *corner), allow_negative_indices=False)
