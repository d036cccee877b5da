"""The Linen wrappers: the numbers of NNX, Flax's transformations, and the explicit matrix of the folded layers."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.traverse_util import flatten_dict

import jaxsrn
import jaxsrn.linen as jlinen
import jaxsrn.nnx as jnnx
from jaxsrn.linen.wrappers import LAYERS as LAYERS_OF_LINEN
from jaxsrn.operators.flax_kinds import kind_of
from jaxsrn.operators.flax_layers import layer_map

FLOAT = {"param_dtype": jnp.float64}
KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (8, 6, 6, 1), jnp.float64)
LABELS = jnp.arange(8) % 5


@pytest.fixture(autouse=True)
def as_users_have_it():
    """JAX's own promotion rules: Flax and optax rely on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def plain_layer(layer, *options, **settings):
    """In the place of a wrapper: the plain architecture."""
    return layer


class Net(nn.Module):
    """Made in `setup`: the wrappers hold their layers. Every kind of norm."""

    stable: object = jlinen.StableRankNorm
    spectral: object = jlinen.SpectralNorm

    def setup(self):
        self.conv = self.stable(nn.Conv(3, (3, 3), padding="CIRCULAR", **FLOAT), 0.3, input_shape=(6, 6))
        self.hidden = self.spectral(nn.Dense(6, **FLOAT), norm=nn.initializers.constant(-1.5))
        self.dense = self.stable(nn.Dense(5, **FLOAT), 0.3, norm=2.0, cap=True, gradient="implicit")

    def __call__(self, x):
        x = nn.tanh(self.conv(x))
        return self.dense(nn.tanh(self.hidden(x.reshape(len(x), -1))))


class CompactNet(nn.Module):
    """The same in a compact method: the layers are neighbours of their wrappers."""

    stable: object = jlinen.StableRankNorm
    spectral: object = jlinen.SpectralNorm
    update_stats: bool = True

    @nn.compact
    def __call__(self, x):
        def call(wrapper, x):
            return wrapper(x) if isinstance(wrapper, (nn.Conv, nn.Dense)) else wrapper(x, self.update_stats)

        circular = nn.Conv(3, (3, 3), padding="CIRCULAR", **FLOAT)
        x = nn.tanh(call(self.stable(circular, 0.3, input_shape=(6, 6)), x))
        x = nn.tanh(nn.Dense(6, **FLOAT)(x.reshape(len(x), -1)))
        return call(self.spectral(nn.Dense(5, name="head", **FLOAT), norm=nn.initializers.ones), x)


class NNXNet(nnx.Module):
    """`Net` in NNX, with the given parameters."""

    def __init__(self, params):
        rngs = nnx.Rngs(0)

        def filled(layer, name):
            layer.kernel[...] = params[name]["layer"]["kernel"]
            return layer

        conv = filled(nnx.Conv(1, 3, (3, 3), padding="CIRCULAR", rngs=rngs, **FLOAT), "conv")
        hidden = filled(nnx.Linear(108, 6, rngs=rngs, **FLOAT), "hidden")
        dense = filled(nnx.Linear(6, 5, rngs=rngs, **FLOAT), "dense")
        self.conv = jnnx.StableRankNorm(conv, 0.3, input_shape=(6, 6))
        self.hidden = jnnx.SpectralNorm(hidden, norm=nnx.Param(jnp.asarray(params["hidden"]["norm"])))
        self.dense = jnnx.StableRankNorm(dense, 0.3, norm=2.0, cap=True, gradient="implicit")

    def __call__(self, x):
        x = nnx.tanh(self.conv(x))
        return self.dense(nnx.tanh(self.hidden(x.reshape(len(x), -1))))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def perturbed(variables, size=0.3):
    """The parameters moved away from those that the states are converged for, so that a step shows."""
    leaves, treedef = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return {**variables, "params": treedef.unflatten(noisy)}


def assert_trees_close(got, expected, **tolerance):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def norm_and_rank(matrix):
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return values[0], np.sum(values**2) / values[0] ** 2


def test_linen_and_nnx_train_alike():
    """Outputs, gradients and states over 100 steps of Adam, to 1e-6."""
    variables = Net().init(KEY, IMAGES)
    twin = NNXNet(variables["params"])
    optimizer = optax.adam(1e-2)
    twin_optimizer = nnx.Optimizer(twin, optimizer, wrt=nnx.Param)

    @jax.jit
    def step(variables, state):
        def loss_of(params):
            logits, changed = Net().apply({**variables, "params": params}, IMAGES, mutable=["stable_rank"])
            return cross_entropy(logits), (logits, changed)

        grads, (logits, changed) = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **changed}, state, logits, grads

    @nnx.jit
    def twin_step(model, optimizer):
        def loss_of(model):
            logits = model(IMAGES)
            return cross_entropy(logits), logits

        grads, logits = nnx.grad(loss_of, has_aux=True)(model)
        optimizer.update(model, grads)
        return logits, grads

    state, first = optimizer.init(variables["params"]), None
    for _ in range(100):
        variables, state, logits, grads = step(variables, state)
        twin_logits, twin_grads = twin_step(twin, twin_optimizer)
        first = logits if first is None else first
        np.testing.assert_allclose(logits, twin_logits, rtol=1e-6, atol=1e-6)
        twin_grads = {path: grad[...] for path, grad in nnx.to_flat_state(twin_grads)}
        assert flatten_dict(grads).keys() == twin_grads.keys()
        for path, grad in flatten_dict(grads).items():
            assert np.any(grad != 0), path
            np.testing.assert_allclose(grad, twin_grads[path], rtol=1e-6, atol=1e-6)
    assert cross_entropy(logits) < cross_entropy(first) - 0.1
    for name in ("conv", "hidden", "dense"):
        twin_state = getattr(twin, name).state.get_value()
        assert jax.tree.structure(variables["stable_rank"][name]["state"].value) == jax.tree.structure(twin_state)
        assert_trees_close(variables["stable_rank"][name], twin_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"norm": None}, {"norm": 1.0, "cap": True}], ids=["own", "capped"])
def test_layers_that_start_at_zero_train(options):
    """One step of gradient descent moves them as it moves plain ones."""
    plain = nn.Dense(5, kernel_init=nn.initializers.zeros, **FLOAT)
    wrapped, x = jlinen.StableRankNorm(plain, 0.5, **options), IMAGES.reshape((8, -1))
    kernels = []
    for model in (plain, wrapped):
        variables = model.init(KEY, x)
        grads = jax.grad(lambda given, model=model: cross_entropy(model.apply(given, x)), allow_int=True)(variables)
        (kernel,) = (leaf for path, leaf in flatten_dict(grads["params"]).items() if path[-1] == "kernel")
        kernels.append(-0.1 * kernel)
    assert np.all(kernels[0] != 0)
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-12)


