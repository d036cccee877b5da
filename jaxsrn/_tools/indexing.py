"""Indexing with indices that are known to be valid: without the code for negative ones, which takes 12 operations."""

from __future__ import annotations

import jax
from jaxtyping import Array, Int

__all__ = ["picked", "put"]

_VALID = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def picked(tree, index: Int[Array, "..."]):
    """`leaf[index]` of every array of a tree, for one index or an array of them."""
    return jax.tree.map(lambda leaf: leaf.at[index].get(**_VALID), tree)


def put(array, index: Int[Array, " n"], rows):
    """The array with `rows` in the places of the indices; indices beyond the end are dropped."""
    return array.at[index].set(rows, mode="drop", wrap_negative_indices=False)
