"""Steepest descent under a layer's norm: against a conic solver on explicit matrices, and optax's Muon."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import dense, gaussian
from events import COMPILATIONS, counted
from flax import nnx

import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn.optim import keep_spectral_norm, keep_stable_rank, spectral_descent
from jaxsrn.projections import steepest, steepest_descent

CIRCULAR, SAME = CircularConv((4,)), ZeroPaddedConv((5,))
SHAPES = {CIRCULAR: (3, 2, 2), SAME: (3, 2, 2), CircularConv((4, 4), strides=2): (3, 3, 1, 3)}
# Of the promise in the docstring.
CERTIFIED = 1e-3
SIZED = {("conv", "kernel"): CircularConv((6,))}
LAYERS = {("conv", "kernel"): UnboundedConv(), ("dense", "kernel"): Dense()}


def dual_norm(gradient: np.ndarray, op, num_steps: int = 3000) -> float:
    """The largest `<G, K>` by the alternating direction method on the explicit matrix of every basis kernel, in NumPy.

    Of the iterates the clipped matrix need not be a layer's, so that the value is that of the kernel scaled into the
    ball. The number of steps is what the slowest case needs to 1e-5.
    """
    basis = np.eye(gradient.size).reshape((-1, *gradient.shape))
    columns = np.stack([np.asarray(dense(kernel, op)) for kernel in basis])
    flat = columns.reshape((len(basis), -1)).T
    inverse, g = np.linalg.pinv(flat), gradient.reshape(-1)
    shape, kernel, multiplier = columns.shape[1:], np.zeros(len(basis)), np.zeros(flat.shape[0])
    normal = inverse @ inverse.T
    step, best = 0.3 * np.sqrt(len(basis)) / np.linalg.norm(normal @ g) / np.sqrt(flat.shape[0]), 0.0
    for _ in range(num_steps):
        u, s, vh = np.linalg.svd((flat @ kernel + multiplier).reshape(shape), full_matrices=False)
        clipped = ((u * np.minimum(s, 1)) @ vh).reshape(-1)
        multiplier = flat @ kernel + multiplier - clipped
        kernel = inverse @ (clipped - multiplier) + step * normal @ g
        best = max(best, g @ kernel / max(1.0, np.linalg.norm((flat @ kernel).reshape(shape), 2)))
    return best


@pytest.mark.parametrize("op", SHAPES)
def test_exact_is_the_dual_norm_of_an_independent_solver(op):
    gradient = gaussian(SHAPES[op])
    result = steepest(jnp.asarray(gradient), op, method="exact")
    value, norm = np.sum(gradient * result.kernel), np.linalg.norm(dense(result.kernel, op), 2)
    expected = dual_norm(gradient, op)
    assert norm <= 1 + 1e-12
    assert 0 <= result.gap <= CERTIFIED
    np.testing.assert_allclose(1 - value / result.dual_norm, result.gap, atol=1e-12)
    np.testing.assert_allclose(value, expected, rtol=CERTIFIED)
    # It is a proven bound, of everything that the other solver finds too.
    assert expected <= result.dual_norm * (1 + 1e-9)


@pytest.mark.parametrize("op", [ZeroPaddedConv((5,)), CircularConv((5,)), UnboundedConv()], ids=str)
def test_exact_reaches_the_gap_that_is_asked_for(op):
    gradient = jnp.asarray(gaussian((3, 2, 2)))
    result = steepest(gradient, op, method="exact", tolerance=1e-5)
    assert 0 <= result.gap <= 1e-5
    np.testing.assert_allclose(1 - jnp.sum(gradient * result.kernel) / result.dual_norm, result.gap, atol=1e-12)
    sized = CircularConv((256,)) if isinstance(op, UnboundedConv) else op
    assert np.linalg.norm(dense(result.kernel, sized), 2) <= 1 + 1e-12


@pytest.mark.parametrize("method", ["exact", "frequency"])
def test_large_zero_padded_layers_are_between_two_stacks(method, monkeypatch):
    """Their kernel is in the ball, and their bound holds, but is not close."""
    monkeypatch.setattr(steepest_descent, "PROVEN_SIZE", 0)
    op, gradient = ZeroPaddedConv((7,)), gaussian((3, 2, 2))
    result = steepest(jnp.asarray(gradient), op, method=method)
    value, expected = np.sum(gradient * result.kernel), dual_norm(gradient, op)
    assert np.linalg.norm(dense(result.kernel, op), 2) <= 1 + 1e-12
    assert 0.8 * expected <= value <= expected * (1 + CERTIFIED)
    assert expected <= result.dual_norm * (1 + 1e-9)
    np.testing.assert_allclose(1 - value / result.dual_norm, result.gap, atol=1e-12)


def test_float32_is_certified_where_singular_values_differ_by_far():
    op, gradient = CircularConv((8,)), gaussian((3, 4, 4)) * np.exp(-np.arange(4.0))
    result = steepest(jnp.asarray(gradient, jnp.float32), op)
    value, expected = np.sum(gradient * np.asarray(result.kernel, float)), dual_norm(gradient, op, 1000)
    assert result.gap.dtype == jnp.float32
    assert result.gap <= CERTIFIED
    np.testing.assert_allclose(value, expected, rtol=CERTIFIED)
    assert expected <= float(result.dual_norm) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["frequency", "flattened"])
def test_other_methods_are_in_the_ball_below_the_bound(method):
    for op in (CIRCULAR, SAME):
        gradients = jnp.asarray(np.stack([gaussian(SHAPES[op], seed) for seed in range(2)]))
        results = jax.vmap(lambda gradient, op=op: steepest(gradient, op, method=method))(gradients)
        for gradient, kernel, bound, gap in zip(gradients, *results, strict=True):
            value, expected = np.sum(gradient * kernel), dual_norm(np.asarray(gradient), op, 500)
            assert np.linalg.norm(dense(kernel, op), 2) <= 1 + 1e-12
            assert value <= expected * (1 + 1e-3)
            assert expected <= bound * (1 + 1e-9)
            np.testing.assert_allclose(value, bound * (1 - gap), rtol=1e-9)
            if op == CIRCULAR and method == "frequency":
                assert value >= 0.95 * expected


def test_the_unbounded_step_is_in_every_ball():
    gradient = jnp.asarray(gaussian((3, 2, 2)))
    result = steepest(gradient, UnboundedConv())
    assert 0 <= result.gap <= CERTIFIED
    # A circular layer of 97 samples sees nearly the supremum over all frequencies.
    norm = np.linalg.norm(dense(result.kernel, CircularConv((97,))), 2)
    assert 1 - CERTIFIED <= norm <= 1


def test_dense_is_the_polar_factor():
    gradient = gaussian((4, 3))
    u, s, vh = np.linalg.svd(gradient)
    result = steepest(jnp.asarray(gradient), Dense())
    np.testing.assert_allclose(result.kernel, u[:, :3] @ vh, atol=1e-12)
    np.testing.assert_allclose(result.dual_norm, s.sum(), rtol=1e-12)
    # Of a matrix of rank 1 only one direction is known.
    rank_one = np.outer([1.0, 2.0], [0.0, 3.0, 4.0])
    np.testing.assert_allclose(
        steepest(jnp.asarray(rank_one), Dense()).kernel, rank_one / np.linalg.norm(rank_one), atol=1e-12
    )


@pytest.mark.parametrize("op", [Dense(), CIRCULAR])
def test_zeros_narrow_types_and_nan(op):
    shape = SHAPES.get(op, (3, 2))
    zero = steepest(jnp.zeros(shape), op)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in zero)
    narrow = steepest(jnp.asarray(gaussian(shape), jnp.bfloat16), op, method="frequency")
    assert narrow.kernel.dtype == jnp.bfloat16
    assert narrow.gap.dtype == jnp.float32
    broken = steepest(jnp.zeros(shape).at[(0,) * len(shape)].set(jnp.nan), op, method="frequency")
    assert all(np.all(np.isnan(np.asarray(leaf, float))) for leaf in broken)


def test_bad_arguments(no_type_checks):
    with pytest.raises(ValueError, match="method: got 'best', expected one of 'exact', 'frequency', 'flattened'"):
        steepest(jnp.ones((3, 1, 1)), CIRCULAR, method="best")
    with pytest.raises(ValueError, match="kernel: got shape"):
        steepest(jnp.ones((1, 1)), CIRCULAR)
    with pytest.raises(ValueError, match="max_passes, tolerance: got it with method='frequency', which has no such"):
        steepest(jnp.ones((3, 1, 1)), CIRCULAR, method="frequency", tolerance=0.1, max_passes=3)
    with pytest.raises(ValueError, match="num_passes: got it with method='exact', which has no such option"):
        steepest(jnp.ones((3, 1, 1)), CIRCULAR, num_passes=3)
    for options, message in (
        ({"momentum": 1.0}, r"momentum: got 1\.0, expected a number below 1"),
        ({"momentum": -0.1}, r"momentum: got -0\.1, expected a positive finite number or 0"),
        ({"weight_decay": -1.0}, r"weight_decay: got -1\.0, expected a positive finite number or 0"),
        ({"method": "exact", "num_passes": 3}, "num_passes: got 3 with method='exact', which has no passes to count"),
        ({"others": 3}, "others: got 3, expected an optax.GradientTransformation"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_descent(0.1, {("a",): Dense()}, **options)
    with pytest.raises(ValueError, match="method: got 'best'"):
        spectral_descent(0.1, LAYERS, method="best")
    with pytest.raises(ValueError, match=r"the path .* names 0 arrays"):
        spectral_descent(0.1, LAYERS).init({"conv": {"kernel": jnp.ones((3, 1, 1))}})


def params(seed, dtype=np.float32):
    shapes = {"conv": (3, 2, 4), "dense": (3, 5)}
    return {
        name: {
            "kernel": jnp.asarray(gaussian(shape, seed), dtype),
            "bias": jnp.asarray(gaussian(shape[-1:], seed), dtype),
        }
        for name, shape in shapes.items()
    }


def run(optimizer, num_steps=3, seed=0):
    """Updates of some steps, jitted, and the parameters that they lead to."""
    weights, updates = params(seed), []
    state = optimizer.init(weights)
    update = jax.jit(optimizer.update)
    for i in range(num_steps):
        step, state = update(params(10 + i), state, weights)
        updates.append(step)
        weights = optax.apply_updates(weights, step)
    return updates, weights


@pytest.mark.parametrize("nesterov", [True, False])
def test_dense_layers_are_optax_muon(nesterov, standard_promotion):
    """And parameters without an operator are its Adam's."""
    options = {"weight_decay": 0.1, "nesterov": nesterov}
    ours, _ = run(spectral_descent(0.02, LAYERS, **options, num_passes=1))
    theirs, _ = run(optax.contrib.muon(0.02, beta=0.95, **options))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["dense"]["kernel"], b["dense"]["kernel"])
        for name in ("conv", "dense"):
            np.testing.assert_allclose(a[name]["bias"], b[name]["bias"], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_convolutions_step_along_their_momentum(nesterov, standard_promotion):
    """The update is minus the rate times the scale times a kernel of norm 1, near the best one along the momentum."""
    rate, op = 0.02, LAYERS["conv", "kernel"]
    updates, _ = run(spectral_descent(rate, {("conv", "kernel"): op}, num_passes=10, nesterov=nesterov))
    average = 0.0
    for i, update in enumerate(updates):
        gradient = np.asarray(params(10 + i)["conv"]["kernel"], float)
        average = 0.95 * average + 0.05 * gradient
        ahead = average
        if nesterov:
            ahead = 0.95 * average / (1 - 0.95 ** (i + 2)) + 0.05 * gradient / (1 - 0.95 ** (i + 1))
        # Twice as many outputs as inputs.
        step = -np.asarray(update["conv"]["kernel"], float) / rate / np.sqrt(2)
        np.testing.assert_allclose(np.linalg.norm(dense(step, CircularConv((96,))), 2), 1, rtol=2e-3)
        assert np.sum(ahead * step) >= 0.9 * steepest(jnp.asarray(ahead), op).dual_norm


@pytest.mark.parametrize("method", ["exact", "flattened"])
def test_other_methods_of_descent_step_too(method, standard_promotion):
    updates, _ = run(spectral_descent(0.02, LAYERS, method=method), num_steps=1)
    step = -np.asarray(updates[0]["conv"]["kernel"], float) / 0.02 / np.sqrt(2)
    np.testing.assert_allclose(np.linalg.norm(dense(step, CircularConv((96,))), 2), 1, rtol=2e-3)
    value = np.sum(step * np.asarray(params(10)["conv"]["kernel"]))
    bound = steepest(params(10)["conv"]["kernel"], LAYERS["conv", "kernel"]).dual_norm
    assert value >= (0.99 if method == "exact" else 0.4) * bound


def test_it_composes(standard_promotion):
    """In a chain with the projection of the weights, and under accumulation of gradients."""
    descent = functools.partial(spectral_descent, 0.1, LAYERS, num_passes=2)
    _, weights = run(optax.chain(descent(), keep_spectral_norm(SIZED, 1.0)), num_steps=2)
    assert np.linalg.norm(dense(np.asarray(weights["conv"]["kernel"], float), SIZED["conv", "kernel"]), 2) <= 1 + 1e-5

    several = optax.MultiSteps(descent(), 2).gradient_transformation()
    updates, _ = run(several, num_steps=2)
    assert not np.any(updates[0]["conv"]["kernel"])
    assert np.any(updates[1]["conv"]["kernel"])


def test_stable_ranks_are_raised():
    """The companion that raises stable ranks leaves those alone that are high enough."""
    op, low, high = SIZED["conv", "kernel"], 0.3, 0.6
    weights = params(0)
    kernels = {}
    for fraction in (low, high):
        keeper = keep_stable_rank(SIZED, fraction, upward=True)
        updates, _ = keeper.update(jax.tree.map(jnp.zeros_like, weights), keeper.init(weights), weights)
        kernels[fraction] = np.asarray(optax.apply_updates(weights, updates)["conv"]["kernel"], float)
    before = np.asarray(weights["conv"]["kernel"], float)
    values = [np.linalg.svd(dense(kernel, op), compute_uv=False) for kernel in (before, kernels[high])]
    ranks = [np.sum(value**2) / value[0] ** 2 for value in values]
    assert low * len(values[0]) < ranks[0] < high * len(values[0])
    np.testing.assert_array_equal(kernels[low], before)
    np.testing.assert_allclose(ranks[1], high * len(values[0]), rtol=1e-3)
    np.testing.assert_allclose(values[1][0], values[0][0], rtol=1e-4)


def test_it_trains_a_flax_model(standard_promotion):
    model = nnx.Sequential(nnx.Conv(1, 2, (3,), rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, spectral_descent(0.05, jnnx.layer_operators(model), num_passes=2), wrt=nnx.Param)
    x = jnp.asarray(gaussian((4, 8, 1)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_matrices_of_several_axes_and_one_tap(standard_promotion):
    """The projections of attention, and 1x1 convolutions: the polar factor of the matrix that they are."""
    kernel = gaussian((4, 2, 3))
    for op, gradient, rows in (
        (Dense(input_axes=1, output_axes=2), kernel, 4),
        (Dense(input_axes=2, output_axes=1), kernel, 8),
        (UnboundedConv(strides=(2, 2)), kernel[:, 0].reshape(1, 1, 4, 3), 4),
    ):
        left, values, right = np.linalg.svd(np.asarray(gradient).reshape(rows, -1), full_matrices=False)
        found = steepest(gradient, op)
        np.testing.assert_allclose(np.asarray(found.kernel).reshape(rows, -1), left @ right, atol=1e-10)
        np.testing.assert_allclose(found.dual_norm, values.sum(), rtol=1e-10)


def test_attention_without_convolutions_takes_muons_steps(standard_promotion):
    model = nnx.MultiHeadAttention(num_heads=2, in_features=4, qkv_features=6, decode=False, rngs=nnx.Rngs(0))
    layers = jnnx.layer_operators(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = spectral_descent(0.02, layers)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(gaussian(leaf.shape), leaf.dtype), params)
    steps, _ = optimizer.update(gradients, optimizer.init(params), params)
    shapes = {"query": (4, 6), "key": (4, 6), "value": (4, 6), "out": (6, 4)}
    matrices = {name: gradients[name]["kernel"].reshape(shape) for name, shape in shapes.items()}
    muon = optax.contrib.muon(0.02, beta=0.95)
    expected, _ = muon.update(matrices, muon.init(matrices), matrices)
    for name, step in expected.items():
        np.testing.assert_allclose(steps[name]["kernel"].reshape(step.shape), step, atol=1e-6)


def test_each_layer_of_a_stack_has_its_own_step(standard_promotion):
    """A dense and a circular stack, for two steps: as if all layers were named one by one."""
    ops = {"dense": Dense(), "circular": CircularConv((4,))}
    shapes = {"dense": (3, 2, 4), "circular": (2, 3, 2, 2)}

    def apart(tree):
        return {(name, i): kernel for name, leaf in tree.items() for i, kernel in enumerate(leaf)}

    def stepped(params, name_of):
        optimizer = spectral_descent(0.1, {(path,): ops[name_of(path)] for path in params}, num_passes=2)
        update, state = jax.jit(optimizer.update), optimizer.init(params)
        for _ in range(2):
            updates, state = update(jax.tree.map(jnp.cos, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    params = {name: jnp.asarray(gaussian(shape)) for name, shape in shapes.items()}
    together, alone = stepped(params, lambda path: path), stepped(apart(params), lambda path: path[0])
    for path, kernel in apart(together).items():
        np.testing.assert_allclose(kernel, alone[path], rtol=1e-9, atol=1e-9)


def test_the_step_has_norm_one_where_the_norm_is_exact():
    op, gradient = CircularConv((8,)), jnp.asarray(gaussian((3, 4, 4)))
    for method in ("frequency", "flattened"):
        norm = np.linalg.norm(dense(steepest(gradient, op, method=method).kernel, op), 2)
        np.testing.assert_allclose(norm, 1, rtol=2e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("method", ["frequency", "flattened"])
def test_the_scale_of_gradients_does_not_matter(method, scale, standard_promotion):
    gradients, op = params(10), UnboundedConv()
    steps = []
    for factor in (1, scale):
        optimizer = spectral_descent(1.0, {("conv", "kernel"): op}, method=method)
        state, update = optimizer.init(params(0)), jax.jit(optimizer.update)
        scaled = jax.tree.map(functools.partial(np.multiply, np.float32(factor)), gradients)
        for _ in range(2):
            step, state = update(scaled, state, params(0))
        steps.append(step["conv"]["kernel"])
    np.testing.assert_allclose(*steps, atol=1e-5)


def test_eager_updates_compile_once(standard_promotion):
    optimizer = spectral_descent(0.02, {("conv", "kernel"): UnboundedConv()})
    weights = params(0)
    state = optimizer.init(weights)
    for _ in range(2):
        _, state = optimizer.update(params(1), state, weights)
    with counted(COMPILATIONS) as compiled:
        optimizer.update(params(2), state, weights)
    assert not compiled


def test_a_layer_whose_first_gradients_are_zero_starts_as_others_do(standard_promotion):
    """The memory of a step without a gradient holds nothing to go on from."""
    layers, weights, gradients = {("conv", "kernel"): UnboundedConv()}, params(0), params(1)
    optimizer = spectral_descent(1.0, layers, momentum=0.0)
    expected, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    state = optimizer.init(weights)
    for _ in range(2):
        nothing, state = optimizer.update(jax.tree.map(jnp.zeros_like, weights), state, weights)
        assert not np.any(nothing["conv"]["kernel"])
    found, _ = optimizer.update(gradients, state, weights)
    np.testing.assert_allclose(found["conv"]["kernel"], expected["conv"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("method", ["frequency", "flattened"])
def test_descent_leaves_taps_that_meet_no_sample(method, standard_promotion):
    op, weights = ZeroPaddedConv((2,)), {"kernel": jnp.asarray(gaussian((5, 3, 3)), jnp.float32)}
    gradients = {"kernel": weights["kernel"].at[jnp.asarray([0, 4])].set(0)}
    optimizer = spectral_descent(1.0, {("kernel",): op}, method=method)
    step, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    assert not np.any(step["kernel"][::4])
    # The scale of a layer with as many outputs as inputs is 1.
    np.testing.assert_allclose(np.linalg.norm(dense(step["kernel"], op), 2), 1, rtol=1e-3)


PADDED = {("conv", "kernel"): ZeroPaddedConv((5,)), ("dense", "kernel"): Dense()}


@pytest.mark.parametrize(
    ("optimizer", "num_copies"),
    [
        # Adam's two moments of two biases, and the momenta of the two kernels.
        pytest.param(spectral_descent(0.1, PADDED), 6, id="frequency"),
        pytest.param(spectral_descent(0.1, PADDED, method="flattened"), 6, id="flattened"),
        pytest.param(keep_spectral_norm(PADDED, 1.0), 0, id="norm"),
        pytest.param(keep_stable_rank(PADDED, 0.6), 0, id="rank"),
        pytest.param(keep_stable_rank(PADDED, 0.6, upward=True), 0, id="upward"),
    ],
)
def test_states_can_be_mapped_by_optax(optimizer, num_copies):
    """`optax.tree_map_params`, as for sharding, maps the copies of the parameters alone."""
    state = optimizer.init(params(0))
    mapped = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(mapped), strict=True)
    assert sum(bool(jnp.any(before != after)) for before, after in pairs) == num_copies


def test_the_gap_does_not_overflow_with_the_dual_norm():
    gradient = jnp.asarray(1e38 * gaussian((4, 4)), jnp.float32)
    result = steepest(gradient, Dense())
    assert result.gap <= 1e-6
    assert np.isinf(result.dual_norm)


def test_a_tolerance_that_asks_for_nothing_gives_a_kernel_of_norm_one():
    found = steepest(jnp.asarray(gaussian((3, 2, 2))), CIRCULAR, tolerance=10.0)
    np.testing.assert_allclose(np.linalg.norm(dense(found.kernel, CIRCULAR), 2), 1, rtol=1e-4)
    assert np.isfinite(found.dual_norm)