MODELS = {"setup": Net, "compact": CompactNet}


@pytest.mark.parametrize("style", MODELS)
def test_forwards_read_or_step_and_never_touch_the_parameters(style):
    model = MODELS[style]()
    variables = perturbed(model.init(KEY, IMAGES))
    before = jax.tree.map(np.array, variables["params"])
    reading = model.apply(variables, IMAGES)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), reading)
    stepping, changed = model.apply(variables, IMAGES, mutable=["stable_rank"])
    np.testing.assert_array_equal(stepping, reading)
    assert set(changed) == {"stable_rank"}
    again, everything = model.apply({**variables, **changed}, IMAGES, mutable=True)
    assert np.any(again != reading)
    jax.tree.map(np.testing.assert_array_equal, everything["params"], before)
    assert jax.tree.structure(everything) == jax.tree.structure(variables)
    leaves = {leaf.dtype for leaf in jax.tree.leaves(changed)}
    assert leaves <= {np.dtype(name) for name in ("float64", "complex128", "int32", "int64")}


@pytest.mark.parametrize("style", MODELS)
def test_refresh_steps_as_a_forward_does(style):
    model = MODELS[style]()
    variables = perturbed(model.init(KEY, IMAGES))
    _, changed = model.apply(variables, IMAGES, mutable=["stable_rank"])
    refreshed = jax.jit(lambda variables: jlinen.refresh(model, variables))(variables)
    assert jax.tree.structure(refreshed) == jax.tree.structure(variables)
    assert_trees_close(refreshed["stable_rank"], changed["stable_rank"], rtol=1e-8, atol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, refreshed["params"], variables["params"])
    states = jax.tree.leaves(refreshed["stable_rank"]), jax.tree.leaves(variables["stable_rank"])
    assert any(np.any(a != b) for a, b in zip(*states, strict=True))
    with pytest.raises(ValueError, match="expected 'stable_rank' among them"):
        jlinen.refresh(model, {"params": variables["params"]})


def test_update_stats_false_only_reads():
    model = CompactNet(update_stats=False)
    variables = perturbed(model.init(KEY, IMAGES))
    outputs, changed = model.apply(variables, IMAGES, mutable=["stable_rank"])
    jax.tree.map(np.testing.assert_array_equal, changed["stable_rank"], variables["stable_rank"])
    np.testing.assert_array_equal(model.apply({**variables, **changed}, IMAGES), outputs)


@pytest.mark.parametrize("style", MODELS)
def test_a_folded_model_is_the_plain_architecture(style):
    """Paths, outputs and gradients, the learned norm's among them; other collections stay."""
    model, plain = MODELS[style](), MODELS[style](stable=plain_layer, spectral=plain_layer)
    variables = {**perturbed(model.init(KEY, IMAGES)), "other": {"x": jnp.ones(2)}}
    expected = jax.eval_shape(plain.init, KEY, IMAGES)["params"]
    folded = jax.jit(lambda variables: jlinen.fold(model, variables))(variables)
    assert set(folded) == {"params", "other"}
    assert jax.tree.map(jnp.shape, folded["params"]) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_allclose(plain.apply(folded, IMAGES), model.apply(variables, IMAGES), rtol=1e-10)

    def live(params):
        return cross_entropy(model.apply({**variables, "params": params}, IMAGES))

    def through_fold(params):
        return cross_entropy(plain.apply(jlinen.fold(model, {**variables, "params": params}), IMAGES))

    grads = jax.jit(jax.grad(live))(variables["params"])
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    assert_trees_close(jax.jit(jax.grad(through_fold))(variables["params"]), grads, rtol=1e-8, atol=1e-12)


def test_true_norms_and_stable_ranks_of_folded_kernels():
    """Against the explicit matrix, from the first forward on, and again once steps have followed new parameters."""
    model = Net()
    variables = model.init(KEY, IMAGES)
    operators = {"conv": jaxsrn.CircularConv((6, 6)), "hidden": jaxsrn.Dense(), "dense": jaxsrn.Dense()}
    step = jax.jit(lambda variables: model.apply(variables, IMAGES, mutable=["stable_rank"])[1])
    for moved in (variables, perturbed(variables)):
        if moved is not variables:
            for _ in range(100):
                moved = {**moved, **step(moved)}
        params, raw = jlinen.fold(model, moved)["params"], moved["params"]

        def measured(name, kernel):
            return norm_and_rank(operators[name].to_dense(kernel))

        own = {name: measured(name, raw[name]["layer"]["kernel"]) for name in params}
        norms = {"conv": 1.0, "hidden": abs(raw["hidden"]["norm"]), "dense": min(2.0, own["dense"][0])}
        targets = {"conv": 0.3 * 36, "hidden": np.inf, "dense": 0.3 * 5}
        assert own["conv"][1] > targets["conv"]
        assert own["dense"][1] > targets["dense"]
        for name, norm in norms.items():
            expected = norm, min(targets[name], own[name][1])
            np.testing.assert_allclose(measured(name, params[name]["kernel"]), expected, rtol=1e-5, err_msg=name)


