"""Optimisers on the sphere against hand-written numpy loops, eigenvectors, and optax itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian
from optax import contrib

from jaxsrn import sphere
from jaxsrn.optim import SphereSGDState, on_sphere, sphere_sgd

SHAPES = {"kernel": (3, 3, 2, 2), "vector": (5,)}


def assert_close(actual, expected, *, atol):
    """Within an absolute error, and no relative one on top."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def unit(array) -> np.ndarray:
    return array / np.linalg.norm(array)


def norm(leaf) -> float:
    return np.linalg.norm(np.ravel(np.asarray(leaf, np.float64)))


def points(seed: int = 0, dtype=np.float64) -> dict[str, jax.Array]:
    return {name: jnp.asarray(unit(gaussian(shape, seed)), dtype) for name, shape in SHAPES.items()}


def gradients(seed: int = 1, dtype=np.float64) -> dict[str, jax.Array]:
    return {name: jnp.asarray(gaussian(shape, seed), dtype) for name, shape in SHAPES.items()}


def step(optimizer, params, updates, state=None, **extra_args):
    """The parameters and the state after one step."""
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(updates, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def relaxed(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with JAX's standard promotion, which optax needs; what is around it stays strict."""

    def update(*args, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(inner).update(*args, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def adam(learning_rate=0.1) -> optax.GradientTransformationExtraArgs:
    return on_sphere(relaxed(optax.adam(learning_rate)))


def decaying(count):
    """A schedule."""
    return 0.5 / (1 + jnp.asarray(count, float))


def assert_trees_close(left, right, *, atol=0.0):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(functools.partial(assert_close, atol=atol), left, right)


# (17) to (19), literally


def paper_step(x, d, eta):
    """Zheng et al. 2025, equations (17) to (19), for one vector."""
    tangent = d - np.vdot(d, x) * x
    moved = x - eta * tangent
    return moved / np.linalg.norm(moved)


def test_gradient_descent_by_the_paper():
    params, state = points(), None
    optimizer = sphere_sgd(0.3)
    expected = {name: np.asarray(leaf) for name, leaf in params.items()}
    for seed in range(1, 6):
        params, state = step(optimizer, params, gradients(seed), state)
        expected = {name: paper_step(x, gaussian(x.shape, seed), 0.3) for name, x in expected.items()}
        assert_trees_close(params, expected, atol=1e-14)


def test_schedules():
    params, state = points(), None
    optimizer = sphere_sgd(decaying)
    expected = np.asarray(params["vector"])
    for count in range(4):
        params, state = step(optimizer, params, gradients(count + 1), state)
        expected = paper_step(expected, gaussian((5,), count + 1), decaying(count))
        assert_close(params["vector"], expected, atol=1e-14)


def ball_step(x, m, d, eta, momentum):
    """A heavy ball on the sphere: the velocity is transported by the textbook formula."""
    m = momentum * m + d - np.vdot(d, x) * x
    y = unit(x - eta * m)
    return y, m - np.vdot(y, m) / (1 + np.vdot(x, y)) * (x + y)


@pytest.mark.parametrize("rate", [0.3, decaying], ids=["number", "schedule"])
def test_momentum_by_hand(rate):
    params, state = points(), None
    optimizer = sphere_sgd(rate, momentum=0.9)
    expected = {name: (np.asarray(x), np.zeros(x.shape)) for name, x in params.items()}
    for count in range(6):
        eta = rate(count) if callable(rate) else rate
        params, state = step(optimizer, params, gradients(count + 1), state)
        expected = {name: ball_step(x, m, gaussian(x.shape, count + 1), eta, 0.9) for name, (x, m) in expected.items()}
        assert isinstance(state, SphereSGDState)
        assert state.count == count + 1
        for name, (x, m) in expected.items():
            assert_close(params[name], x, atol=1e-13)
            assert_close(state.momentum[name], m, atol=1e-13 * norm(m))
            assert abs(np.vdot(state.momentum[name], params[name])) < 1e-14 * norm(m)


def test_no_momentum_is_momentum_zero():
    plain, ball = points(), points()
    plain_state = ball_state = None
    for seed in range(4):
        plain, plain_state = step(sphere_sgd(0.2), plain, gradients(seed), plain_state)
        ball, ball_state = step(sphere_sgd(0.2, momentum=0.0), ball, gradients(seed), ball_state)
        assert_trees_close(plain, ball, atol=1e-15)


def test_a_ball_without_forces_runs_along_a_great_circle():
    x, u = np.linalg.qr(gaussian((4, 2)))[0].T
    params, state = {"x": jnp.asarray(x)}, None
    optimizer = sphere_sgd(0.1, momentum=1.0)
    for count in range(50):
        params, state = step(optimizer, params, {"x": jnp.asarray(-u if count == 0 else 0 * u)}, state)
    angle = 50 * np.arctan(0.1)
    assert_close(params["x"], np.cos(angle) * x + np.sin(angle) * u, atol=1e-14)
    assert_close(state.momentum["x"], np.sin(angle) * x - np.cos(angle) * u, atol=1e-14)


# Any inner transformation


def test_by_hand_with_an_inner_transformation():
    """The gradient that the inner one sees is tangent, and what it returns is projected."""
    seen = []

    def update(updates, state, params):
        seen.append((updates, params))
        return jax.tree.map(lambda g: jnp.sign(g) + 0.5, updates), state

    inner = optax.GradientTransformation(lambda params: (), update)
    params = {name: 3 * leaf for name, leaf in points().items()}
    moved, _ = step(on_sphere(inner), params, gradients())
    (tangents, normalized) = seen[0]
    for name, x in points().items():
        d = gradients()[name]
        tangent = d - np.vdot(d, x) * x
        assert_close(tangents[name], tangent, atol=1e-14)
        assert_close(normalized[name], x, atol=1e-15)
        u = np.sign(tangent) + 0.5
        assert_close(moved[name], unit(x + u - np.vdot(u, x) * x), atol=1e-14)


INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.8, nesterov=True),
    "adam": lambda: optax.adam(optax.exponential_decay(0.05, 100, 0.5)),
    "rmsprop": lambda: optax.rmsprop(0.01),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(optax.cosine_decay_schedule(0.2, 500))
    ),
}


@pytest.mark.parametrize("name", [*INNER, "transported"])
def test_leading_eigenvector(name):
    """Minimising -x^T B x on the sphere, against numpy."""
    basis = np.linalg.qr(gaussian((6, 6), 4))[0]
    matrix = basis * np.asarray([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]) @ basis.T
    values, vectors = np.linalg.eigh(matrix)
    optimizer = sphere_sgd(0.02, momentum=0.8) if name == "transported" else on_sphere(relaxed(INNER[name]()))

    def one_step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(lambda x: -x @ jnp.asarray(matrix) @ x)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.asarray(unit(gaussian((6,), 5)))
    (x, _), _ = jax.jit(lambda x: jax.lax.scan(one_step, (x, optimizer.init(x)), None, 1500))(start)
    # RMSProp steps by the sign of the gradient: it circles at the distance of its learning rate.
    tolerance = 0.05 if name == "rmsprop" else 1e-6
    assert sphere.distance(x, jnp.asarray(np.sign(x @ vectors[:, -1]) * vectors[:, -1])) < tolerance
    assert sphere.distance(x, start) > 0.1
    np.testing.assert_allclose(x @ matrix @ x, values[-1], rtol=tolerance)


def test_extra_arguments_reach_the_inner_transformation():
    params = points()
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=1e-6)
    optimizer = on_sphere(relaxed(optax.chain(optax.sgd(0.1), plateau)))
    state = optimizer.init(params)
    scales = []
    for _ in range(5):
        params, state = step(optimizer, params, gradients(), state, value=jnp.asarray(1.0, jnp.float32))
        scales.append(float(state[1].scale))
    assert scales[0] == 1.0
    assert scales[-1] <= 0.5
    # Transformations that know no extra arguments are not bothered with them.
    for plain in (sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.5)):
        step(plain, params, gradients(), value=1.0)


