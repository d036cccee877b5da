"""The unit sphere against closed forms, defining identities, and numpy."""

from fractions import Fraction

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian

from jaxsrn import sphere
from jaxsrn.optim import sphere_sgd

EPS = np.finfo(np.float64).eps
# Every function, and how many arrays it takes; all but the distance return a vector.
FUNCTIONS = {
    "tangent": (sphere.tangent, 2),
    "retract": (sphere.retract, 2),
    "exp": (sphere.exp, 2),
    "log": (sphere.log, 2),
    "transport": (sphere.transport, 3),
    "distance": (sphere.distance, 2),
}
# What needs no derivatives is compiled with little optimisation, as it takes a third of the time.
QUICK = {name: jax.jit(function, static_argnames="axis") for name, (function, _) in FUNCTIONS.items()}
tangent, retract, exp, log, transport, distance = QUICK.values()
# From coincident to opposite; both sides of where the power series end, and of the quarter circle.
ANGLES = (1e-9, 1e-6, 1e-3, 0.1, 0.21, 0.23, 0.6, 0.99, 1.01, np.pi / 2 - 1e-9, np.pi / 2 + 1e-9, 2, 2.9, np.pi - 1e-6)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def assert_close(actual, expected, *, atol):
    """Within an absolute error, and no relative one on top."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def unit(vector) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def frame(size: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A point, a unit tangent vector, and a tangent vector of no special direction or length."""
    x, u = np.linalg.qr(gaussian((size, 2), seed))[0].T
    v = gaussian((size,), seed + 50)
    return x, u, v - (x @ v) * x


def on_circle(x, u, angle) -> np.ndarray:
    """The point at this angle from `x` on the great circle towards `u`."""
    return np.cos(angle) * x + np.sin(angle) * u