TWINS = {
    "Conv": (
        nn.Conv(4, (3, 2), strides=2, feature_group_count=2, padding="CIRCULAR"),
        lambda rngs: nnx.Conv(2, 4, (3, 2), strides=2, feature_group_count=2, padding="CIRCULAR", rngs=rngs),
        (6, 4),
    ),
    "dilated": (
        nn.Conv(3, (3,), padding=2, kernel_dilation=2),
        lambda rngs: nnx.Conv(2, 3, (3,), padding=2, kernel_dilation=2, rngs=rngs),
        (7,),
    ),
    "causal": (
        nn.Conv(3, 3, padding="CAUSAL", strides=None),
        lambda rngs: nnx.Conv(2, 3, 3, padding="CAUSAL", strides=None, rngs=rngs),
        (7,),
    ),
    "ConvTranspose": (
        nn.ConvTranspose(3, (3,), (2,), transpose_kernel=True),
        lambda rngs: nnx.ConvTranspose(2, 3, (3,), (2,), transpose_kernel=True, rngs=rngs),
        (5,),
    ),
    "DenseGeneral": (
        nn.DenseGeneral((2, 5), axis=(-2, -1)),
        lambda rngs: nnx.LinearGeneral((3, 2), (2, 5), axis=(-2, -1), rngs=rngs),
        None,
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_layer_is_the_operator_that_its_twin_is(name):
    layer, make, input_shape = TWINS[name]
    twin, in_shape = make(nnx.Rngs(0)), (*(input_shape or (3,)), 2)
    shape = jax.eval_shape(layer.init, KEY, jnp.ones((1, *in_shape)))["params"]["kernel"].shape
    kind, twin_kind = kind_of(layer, LAYERS_OF_LINEN, {}), kind_of(twin, jnnx.wrappers.LAYERS, {})
    assert kind == twin_kind
    for size in (input_shape, None):
        assert layer_map(layer, shape, size, kind) == layer_map(twin, twin.kernel.shape, size, kind)


LAYERS = {
    "ConvTranspose": (nn.ConvTranspose(3, (3,), (2,), padding="CIRCULAR", **FLOAT), (4,), (4, 2)),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1), **FLOAT), None, (3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrapper_as_the_whole_model_by_its_outputs_at_all_basis_images(name):
    """Its layer takes the place of the root. Kernels here are stored in another shape than the operator's."""
    layer, input_shape, in_shape = LAYERS[name]
    model = jlinen.StableRankNorm(layer, 0.6, input_shape=input_shape)
    basis = jnp.eye(math.prod(in_shape)).reshape((-1, *in_shape))
    variables = model.init(KEY, basis)
    outputs = model.apply(variables, basis)
    raw = layer.apply({"params": variables["params"]["layer"]}, basis)
    (norm, rank), (_, own_rank) = (norm_and_rank(images.reshape(len(basis), -1)) for images in (outputs, raw))
    largest = min(len(basis), outputs[0].size)
    np.testing.assert_allclose((norm, rank), (1, min(0.6 * largest, own_rank)), rtol=1e-6)
    np.testing.assert_allclose(layer.apply(jlinen.fold(model, variables), basis), outputs, atol=1e-12)


UNSIZED = {
    "circular": nn.Conv(3, 3, padding="CIRCULAR", **FLOAT),
    "stride-groups": nn.Conv(4, (3,), strides=2, feature_group_count=2, **FLOAT),
    "ConvTranspose": nn.ConvTranspose(3, (3,), (2,), **FLOAT),
    "input-dilation": nn.Conv(4, (3,), padding=((2, 2),), input_dilation=2, feature_group_count=2, **FLOAT),
}


@pytest.mark.parametrize("name", UNSIZED)
def test_a_wrapper_without_an_input_shape_bounds_the_layer_at_every_size(name):
    """From the outputs at all basis images of two sizes; the norm of the larger is nearly 1."""
    layer = UNSIZED[name]
    model, norms = jlinen.SpectralNorm(layer), []
    variables = model.init(KEY, jnp.ones((1, 8, 2)))
    for size in (4, 48):
        basis = jnp.eye(2 * size).reshape((-1, size, 2))
        outputs = model.apply(variables, basis) - model.apply(variables, 0 * basis[:1])
        norms.append(norm_and_rank(outputs.reshape(len(basis), -1))[0])
    assert max(norms) <= 1 + 1e-8
    assert norms[1] > 0.994


class Cell(nn.Module):
    """One step of a recurrence, one layer of a stack, or one member of an ensemble."""

    wrapped: bool = True
    learned: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        layer = nn.Dense(4, **FLOAT)
        norm = nn.initializers.constant(1.5) if self.learned else 0.9
        x = (jlinen.StableRankNorm(layer, 0.5, norm=norm) if self.wrapped else layer)(x)
        return nn.tanh(x + 1), None


ROWS = jax.random.normal(KEY, (3, 4), jnp.float64)


@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_jit_and_remat(transform):
    model, lifted = Cell(learned=True), transform(Cell)(learned=True)
    variables = perturbed(model.init(KEY, ROWS))
    assert jax.tree.structure(jax.eval_shape(lifted.init, KEY, ROWS)) == jax.tree.structure(variables)

    @jax.jit(static_argnums=0)
    def results(model, params):
        def loss_of(params):
            outputs, changed = model.apply({**variables, "params": params}, ROWS, mutable=["stable_rank"])
            return jnp.sum(outputs[0] ** 3), changed

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    expected = results(model, variables["params"])
    assert_trees_close(results(lifted, variables["params"]), expected, rtol=1e-8, atol=1e-10)
    (_, changed), grads = expected
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    states = jax.tree.leaves(changed), jax.tree.leaves(variables["stable_rank"])
    assert any(np.any(a != b) for a, b in zip(*states, strict=True))


def test_an_argument_that_is_static_under_a_transformation():
    lifted = nn.remat(jlinen.SpectralNorm, static_argnums=(2,))(nn.Dense(3, **FLOAT))
    x = jnp.ones((2, 4))
    variables = perturbed(lifted.init(KEY, x, True))
    _, kept = lifted.apply(variables, x, False, mutable=["stable_rank"])
    _, stepped = lifted.apply(variables, x, True, mutable=["stable_rank"])
    jax.tree.map(np.testing.assert_array_equal, kept["stable_rank"], variables["stable_rank"])
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(stepped), strict=True))


def test_scan_over_stacked_layers():
    """Each layer has its state and its learned norm; folding takes them all."""
    axes = {"variable_axes": {"params": 0, "stable_rank": 0}, "split_rngs": {"params": True}, "length": 3}
    model, plain = nn.scan(Cell, **axes)(learned=True), nn.scan(Cell, **axes)(wrapped=False)
    x = ROWS
    variables = perturbed(model.init(KEY, x, None))
    (out, _), changed = model.apply(variables, x, None, mutable=["stable_rank"])
    expected = x
    for i in range(3):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        (expected, _), single = Cell(learned=True).apply(single, expected, None, mutable=["stable_rank"])
        stacked = jax.tree.map(lambda leaf, i=i: leaf[i], changed)
        assert_trees_close(stacked, single, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(out, expected, rtol=1e-8)
    folded = jlinen.fold(model, variables)
    np.testing.assert_allclose(plain.apply(folded, x, None)[0], out, rtol=1e-8)
    inputs = jax.ShapeDtypeStruct(x.shape, x.dtype), None
    assert jlinen.layer_operators(model, variables, *inputs) == {("Dense_0", "kernel"): jaxsrn.Dense()}
    swapped = {**variables, "params": jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), variables["params"])}
    with pytest.raises(ValueError, match=r"Dense_0: got kernels of shape \(4, 4, 3\), expected \(4, 4\), stacked"):
        jlinen.fold(model, swapped)