def test_hyperparameters_may_be_injected():
    optimizer = optax.inject_hyperparams(sphere_sgd)(learning_rate=0.1, momentum=0.5)
    params = points()
    state = jax.jit(optimizer.init)(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.3)
    moved, state = jax.jit(functools.partial(step, optimizer))(params, gradients(), state)
    expected = {name: paper_step(np.asarray(x), np.asarray(gradients()[name]), 0.3) for name, x in params.items()}
    assert_trees_close(moved, expected, atol=1e-14)


def test_a_momentum_may_be_traced():
    params, gradient = points(), gradients()
    traced = jax.jit(lambda momentum: step(sphere_sgd(0.1, momentum=momentum), params, gradient)[0])
    expected, _ = step(sphere_sgd(0.1, momentum=0.5), params, gradient)
    assert_trees_close(traced(0.5), expected, atol=1e-14)


# Trees


def test_every_leaf_is_one_point():
    both, _ = step(adam(), points(), gradients())
    for name in SHAPES:
        alone, _ = step(adam(), {name: points()[name]}, {name: gradients()[name]})
        assert_close(both[name], alone[name], atol=1e-15)
        np.testing.assert_allclose(norm(both[name]), 1, rtol=1e-15)
    flat, _ = step(sphere_sgd(0.1, momentum=0.5), points()["kernel"].ravel(), gradients()["kernel"].ravel())
    kernel, _ = step(sphere_sgd(0.1, momentum=0.5), points()["kernel"], gradients()["kernel"])
    assert_close(kernel.ravel(), flat, atol=1e-15)