def arguments(name: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A generic point, a second one or a tangent vector, and for the transport also a tangent vector."""
    x, u, v = frame(seed=seed)
    y = on_circle(x, u, 1.3)
    return {"log": (x, y), "distance": (x, y), "transport": (x, y, v)}.get(name, (x, v))


# Closed forms


def test_the_plane():
    """Everything on the circle is an angle."""
    a, b = 0.7, 2.9
    x, y = np.asarray([np.cos(a), np.sin(a)]), np.asarray([np.cos(b), np.sin(b)])
    along_x, along_y = np.asarray([-np.sin(a), np.cos(a)]), np.asarray([-np.sin(b), np.cos(b)])
    assert_close(exp(x, (b - a) * along_x), y, atol=4 * EPS)
    assert_close(log(x, y), (b - a) * along_x, atol=8 * EPS)
    assert_close(log(y, x), (a - b) * along_y, atol=8 * EPS)
    np.testing.assert_allclose(distance(x, y), b - a, rtol=4 * EPS)
    assert_close(transport(x, y, -3 * along_x), -3 * along_y, atol=8 * EPS)
    assert_close(tangent(x, 5 * x - 3 * along_x), -3 * along_x, atol=8 * EPS)
    reached = a + np.arctan(0.4)
    assert_close(retract(x, 0.4 * along_x), [np.cos(reached), np.sin(reached)], atol=4 * EPS)


def test_tangent_and_retraction_are_literal():
    x, v = frame()[0], gaussian((4,), 9)
    assert_close(tangent(x, v), v - np.dot(v, x) * x, atol=4 * EPS)
    assert abs(np.dot(tangent(x, v), x)) < 4 * EPS
    assert_close(retract(x, v), (x + v) / np.linalg.norm(x + v), atol=4 * EPS)


def test_whole_turns():
    x, u, _ = frame()
    for turns in (1, 7, 1000):
        assert_close(exp(x, 2 * np.pi * turns * u), x, atol=20 * turns * EPS)
        assert_close(exp(x, np.pi * (2 * turns + 1) * u), -x, atol=20 * turns * EPS)


@pytest.mark.parametrize("size", [2, 4, 40])
@pytest.mark.parametrize("angle", ANGLES)
def test_exponential_and_logarithm_are_inverse(angle, size):
    x, u, _ = frame(size)
    y = on_circle(x, u, angle)
    leading = log(x, y)
    assert_close(exp(x, leading), y, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(leading), angle, rtol=1e-12, atol=1e-14)
    assert abs(np.dot(leading, x)) < 1e-14
    assert_close(exp(x, angle * u), y, atol=1e-14)
    # The direction is as uncertain as the points' own rounding makes it.
    assert_close(leading, angle * u, atol=1e-14 / np.sin(angle) * angle)


def exact_direction(x, y) -> np.ndarray:
    """The direction of `y - <x, y> x / <x, x>`, in rational arithmetic."""
    x, y = ([Fraction(float(entry)) for entry in point] for point in (x, y))
    share = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    return unit(np.asarray([float(b - share * a) for a, b in zip(x, y, strict=True)]))


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, np.pi - 1e-6, np.pi - 1e-9, np.pi - 1e-12])
def test_logarithm_keeps_the_digits_of_close_and_of_opposite_points(angle):
    x, u, _ = frame()
    y = on_circle(x, u, angle)
    leading = np.asarray(log(x, y))
    assert_close(unit(leading), exact_direction(x, y), atol=8 * EPS)
    assert abs(leading @ x) < 4 * EPS * np.linalg.norm(leading)


@pytest.mark.parametrize("angle", [0.0, 1e-15, 1e-12, *ANGLES, np.pi - 1e-9, np.pi - 1e-12, np.pi - 1e-15, np.pi])
def test_distance_is_accurate_at_every_angle(angle):
    # Points whose coordinates carry the angle to all its digits.
    x = np.asarray([0.0, 1.0, 0.0])
    y = np.asarray([np.sin(angle), np.cos(angle), 0.0])
    np.testing.assert_allclose(distance(x, y), angle, rtol=4 * EPS)
    x, u, _ = frame(40)
    np.testing.assert_allclose(distance(x, on_circle(x, u, angle)), angle, rtol=4 * EPS, atol=4 * EPS)


def test_distances_below_the_root_of_the_smallest_number():
    x = np.asarray([1.0, 0.0], np.float32)
    y = np.asarray([1.0, 1e-30], np.float32)
    np.testing.assert_allclose(distance(x, y), 1e-30, rtol=1e-6)


def test_distance_is_a_metric():
    points = np.asarray([unit(gaussian((4,), seed)) for seed in range(5)])
    table = np.asarray([distance(np.broadcast_to(point, points.shape), points) for point in points])
    np.testing.assert_array_equal(table, table.T)
    np.testing.assert_array_equal(np.diag(table), 0)
    assert np.all(table[:, :, None] <= table[:, None, :] + table.T[None] + 1e-14)
    assert_close(np.cos(table), points @ points.T, atol=1e-14)


# Transport


def integrated(x, u, angle, v, steps: int = 400) -> np.ndarray:
    """The parallel field along the geodesic, `v' = -<v, c'> c`, by Runge-Kutta of order four."""

    def rate(t, v):
        return -(v @ (np.cos(t) * u - np.sin(t) * x)) * on_circle(x, u, t)

    step = angle / steps
    for t in np.arange(steps) * step:
        a = rate(t, v)
        b = rate(t + step / 2, v + step / 2 * a)
        c = rate(t + step / 2, v + step / 2 * b)
        v = v + step / 6 * (a + 2 * b + 2 * c + rate(t + step, v + step * c))
    return v


@pytest.mark.parametrize("angle", [1e-9, 0.1, 1.0, 2.0, 3.0, np.pi - 1e-3])
def test_transport_solves_its_differential_equation(angle):
    x, u, v = frame()
    np.testing.assert_allclose(
        transport(x, on_circle(x, u, angle), v), integrated(x, u, angle, v), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("size", [2, 4, 40])
@pytest.mark.parametrize("angle", [0.0, *ANGLES, np.pi - 1e-9, np.pi - 1e-15])
def test_transport_is_an_isometry_to_the_tangent_space(angle, size):
    x, u, v = frame(size)
    y = on_circle(x, u, angle)
    other = tangent(x, gaussian((size,), 7))
    carried, carried_other = transport(x, y, v), transport(x, y, other)
    scale = np.linalg.norm(v) * np.linalg.norm(other)
    np.testing.assert_allclose(np.linalg.norm(carried), np.linalg.norm(v), rtol=16 * EPS)
    assert_close(carried @ carried_other, v @ other, atol=16 * EPS * scale)
    assert abs(carried @ y) < 16 * EPS * np.linalg.norm(v)
    assert_close(transport(y, x, carried), v, atol=32 * EPS * np.linalg.norm(v))


@pytest.mark.parametrize("angle", [0.0, *ANGLES[:-1]])
def test_transport_by_the_textbook(angle):
    x, u, v = frame()
    y = on_circle(x, u, angle)
    expected = v - (y @ v) / (1 + x @ y) * (x + y)
    assert_close(transport(x, y, v), expected, atol=4 * EPS * np.linalg.norm(v) / (1 + np.cos(angle)))


def test_transport_turns_the_direction_of_the_geodesic():
    x, u, _ = frame()
    y = on_circle(x, u, 2.0)
    assert_close(transport(x, y, log(x, y)), -log(y, x), atol=16 * EPS)


def test_transport_around_an_octant_turns_by_its_area():
    a, b, c = np.eye(4)[:3]
    v = transport(a, b, c)
    v = transport(b, c, v)
    v = transport(c, a, v)
    # The area is pi / 2: a quarter turn, from c to -b seen along a -> b -> c.
    assert_close(v, -b, atol=8 * EPS)


# The antipode


@pytest.mark.parametrize("shift", [0.0, 1e-16])
def test_antipode(shift):
    x, u, v = frame()
    y = -x + shift * u
    leading = np.asarray(log(x, y))
    np.testing.assert_allclose(np.linalg.norm(leading), np.pi, rtol=4 * EPS)
    assert abs(leading @ x) < 16 * EPS
    assert_close(exp(x, leading), y, atol=16 * EPS)
    # The basis vector of the smallest entry, as documented.
    basis = np.eye(4)[np.argmin(np.abs(x))]
    assert_close(leading, np.pi * unit(basis - (x @ basis) * x), atol=16 * EPS)
    np.testing.assert_allclose(distance(x, y), np.pi, rtol=4 * EPS)
    carried = transport(x, y, v)
    direction = leading / np.pi
    assert_close(carried, v - 2 * (direction @ v) * direction, atol=32 * EPS)
    assert abs(np.dot(carried, y)) < 32 * EPS


def test_antipode_breaks_ties_by_the_first():
    x = np.asarray([[0.0, 0.0, 1.0], [0.0, 0.6, -0.8]])
    expected = np.pi * np.asarray([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert_close(log(x, -x), expected, atol=8 * EPS)
    assert_close(log(x.T, -x.T, axis=0), expected.T, atol=8 * EPS)


def test_antipode_of_a_kernel():
    x = unit(gaussian((3, 2, 2)))
    leading = log(x, -x, axis=None)
    assert_close(np.ravel(leading), log(x.ravel(), -x.ravel()), atol=8 * EPS)


# Derivatives


def both_jacobians(function, arrays):
    """All first derivatives, forward and reverse."""
    indices = tuple(range(len(arrays)))
    return jax.jacfwd(function, indices)(*arrays), jax.jacrev(function, indices)(*arrays)


jacobians = jax.jit(both_jacobians, static_argnums=0)


def hessians(function, *arrays):
    """The second derivatives in the second argument, by both modes over both."""
    modes = (jax.jacfwd, jax.jacrev)
    return jax.jit(lambda *a: [outer(inner(function, 1), 1)(*a) for outer in modes for inner in modes])(*arrays)


@every_function
def test_derivatives_by_finite_differences(name):
    function, _ = FUNCTIONS[name]
    for seed in (0, 1):
        arrays = arguments(name, seed)
        forward, reverse = jacobians(function, arrays)
        for i, array in enumerate(arrays):
            assert_close(forward[i], reverse[i], atol=1e-13)
            direction = gaussian((4,), 3 + seed)
            expected = cases.derivative(
                lambda a, i=i, arrays=arrays: QUICK[name](*arrays[:i], a, *arrays[i + 1 :]), array, direction
            )
            assert_close(forward[i] @ direction, expected, atol=1e-8)
            # No test of zeros against zeros.
            assert np.linalg.norm(expected) > 1e-2


@pytest.mark.parametrize("function", [sphere.exp, sphere.log, sphere.distance])
def test_second_derivatives_by_finite_differences(function):
    """Also next to where the power series hand over."""
    x, u, w = frame()
    gradient = jax.jit(jax.jacrev(function, 1))
    hessian = jax.jit(jax.jacfwd(jax.jacrev(function, 1), 1))
    for angle in (0.1, 0.2199, 0.2232, 0.9999, 1.0001, 2.5, 4.0):
        second = angle * u if function is sphere.exp else on_circle(x, u, angle)
        expected = cases.derivative(lambda a: gradient(x, a), second, w)
        assert_close(hessian(x, second) @ w, expected, atol=1e-7)
        assert np.linalg.norm(expected) > 1e-2


def test_exponential_at_zero():
    x, zero = frame()[0], np.zeros(4)
    for jacobian in jacobians(sphere.exp, (x, zero)):
        assert_close(jacobian[0], np.eye(4), atol=EPS)
        assert_close(jacobian[1], np.eye(4), atol=EPS)
    for hessian in hessians(sphere.exp, x, zero):
        assert_close(hessian, -x[:, None, None] * np.eye(4), atol=4 * EPS)


def test_logarithm_at_its_own_point():
    x = frame()[0]
    projection = np.eye(4) - np.outer(x, x)
    np.testing.assert_array_equal(log(x, x), 0)
    for jacobian in jacobians(sphere.log, (x, x)):
        assert_close(jacobian[0], -projection, atol=4 * EPS)
        assert_close(jacobian[1], projection, atol=4 * EPS)
    # The angle does not depend on |y|, hence 1 / <x, y> in front of the projection.
    expected = -np.einsum("ij,k->ijk", projection, x)
    expected += expected.transpose(0, 2, 1)
    for hessian in hessians(sphere.log, x, x):
        assert_close(hessian, expected, atol=8 * EPS)


def curve_derivatives(curve):
    """A curve's value and two derivatives at 0."""
    return jax.jit(lambda t: (curve(t), jax.jacfwd(curve)(t), jax.jacfwd(jax.jacfwd(curve))(t)))(0.0)


def test_second_order_along_geodesics():
    x, u, v = map(jnp.asarray, frame())

    def geodesic(t):
        return sphere.exp(x, t * u)

    # log(x, c(t)) = t u and log(c(t), x) = -t c'(t).
    for value, expected in zip(curve_derivatives(lambda t: sphere.log(x, geodesic(t))), (0 * x, u, 0 * x), strict=True):
        assert_close(value, expected, atol=16 * EPS)
    for value, expected in zip(
        curve_derivatives(lambda t: sphere.log(geodesic(t), x)), (0 * x, -u, 2 * x), strict=True
    ):
        assert_close(value, expected, atol=16 * EPS)
    # The part along u turns with c'(t), the rest stays.
    along = jnp.dot(u, v)
    for value, expected in zip(
        curve_derivatives(lambda t: sphere.transport(x, geodesic(t), v)), (v, -along * x, -along * u), strict=True
    ):
        assert_close(value, expected, atol=16 * EPS)
    # The retraction agrees with the geodesic to second order.
    for value, expected in zip(
        curve_derivatives(lambda t: sphere.retract(x, t * u)), curve_derivatives(geodesic), strict=True
    ):
        assert_close(value, expected, atol=16 * EPS)


def test_gradient_of_half_the_squared_distance_is_minus_the_logarithm():
    gradient = jax.jit(jax.grad(lambda x, y: sphere.distance(x, y) ** 2 / 2))
    for angle in (0.1, 1.5, 3.0):
        x, u, _ = frame()
        y = on_circle(x, u, angle)
        assert_close(tangent(x, gradient(x, y)), -log(x, y), atol=1e-13)


@pytest.mark.parametrize("sign", [1, -1])
def test_distance_has_derivative_zero_at_its_kinks(sign):
    x = frame()[0]
    for jacobian in jacobians(sphere.distance, (x, sign * x)):
        np.testing.assert_array_equal(jacobian[0], 0)
        np.testing.assert_array_equal(jacobian[1], 0)


def special_vectors(size: int, dtype) -> np.ndarray:
    """Vectors at which some formula is 0/0, and neighbours of them."""
    x = unit(gaussian((size,)))
    other = unit(gaussian((size,), 1))
    tiny, eps = float(np.finfo(dtype).tiny), float(np.finfo(dtype).eps)
    vectors = [0 * x, x, -x, other, tiny * other, x + eps * other, -x + eps * other, -x * (1 + 2 * eps)]
    vectors += [-x + np.sqrt(eps) * other, np.pi * other, np.eye(size)[0], -np.eye(size)[0]]
    return np.asarray(vectors, dtype)


@every_function
@pytest.mark.parametrize(("size", "dtype"), [(1, np.float64), (4, np.float32)])
def test_finite_everywhere(name, dtype, size):
    function, count = FUNCTIONS[name]
    vectors = special_vectors(size, dtype)
    first, second = (a.ravel() for a in np.meshgrid(*[np.arange(len(vectors))] * 2))
    arrays = (vectors[first], vectors[second], vectors[(first + second) % len(vectors)])[:count]

    @jax.jit
    @jax.vmap
    def all_of(*arrays):
        return function(*arrays), both_jacobians(function, arrays)

    for leaf in jax.tree.leaves(all_of(*arrays)):
        assert leaf.dtype == dtype
        assert np.all(np.isfinite(leaf))


def test_huge_and_tiny_steps():
    for dtype, huge in ((np.float32, 1e30), (np.float64, 1e200)):
        x, u, _ = (a.astype(dtype) for a in frame())
        tolerance = 8 * np.finfo(dtype).eps
        assert_close(retract(x, dtype(huge) * u), u, atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(exp(x, dtype(huge) * u)), 1, rtol=tolerance)
        np.testing.assert_array_equal(exp(x, u / dtype(huge)), x)
        assert_close(retract(0 * x, u / dtype(huge)), u, atol=tolerance)


def test_nan_in_nan_out():
    x, u, v = frame()
    bad = u.copy()
    bad[1] = np.nan
    for name, (_, count) in FUNCTIONS.items():
        for i in range(count):
            arrays = [x, on_circle(x, u, 1.0), v][:count]
            arrays[i] = bad
            result = np.isnan(QUICK[name](*arrays))
            # Linear in x without a scalar product: no other entry is touched.
            expected = [False, True, False, False] if (name, i) == ("exp", 0) else True
            np.testing.assert_array_equal(result, expected, err_msg=f"{name} {i}")


# Vectors without a direction


def test_zero_vectors():
    x, u, v = frame()
    zero = np.zeros(4)
    y = on_circle(x, u, 1.0)
    np.testing.assert_array_equal(tangent(zero, v), v)
    np.testing.assert_array_equal(retract(x, -x), x)
    np.testing.assert_array_equal(retract(zero, zero), 0)
    assert_close(retract(zero, v), unit(v), atol=2 * EPS)
    np.testing.assert_array_equal(exp(x, zero), x)
    assert_close(exp(zero, u), np.sin(1) * u, atol=2 * EPS)
    assert_close(log(zero, y), np.pi / 2 * y, atol=4 * EPS)
    np.testing.assert_array_equal(log(x, zero), 0)
    np.testing.assert_array_equal(log(zero, zero), 0)
    assert_close(transport(zero, y, v), v - (y @ v) * y, atol=4 * EPS)
    assert_close(transport(x, zero, v), v, atol=4 * EPS)
    assert distance(zero, zero) == 0
    np.testing.assert_allclose(distance(zero, x), np.pi / 2, rtol=2 * EPS)


def test_sphere_of_two_points():
    one, zero = np.ones(1), np.zeros(1)
    np.testing.assert_array_equal(log(one, -one), 0)
    np.testing.assert_array_equal(log(one, one), 0)
    # Also where rounding makes it less than a unit vector.
    np.testing.assert_array_equal(log((1 - EPS) * one, -one), 0)
    np.testing.assert_array_equal(tangent(one, 3 * one), 0)
    np.testing.assert_array_equal(exp(-one, zero), -one)
    np.testing.assert_array_equal(retract(one, -3 * one), -one)
    np.testing.assert_array_equal(transport(one, -one, zero), 0)
    np.testing.assert_allclose(distance(one, -one), np.pi, rtol=EPS)
    np.testing.assert_allclose(np.abs(sphere.random(jax.random.key(0), (9, 1))), 1, rtol=EPS)
    np.testing.assert_array_equal(retract(np.asarray(2.0), np.asarray(-5.0), axis=None), -1)


# Batches, axes, transformations, dtypes


def batch(name: str, rows: int = 5) -> list[np.ndarray]:
    """The arguments of several calls, stacked; the last two are special."""
    stacked = [np.stack(arrays) for arrays in zip(*(arguments(name, seed) for seed in range(rows)), strict=True)]
    stacked[1][-1] = stacked[0][-1]
    stacked[1][-2] = -stacked[0][-2]
    return stacked


@every_function
def test_batches_equal_single_points(name):
    function = QUICK[name]
    arrays = batch(name)
    single = np.stack([function(*(array[i] for array in arrays)) for i in range(5)])
    assert_close(function(*arrays), single, atol=8 * EPS)
    assert_close(jax.jit(jax.vmap(FUNCTIONS[name][0]))(*arrays), single, atol=8 * EPS)
    first = function(*(np.moveaxis(array, -1, 0) for array in arrays), axis=0)
    assert_close(first, single.T, atol=8 * EPS)
    # Points of shape (2, 2) along the outer axes of (2, 5, 2).
    split = [np.moveaxis(array.reshape((5, 2, 2)), 0, 1) for array in arrays]
    result = np.asarray(function(*split, axis=(0, -1)))
    result = result if name == "distance" else np.moveaxis(result, 1, 0).reshape((5, 4))
    assert_close(result, single, atol=8 * EPS)


@every_function
def test_axis_none_is_the_flattened_array(name):
    count = FUNCTIONS[name][1]
    shape = (3, 3, 2, 4)
    x, y, v = (unit(gaussian(shape, seed)) for seed in (0, 1, 2))
    v = v - np.sum(x * v) * x
    arrays = {"log": (x, y), "distance": (x, y), "transport": (x, y, v)}.get(name, (x, v))
    result = QUICK[name](*arrays, axis=None)
    assert result.shape == (() if name == "distance" else shape)
    assert_close(np.ravel(result), np.ravel(QUICK[name](*map(np.ravel, arrays))), atol=8 * EPS)
    assert len(arrays) == count


@every_function
def test_the_same_eager_and_jitted(name):
    function, _ = FUNCTIONS[name]
    arrays = tuple(map(jnp.asarray, batch(name)))
    eager = function(*arrays)
    assert_close(jax.jit(function)(*arrays), eager, atol=8 * EPS)
    with jax.disable_jit():
        assert_close(function(*arrays), eager, atol=8 * EPS)


@every_function
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(name, dtype):
    """Narrow arrays are computed in float32, which the result shows to its last digit."""
    function, _ = FUNCTIONS[name]
    narrow = tuple(jnp.asarray(array).astype(dtype) for array in batch(name))
    wide = function(*(array.astype(jnp.float32) for array in narrow))
    result = function(*narrow)
    assert wide.dtype == jnp.float32
    assert result.dtype == (jnp.float32 if name == "distance" else dtype)
    np.testing.assert_array_equal(result, wide.astype(result.dtype))


@every_function
def test_empty_batches(name):
    count = FUNCTIONS[name][1]
    result = QUICK[name](*[jnp.zeros((0, 3))] * count)
    assert result.shape == ((0,) if name == "distance" else (0, 3))


# Random points


def test_random_points_are_uniform():
    samples, size = 20_000, 3
    points = np.asarray(sphere.random(jax.random.key(0), (samples, size)))
    assert points.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 1, rtol=4 * EPS)
    assert_close(np.mean(points, axis=0), 0, atol=4 / np.sqrt(size * samples))
    # The variance of x_k^2 is 2 (n - 1) / (n^2 (n + 2)).
    spread = np.sqrt(2 * (size - 1) / (size**2 * (size + 2)) / samples)
    assert_close(points.T @ points / samples, np.eye(size) / size, atol=4 * spread)
    # Archimedes: each coordinate, in any direction, is uniform on [-1, 1] (Kolmogorov and Smirnov at 1 in 10^4).
    for direction in (np.eye(3)[0], unit(np.ones(3))):
        heights = np.sort(points @ direction)
        assert np.max(np.abs(heights - np.linspace(-1, 1, samples))) / 2 < 2.23 / np.sqrt(samples)