def test_scan_as_a_recurrence():
    """One layer at every step: the state is carried, or only read; as many steps of a loop give the same."""
    shared = {"variable_broadcast": "params", "variable_carry": "stable_rank", "split_rngs": {"params": False}}
    x = ROWS
    variables = perturbed(Cell().init(KEY, x, None))
    (out, _), changed = nn.scan(Cell, **shared, length=4)().apply(variables, x, None, mutable=["stable_rank"])
    expected, states = x, variables
    for _ in range(4):
        (expected, _), states = Cell().apply({**variables, **states}, expected, None, mutable=["stable_rank"])
    np.testing.assert_allclose(out, expected, rtol=1e-8)
    assert_trees_close(changed, states, rtol=1e-8, atol=1e-10)
    reading = nn.scan(Cell, variable_broadcast=["params", "stable_rank"], split_rngs={"params": False}, length=4)()
    plain = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, length=4)(wrapped=False)
    folded = jlinen.fold(reading, variables)
    np.testing.assert_allclose(reading.apply(variables, x, None)[0], plain.apply(folded, x, None)[0], rtol=1e-8)


def test_vmap_over_an_ensemble():
    lift = {"variable_axes": {"params": 0, "stable_rank": 0}, "split_rngs": {"params": True}, "in_axes": None}
    ensemble, plain = (nn.vmap(Cell, **lift, axis_size=3)(wrapped=wrapped) for wrapped in (True, False))
    variables = ensemble.init(KEY, ROWS)
    (out, _), changed = ensemble.apply(variables, ROWS, mutable=["stable_rank"])
    for i in range(3):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        (expected, _), state = Cell().apply(single, ROWS, mutable=["stable_rank"])
        np.testing.assert_allclose(out[i], expected, rtol=1e-8)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], changed), state, rtol=1e-8, atol=1e-10)
        kernels = jlinen.fold(Cell(), single)["params"]["Dense_0"]["kernel"], single["params"]["Dense_0"]["kernel"]
        (norm, rank), (_, own_rank) = map(norm_and_rank, kernels)
        np.testing.assert_allclose((norm, rank), (0.9, min(2, own_rank)), rtol=1e-6)
    np.testing.assert_allclose(plain.apply(jlinen.fold(ensemble, variables), ROWS)[0], out, rtol=1e-8)


def test_outside_layers_in_a_sequence():
    layers = [nn.Dense(4, **FLOAT), jnp.tanh, nn.Dense(3, use_bias=False, **FLOAT)]
    model = nn.Sequential([*layers[:2], jlinen.SpectralNorm(layers[2])])
    x = jax.random.normal(KEY, (5, 6))
    variables = model.init(KEY, x)
    assert set(flatten_dict(variables["params"])) >= {("layers_2", "layer", "kernel")}
    folded = jlinen.fold(model, variables)
    np.testing.assert_allclose(nn.Sequential(layers).apply(folded, x), model.apply(variables, x), rtol=1e-10)
    assert jlinen.layer_operators(model, variables, x).keys() == {
        ("layers_0", "kernel"),
        ("layers_2", "layer", "kernel"),
    }


def test_checkpoints(tmp_path):
    model = CompactNet()
    variables = perturbed(model.init(KEY, IMAGES))
    expected = model.apply(variables, IMAGES)
    other = model.init(jax.random.key(9), IMAGES)
    restored = serialization.from_bytes(other, serialization.to_bytes(variables))
    np.testing.assert_array_equal(model.apply(restored, IMAGES), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", other)
    np.testing.assert_array_equal(model.apply(restored, IMAGES), expected)
    loose = serialization.msgpack_restore(serialization.to_bytes(variables))
    with pytest.raises(ValueError, match=r"Conv\(features=3.* has a dict, expected a StableRankState; restore"):
        model.apply(loose, IMAGES)
    for function in (jlinen.fold, jlinen.refresh, jlinen.restart):
        with pytest.raises(ValueError, match=r"the collection .* has a .*, expected a StableRankState; restore"):
            function(model, loose)


def test_trained_weights_without_a_state_get_a_converged_one():
    model = Net()
    variables = perturbed(model.init(KEY, IMAGES))
    params = variables["params"]
    _, born = model.apply({"params": params}, IMAGES, mutable=["stable_rank"])
    folded = jlinen.fold(model, {"params": params, **born})["params"]
    rank = norm_and_rank(jaxsrn.CircularConv((6, 6)).to_dense(folded["conv"]["kernel"]))[1]
    np.testing.assert_allclose(rank, 0.3 * 36, rtol=1e-6)


class Flagged(nn.Module):
    """Takes a flag, drops out, normalizes, and skips a layer unless asked."""

    @nn.compact
    def __call__(self, batch, train: bool):
        x = nn.Conv(2, (3, 3))(batch["image"])
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.Conv(2, (2, 2), strides=(2, 2), padding=1)(x) if train else x
        return nn.DenseGeneral((2, 3), axis=(1, 2, 3))(x)


def test_layer_operators():
    expected = {"conv": jaxsrn.CircularConv((6, 6)), "hidden": jaxsrn.Dense(), "dense": jaxsrn.Dense()}
    plain = Net(stable=plain_layer, spectral=plain_layer)
    shapes = jax.eval_shape(plain.init, KEY, IMAGES)
    found = jlinen.layer_operators(plain, shapes, IMAGES)
    assert found == {(name, "kernel"): op for name, op in expected.items()}
    assert set(found) <= set(flatten_dict(shapes["params"]))
    # Also where the trace of the compiled module is remembered.
    variables = jax.eval_shape(Net().init, KEY, IMAGES)
    for model in (Net(), nn.jit(Net)()):
        for _ in range(2):
            inside = jlinen.layer_operators(model, variables, IMAGES)
            assert inside == {(path[0], "layer", "kernel"): op for path, op in found.items()}
    model, batch = Flagged(), {"image": jax.ShapeDtypeStruct((2, 5, 5, 3), jnp.float32)}
    variables = jax.eval_shape(
        lambda x: model.init({"params": KEY, "dropout": KEY}, {"image": x}, True), batch["image"]
    )
    first = {
        ("Conv_0", "kernel"): jaxsrn.ZeroPaddedConv((5, 5)),
        ("DenseGeneral_0", "kernel"): jaxsrn.Dense(input_axes=3, output_axes=2),
    }
    second = {("Conv_1", "kernel"): jaxsrn.ZeroPaddedConv((5, 5), padding=((1, 1), (1, 1)), strides=2)}
    assert jlinen.layer_operators(model, variables, batch, True) == {**first, **second}
    assert jlinen.layer_operators(model, variables, train=True, batch=batch) == {**first, **second}
    sizes = [{"image": jax.ShapeDtypeStruct((2, *shape, 3), jnp.float32)} for shape in ((5, 5), (4, 6))]

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            layer = nn.Conv(2, (3, 3), name="shared")
            return layer(x["image"]), layer(y["image"])

    variables = jax.eval_shape(Twice().init, KEY, *sizes)
    with pytest.raises(ValueError, match=r"shared: called as .*\(5, 5\).* and as .*\(4, 6\).*expected one image size"):
        jlinen.layer_operators(Twice(), variables, *sizes)
    assert jlinen.layer_operators(Twice(), variables, *sizes, unbounded=True) == {
        ("shared", "kernel"): jaxsrn.UnboundedConv()
    }


def test_layer_operators_of_no_image_size():
    """Wrapped layers have the operator of their wrapper; the kernel of the last layer is that of its adjoint."""

    class Sequence(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=2, kernel_dilation=(1, 2), padding="CIRCULAR")(x)
            x = jlinen.SpectralNorm(nn.Conv(4, (3, 3)), input_shape=(6, 6))(x)
            x = nn.ConvTranspose(3, (3, 3), transpose_kernel=True, strides=(2, 1))(x)
            return nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x)

    variables = jax.eval_shape(Sequence().init, KEY, IMAGES)
    found = jlinen.layer_operators(Sequence(), variables, IMAGES, unbounded=True)
    assert found == {
        ("Conv_0", "kernel"): jaxsrn.UnboundedConv(strides=2, kernel_dilation=(1, 2)),
        ("Conv_1", "kernel"): jaxsrn.ZeroPaddedConv((6, 6)),
        ("ConvTranspose_0", "kernel"): jaxsrn.UnboundedConv(strides=(2, 1)),
    }
    assert found.left_out.keys() == {("ConvTranspose_1", "kernel")}
    with pytest.raises(ValueError, match=r"inputs: got none, expected those of Sequence .*unbounded=True"):
        jlinen.layer_operators(Sequence(), variables)