@pytest.mark.parametrize("constrained", [on_sphere(optax.sgd(0.1)), sphere_sgd(0.1, momentum=0.9)], ids=["on", "ball"])
@pytest.mark.parametrize("way", ["masked", "partition", "multi_transform"])
def test_some_leaves_on_the_sphere(constrained, way):
    params = {**points(), "scale": jnp.asarray([3.0, -2.0]), "count": jnp.asarray([1, 2])}
    updates = {**gradients(), "scale": jnp.asarray([0.5, 0.25]), "count": jnp.asarray([0, 1])}
    if way == "masked":
        optimizer = optax.masked(constrained, {"kernel": True, "vector": True, "scale": False, "count": False})
        expected_scale = params["scale"] + updates["scale"]
    else:
        labels = {"kernel": "on", "vector": "on", "scale": "off", "count": "keep"}
        parts = {"on": constrained, "off": optax.sgd(0.5), "keep": optax.set_to_zero()}
        optimizer = getattr(optax, way)(parts, labels)
        expected_scale = params["scale"] - 0.5 * updates["scale"]
    moved, state = step(optimizer, params, updates)
    np.testing.assert_array_equal(moved["scale"], expected_scale)
    np.testing.assert_array_equal(moved["count"], [1, 3] if way == "masked" else [1, 2])
    for name, x in points().items():
        assert_close(moved[name], paper_step(np.asarray(x), np.asarray(updates[name]), 0.1), atol=1e-14)
    again, _ = step(optimizer, moved, updates, state)
    for name in SHAPES:
        assert norm(again[name] - moved[name]) > 1e-3
        np.testing.assert_allclose(norm(again[name]), 1, rtol=1e-15)


@pytest.mark.parametrize(
    "optimizer",
    [sphere_sgd(0.1), adam(), on_sphere(optax.sgd(0.1, momentum=0.5)), sphere_sgd(0.1, 0.5)],
    ids=["sgd", "adam", "ambient", "transported"],
)
def test_missing_leaves(optimizer):
    """`None` in place of a parameter; optax also takes it in place of a single update, and so do these."""
    params, updates = {**points(), "none": None}, {**gradients(), "none": None}
    moved, state = step(optimizer, params, updates)
    assert moved["none"] is None
    alone, _ = step(optimizer, points(), gradients())
    assert_trees_close({name: moved[name] for name in SHAPES}, alone, atol=1e-15)
    moved, after = step(optimizer, moved, updates, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_velocity_waits_for_its_update():
    optimizer = sphere_sgd(0.1, momentum=0.5)
    params, state = step(optimizer, points(), gradients())
    updates, after = optimizer.update({**gradients(), "vector": None}, state, params)
    assert updates["vector"] is None
    assert norm(updates["kernel"]) > 1e-3
    np.testing.assert_array_equal(after.momentum["vector"], state.momentum["vector"])
    updates, _ = on_sphere(optax.scale(-0.1)).update({**gradients(), "vector": None}, optax.ScaleState(), params)
    assert updates["vector"] is None


def test_numbers_and_numpy_arrays():
    """A parameter of one entry is a point of {-1, 1}: it has no direction to go."""
    for optimizer in (sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.5)):
        params = {"sign": jnp.asarray(-1.0), "vector": unit(gaussian((3,)))}
        moved, _ = step(optimizer, params, {"sign": jnp.asarray(5.0), "vector": gaussian((3,), 1)})
        assert moved["sign"] == -1
        assert_close(moved["vector"], paper_step(params["vector"], gaussian((3,), 1), 0.1), atol=1e-15)


