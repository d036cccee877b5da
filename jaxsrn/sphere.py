"""The unit sphere: tangent projection, retraction, exponential, logarithm, parallel transport, distance.

A point is the vector along `axis` (default the last): an int, a tuple of ints, or `None` for the whole array; the
other axes are a batch. Points are unit vectors and directions `v` are tangent, `<x, v> = 0`. Each function is jitted,
and finite everywhere, as are its derivatives in both modes. Its docstring says what it returns at zero vectors.
Narrow dtypes are computed in float32 and returned narrow, except distances, which stay in float32 or wider.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxsrn._tools.checks import ensure, float_dtype, if_injected, is_integer, real_floating
from jaxsrn._tools.linalg import moderate, norm_along
from jaxsrn._tools.programs import program

__all__ = [
    "distance",
    "exp",
    "log",
    "random",
    "retract",
    "tangent",
    "transport",
]

# Users pass any real floating array; `_inputs` checks it.
Points = Shaped[Array | np.ndarray, "..."]
# Coefficients of the powers of s = |v|^2 in cos(sqrt(s)) and sin(sqrt(s)) / sqrt(s). Eleven terms make the series and
# two of its derivatives exact to rounding for s <= 1, in float64.
_COS = tuple((-1) ** k / math.factorial(2 * k) for k in range(11))
_SINC = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(11))
# Coefficients of the powers of w = tan^2 in arctan(sqrt(w)) / sqrt(w), exact in the same sense for w <= _NEAR. A larger
# _NEAR would need more terms; near 0 the derivatives of the closed form cancel.
_ARC = tuple((-1) ** k / (2 * k + 1) for k in range(15))
_NEAR = 0.05


# Checks of the arguments


def _point_axes(axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of one point, counted from 0."""
    if axis is None:
        return tuple(range(len(shape)))
    axes = axis if isinstance(axis, tuple) else (axis,)
    valid = all(is_integer(a) and -len(shape) <= a < len(shape) for a in axes)
    counted = {int(a) % len(shape) for a in axes} if valid and shape else set()
    ensure(
        valid and len(counted) == len(axes),
        f"axis: got {axis!r} for shape {shape}, expected distinct axes of the array; "
        f"give an int, a tuple of ints, or None for the whole array as one point{if_injected(axis, 'axis')}.",
    )
    return tuple(sorted(counted))


def _inputs(axis, **arrays):
    """The arrays in the dtype of the computation, the axes of a point, and the dtype of the result."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        real_floating(array.dtype, name, f"stack {name}.real and {name}.imag, a real point")
    shapes = [array.shape for array in arrays.values()]
    ensure(
        len(set(shapes)) == 1,
        f"{', '.join(arrays)}: got shapes {', '.join(map(str, shapes))}, expected equal ones; "
        "use jnp.broadcast_to, or jax.vmap.",
    )
    dtype = jnp.result_type(*arrays.values())
    wide = float_dtype(dtype)
    return *(array.astype(wide) for array in arrays.values()), _point_axes(axis, shapes[0]), dtype


_core = functools.partial(program, static_argnums=2)


# Smooth pieces. Sums keep the axes of a point, with length 1


def _dot(a, b, axes):
    return jnp.sum(a * b, axis=axes, keepdims=True)


def _unit(z, otherwise, axes):
    """`z / |z|`, and `otherwise` where `z` is 0."""
    parts, _, zero = moderate(z, axes)
    return jnp.where(zero, otherwise, parts / jnp.sqrt(_dot(parts, parts, axes)))


def _series(t, coefficients: tuple[float, ...]):
    """The power series at `t`, by Horner's rule."""
    return functools.reduce(lambda total, c: total * t + c, reversed(coefficients), jnp.zeros_like(t))


def _basis_vector(x, axes):
    """The basis vector of the smallest `|x_k|`, the first one where several are equal."""
    index = jnp.zeros(x.shape, jnp.int32)
    for axis in axes:
        index = index * x.shape[axis] + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    size = jnp.abs(x)
    least = size == jnp.min(size, axis=axes, keepdims=True, initial=jnp.inf)
    last = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(least, index, last), axis=axes, keepdims=True, initial=last)
    return (index == first).astype(x.dtype)