class PlainNNX(nnx.Module):
    """The plain `Net` in NNX, with the given parameters."""

    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 3, (3, 3), padding="CIRCULAR", rngs=rngs, **FLOAT)
        self.hidden = nnx.Linear(108, 6, rngs=rngs, **FLOAT)
        self.dense = nnx.Linear(6, 5, rngs=rngs, **FLOAT)
        for name, leaves in params.items():
            getattr(self, name).kernel[...] = leaves["kernel"]

    def __call__(self, x):
        x = nnx.tanh(self.conv(x))
        return self.dense(nnx.tanh(self.hidden(x.reshape(len(x), -1))))


def wrap_by(library, learned):
    """The same wrappers in both libraries, by the name of the layer; the hidden layer has a learned norm."""

    def wrap(path, layer):
        if path[-1].startswith(("conv", "Conv")):
            return library.StableRankNorm(layer, 0.3, input_shape=(6, 6))
        if path[-1] == "hidden":
            return library.SpectralNorm(layer, norm=learned)
        return library.StableRankNorm(layer, 0.3, norm=2.0, cap=True, gradient="implicit")

    return wrap


LEARNED = nn.initializers.constant(-1.5)
PLAIN = Net(stable=plain_layer, spectral=plain_layer)


def test_linen_and_nnx_are_constrained_alike():
    """The same weights through constrain, forwards that step, refresh and fold: the same outputs and kernels."""
    model = jlinen.constrain(PLAIN, wrap_by(jlinen, LEARNED))
    variables = model.init(KEY, IMAGES)
    plain = {name: variables["params"][name] for name in ("conv", "hidden", "dense")}
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, PLAIN.init(KEY, IMAGES)["params"])
    twin = jnnx.constrain(PlainNNX(plain), wrap_by(jnnx, nnx.Param(jnp.asarray(-1.5))))

    def assert_alike():
        twin_kernels = {
            path[:-1]: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(jnnx.fold(twin))) if path[-1] == "kernel"
        }
        folded = jlinen.fold(model, variables)
        assert jax.tree.structure(folded["params"]) == jax.tree.structure(plain)
        for (name,), kernel in twin_kernels.items():
            np.testing.assert_allclose(folded["params"][name]["kernel"], kernel, rtol=1e-8, atol=1e-10, err_msg=name)
        outputs = model.apply(variables, IMAGES)
        np.testing.assert_allclose(outputs, PLAIN.apply(folded, IMAGES), rtol=1e-10)
        twin.eval()
        np.testing.assert_allclose(outputs, twin(IMAGES), rtol=1e-8, atol=1e-10)
        twin.train()

    assert_alike()
    moved = perturbed(variables)["params"]
    variables = {**variables, "params": {**moved, "constrained": variables["params"]["constrained"]}}
    for name in plain:
        getattr(twin, name).layer.kernel[...] = moved[name]["kernel"]
        getattr(twin, name).layer.bias[...] = moved[name]["bias"]
    reading = model.apply(variables, IMAGES)
    assert_alike()
    variables = jax.jit(lambda variables: jlinen.refresh(model, variables))(variables)
    jnnx.refresh(twin)
    assert np.any(model.apply(variables, IMAGES) != reading)
    assert_alike()
    _, changed = model.apply(variables, IMAGES, mutable=["stable_rank"])
    variables = {**variables, **changed}
    twin(IMAGES)
    assert_alike()


def test_a_constrained_model_learns_as_its_folded_one():
    """Gradients through the constrained call and through fold, the learned norm's among them; with jit and remat."""
    plain = CompactNet(stable=plain_layer, spectral=plain_layer)
    wrap = wrap_by(jlinen, LEARNED)

    def live(params, model, variables):
        return cross_entropy(model.apply({**variables, "params": params}, IMAGES))

    def through_fold(params, model, variables):
        return cross_entropy(plain.apply(jlinen.fold(model, {**variables, "params": params}), IMAGES))

    lifted = [transform(CompactNet)(stable=plain_layer, spectral=plain_layer) for transform in (nn.remat, nn.jit)]
    for module in (plain, *lifted):
        model = jlinen.constrain(
            jlinen.constrain(module, wrap, nn.Conv),
            lambda path, layer: jlinen.SpectralNorm(layer, norm=LEARNED),
            lambda path, layer: path == ("head",),
        )
        variables = perturbed(model.init(KEY, IMAGES))
        assert set(variables["stable_rank"]["constrained"]) == {"Conv_0", "head"}
        grads, expected = (
            jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], model, variables)
            for loss in (live, through_fold)
        )
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
        assert_trees_close(grads, expected, rtol=1e-8, atol=1e-12)


