"""The histogram of empirical Lipschitz constants, eLhist (Sanyal, Torr, Dokania 2020, Figure 2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxsrn._tools.checks import ensure, is_integer

__all__ = ["Histogram", "histogram"]


class Histogram(NamedTuple):
    """Counts of ratios in bins, and their percentile.

    Attributes:
      counts: the number of ratios in each bin.
      edges: the edges of the bins, one more than there are bins.
      percentile: the ratio below which the asked share of all ratios lies.
      largest: the largest ratio, a lower bound of the global Lipschitz constant.
    """

    counts: Int[np.ndarray, " bins"]
    edges: Float[np.ndarray, " bins+1"]
    percentile: float
    largest: float


def histogram(ratios, *, bins=50, percentile=95.0) -> Histogram:
    """The eLhist of a network: the histogram of `||f(x) - f(y)|| / ||x - y||` over pairs, with its 95th percentile.

    The paper takes pairs of a real and a generated sample, each through the discriminator. The percentile is exact: a
    pair leaves one number on the host, its points are not kept. `matplotlib.pyplot.stairs(h.counts, h.edges)` draws it.

    Args:
      ratios: an array of ratios, from `pairwise` or `over_batches`; or an iterable of such arrays, which is read one
        array at a time, such as `(pairwise(f, params, x, y) for x, y in batches)`.
      bins: the number of bins, or their edges, as in `numpy.histogram`.
      percentile: from 0 to 100.

    Returns:
      A `Histogram` of NumPy arrays.

    Raises:
      ValueError: no ratios, ratios that are not finite (their number is named), or a bad percentile or number of bins.
    """
    batches = [ratios] if isinstance(ratios, (np.ndarray, jax.Array)) else ratios
    values = np.concatenate([np.zeros(0), *(np.asarray(batch, float).ravel() for batch in batches)])
    bad = int(np.sum(~np.isfinite(values)))
    ensure(
        values.size > 0 and bad == 0,
        f"ratios: got {values.size} of which {bad} are not finite, expected at least one and all finite.",
    )
    ensure(0 <= percentile <= 100, f"percentile: got {percentile}, expected a number from 0 to 100.")
    ensure(np.ndim(bins) == 1 or is_integer(bins), f"bins: got {bins!r}, expected an integer or the edges.")
    counts, edges = np.histogram(values, bins)
    return Histogram(counts, edges, float(np.percentile(values, percentile)), float(values.max()))