def _any_direction(x, axes):
    """A constant unit tangent vector at `x`, the same at `-x`. It is 0 where a point has one entry and no tangent."""
    if math.prod(x.shape[axis] for axis in axes) == 1:
        return jnp.zeros_like(x)
    x = lax.stop_gradient(x)
    return _unit(_tangent(x, _basis_vector(x, axes), axes), jnp.zeros_like(x), axes)


# The functions


def tangent(x: Points, v: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """`v - <x, v> x`: the projection of `v` on the tangent space at `x` (Zheng et al. 2025, eq. 18).

    Args:
      x: points, unit vectors along `axis`. At `x = 0` the result is `v`.
      v: vectors, of the shape of `x`.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, v, axes, dtype = _inputs(axis, x=x, v=v)
    return _tangent(x, v, axes).astype(dtype)


@_core
def _tangent(x, v, axes):
    return v - _dot(x, v, axes) * x


def retract(x: Points, v: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """`(x + v) / |x + v|`: the point reached from `x` by the step `v` (Zheng et al. 2025, eq. 19).

    A retraction of second order for tangent `v`: it deviates from the geodesic by `O(|v|^3)`.

    Args:
      x: points, unit vectors along `axis`.
      v: steps, of the shape of `x`; not necessarily tangent.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.

    Returns:
      Unit vectors, of the shape of `x`; where `x + v = 0`, which has no direction, `x` itself.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, v, axes, dtype = _inputs(axis, x=x, v=v)
    return _retract(x, v, axes).astype(dtype)


@_core
def _retract(x, v, axes):
    return _unit(x + v, x, axes)


def exp(x: Points, v: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """`cos|v| x + sin|v| v / |v|`: where the geodesic from `x` with velocity `v` is after unit time.

    Smooth; its first and second derivatives are exact, also at `v = 0`.

    Args:
      x: points, unit vectors along `axis`. At `x = 0` the first term vanishes.
      v: tangent vectors, of the shape of `x`; their lengths are angles in radians.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.

    Returns:
      Unit vectors, of the shape of `x`.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, v, axes, dtype = _inputs(axis, x=x, v=v)
    return _exp(x, v, axes).astype(dtype)


@_core
def _exp(x, v, axes):
    norm = norm_along(v, axes)
    small = norm < 1
    # Each branch of a `where` sees only its own values, because its derivative may be 0/0 at the others.
    inner = jnp.where(small, v, 0.0)
    square, angle = _dot(inner, inner, axes), jnp.where(small, 1.0, norm)
    cosine = jnp.where(small, _series(square, _COS), jnp.cos(angle))
    sinc = jnp.where(small, _series(square, _SINC), jnp.sin(angle) / angle)
    return cosine * x + sinc * v


def log(x: Points, y: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """The tangent vector at `x` that leads to `y`: `exp(x, log(x, y)) = y`, of length `distance(x, y)`.

    It is `theta / sin(theta) (y - <x, y> x)` with the angle by `atan2`. Its first and second derivatives along the
    sphere are exact, also at `y = x`. At the antipode every direction leads to `y`. There the result is a constant
    (derivative 0): the basis vector of the smallest `|x_k|`, projected and normalized, times pi.

    Args:
      x: points, unit vectors along `axis`. At `x = 0` the result is `pi / 2 y`.
      y: points, of the shape of `x`. At `y = 0` the result is 0.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array. A point of one entry has no
        tangent vectors, and the result is 0 throughout.

    Returns:
      Tangent vectors, of the shape of `x`.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, y, axes, dtype = _inputs(axis, x=x, y=y)
    return _log(x, y, axes).astype(dtype)


@_core
def _log(x, y, axes):
    cosine = _dot(x, y, axes)
    # On the sphere `y`, `y - x` and `y + x` have the same projection. The shortest one keeps all digits of it.
    projected = _tangent(x, jnp.where(cosine < 0, y + x, y - x), axes)
    sine = norm_along(projected, axes)
    # Below this sine the angle is rounding: a few roundings of `projected`.
    rounding = 16 * float(jnp.finfo(x.dtype).eps)
    vague = (sine <= rounding) & (cosine <= rounding)
    antipodal = vague & (cosine < -0.5)
    near = ~vague & (cosine > 0) & (sine**2 < _NEAR * cosine**2)
    inner, divisor = jnp.where(near, projected, 0.0), jnp.where(near, cosine, 1.0)
    series = _series(_dot(inner, inner, axes) / divisor**2, _ARC) / divisor
    height = jnp.where(near | vague, 1.0, sine)
    ratio = jnp.where(near, series, jnp.where(vague, 0.0, jnp.arctan2(height, cosine) / height))
    return jnp.where(antipodal, math.pi * _any_direction(x, axes), ratio * projected)


def transport(x: Points, y: Points, v: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """Parallel transport of the tangent vector `v` from `x` to `y`, along the geodesic that `log(x, y)` starts.

    It is `v - 2 <w, v> w` with the middle `w = (x + y) / |x + y|` of the geodesic. For tangent `v` this equals
    `v - <y, v> / (1 + <x, y>) (x + y)`, and as a reflection it is an isometry to rounding. At the antipode `w` is the
    direction that `log` takes there.

    Args:
      x: points, unit vectors along `axis`.
      y: points, of the shape of `x`. Where `x` or `y` is 0 the result is `v - <y, v> y` or `v - 2 <x, v> x`.
      v: tangent vectors at `x`, of its shape.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.

    Returns:
      Tangent vectors at `y`, of the shape of `x`.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, y, v, axes, dtype = _inputs(axis, x=x, y=y, v=v)
    return _transport(x, y, v, axes).astype(dtype)


@functools.partial(program, static_argnums=3)
def _transport(x, y, v, axes):
    # Half of the geodesic keeps all digits up to the antipode, where `(x + y) / |x + y|` cancels.
    middle = _exp(x, 0.5 * _log(x, y, axes), axes)
    return v - 2 * _dot(middle, v, axes) * middle


def distance(x: Points, y: Points, *, axis: Any = -1) -> Float[Array, "..."]:
    """The angle between points, `2 atan2(|x - y|, |x + y|)`: in radians, accurate from 0 to pi (Kahan).

    Args:
      x: points, unit vectors along `axis`.
      y: points, of the shape of `x`. The distance from 0 to a point is `pi / 2`, and from 0 to 0 it is 0.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.

    Returns:
      An array without the axes of the points, in float32 or wider. The derivative is 0 where `x = y` and at the
      antipode, where the distance has a kink.

    Raises:
      ValueError: different shapes, a dtype that isn't real floating, or a bad axis.
    """
    x, y, axes, _ = _inputs(axis, x=x, y=y)
    return _distance(x, y, axes)


@_core
def _distance(x, y, axes):
    apart, together = norm_along(x - y, axes), norm_along(x + y, axes)
    # Both lengths are 0 only where `x` and `y` are 0.
    together = jnp.where(apart + together < jnp.finfo(x.dtype).eps, 1.0, together)
    return jnp.squeeze(2 * jnp.arctan2(apart, together), axes)


def random(key: PRNGKeyArray, shape, *, axis: Any = -1, dtype=None) -> Float[Array, "..."]:
    """Independent points, uniform on the sphere.

    Args:
      key: a `jax.random` key.
      shape: the shape of the result, with the axes of a point.
      axis: the axes of one point; an int, a tuple, or `None` for the whole array.
      dtype: real floating; default JAX's float (float32, with x64 float64).

    Returns:
      Unit vectors along `axis`.

    Raises:
      ValueError: a dtype that isn't real floating, or a bad axis.
    """
    shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    real_floating(dtype, "dtype", "take a real one")
    return _random(key, shape, _point_axes(axis, shape), float_dtype(dtype)).astype(dtype)


@functools.partial(program, static_argnums=(1, 2, 3))
def _random(key, shape, axes, dtype):
    normal = jax.random.normal(key, shape, dtype)
    # A point of one entry can be drawn as 0.
    return _unit(normal, _basis_vector(normal, axes), axes)