def test_layer_operators_of_a_constrained_model():
    """Held layers have the operator of their wrapper, whatever size the call has; the others that of the call."""
    module = CompactNet(stable=plain_layer, spectral=plain_layer)
    model = jlinen.constrain(
        module, lambda path, layer: jlinen.SpectralNorm(layer, input_shape=(9, 9)), lambda path, _: path == ("Conv_0",)
    )
    variables = model.init(KEY, IMAGES)
    held = {("Conv_0", "kernel"): jaxsrn.CircularConv((9, 9))}
    others = {(name, "kernel"): jaxsrn.Dense() for name in ("Dense_0", "head")}
    params_only = {"params": variables["params"]}
    for given in (variables, params_only):
        assert jlinen.layer_operators(model, given, IMAGES) == {**held, **others}
    seen = jlinen.layer_operators(module, params_only, IMAGES)
    assert seen == {("Conv_0", "kernel"): jaxsrn.CircularConv((6, 6)), **others}


def test_rules_of_a_constrained_model_add_up():
    """Two calls of `constrain`, each for one layer: both kernels have their own norm."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="second", **FLOAT)(nn.Dense(3, name="first", **FLOAT)(x))

    model = Two()
    for name, norm in (("first", 2.0), ("second", 3.0)):
        wrap = functools.partial(jlinen.SpectralNorm, norm=norm)
        model = jlinen.constrain(
            model, lambda path, layer, wrap=wrap: wrap(layer), lambda path, _, name=name: path == (name,)
        )
    folded = jlinen.fold(model, model.init(KEY, ROWS))
    norms = [np.linalg.norm(folded["params"][name]["kernel"], 2) for name in ("first", "second")]
    np.testing.assert_allclose(norms, [2, 3], rtol=1e-6)


def test_constrain_in_a_model_of_many_parts():
    """Stacked layers, wrappers that are there already, flags, running means: steps once a call, and norms are 1."""

    class Parts(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train, **FLOAT)(x)
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            x, _ = nn.scan(Cell, **axes)(wrapped=False, name="stack")(x, None)
            x = jlinen.SpectralNorm(nn.Dense(4, name="own", **FLOAT), norm=3.0)(x)
            twice = nn.Dense(4, name="twice", **FLOAT)
            return twice(twice(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return jlinen.constrain(Parts(name="parts"), lambda path, layer: jlinen.SpectralNorm(layer))(x, train)

    model = Outer()
    variables = model.init(KEY, ROWS)
    assert set(variables["params"]["parts"]) == {"BatchNorm_0", "stack", "own", "twice"}
    assert set(variables["stable_rank"]["parts"]["constrained"]) == {"stack", "twice"}
    np.testing.assert_array_equal(variables["batch_stats"]["parts"]["BatchNorm_0"]["mean"], 0)
    folded = jlinen.fold(model, variables)["params"]["parts"]
    kernels = [*folded["stack"]["Dense_0"]["kernel"], folded["twice"]["kernel"], folded["own"]["kernel"] / 3]
    np.testing.assert_allclose([norm_and_rank(kernel)[0] for kernel in kernels], 1, rtol=1e-8)
    variables = {**perturbed(variables), "stable_rank": variables["stable_rank"]}
    _, changed = model.apply(variables, ROWS, True, mutable=["stable_rank", "batch_stats"])
    refreshed = jlinen.refresh(model, variables)
    assert_trees_close(changed["stable_rank"], refreshed["stable_rank"], rtol=1e-8, atol=1e-10)
    mean = changed["batch_stats"]["parts"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * ROWS.mean(0), rtol=1e-6)


def test_states_that_start_under_jit():
    """They are those of an eager start: layers of one shape and of another, learned norms, a stack."""

    class Parts(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(Cell, **axes)(wrapped=False, name="stack")(x, None)
            for features in (4, 4, 4, 3):
                x = nn.Dense(features, **FLOAT)(x)
            return x

    def wrap(path, layer):
        norm = nn.initializers.constant(2.0) if path == ("Dense_1",) else 2.0
        return jlinen.StableRankNorm(layer, 0.4, norm=norm)

    model = jlinen.constrain(Parts(), wrap)
    eager, jitted = model.init(KEY, ROWS), jax.jit(model.init)(KEY, ROWS)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(jnp.shape, jitted)
    folded = [flatten_dict(jlinen.fold(model, variables)["params"]) for variables in (eager, jitted)]
    norms = {}
    for path, kernel in folded[0].items():
        if path[-1] == "kernel":
            np.testing.assert_allclose(folded[1][path], kernel, rtol=1e-8, atol=1e-10, err_msg=path)
            norms[path[0]] = [norm_and_rank(one)[0] for one in kernel.reshape((-1, *kernel.shape[-2:]))]
    assert {name: len(values) for name, values in norms.items()} == {"stack": 2} | {f"Dense_{i}": 1 for i in range(4)}
    for name, values in norms.items():
        np.testing.assert_allclose(values, 2, rtol=1e-8, err_msg=name)


def test_constraints_around_trained_weights():
    """Their states are born converged where the collection is missing and mutable; a single layer is a model too."""
    model = jlinen.constrain(nn.Dense(4, **FLOAT), lambda path, layer: jlinen.StableRankNorm(layer, 0.3))
    params = nn.Dense(4, **FLOAT).init(KEY, ROWS)["params"]
    own = norm_and_rank(params["kernel"])[1]
    _, born = model.apply({"params": params}, ROWS, mutable=["stable_rank"])
    folded = jlinen.fold(model, {"params": params, **born})["params"]
    assert own > 1.2
    np.testing.assert_allclose(norm_and_rank(folded["kernel"]), (1, 1.2), rtol=1e-8)
    np.testing.assert_array_equal(folded["bias"], params["bias"])


class Counting(nn.Module):
    """It counts its calls, starts a variable at random, and has a second method."""

    features: int = 3

    def setup(self):
        self.layer = nn.Dense(self.features, **FLOAT)
        self.calls = self.variable("calls", "count", lambda: jnp.zeros(()))
        self.noise = self.variable("noise", "start", lambda: jax.random.normal(self.make_rng("params")))

    def __call__(self, inputs):
        self.calls.value += 1
        return self.layer(inputs)

    def encode(self, inputs):
        return self.layer(inputs)


class CountingDense(nn.Dense):
    """A layer that counts its calls."""

    @nn.compact
    def __call__(self, inputs):
        calls = self.variable("calls", "count", lambda: jnp.zeros(()))
        calls.value += 1
        return super().__call__(inputs)


@pytest.mark.parametrize("make", [Counting, functools.partial(CountingDense, 3, **FLOAT)], ids=["model", "layer"])
def test_init_of_a_constrained_model_leaves_the_variables_of_the_plain_one(make):
    """Parameters are made by one pass and used by another, which writes nothing."""

    def wrap(path, layer):
        return jlinen.SpectralNorm(layer, computes=nn.Dense)

    plain = make()
    model, x = jlinen.constrain(plain, wrap, nn.Dense), jnp.ones((2, 4))
    expected = plain.init(KEY, x)
    outputs, variables = model.init_with_output(KEY, x)
    assert expected["calls"]["count"] == 1
    jax.tree.map(np.testing.assert_array_equal, {name: variables[name] for name in expected}, expected)
    np.testing.assert_allclose(outputs, model.apply(variables, x, mutable=["calls"])[0], rtol=1e-10)
    _, changed = model.apply(variables, x, mutable=["calls", "stable_rank"])
    assert changed["calls"]["count"] == 2
    if make is not Counting:
        wrapped = jlinen.SpectralNorm(plain, computes=nn.Dense).init(KEY, x)
        assert jax.tree.leaves(wrapped["calls"]) == [1]


def test_calls_by_keyword_and_other_methods():
    x, model = jnp.ones((2, 4)), jlinen.constrain(Counting(), lambda path, layer: jlinen.SpectralNorm(layer))
    variables = model.init(KEY, inputs=x)
    layer = jlinen.SpectralNorm(nn.Dense(3, **FLOAT))
    weights = layer.init(KEY, inputs=x)
    np.testing.assert_array_equal(layer.apply(weights, inputs=x), layer.apply(weights, x))
    assert jlinen.layer_operators(model, variables, inputs=x) == {("layer", "kernel"): jaxsrn.Dense()}
    with pytest.raises(AttributeError, match=r"encode: got it of a constrained Counting, expected __call__.*fold"):
        model.apply(variables, x, method="encode")
    with pytest.raises(AttributeError, match='no attribute "other"'):
        model.apply(variables, x, method="other")
    assert type(copy.deepcopy(model)) is type(model)
    folded = jlinen.fold(model, variables)
    expected, _ = model.apply(variables, x, mutable=["calls"])
    np.testing.assert_allclose(Counting().apply(folded, x, method="encode"), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("wrap", "where", "message"),
    [
        (wrap_by(jlinen, LEARNED), nn.Embed, r"where: got .*Embed.*, which matches no layer of Net"),
        (lambda path, layer: layer, nn.Dense, r"hidden: wrap: got a Dense, expected a StableRankNorm or a"),
        (
            lambda path, layer: jlinen.SpectralNorm(layer, input_shape=8),
            nn.Conv,
            r"conv: Conv\(.*input_shape: got \(8,\)",
        ),
        (lambda path, layer: jlinen.SpectralNorm(layer), ..., r"Net\(\): layer: got Net, expected Conv"),
    ],
)
def test_misuse_of_constrain(wrap, where, message):
    with pytest.raises(ValueError, match=message):
        jlinen.constrain(PLAIN, wrap, where).init(KEY, IMAGES)


NAME = r"Conv\(features=3, kernel_size=\(3, 3\)\): "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jlinen.SpectralNorm(nn.BatchNorm(True)),
            r"BatchNorm\(.*got BatchNorm, expected Conv, ConvTranspose",
        ),
        (lambda: jlinen.SpectralNorm(nn.Einsum((2, 3), "ij,jk->ik")), "Einsum.*got Einsum, expected"),
        (
            lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3), strides=2, input_dilation=(1, 2), padding=2)),
            NAME + r"input_dilation: got \(1, 2\) with strides=\(2, 2\) and .*give input_shape=",
        ),
        (lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3), padding="REFLECT")), NAME + "padding: got 'REFLECT'"),
        (lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3)), input_shape=8), NAME + r"input_shape: got \(8,\), expected 2"),
        (lambda: jlinen.StableRankNorm(nn.Conv(3, (3, 3)), 0.0, input_shape=(8, 8)), NAME + "fraction: got 0.0"),
        (lambda: jlinen.StableRankNorm(nn.Conv(3, (3, 3)), 1.1, input_shape=(8, 8)), NAME + "fraction: got 1.1"),
        (
            lambda: jlinen.StableRankNorm(nn.Conv(3, (3, 3), padding="CIRCULAR"), 0.05, input_shape=(8, 8)),
            # 64 / 9 of 128.
            NAME + "fraction: got 0.05, expected at least 0.0555556",
        ),
        (
            lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3), padding="REFLECT"), input_shape=(8, 8)),
            NAME + "padding: got 'REFLECT'",
        ),
        (
            lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3), mask=jnp.ones((3, 3, 2, 3))), input_shape=(8, 8)),
            NAME + "mask: got one, expected None",
        ),
        (
            lambda: jlinen.SpectralNorm(nn.Conv(3, (3, 3), strides=2, padding="CIRCULAR"), input_shape=(7, 8)),
            NAME + r"strides: got \(2, 2\) on an image of \(7, 8\)",
        ),
        (lambda: jlinen.SpectralNorm(nn.DenseGeneral(3, batch_dims=(0,))), "DenseGeneral.*batch axes: got some"),
        (lambda: jlinen.SpectralNorm(nn.Dense(3), norm=-1.0), r"Dense\(features=3\): norm: got -1.0, expected"),
        (lambda: jlinen.SpectralNorm(nn.Dense(3), norm=np.ones(2)), r"norm: got shape \(2,\), expected one number"),
        (lambda: jlinen.SpectralNorm(nn.Dense(3), norm=None, cap=True), r"Dense\(features=3\): cap: got True"),
        (lambda: jlinen.SpectralNorm(nn.Dense(3), gradient="exact"), "gradient: got 'exact', expected one of"),
    ],
)
def test_misuse_names_the_layer(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(KEY, jnp.ones((2, 8, 8, 2)))


class Standardized(nn.Conv):
    """A weight-standardising convolution."""

    def param(self, name, init, *args, **options):
        value = super().param(name, init, *args, **options)
        return value / value.std(axis=(0, 1, 2)) if name == "kernel" else value


class Local(nn.Conv):
    shared_weights = False


class Squared(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) ** 2


class Stem(nn.Conv):
    """Harmless: other defaults, a further field, a further method."""

    kernel_size: tuple = (3, 3)
    kernel_init: object = nn.initializers.normal(1.0)
    purpose: str = "stem"

    def describe(self):
        return self.purpose


class Dense(nn.Module):
    """Only the name is Flax's; the map is that of `nn.Dense`, or twice it."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        return self.scale * x @ self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 4))


