"""Peaks of the symbol: the highest one, with a proof, and others as far as climbing finds them.

A peak is a frequency where the largest singular value of the symbol has a local maximum (`climbing.py`). The search
with zero padding starts from several of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import Boxes, boxes_of
from jaxsrn.spectra.circular.branch_and_bound import highest_peak
from jaxsrn.spectra.circular.climbing import NUM_CLIMBERS, Estimates, Peak, at_site, climbs, estimates, most_promising
from jaxsrn.spectra.circular.grams import GramPolynomial, gram_polynomial
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "other_peaks",
    "peaks",
]


def peaks(
    kernel: Float[Array, "..."], op: CircularConv, count: int, radius: int
) -> tuple[Float[Array, " peaks"], Pair]:
    """The largest singular value of the whole grid, and other peaks as far as climbing finds them.

    A frequency within `radius` indices of a higher one, or of its opposite, is no peak of its own.

    Returns:
      `(values, pairs)`, stacks of at most `count`, the largest first; values are 0 where fewer were found.
    """
    poly, boxes = gram_polynomial(kernel, op), boxes_of(op, kernel.shape)
    known = estimates(poly, op, boxes)
    highest = highest_peak(poly, op, boxes, known, 0.0)
    found = other_peaks(poly, op, boxes, known, highest, count, radius)
    return found.value, jax.vmap(lambda peak: at_site(peak, op, kernel.shape))(found)


def other_peaks(
    poly: GramPolynomial, op: CircularConv, boxes: Boxes, known: Estimates, highest: Peak, count: int, radius: int
) -> Peak:
    """A stack of the highest peak and of others, as far as climbing finds them, the larger ones first.

    A frequency within `radius` indices of a higher one, or of its opposite, is no peak of its own. Where fewer peaks
    than `count` are found, the values of the rest are 0.
    """
    # The kernels of which every frequency was estimated are wide, as a rule, so that each climb is dear.
    dear = len(boxes.sizes) == 1
    chosen = _estimated_peaks(known, boxes, op, count, radius) if dear else most_promising(known, 2 * NUM_CLIMBERS)
    found = climbs(poly, op, boxes, known, chosen)
    # The highest comes first and wins among equal values, so values that exceed it by rounding are cut to it.
    found = found._replace(value=jnp.minimum(found.value, highest.value))
    found = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), highest, found)
    chosen, values = _largest_apart(found.value, found.index, found.group, op, count, radius)
    return jax.tree.map(lambda leaf: leaf[chosen], found)._replace(value=values)


def _estimated_peaks(known: Estimates, boxes: Boxes, op: CircularConv, count: int, radius: int):
    """The flat indices of the largest estimates at single frequencies, none near a larger one of its group."""
    which, groups = np.indices(known.values.shape).reshape((2, -1))
    return _largest_apart(known.values.reshape(-1), jnp.asarray(boxes.corners[which]), groups, op, count, radius)[0]


def _largest_apart(values: Float[Array, " n"], indices, groups, op: CircularConv, count: int, radius: int):
    """The indices of the largest values, and the values; none is near a larger one of its group, or its opposite.

    Where fewer than `count` are left, the rest of the values are 0.
    """
    grid, groups = np.array(op.grid)[None], jnp.asarray(groups)

    def near(other):
        steps = (indices - other[None]) % grid
        return jnp.max(jnp.minimum(steps, grid - steps), axis=-1) <= radius

    def pick(k, state):
        left, chosen, found = state
        best = jnp.argmax(left)
        taken = (near(indices[best]) | near(-indices[best])) & (groups == groups[best])
        found = found.at[k].set(jnp.maximum(left[best], 0))
        return jnp.where(taken, -1, left), chosen.at[k].set(best), found

    count = min(count, values.size)
    return lax.fori_loop(0, count, pick, (values, jnp.zeros(count, int), jnp.zeros(count, values.dtype)))[1:]
