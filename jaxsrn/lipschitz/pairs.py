"""Lower bounds of the global Lipschitz constant: what pairs of points attain, given ones and ones that climb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxsrn._tools.checks import ensure, static_int
from jaxsrn._tools.held import held, refusing
from jaxsrn._tools.linalg import ratio
from jaxsrn._tools.programs import program
from jaxsrn.lipschitz.samples import check_network, checked_batches, has_nan, norms_of_samples, rows

__all__ = ["Ascent", "ascent", "pairwise"]


class Ascent(NamedTuple):
    """Pairs of points after they have climbed.

    Attributes:
      ratio: `||f(x) - f(y)|| / ||x - y||` of each pair, of shape `(samples,)`.
      x: the first points of the pairs, of the shape of those given.
      y: the second ones.
    """

    ratio: Float[Array, "..."]
    x: Float[Array, "..."]
    y: Float[Array, "..."]


def pairwise(f: Callable, params, x, y) -> Float[Array, "..."]:
    """The ratio `||f(x) - f(y)|| / ||x - y||` of each pair of samples.

    Each ratio is a lower bound of the global Lipschitz constant; over pairs of data it is the empirical one of Sanyal,
    Torr, Dokania 2020, section 2. The largest of many is far below the constant in high dimension, where the
    difference of two samples hardly ever lies along the directions that `f` stretches most; `ascent` and `local` come
    nearer.

    Args:
      f, params: as in `local`.
      x, y: `(samples, ...)`, of equal shape.

    Returns:
      An array `(samples,)` in float32 or wider: 0 for a pair of equal points, NaN where a point, `params` or an output
      has one. It is differentiable in all but `f`, with derivative 0 where it is 0.

    Raises:
      ValueError: what `local` refuses, or `x` and `y` of different shapes.
    """
    check_network(f)
    return _pairwise(f, params, jnp.asarray(x), jnp.asarray(y))


@functools.partial(program, static_argnums=0)
def _pairwise(f, params, x, y):
    x, y = checked_batches(f, params, x, y)
    # One call of the network for both points, so that its program is there once.
    first, second = jnp.split(rows(f, params, jnp.concatenate([x, y])), 2)
    found = ratio(norms_of_samples(first - second), norms_of_samples(x - y))
    return jnp.where(has_nan(params, x, y, first, second), jnp.nan, found)


def ascent(f: Callable, params, x, y, *, num_steps: int = 100, box=None) -> Ascent:
    """Pairs that climb: each pair is moved to where its ratio `||f(x) - f(y)|| / ||x - y||` is larger.

    Each final ratio is a lower bound of the global Lipschitz constant, up to rounding not below that of the given
    pair, and no proof that none is larger. Pairs keep their distance, so that rounding does not drown the difference
    of outputs. A trial step moves both the direction of the difference and the centre of the pair along the gradient.
    A full step of the direction is a power step: on a linear map it is the power method, whose limit is the spectral
    norm. A step that does not raise the ratio is taken back, and the next one is half as long.

    Args:
      f, params: as in `local`.
      x, y: `(samples, ...)`, of equal shape; the pairs to start from. Pairs of one point and the same with noise give
        constants of that neighbourhood.
      num_steps: the number of trial steps; each costs one gradient of the network for all pairs.
      box: static; the interval `(low, high)` in which all entries of the points are kept, such as `(0, 1)` for images.
        Points outside of it are moved into it first, and the distance of a pair may shrink there. By default there is
        none.

    Returns:
      An `Ascent` in float32 or wider; a pair whose ratio is NaN at the start keeps it. The ratio is differentiable in
      `params`, with the points held constant.

    Raises:
      ValueError: what `pairwise` refuses, a bad number of steps, a box that is empty, or a second derivative.
    """
    check_network(f)
    ensure(
        box is None or (np.shape(box) == (2,) and float(box[0]) < float(box[1])),
        f"box: got {box!r}, expected a pair (low, high) of numbers with low < high.",
    )
    low, high = (-jnp.inf, jnp.inf) if box is None else box
    limits, points = (jnp.asarray(low, float), jnp.asarray(high, float)), (jnp.asarray(x), jnp.asarray(y))
    x, y = _climbed(f, *lax.stop_gradient((params, *points)), limits, static_int(num_steps, "num_steps"))
    ratios = held(functools.partial(_of_points, f), _NO_MOVE, params, (x, y))
    return Ascent(ratios, x, y)


_NO_MOVE = refusing(
    "ascent: got a second derivative, which would need how the points move with params; "
    "take that of pairwise(f, params, x, y) at the points that ascent returns."
)


def _of_points(f: Callable, params, points):
    return _pairwise(f, params, *points)


class _Pairs(NamedTuple):
    """Pairs, their ratios, the gradients of the distances of their outputs, and the lengths of their next steps."""

    x: Float[Array, "samples ..."]
    y: Float[Array, "samples ..."]
    ratio: Float[Array, " samples"]
    slope_x: Float[Array, "samples ..."]
    slope_y: Float[Array, "samples ..."]
    length: Float[Array, " samples"]


@functools.partial(program, static_argnums=0)
def _climbed(f, params, x, y, limits, num_steps):
    x, y = checked_batches(f, params, x, y)
    limits = [limit.astype(x.dtype) for limit in limits]

    def distances(x, y):
        found = norms_of_samples(jnp.subtract(*jnp.split(rows(f, params, jnp.concatenate([x, y])), 2)))
        return jnp.sum(found), found

    def step(i, best: _Pairs) -> _Pairs:
        x, y = (jnp.clip(point, *limits) for point in _trial(best))
        (_, found), (slope_x, slope_y) = jax.value_and_grad(distances, (0, 1), has_aux=True)(x, y)
        found = ratio(found, norms_of_samples(x - y))
        # The first trial is the given pair itself.
        better = (found > best.ratio) | (i == 0)
        length = jnp.where(i == 0, 1, jnp.where(better, jnp.minimum(2 * best.length, 1), best.length / 2))
        trial = _Pairs(x, y, found, slope_x, slope_y, length)
        chosen = jax.tree.map(lambda new, old: jnp.where(_like(better, new), new, old), trial, best)
        return chosen._replace(length=length)

    none = jnp.zeros(len(x), x.dtype)
    start = _Pairs(x, y, none, jnp.zeros_like(x), jnp.zeros_like(y), none)
    best = lax.fori_loop(0, num_steps + 1, step, start)
    return best.x, best.y


def _trial(pairs: _Pairs):
    """The points after one step of the pairs' lengths along their gradients, at the same distance."""
    centre, half = (pairs.x + pairs.y) / 2, (pairs.x - pairs.y) / 2
    along, across = pairs.slope_x - pairs.slope_y, pairs.slope_x + pairs.slope_y
    radius, steepness = norms_of_samples(half), norms_of_samples(along)
    length = jnp.where(steepness == 0, 0, pairs.length)
    turned = _scaled(half, (1 - length) * ratio(1.0, radius)) + _scaled(along, length * ratio(1.0, steepness))
    half = jnp.where(_like(length == 0, half), half, _scaled(turned, ratio(radius, norms_of_samples(turned))))
    # A linear map has no slope across, and its pairs stay where they are.
    largest = jnp.maximum(steepness, norms_of_samples(across))
    centre = centre + _scaled(across, ratio(pairs.length * radius, largest))
    return centre + half, centre - half


def _like(samples: Shaped[Array, " samples"], points: Float[Array, "samples ..."]):
    """Numbers of samples, with axes of length 1 that let them act on points."""
    return samples.reshape((-1,) + (1,) * (points.ndim - 1))


def _scaled(points: Float[Array, "samples ..."], factors: Float[Array, " samples"]):
    return points * _like(factors, points)