OTHERS = {
    "standardized": (Standardized(3, (3, 3)), "got Standardized, a Conv with its own param"),
    "local": (Local(3, (3, 3)), "a Conv with its own shared_weights"),
    "call": (Squared(4), "a Dense with its own __call__"),
    "name": (Dense(), "got Dense, expected Conv, ConvTranspose"),
    "function": (nn.Dense(4, dot_general=lambda x, k, *_, **__: x @ (2 * k)), "a Dense with its own dot_general"),
    "lifted": (nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4), "its own __call__"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_may_compute_another_map_is_refused(name):
    layer, message = OTHERS[name]
    x = jnp.ones((2, 4, 4, 2))
    with pytest.raises(ValueError, match=message + r".*say which: computes="):
        jlinen.SpectralNorm(layer, input_shape=(4, 4)).init(KEY, x)
    with pytest.raises(ValueError, match=r"computes: got <class 'object'>, expected one of Flax's Conv"):
        jlinen.SpectralNorm(layer, input_shape=(4, 4), computes=object).init(KEY, x)


def test_a_subclass_that_changes_nothing_is_its_base():
    basis = jnp.eye(32, dtype=jnp.float64).reshape(32, 4, 4, 2)
    outputs = jlinen.SpectralNorm(Stem(3, **FLOAT), input_shape=(4, 4)).init_with_output(KEY, basis)[0]
    np.testing.assert_allclose(norm_and_rank(outputs.reshape(32, -1))[0], 1, rtol=1e-6)


def test_a_vouched_layer_is_what_it_is_vouched_for():
    basis = jnp.eye(3)
    for scale in (1, 2):
        outputs = jlinen.SpectralNorm(Dense(scale), computes=nn.Dense).init_with_output(KEY, basis)[0]
        np.testing.assert_allclose(norm_and_rank(outputs)[0], scale, rtol=1e-5)
    with pytest.raises(ValueError, match=r"Dense\(\): layer: it has no mask, strides, .*expected the fields of"):
        jlinen.SpectralNorm(Dense(), input_shape=(4, 4), computes=nn.Conv).init(KEY, basis)
    with pytest.raises(ValueError, match=r"BatchNorm\(\): it has no parameter 'kernel'"):
        jlinen.SpectralNorm(nn.BatchNorm(True), computes=nn.Dense).init(KEY, basis)
    model, x = nn.Sequential([Standardized(3, (3, 3)), Squared(3), Dense()]), jnp.ones((1, 4, 4, 2))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=r"layers_0: Standardized\(.*with its own param"):
        jlinen.layer_operators(model, variables, x)
    found = jlinen.layer_operators(
        model, variables, x, computes={Standardized: nn.Conv, Squared: None, Dense: nn.Dense}
    )
    assert found == {
        ("layers_0", "kernel"): jaxsrn.ZeroPaddedConv((4, 4)),
        ("layers_2", "kernel"): jaxsrn.Dense(),
    }