@pytest.mark.parametrize("optimizer", [adam(), sphere_sgd(0.1, 0.5)], ids=["adam", "transported"])
def test_the_state_is_one_that_optax_can_map(optimizer):
    """`optax.tree_map_params` finds the copies of the parameters in a state, to shard or cast them."""
    _, state = step(optimizer, points(), gradients())
    doubled = optax.tree_map_params(optimizer, lambda leaf: 2 * leaf, state)
    copies, doubles = (
        [leaf for leaf in jax.tree.leaves(tree) if leaf.shape in SHAPES.values()] for tree in (state, doubled)
    )
    assert len(copies) >= len(SHAPES)
    assert_trees_close(doubles, [2 * leaf for leaf in copies])


# Where a parameter starts


@pytest.mark.parametrize("optimizer", [sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.9)], ids=["plain", "momentum"])
@pytest.mark.parametrize("size", [1e-200, 0.5, 7.0, 1e3])
def test_off_the_sphere(optimizer, size):
    params = {name: size * leaf for name, leaf in points().items()}
    moved, _ = step(optimizer, params, gradients())
    expected = {name: paper_step(np.asarray(x), np.asarray(gradients()[name]), 0.1) for name, x in points().items()}
    # The update is a difference: its rounding is that of the parameter.
    assert_trees_close(moved, expected, atol=1e-15 * max(1.0, size))


@pytest.mark.parametrize("optimizer", [sphere_sgd(0.1), adam(), sphere_sgd(0.1, momentum=0.9)])
def test_zero_gradients_leave_points_where_they_are(optimizer):
    params, state = points(), None
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(20):
        moved, state = step(optimizer, params, zeros, state)
        assert_trees_close(moved, points(), atol=2e-16)


@pytest.mark.parametrize("optimizer", [sphere_sgd(0.1), adam(), sphere_sgd(0.1, momentum=0.9)])
def test_a_nan_stays_in_its_point(optimizer):
    given = gradients()
    first = next(iter(given))
    poisoned = {**given, first: given[first].at[(0,) * given[first].ndim].set(jnp.nan)}
    moved, _ = step(optimizer, points(), poisoned)
    expected, _ = step(optimizer, points(), given)
    for name in given:
        assert np.all(np.isnan(moved[name])) if name == first else np.array_equal(moved[name], expected[name])