def test_random_axes_shapes_and_dtypes():
    @jax.jit
    def draw(key, other):
        kernel = sphere.random(key, (3, 2, 4), axis=None, dtype=jnp.float32)
        half = sphere.random(key, (50,), dtype=jnp.bfloat16)
        return kernel, half, sphere.random(key, 3), sphere.random(key, (4, 5), axis=0), sphere.random(other, 3)

    kernel, half, vector, columns, other = draw(jax.random.key(1), jax.random.key(2))
    assert (kernel.dtype, half.dtype, vector.dtype) == (jnp.float32, jnp.bfloat16, jnp.float64)
    np.testing.assert_allclose(np.linalg.norm(np.ravel(kernel)), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(half.astype(np.float32)), 1, rtol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(columns, axis=0), 1, rtol=4 * EPS)
    assert_close(sphere.random(jax.random.key(1), 3), vector, atol=4 * EPS)
    assert vector.shape == (3,)
    assert np.linalg.norm(vector - other) > 1e-3
    with jax.enable_x64(False):
        assert sphere.random(jax.random.key(0), 3).dtype == jnp.float32


# Bad input


@every_function
def test_bad_arrays(name):
    function, count = FUNCTIONS[name]
    fine = [jnp.ones((2, 3))] * (count - 1)
    with pytest.raises(ValueError, match=r"got shapes .*\(2, 3\).*\(3,\), expected equal ones"):
        function(*fine, jnp.ones(3))
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(ValueError, match=r"got dtype (int32|complex64), expected a real floating-point"):
            function(*fine, jnp.ones((2, 3), dtype))


