"""Constraints kept under optimizers: against explicit matrices in float64, numpy's projections, and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from cases import dense, gaussian, weights
from events import COMPILATIONS, counted
from flax import nnx
from jax.extend.core import jaxprs_in_params

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, Dense, ZeroPaddedConv
from jaxsrn.optim import KeepState, keep_spectral_norm, keep_stable_rank

LAYERS = {
    ("circular", "kernel"): CircularConv((6, 5)),
    ("same", "kernel"): ZeroPaddedConv((5, 4)),
    ("dense", "kernel"): Dense(),
}
SHAPES = {"circular": (3, 3, 2, 3), "same": (3, 3, 2, 2), "dense": (8, 9)}
NORM, FRACTION = 3.0, 0.17
# As the README says.
KEPT_TO = 5e-6
KEEPERS = {
    "norm": functools.partial(keep_spectral_norm, max_norm=NORM),
    "rank": functools.partial(keep_stable_rank, fraction=FRACTION),
}
every_keeper = pytest.mark.parametrize("kind", KEEPERS)


def tree(seed, dtype=np.float32):
    """Kernels with biases, or their gradients."""
    return {
        name: {
            "kernel": jnp.asarray(gaussian(shape, seed), dtype),
            "bias": jnp.asarray(gaussian(shape[-1:], seed), dtype),
        }
        for name, shape in SHAPES.items()
    }


def values_of(kernel, op) -> np.ndarray:
    return np.linalg.svd(dense(kernel, op), compute_uv=False)


def norm_and_rank(kernel, op):
    values = values_of(kernel, op)
    return values[0], np.sum(values**2) / values[0] ** 2


def target_of(kernel, op) -> float:
    return FRACTION * min(dense(kernel, op).shape)


def assert_kept(kind, kernel, reached, op):
    """`kernel` meets the constraint; `reached` is where the optimizer alone would have led."""
    norm, rank = norm_and_rank(kernel, op)
    own_norm, own_rank = norm_and_rank(reached, op)
    if kind == "norm":
        np.testing.assert_allclose(norm, min(own_norm, NORM), rtol=KEPT_TO)
    else:
        np.testing.assert_allclose((norm, rank), (own_norm, min(own_rank, target_of(kernel, op))), rtol=KEPT_TO)


def plain(params, updates):
    """`optax.apply_updates` of plain descent."""
    return jax.tree.map(lambda p, u: p - jnp.asarray(0.1, p.dtype) * u, params, updates)


@functools.cache
def trained(kind):
    """Six steps of gradient descent, a projection in every second: `(reached, kept)` of each, and the last state."""
    optimizer = optax.chain(optax.sgd(0.1), KEEPERS[kind](LAYERS, every=2))
    update = jax.jit(optimizer.update)
    params, found = tree(0), []
    state = optimizer.init(params)
    for i in range(1, 7):
        updates, state = update(tree(i), state, params)
        reached, params = plain(params, tree(i)), optax.apply_updates(params, updates)
        assert state[-1].count == i % 2
        found.append((reached, params))
    return found, state


@every_keeper
def test_every_projection_ends_where_it_was_asked(kind):
    for reached, params in trained(kind)[0][1::2]:
        for (name, leaf), op in LAYERS.items():
            assert_kept(kind, params[name][leaf], reached[name][leaf], op)


@every_keeper
def test_all_else_passes_bit_by_bit(kind):
    for i, (reached, params) in enumerate(trained(kind)[0]):
        for name in SHAPES:
            np.testing.assert_array_equal(params[name]["bias"], reached[name]["bias"])
            same = np.array_equal(params[name]["kernel"], reached[name]["kernel"])
            # Later some layer may be below its target by itself.
            assert same == (i % 2 == 0) or i > 1, (i, name)
            assert same or i % 2 == 1


def test_the_start_is_outside():
    """Else the tests here would show nothing: every layer is corrected at least in the first step."""
    for (name, leaf), op in LAYERS.items():
        norm, rank = norm_and_rank(tree(0)[name][leaf], op)
        assert norm > 1.2 * NORM
        assert rank > 1.2 * target_of(tree(0)[name][leaf], op)


def test_matrices_are_clipped():
    reached, params = trained("norm")[0][1]
    u, s, vt = np.linalg.svd(np.asarray(reached["dense"]["kernel"], np.float64), full_matrices=False)
    np.testing.assert_allclose(params["dense"]["kernel"], u * np.minimum(s, NORM) @ vt, atol=1e-5)


def test_matrices_keep_their_first_value():
    """Sanyal et al. 2020: the other singular values are scaled alike."""
    reached, params = trained("rank")[0][1]
    u, s, vt = np.linalg.svd(np.asarray(reached["dense"]["kernel"], np.float64), full_matrices=False)
    s[1:] *= np.sqrt((FRACTION * 8 - 1) * s[0] ** 2 / np.sum(s[1:] ** 2))
    np.testing.assert_allclose(params["dense"]["kernel"], u * s @ vt, atol=1e-5)


def distance(a, b, op):
    return np.linalg.norm(dense(np.asarray(a, np.float64) - np.asarray(b, np.float64), op))


@pytest.mark.parametrize("op", [CircularConv((6,)), ZeroPaddedConv((5,))], ids=["circular", "same"])
def test_no_kernel_of_the_ball_is_nearer(op):
    """Not one that SciPy finds from the kernel kept or the kernel scaled, nor the end of many clippings."""
    reached = gaussian((3, 2, 2))
    transform = keep_spectral_norm({("kernel",): op}, NORM)
    params, step = {"kernel": jnp.zeros(reached.shape)}, {"kernel": jnp.asarray(reached)}
    kept = np.asarray(transform.update(step, transform.init(params), params)[0]["kernel"])
    assert values_of(kept, op)[0] <= NORM * (1 + 1e-9)
    basis = np.stack([dense(e.reshape(reached.shape), op) for e in np.eye(reached.size)])
    scale = np.sqrt(weights(reached.shape, op) * np.ones(reached.shape)).ravel()

    def near(flat):
        change = (flat - reached.ravel()) * scale
        return change @ change, 2 * change * scale

    def room(flat):
        return NORM**2 - np.linalg.svd(np.tensordot(flat, basis, 1), compute_uv=False)[:4] ** 2

    found = []
    for start in (kept, reached * NORM / values_of(reached, op)[0]):
        constraint = {"type": "ineq", "fun": room}
        end = scipy.optimize.minimize(near, start.ravel(), jac=True, method="SLSQP", constraints=constraint)
        found.append(end.x.reshape(reached.shape))
    clipped = jnp.asarray(reached)
    for _ in range(300):
        clipped = jaxsrn.clip_singular_values(clipped, op, NORM)
    inside = [k * min(1.0, NORM / values_of(k, op)[0]) for k in (*found, np.asarray(clipped))]
    best = min(distance(k, reached, op) for k in inside)
    assert distance(kept, reached, op) <= best * (1 + 1e-6)
    # They are not far either: the oracle is no straw man.
    assert best <= 1.05 * distance(kept, reached, op)


def test_the_remembered_pair_is_as_good_as_a_new_start():
    """Of the zero-padded layer, the only one that remembers: no farther than `srnc` from all its starts."""
    op, best = LAYERS["same", "kernel"], jax.jit(jaxsrn.srnc)
    for reached, kept in trained("rank")[0][1::2]:
        reached, kept = reached["same"]["kernel"], kept["same"]["kernel"]
        nearest = best(reached, op, target_of(reached, op)).kernel
        assert distance(kept, reached, op) <= distance(nearest, reached, op) * (1 + 1e-3)


DENSE_ONLY = {("dense", "kernel"): Dense()}


@every_keeper
def test_eager_as_jitted(kind):
    transform = KEEPERS[kind](DENSE_ONLY, every=2)
    params, given = tree(0), tree(1)
    state = transform.init(params)
    for _ in range(2):
        eager, jitted = transform.update(given, state, params), jax.jit(transform.update)(given, state, params)
        assert jax.tree.structure(eager) == jax.tree.structure(jitted)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, jitted)
        state = eager[1]
    assert np.any(eager[0]["dense"]["kernel"] != given["dense"]["kernel"])


@every_keeper
def test_what_is_right_already_is_left_to_the_last_bit(kind):
    """A small kernel of one singular vector: in the ball, and of stable rank little above one."""
    layers = {("a",): Dense()}
    params = {"a": jnp.full((8, 9), 0.01, jnp.float32)}
    transform = keep_spectral_norm(layers, 3.0) if kind == "norm" else keep_stable_rank(layers, 0.9)
    given = jax.tree.map(lambda leaf: jnp.asarray(gaussian(leaf.shape, 1) * 1e-3, jnp.float32), params)
    got, _ = transform.update(given, transform.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, given)


@every_keeper
def test_with_multi_steps(kind):
    """Inside: as one step with the mean gradient. Outside, with the same `every`: the same, at less cost."""
    gradients = [tree(1), tree(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / jnp.asarray(2, a.dtype), *gradients)
    once = optax.chain(optax.sgd(0.1), KEEPERS[kind](DENSE_ONLY))
    expected = optax.apply_updates(tree(0), once.update(mean, once.init(tree(0)), tree(0))[0])
    accumulated = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):
        for optimizer in (
            optax.MultiSteps(once, 2).gradient_transformation(),
            optax.chain(accumulated, KEEPERS[kind](DENSE_ONLY, every=2)),
        ):
            params, state = tree(0), optimizer.init(tree(0))
            update = jax.jit(optimizer.update)
            for i, given in enumerate(gradients):
                updates, state = update(given, state, params)
                params = optax.apply_updates(params, updates)
                if i == 0:
                    jax.tree.map(np.testing.assert_array_equal, params, tree(0))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, expected)


class Net(nnx.Module):
    """Two convolutions of one shape and a dense layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(2, 2, (3, 3), padding="CIRCULAR", rngs=rngs) for _ in range(2)])
        self.dense = nnx.Linear(32, 6, rngs=rngs)

    def __call__(self, x):
        for layer in self.convs:
            x = nnx.relu(layer(x))
        return self.dense(x.reshape(len(x), -1))