def test_misuse_of_variables():
    model, x = jlinen.StableRankNorm(nn.Dense(3), 0.5), jnp.ones((2, 4))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=r"variables: got the collections \['params'\] for StableRankNorm, expected"):
        jlinen.fold(model, {"params": variables["params"]})
    with pytest.raises(
        ValueError, match=r"Dense\(features=3\): the collection 'stable_rank' was made for .*start anew"
    ):
        jlinen.StableRankNorm(nn.Dense(3), 0.6).apply(variables, x)

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return jlinen.SpectralNorm(layer)(jlinen.SpectralNorm(layer, norm=2.0)(x))

    with pytest.raises(ValueError, match="Dense_0: it has several wrappers, expected one"):
        jlinen.fold(Twice(), Twice().init(KEY, x))


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_whose_kernel_flax_changes_are_refused(wrapper):
    """They compute with another kernel than they store."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return wrapper(nn.Dense(4))(nn.Dense(5)(x), **options)

    x = jnp.ones((2, 3), jnp.float32)
    model = Net()
    variables = model.init(jax.random.key(0), x)
    message = f"{wrapper.__name__}_0: got Flax's {wrapper.__name__}, which changes the kernel"
    with pytest.raises(ValueError, match=message):
        jlinen.layer_operators(model, variables, x)
    with pytest.raises(ValueError, match=message):
        jlinen.constrain(model, lambda path, layer: jlinen.SpectralNorm(layer)).init(jax.random.key(0), x)


def test_what_matches_no_layer_is_named():
    model = jlinen.constrain(nn.LayerNorm(), lambda path, layer: jlinen.SpectralNorm(layer))
    with pytest.raises(ValueError, match="where: got Conv, ConvTranspose, Dense, DenseGeneral, which matches no layer"):
        model.init(jax.random.key(0), jnp.ones((2, 3), jnp.float32))


def test_a_wrapper_whose_scope_is_shared():
    """`nn.share_scope` puts the variables of the wrapper where its parent has its own."""

    class Shared(nn.Module):
        inner: nn.Module

        def setup(self):
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return self.inner(x)

    model = Shared(jlinen.SpectralNorm(nn.Conv(3, (3, 3), **FLOAT)))
    variables = model.init(KEY, IMAGES)
    expected = model.apply(variables, IMAGES)
    folded = jlinen.fold(model, variables)
    assert folded["params"].keys() == {"kernel", "bias"}
    np.testing.assert_allclose(nn.Conv(3, (3, 3), **FLOAT).apply(folded, IMAGES), expected, rtol=1e-12)
    for again in (jlinen.refresh(model, variables), jlinen.restart(model, variables)):
        np.testing.assert_allclose(model.apply(again, IMAGES), expected, rtol=1e-6, atol=1e-6)


def test_parameters_alone_are_no_variables():
    model = jlinen.SpectralNorm(nn.Dense(3))
    variables = model.init(KEY, jnp.ones((1, 4)))
    for function in (jlinen.fold, jlinen.refresh):
        with pytest.raises(ValueError, match="variables: got the collections"):
            function(model, variables["params"])
    with pytest.raises(
        ValueError, match=r"variables: got the collections \['layer'\] for SpectralNorm, expected 'params'"
    ):
        jlinen.layer_operators(model, variables["params"], jnp.ones((1, 4)))
