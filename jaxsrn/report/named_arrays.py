"""Named arrays, read one at a time, and those of a tree of parameters.

Names, shapes and dtypes are known at once, and an array is read when it is asked for, so that the memory that a report
takes does not grow with its file.
"""

from __future__ import annotations

import abc
import collections
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsrn._tools.checks import ensure, errors_named
from jaxsrn.operators.layers import plain

__all__ = ["ArrayInfo", "NamedArrays", "Tree", "array_of", "names_of", "natural", "sorted_infos"]


class ArrayInfo(NamedTuple):
    """What is known of an array before it is read; a dtype that NumPy does not know has its name alone."""

    shape: tuple[int, ...]
    dtype: np.dtype | str


class NamedArrays(abc.ABC):
    """Arrays by name.

    Attributes:
      infos: `{name: ArrayInfo}`, names in natural order, `layer2` before `layer10`, or in the order of an `.npz`.
      source: what they are read from, as a report names it.
    """

    infos: dict[str, ArrayInfo]
    source: str

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One array; no other is read."""

    def copy(self, path: Path, change: Callable[[str], np.ndarray | None]) -> None:
        """Writes all arrays to `path` in the same format; `None` as a change leaves an array as it is, bit by bit.

        The file appears when it is complete, so that what an interrupted run leaves is no file. A change has the shape
        and the dtype of its array.
        """
        raise NotImplementedError


def natural(name: str) -> list[tuple[int, int, str]]:
    """The key that sorts names as people do, numbers by their value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def sorted_infos(infos: Mapping[str, ArrayInfo]) -> dict[str, ArrayInfo]:
    """The same in natural order."""
    return {name: infos[name] for name in sorted(infos, key=natural)}


class Tree(NamedArrays):
    """The leaves of a pytree, named by their paths, `params/Conv_0/kernel`."""

    def __init__(self, tree: Any, source: str = "parameters"):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = names_of([plain(path) for path, _ in leaves])
        self._leaves = {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
        self.source = source
        infos = {}
        for name, leaf in self._leaves.items():
            with errors_named(name):
                infos[name] = _info_of(leaf)
        self.infos = sorted_infos(infos)

    def read(self, name):
        return np.asarray(self._leaves[name])


# The attributes in which variables of NNX and boxes of Linen hold their array.
_HOLDERS = ("value", "raw_value")


def names_of(paths: Sequence[tuple]) -> list[str]:
    """The names of leaves by their paths; the attribute in which a Flax variable holds its array is left out.

    Raises:
      ValueError: two leaves of the same name.
    """
    inside = collections.Counter(path[:-1] for path in paths)
    is_variable = [len(path) > 1 and path[-1] in _HOLDERS and inside[path[:-1]] == 1 for path in paths]
    held = [path[:-1] if variable else path for path, variable in zip(paths, is_variable, strict=True)]
    names = ["/".join(map(str, path)) for path in held]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    ensure(not twice, f"{', '.join(twice)}: two arrays have this name, expected names that differ.")
    return names


def _info_of(leaf) -> ArrayInfo:
    if not hasattr(leaf, "shape") or isinstance(leaf, jax.ShapeDtypeStruct):
        return ArrayInfo(np.shape(leaf) if np.isscalar(leaf) else (), type(leaf).__name__)
    dtype = leaf.dtype
    is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    try:
        return ArrayInfo(tuple(leaf.shape), str(dtype) if is_key else np.dtype(dtype))
    except TypeError:
        # Tensors of other libraries have types of their own.
        return ArrayInfo(tuple(leaf.shape), array_of(leaf).dtype)


def array_of(tensor) -> np.ndarray:
    """The array of NumPy that a tensor of any library is; raises `ValueError` where it is none."""
    try:
        return np.asarray(tensor)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"got a {type(tensor).__name__} that is no array of NumPy ({error}).") from error