def test_an_injected_axis_says_what_helps():
    optimizer = optax.inject_hyperparams(sphere_sgd)(0.1, momentum=0.9, axis=-1)
    with pytest.raises(ValueError, match=r"axis: got .* with optax.inject_hyperparams name 'axis' in static_args"):
        optimizer.init(jnp.ones((2, 3)))
    optax.inject_hyperparams(sphere_sgd, static_args=("axis",))(0.1, momentum=0.9, axis=-1).init(jnp.ones((2, 3)))


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, -2), (0, 2), 1.5, "0"], ids=repr)
def test_bad_axes(axis):
    x = jnp.ones((2, 3))
    for function, count in FUNCTIONS.values():
        with pytest.raises(ValueError, match=r"axis: got .* for shape \(2, 3\), expected distinct axes"):
            function(*[x] * count, axis=axis)
    with pytest.raises(ValueError, match=r"axis: got .* for shape \(2, 3\), expected distinct axes"):
        sphere.random(jax.random.key(0), (2, 3), axis=axis)


def test_a_number_has_no_last_axis():
    with pytest.raises(ValueError, match=r"axis: got -1 for shape \(\)"):
        sphere.tangent(jnp.ones(()), jnp.ones(()))


def test_random_points_are_floating():
    with pytest.raises(ValueError, match="dtype: got dtype int32"):
        sphere.random(jax.random.key(0), (3,), dtype=jnp.int32)