@pytest.mark.parametrize("optimizer", [sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.9)], ids=["plain", "momentum"])
def test_a_zero_parameter_goes_where_the_step_leads(optimizer):
    params = jax.tree.map(jnp.zeros_like, points())
    moved, state = step(optimizer, params, gradients())
    assert_trees_close(moved, {name: -unit(np.asarray(g)) for name, g in gradients().items()}, atol=1e-15)
    still, _ = step(optimizer, params, params)
    assert_trees_close(still, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# Precision


@pytest.mark.parametrize("optimizer", [sphere_sgd(0.1), adam(), sphere_sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(optimizer, dtype):
    """Computed in float32: one rounding of the update and one of the sum away from it; the states are float32."""
    eps = float(jnp.finfo(dtype).eps)
    params, updates = points(dtype=dtype), gradients(dtype=dtype)
    moved, state = step(optimizer, params, updates)
    upcast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    wide, _ = step(optimizer, upcast(params), upcast(updates))
    assert jax.tree.map(lambda leaf: leaf.dtype, moved) == dict.fromkeys(SHAPES, jnp.dtype(dtype))
    assert_trees_close(upcast(moved), wide, atol=2 * eps)
    again, after = step(optimizer, moved, updates, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert all(norm(again[name]) == pytest.approx(1, abs=2 * eps) for name in SHAPES)


STAYING = {
    "sgd": lambda: sphere_sgd(0.05),
    "ambient": lambda: on_sphere(optax.sgd(0.02, momentum=0.9)),
    "transported": lambda: sphere_sgd(0.02, momentum=0.9),
    "adam": lambda: adam(0.01),
}


@pytest.mark.parametrize("name", STAYING)
def test_stays_on_the_sphere_for_a_hundred_thousand_steps(name):
    """float32, with a target that goes round, so that the point never rests; every norm on the way counts."""
    optimizer = STAYING[name]()
    first, second = (jnp.asarray(a, jnp.float32) for a in np.linalg.qr(gaussian((8, 2)))[0].T)
    start = jnp.asarray(unit(gaussian((8,), 3)), jnp.float32)

    def one_step(carry, count):
        x, state, worst, path = carry
        angle = 0.01 * count.astype(jnp.float32)
        updates, state = optimizer.update(-jnp.cos(angle) * first - jnp.sin(angle) * second, state, x)
        moved = optax.apply_updates(x, updates)
        # In float64, so that the measurement has no rounding of its own.
        deviation = jnp.abs(jnp.sqrt(jnp.sum(moved.astype(jnp.float64) ** 2)) - 1)
        path = path + sphere.distance(x, moved)
        return (moved, state, jnp.maximum(worst, deviation), path), None

    carry = (start, optimizer.init(start), jnp.zeros((), jnp.float64), jnp.zeros((), jnp.float32))
    (x, _, worst, path), _ = jax.jit(lambda carry: jax.lax.scan(one_step, carry, jnp.arange(100_000)))(carry)
    assert x.dtype == jnp.float32
    assert worst <= 1e-6
    # The target makes 159 rounds, a thousand radians: so does the point.
    assert path > 800
    assert abs(norm(x) - 1) <= 1e-6


# Bad input


def test_parameters_are_needed():
    for optimizer in (adam(), sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.5)):
        state = optimizer.init(points())
        with pytest.raises(ValueError, match="you are not passing `params`"):
            optimizer.update(gradients(), state)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("inner", [0.1, optax.sgd, None, "adam"], ids=["number", "function", "nothing", "name"])
def test_only_transformations(inner):
    with pytest.raises(ValueError, match=r"inner: got .* expected an optax.GradientTransformation"):
        on_sphere(inner)


@pytest.mark.parametrize("momentum", [-0.1, float("nan"), np.asarray([0.5, 0.9])], ids=str)
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match=r"momentum: got .* expected a (positive finite number or 0|scalar)"):
        sphere_sgd(0.1, momentum=momentum)


def test_parameters_must_be_floating():
    params = {"x": jnp.asarray([1, 0])}
    for optimizer in (on_sphere(optax.sgd(0.1)), sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.5)):
        with pytest.raises(ValueError, match=r"params: got a leaf of dtype int\d\d, .*optax.masked"):
            optimizer.init(params)
        state = optimizer.init({"x": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"params: got a leaf of dtype int\d\d, .*optax.masked"):
            optimizer.update({"x": jnp.ones(2)}, state, params)


def test_gradients_must_fit():
    for optimizer in (sphere_sgd(0.1), sphere_sgd(0.1, momentum=0.5)):
        with pytest.raises(ValueError, match=r"got shapes \(5,\), \(3,\), expected equal ones"):
            step(optimizer, {"x": points()["vector"]}, {"x": jnp.ones(3)})


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda axis: on_sphere(optax.sgd(0.1), axis=axis),
        lambda axis: sphere_sgd(0.1, axis=axis),
        lambda axis: sphere_sgd(0.1, momentum=0.5, axis=axis),
    ],
    ids=["on_sphere", "sgd", "momentum"],
)
@pytest.mark.parametrize("axis", [-1, 0, (0, 2)], ids=str)
def test_a_batch_of_points_moves_as_each_point_alone(optimizer, axis):
    """Along an axis every point descends on its own, as it does in a leaf of its own."""
    points, matrix = jnp.asarray(gaussian((3, 4, 5))), jnp.asarray(gaussian((3, 4, 5), 1))
    batch = [a for a in range(3) if a not in {i % 3 for i in np.atleast_1d(axis)}]

    def descend(optimizer, x, matrix):
        state = optimizer.init(x)
        for _ in range(4):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(matrix * x)))(x)
            updates, state = optimizer.update(gradient, state, x)
            x = optax.apply_updates(x, updates)
        return x

    together = descend(optimizer(axis), points, matrix)
    norms = np.sqrt(np.sum(together**2, axis=axis))
    np.testing.assert_allclose(norms, 1, rtol=1e-12)
    for index in itertools.product(*(range(points.shape[a]) for a in batch)):
        place = [slice(None)] * 3
        for a, i in zip(batch, index, strict=True):
            place[a] = i
        place = tuple(place)
        alone = descend(optimizer(None), points[place], matrix[place])
        np.testing.assert_allclose(together[place], alone, rtol=1e-12, atol=1e-14)


def test_an_axis_that_a_leaf_lacks():
    with pytest.raises(ValueError, match="axis: got 2 for shape"):
        on_sphere(optax.sgd(0.1), axis=2).init(jnp.ones((3, 3)))