@every_keeper
def test_with_an_nnx_optimizer(kind, standard_promotion):
    """Adam, 20 steps, every=4: the constraints hold after each fourth."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        model, x = Net(), jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
        layers = jnnx.layer_operators(model, x)
        assert len(layers) == 3
        keeper = keep_spectral_norm(layers, 0.7, every=4) if kind == "norm" else keep_stable_rank(layers, 0.3, every=4)
        optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), keeper), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
            optimizer.update(model, grads)

        before, drifted = model(x), 0
        for i in range(1, 21):
            step(model, optimizer)
            kernels = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
            for path, op in layers.items():
                norm, rank = norm_and_rank(kernels[path], op)
                value, limit = (norm, 0.7) if kind == "norm" else (rank, 0.3 * min(dense(kernels[path], op).shape))
                drifted += value > limit * (1 + 1e-4)
                assert i % 4 != 0 or value <= limit * (1 + 1e-4), (i, path)
        # In between they drift: it is the projections that keep them.
        assert drifted > 0
        assert jnp.max(jnp.abs(model(x) - before)) > 0.1


def count(jaxpr, name) -> int:
    """How often a primitive occurs in a jaxpr, nested ones included."""
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(count(sub, name) for sub in inner)


@every_keeper
@pytest.mark.parametrize("op", [Dense(), CircularConv((6,))], ids=["dense", "circular"])
def test_layers_of_one_shape_are_one_call(kind, op):
    """As many SVDs in the program of five layers as in that of one."""
    shape = (4, 3) if isinstance(op, Dense) else (3, 2, 2)

    def svds(number):
        params = {str(i): jnp.asarray(gaussian(shape, i), jnp.float32) for i in range(number)}
        transform = KEEPERS[kind]({(name,): op for name in params}, **({"fraction": 0.5} if kind == "rank" else {}))
        return count(jax.make_jaxpr(transform.update)(params, transform.init(params), params).jaxpr, "svd")

    assert svds(5) == svds(1) > 0


@every_keeper
def test_missing_updates_stay_missing(kind):
    layers = {("a",): Dense(), ("b",): Dense(), ("c",): ZeroPaddedConv((5,))}
    params = {"a": gaussian((8, 9), 0), "b": gaussian((8, 9), 1), "c": gaussian((3, 2, 2), 0), "d": None}
    params = jax.tree.map(jnp.asarray, params)
    given = {**params, "b": None, "c": None}
    transform = KEEPERS[kind](layers)
    state = transform.init(params)
    got, after = transform.update(given, state, params)
    assert {name: leaf for name, leaf in got.items() if name != "a"} == {"b": None, "c": None, "d": None}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert_kept(kind, params["a"] + got["a"], 2 * params["a"], Dense())


@every_keeper
def test_narrow_kernels_are_kept_to_their_rounding(kind):
    params, given = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    transform = KEEPERS[kind](DENSE_ONLY)
    updates, _ = jax.jit(transform.update)(given, transform.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    kernel = optax.apply_updates(params, updates)["dense"]["kernel"].astype(jnp.float32)
    norm, rank = norm_and_rank(kernel, Dense())
    reached = params["dense"]["kernel"] + given["dense"]["kernel"]
    own_norm, own_rank = norm_and_rank(reached.astype(jnp.float32), Dense())
    assert own_norm > 1.2 * NORM
    assert own_rank > 1.2 * FRACTION * 8
    if kind == "norm":
        np.testing.assert_allclose(norm, NORM, rtol=1e-2)
    else:
        np.testing.assert_allclose((norm, rank), (own_norm, FRACTION * 8), rtol=2e-2)


@every_keeper
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_nan_stays_in_its_layer(kind, value):
    """Also where another layer has the same shape, and both are projected by one call. Infinity becomes NaN."""
    layers, params = {("bad",): Dense(), ("good",): Dense()}, {"bad": gaussian((8, 9), 0), "good": gaussian((8, 9), 1)}
    params = jax.tree.map(jnp.asarray, params)
    transform = KEEPERS[kind](layers)
    given = {name: leaf.at[0, 0].set(value) if name == "bad" else leaf for name, leaf in params.items()}
    got, _ = transform.update(given, transform.init(params), params)
    assert np.all(np.isnan(got["bad"]))
    assert_kept(kind, params["good"] + got["good"], 2 * params["good"], Dense())


def test_raising_costs_nothing_above_the_target_and_hands_nan_on():
    layers, kernel = {("a",): Dense()}, jnp.asarray(np.eye(4, 5))
    transform = keep_stable_rank(layers, 0.5, upward=True)
    step = {"a": 0.1 * gaussian((4, 5))}
    got, _ = jax.jit(transform.update)(step, transform.init({"a": kernel}), {"a": kernel})
    np.testing.assert_array_equal(got["a"], step["a"])
    got, _ = transform.update({"a": kernel.at[0, 0].set(jnp.nan)}, transform.init({"a": kernel}), {"a": kernel})
    assert np.all(np.isnan(got["a"]))


def test_the_state_is_a_tree_of_arrays():
    _, state = trained("rank")
    assert isinstance(state[-1], KeepState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state[-1]))
    # What the next projection starts from.
    (pair,) = (pair for pair in state[-1].memory if pair)
    assert np.any(pair.input != 0)


BAD = {
    "no layers": (lambda keep: keep([Dense()]), "layers: got "),
    "every": (lambda keep: keep(LAYERS, every=0), "every: got 0, expected a static integer >= 1"),
    "no path": (lambda keep: keep({("conv", "kernel"): Dense()}).init(tree(0)), "names 0 arrays, expected one"),
    "no operator": (lambda keep: keep({("dense", "kernel"): "Dense"}).init(tree(0)), "expected an operator"),
    "no fit": (
        lambda keep: keep({("dense", "kernel"): CircularConv((4,))}).init(tree(0)),
        r"layers: at \('dense', 'kernel'\): kernel: got shape \(8, 9\)",
    ),
    "aliased": (
        lambda keep: keep({("circular", "kernel"): CircularConv((2, 2))}).init(tree(0)),
        r"layers: at \('circular', 'kernel'\): kernel: taps .* fall on each other",
    ),
    "no params": (lambda keep: keep(LAYERS).update(tree(1), None), "requires the current value of parameters"),
    "other shapes": (
        lambda keep: keep({("a",): Dense()}).update({"a": jnp.ones((3, 4))}, None, {"a": jnp.ones((4, 3))}),
        r"updates: got shape \(3, 4\) at \('a',\), expected that of the kernel, \(4, 3\)",
    ),
}


@every_keeper
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(kind, what, no_type_checks):
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        make(KEEPERS[kind])


def test_a_schedule_of_the_norm():
    scheduled = optax.inject_hyperparams(keep_spectral_norm, static_args=("layers", "every"))
    optimizer = scheduled(LAYERS, max_norm=optax.linear_schedule(2.0, 1.0, 2))
    params = tree(0)
    state = optimizer.init(params)
    for limit in (2.0, 1.5, 1.0):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        for (name, _), op in LAYERS.items():
            np.testing.assert_allclose(values_of(params[name]["kernel"], op)[0], limit, rtol=KEPT_TO)


def test_bad_limits(no_type_checks):
    for max_norm in (0.0, -1.0, np.inf, np.nan, np.ones(2)):
        with pytest.raises(ValueError, match="max_norm: got"):
            keep_spectral_norm(LAYERS, max_norm)
    with pytest.raises(ValueError, match=r"max_norm: got a function, .* optax.inject_hyperparams"):
        keep_spectral_norm(LAYERS, optax.linear_schedule(2.0, 1.0, 3))
    for fraction in (0.0, 1.1, np.nan, np.ones(2), optax.linear_schedule(0.5, 0.3, 3)):
        with pytest.raises(ValueError, match="fraction: got"):
            keep_stable_rank(LAYERS, fraction)
    with pytest.raises(ValueError, match=r"fraction: got .*, expected a static number"):
        jax.jit(lambda fraction: keep_stable_rank(LAYERS, fraction).init(tree(0)))(0.5)
    with pytest.raises(ValueError, match=r"at \('same', 'kernel'\): fraction: got 0.01, expected at least"):
        keep_stable_rank({("same", "kernel"): LAYERS["same", "kernel"]}, 0.01).init(tree(0))


# Stacks of layers


STACKS = {
    "norm": functools.partial(keep_spectral_norm, max_norm=1.5),
    "rank": functools.partial(keep_stable_rank, fraction=0.4),
    "upward": functools.partial(keep_stable_rank, fraction=0.7, upward=True),
}


@pytest.mark.parametrize("kind", STACKS)
def test_each_layer_of_a_stack_is_kept_by_itself(kind):
    """Along one axis or two, beside a single layer of the same shape: as if all of them were named one by one."""
    ops = {"same": ZeroPaddedConv((4,)), "dense": Dense()}
    shapes = {"same": (3, 2, 2), "dense": (3, 4)}
    if kind == "upward":
        del ops["same"], shapes["same"]
    outer = {"one": (), "row": (2,), "grid": (1, 2)}
    params, grads = (
        {(name, n): jnp.asarray(gaussian((*outer[n], *shapes[name]), seed)) for name in shapes for n in outer}
        for seed in (0, 1)
    )

    def apart(tree):
        return {
            (*path, i): kernel
            for path, leaf in tree.items()
            for i, kernel in enumerate(leaf.reshape((-1, *shapes[path[0]])))
        }

    def after_steps(params, grads):
        transform = STACKS[kind]({(path,): ops[path[0]] for path in params})
        update, state = jax.jit(transform.update), transform.init(params)
        for _ in range(2):
            updates, state = update(jax.tree.map(lambda grad: -0.1 * grad, grads), state, params)
            params = optax.apply_updates(params, updates)
        return params

    together, alone = after_steps(params, grads), after_steps(apart(params), apart(grads))
    for path, kernel in apart(together).items():
        np.testing.assert_allclose(kernel, alone[path], rtol=1e-9, atol=1e-9)
        assert not np.allclose(kernel, apart(params)[path])


@pytest.mark.parametrize("every", [1, 2])
def test_a_schedule_compiles_once(every, standard_promotion):
    """`optax.inject_hyperparams` makes the transformation anew in every step, and eager steps share a program."""
    scheduled = optax.inject_hyperparams(keep_spectral_norm, static_args=("layers", "every"))
    optimizer = scheduled({("kernel",): Dense()}, max_norm=optax.linear_schedule(2.0, 1.0, 10), every=every)
    params = {"kernel": jnp.asarray(gaussian((3, 4)), jnp.float32)}
    state = optimizer.init(params)
    for _ in range(2):
        _, state = optimizer.update(params, state, params)
    with counted(COMPILATIONS) as compiled:
        _, state = optimizer.update(params, state, params)
    assert not compiled


@pytest.mark.parametrize("every", [1, 2])
def test_narrow_updates_of_wide_kernels(every):
    """A displacement that is rounded to bfloat16 leads beside the ball, by 1.1% here."""
    path = ("fc", "kernel")
    params = {"fc": {"kernel": jnp.asarray(gaussian((30, 40)), jnp.float32)}}
    optimizer = keep_spectral_norm({path: Dense()}, 1.0, every=every)
    state = optimizer.init(params)
    for _ in range(every):
        updates, state = optimizer.update({"fc": {"kernel": jnp.zeros((30, 40), jnp.bfloat16)}}, state, params)
    found = optax.apply_updates(params, updates)["fc"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(found, 2), 1, rtol=1e-5)


@pytest.mark.usefixtures("no_type_checks")
def test_static_options_that_became_arrays_are_explained():
    layers = {("fc", "kernel"): Dense()}
    with pytest.raises(ValueError, match=r"every: got Array\(1, .*inject_hyperparams name 'every' in static_args"):
        optax.inject_hyperparams(keep_spectral_norm)(layers, 1.0).init({"fc": {"kernel": jnp.ones((2, 2))}})
