"""Data sets that do not fit into memory: any function of a batch, run over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxsrn._tools.checks import ensure, static_int

__all__ = ["over_batches"]


def over_batches(function: Callable, *data, batch_size: int | None = None) -> Any:
    """`function(*batch)` over a data set, its results for all samples, one after the other.

    Only one batch of data is on the device at a time. What is kept are the results, in NumPy arrays on the host: a
    constant or a margin is one number a sample.

    Args:
      function: a map from the arrays of a batch to a tree of arrays whose first axis is that of the samples, such as
        `lambda x: lipschitz.local(f, params, x)`.
      *data: with `batch_size`, arrays of equally many samples along their first axis (of NumPy or JAX, or anything
        with `shape` that can be sliced, such as a memory map). Without it, one iterable of batches; a batch is an
        array, or a tuple of the function's arguments.
      batch_size: samples of a batch. The last batch is filled up with copies of its last sample, whose results are
        dropped, so that one compiled program serves all.

    Returns:
      The tree of the function's results, each a NumPy array of all samples.

    Raises:
      ValueError: no data, arrays of different lengths, or results without an axis of samples.
    """
    batches = _given(data) if batch_size is None else _cut(data, static_int(batch_size, "batch_size"))
    results = []
    for batch, count in batches:
        found = jax.device_get(function(*batch))
        length = len(batch[0])
        ensure(
            all(np.shape(leaf)[:1] == (length,) for leaf in jax.tree.leaves(found)),
            f"function: got results of shapes {[np.shape(leaf) for leaf in jax.tree.leaves(found)]} for {length} "
            "samples, expected the samples along the first axis of each.",
        )
        results.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], found))
    ensure(len(results) > 0, "data: got no batches, expected at least one.")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)


def _given(data: tuple) -> Iterator[tuple[tuple, int]]:
    """The batches of an iterable, as tuples with their lengths."""
    ensure(
        len(data) == 1 and isinstance(data[0], Iterable) and not hasattr(data[0], "shape"),
        f"data: got {len(data)} arguments without batch_size, expected one iterable of batches; arrays are cut into "
        "batches by batch_size.",
    )
    for batch in data[0]:
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        yield tuple(batch), len(batch[0])


def _cut(data: tuple, batch_size: int) -> Iterator[tuple[tuple, int]]:
    """Batches of equal size, as tuples with the number of their own samples."""
    lengths = {np.shape(array)[:1] for array in data}
    ensure(
        len(lengths) == 1 and lengths != {()},
        f"data: got arrays of shapes {[np.shape(array) for array in data]}, expected equally many samples along the "
        "first axis of each.",
    )
    (num_samples,) = lengths.pop()
    batch_size = min(batch_size, num_samples)
    for start in range(0, num_samples, max(batch_size, 1)):
        batch = tuple(np.asarray(array[start : start + batch_size]) for array in data)
        count = len(batch[0])
        yield tuple(np.concatenate([array, array[-1:].repeat(batch_size - count, axis=0)]) for array in batch), count
