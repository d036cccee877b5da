"""Lipschitz constants and generalization measures: against explicit Jacobians and literal formulas in NumPy."""

from __future__ import annotations

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense, derivative, gaussian
from events import TRACES, counted
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree

import jaxsrn
import jaxsrn.linen as jlinen
import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds, lipschitz, penalties
from jaxsrn.lipschitz import jacobians

# A chain of layers of every kind with ReLUs between them: 8 samples of 2 channels to 3 logits.
OPS = {("first",): CircularConv((8,)), ("second",): ZeroPaddedConv((8,), strides=2), ("last",): Dense()}
SHAPES = {("first",): (3, 2, 3), ("second",): (3, 3, 2), ("last",): (8, 3)}
INPUT = (8, 2)


def chain(params, x, tap=lambda h: h):
    h = tap(jax.nn.relu(OPS["first",].apply(params["first"], x)))
    h = tap(jax.nn.relu(OPS["second",].apply(params["second"], h)))
    return h.reshape((len(x), 8)) @ params["last"]


def kernels(seed: int = 0) -> dict[str, np.ndarray]:
    return {path[0]: gaussian(shape, seed) for path, shape in SHAPES.items()}


def matrices(params) -> list[np.ndarray]:
    return [dense(params[path[0]], op) for path, op in OPS.items()]


def explicit(params, x):
    """The hidden layers, the logits and the Jacobian of `chain` at one sample, by the matrices."""
    h, jacobian, hidden = x.ravel(), np.eye(x.size), []
    *before, last = matrices(params)
    for matrix in before:
        h = matrix @ h
        jacobian = (h > 0)[:, None] * (matrix @ jacobian)
        h = np.maximum(h, 0)
        hidden.append(h)
    return hidden, last @ h, last @ jacobian


def deep(params, x):
    """A smooth network whose Jacobian has many leading values: 30 inputs, 40 outputs."""
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])


DEEP = [gaussian((30, 50)) / 5, gaussian((50, 40)) / 5]


def jacobian_of_deep(params, x):
    h = np.tanh(x @ params[0])
    return (1 - np.tanh(h @ params[1]) ** 2)[:, None] * params[1].T @ np.diag(1 - h**2) @ params[0].T


# Local constants


def linear(params, x):
    return x @ params


def test_local_is_the_norm_of_the_explicit_jacobian():
    x, params = gaussian((5, *INPUT)), kernels()
    expected = [np.linalg.norm(explicit(params, sample)[2], 2) for sample in x]
    single = jax.tree.map(jnp.float32, params)
    found = lipschitz.local(chain, single, x.astype(np.float32))
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, expected, rtol=1e-4)

    x = gaussian((3, 30))
    expected = [np.linalg.norm(jacobian_of_deep(DEEP, sample), 2) for sample in x]
    found = lipschitz.local(deep, DEEP, x)
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    assert np.all(found.residual < 1e-10)
    # A coarse search among nearly equal values stops early, from below, and says so.
    left, _, right = np.linalg.svd(gaussian((60, 60)))
    near = left * np.linspace(1, 0.9, 60) @ right
    fine, coarse = (lipschitz.local(linear, near, x[:, :1].repeat(60, 1), tolerance=t) for t in (1e-12, 0.1))
    np.testing.assert_allclose(fine.value, 1, rtol=1e-10)
    assert np.all(coarse.value < 1 - 1e-6)
    assert np.all((coarse.residual > 1e-4) & (coarse.residual <= 0.1))


def test_derivatives_of_local_constants():
    x = gaussian((2, 30))

    def total(params, x):
        return jnp.sum(lipschitz.local(deep, params, x).value) + jnp.sum(
            lipschitz.local_frobenius(deep, params, x).value
        )

    by_reverse = jax.jit(jax.grad(total, (0, 1)))(DEEP, x)
    directions = [gaussian(w.shape, 1) for w in DEEP], gaussian(x.shape, 1)
    _, by_forward = jax.jit(lambda p, x, d: jax.jvp(total, (p, x), d))(DEEP, x, directions)

    def literal(step):
        params = [w + step * d for w, d in zip(DEEP, directions[0], strict=True)]
        found = [jacobian_of_deep(params, sample) for sample in x + step * directions[1]]
        return sum(np.linalg.norm(j, 2) + np.linalg.norm(j) for j in found)

    expected = derivative(literal, 0.0, 1.0)
    along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(by_reverse), jax.tree.leaves(directions), strict=True))
    np.testing.assert_allclose([along, by_forward], expected, rtol=1e-6)


def test_local_frobenius_norms():
    x = gaussian((3, 30))
    expected = [jacobian_of_deep(DEEP, sample) for sample in x]
    norms = np.array([np.linalg.norm(j) for j in expected])
    exact = lipschitz.local_frobenius(deep, DEEP, x)
    np.testing.assert_allclose(exact.value, norms, rtol=1e-12)
    assert np.all(exact.standard_error == 0)
    params, samples = kernels(), gaussian((2, *INPUT))
    np.testing.assert_allclose(
        lipschitz.local_frobenius(chain, params, samples).value,
        [np.linalg.norm(explicit(params, sample)[2]) for sample in samples],
        rtol=1e-12,
    )

    found = lipschitz.local_frobenius(deep, DEEP, x, key=jax.random.key(0), num_probes=2000)
    # The variance of `z^T A z` for random signs is `2 (||A||_F^2 - sum A_ii^2)`; the smaller side has 30 entries.
    grams = [j.T @ j for j in expected]
    variances = np.array([2 * (np.linalg.norm(a) ** 2 - np.sum(np.diag(a) ** 2)) for a in grams])
    np.testing.assert_allclose(found.standard_error, np.sqrt(variances / 2000) / (2 * norms), rtol=0.1)
    assert np.all(np.abs(found.value - norms) < 4 * found.standard_error)
    assert len(set(np.asarray((found.value - norms) / norms).round(9))) == 3


# Pairs


def test_pairs_by_the_definition():
    params, x, y = kernels(), gaussian((4, *INPUT)), gaussian((4, *INPUT), 1)
    y[3] = x[3]
    found = lipschitz.pairwise(chain, params, x, y)
    expected = [
        np.linalg.norm(explicit(params, a)[1] - explicit(params, b)[1]) / np.linalg.norm(a - b)
        for a, b in zip(x[:3], y[:3], strict=True)
    ]
    np.testing.assert_allclose(found, [*expected, 0], rtol=1e-12)
    slope = jax.grad(lambda y: jnp.sum(lipschitz.pairwise(chain, params, x, y)))(y)
    assert np.all(np.isfinite(slope))


def test_pairs_climb():
    """To the norm of a linear map, of which random pairs see a part; and never down."""
    matrix = gaussian((200, 30))
    x, y = gaussian((8, 200)), gaussian((8, 200), 1)
    norm = np.linalg.norm(matrix, 2)
    assert np.max(lipschitz.pairwise(linear, matrix, x, y)) < 0.5 * norm
    found = lipschitz.ascent(linear, matrix, x, y, num_steps=100)
    np.testing.assert_allclose(found.ratio, norm, rtol=1e-3)
    assert np.all(found.ratio <= norm * (1 + 1e-12))
    np.testing.assert_allclose(np.linalg.norm(found.x - found.y, axis=1), np.linalg.norm(x - y, axis=1), rtol=1e-9)

    params, x, y = kernels(), gaussian((50, *INPUT)), gaussian((50, *INPUT), 1)
    start = lipschitz.pairwise(chain, params, x, y)
    found = lipschitz.ascent(chain, params, x, y)
    np.testing.assert_allclose(found.ratio, lipschitz.pairwise(chain, params, found.x, found.y), rtol=1e-12)
    assert np.all(found.ratio >= start * (1 - 1e-12))
    assert np.median(found.ratio / start) > 1.5

    # The points stay in the box, the ratio holds for them, and its gradient in the parameters holds them constant.
    found = lipschitz.ascent(chain, params, x, y, box=(-0.5, 0.5), num_steps=20)
    assert max(np.max(np.abs(found.x)), np.max(np.abs(found.y))) <= 0.5
    slope = jax.grad(lambda p: lipschitz.ascent(chain, p, x, y, box=(-0.5, 0.5), num_steps=20).ratio.sum())(params)
    fixed = jax.grad(lambda p: lipschitz.pairwise(chain, p, found.x, found.y).sum())(params)
    np.testing.assert_allclose(slope["first"], fixed["first"], rtol=1e-9)


# Upper bounds


def chain_of_matrices(matrices, x):
    """`chain` by its matrices, which XLA multiplies faster than 1,000 convolutions of kernels of their own."""
    h = x.reshape((len(x), -1))
    for matrix in matrices[:-1]:
        h = jax.nn.relu(h @ matrix.T)
    return h @ matrices[-1].T


def test_lower_bounds_never_exceed_upper_ones():
    """In 1,000 random networks, with every kind of layer; at every image size by unbounded operators."""
    rng = np.random.default_rng(0)
    params = {path[0]: rng.standard_normal((1000, *shape)) for path, shape in SHAPES.items()}
    params["first"] *= 10 ** rng.uniform(-2, 2, (1000, 1, 1, 1))
    x, y = gaussian((4, *INPUT)), gaussian((4, *INPUT), 1)

    @jax.jit
    def lower(params):
        matrices = [op.to_dense(params[path[0]]) for path, op in OPS.items()]
        climbed = lipschitz.ascent(chain_of_matrices, matrices, x, y, num_steps=20)
        sampled = lipschitz.pairwise(chain_of_matrices, matrices, x, y)
        return jnp.concatenate([lipschitz.local(chain_of_matrices, matrices, climbed.x).value, sampled, climbed.ratio])

    found = np.max(jax.vmap(lower)(params), axis=1)
    unbounded = OPS | {("first",): UnboundedConv(), ("second",): UnboundedConv(strides=2)}
    product = jax.vmap(lambda p: lipschitz.upper_bound(OPS, p))(params)
    certified = jax.vmap(lambda p: lipschitz.certified_upper_bound(OPS, p))(params)
    at_every_size = jax.vmap(lambda p: lipschitz.certified_upper_bound(unbounded, p))(params)
    assert np.all(found <= np.asarray(product) * (1 + 1e-12))
    assert np.all(product <= certified)
    assert np.all(found <= np.asarray(at_every_size))
    assert np.all(product <= at_every_size * (1 + 1e-9))
    assert np.max(found / certified) > 0.5
    # Without activations and of one layer, the two ends meet.
    layers, matrix = {(): Dense()}, gaussian((6, 4))
    local = lipschitz.local(linear, matrix, gaussian((1, 6))).value[0]
    np.testing.assert_allclose(lipschitz.upper_bound(layers, matrix), local, rtol=1e-12)
    assert local <= lipschitz.certified_upper_bound(layers, matrix)


def test_products_of_norms():
    params = kernels()
    norms = [np.linalg.norm(matrix, 2) for matrix in matrices(params)]
    np.testing.assert_allclose(lipschitz.upper_bound(OPS, params), np.prod(norms), rtol=1e-9)
    np.testing.assert_allclose(lipschitz.upper_bound(OPS, params, log=True), np.log(norms).sum(), rtol=1e-9)
    bound = np.prod([bounds.l1(params[path[0]], op) for path, op in OPS.items()])
    np.testing.assert_allclose(lipschitz.upper_bound(OPS, params, norm=bounds.l1), bound, rtol=1e-12)
    certified = lipschitz.certified_upper_bound(OPS, params)
    assert np.prod(norms) <= certified
    log = lipschitz.certified_upper_bound(OPS, params, log=True)
    np.testing.assert_allclose(log, np.log(certified), rtol=1e-12)
    assert log > np.log(norms).sum()


# Generalization measures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_2_1_of_every_operator(case):
    kernel = gaussian(case.kernel_shape)
    expected = np.sum(np.linalg.norm(dense(kernel, case.op), axis=1))
    found = jax.jit(lipschitz.norm_2_1)(jnp.asarray(kernel), case.op)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_spectral_measures_are_literal():
    params, margin = kernels(), np.array([0.5, 2.0, 0.0, -1.0, np.nan])
    found = matrices(params)
    norms = np.array([np.linalg.norm(w, 2) for w in found])
    stable_ranks = np.array([np.linalg.norm(w) ** 2 for w in found]) / norms**2
    sums = np.array([np.sum(np.linalg.norm(w, axis=1)) for w in found])
    for measure, factor in (
        (lipschitz.spec_fro, np.sum(stable_ranks)),
        (lipschitz.spec_l1, np.sum((sums / norms) ** (2 / 3)) ** 3),
    ):
        expected = [*(np.prod(norms) ** 2 * factor / margin[:2] ** 2), np.inf, np.inf, np.nan]
        np.testing.assert_allclose(measure(OPS, params, margin), expected, rtol=1e-9)
        np.testing.assert_allclose(measure(OPS, params, margin, log=True), np.log(expected), rtol=1e-9)
        np.testing.assert_allclose(measure(OPS, params, 2), expected[1], rtol=1e-9)
        # Of scale 10 each layer of a chain scales the margin too, and the measure stays as it is.
        scaled = params | {"first": 10 * params["first"]}
        np.testing.assert_allclose(measure(OPS, scaled, 20.0), expected[1], rtol=1e-9)
        slope = jax.jit(jax.grad(lambda p, measure=measure: measure(OPS, p, 2.0)))
        assert np.all(np.isfinite(ravel_pytree(slope(jax.tree.map(jnp.zeros_like, params)))[0]))
        direction = gaussian(params["second"].shape, 3)
        along = np.vdot(slope(params)["second"], direction)
        by_difference = derivative(
            lambda w, measure=measure: measure(OPS, params | {"second": w}, 2.0), params["second"], direction, 1e-5
        )
        np.testing.assert_allclose(along, by_difference, rtol=1e-5)


def test_spectral_measures_of_matrices_of_several_axes():
    """The projections of attention are matrices."""
    heads = gaussian((4, 2, 3))
    layers, matrix = {("heads",): Dense(output_axes=2)}, {("heads",): Dense()}
    for measure in (lipschitz.spec_fro, lipschitz.spec_l1):
        found, expected = measure(layers, {"heads": heads}, 1.0), measure(matrix, {"heads": heads.reshape(4, 6)}, 1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def literal_margin(logits, label):
    return logits[label] - max(np.delete(logits, label))


def test_margins():
    logits, labels = gaussian((6, 4)), np.array([0, 1, 2, 3, 3, 0])
    expected = [literal_margin(row, label) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(lipschitz.margins(logits, labels), expected, rtol=1e-12)
    assert lipschitz.margins(jnp.ones(2, jnp.bfloat16), 1).dtype == jnp.float32
    # What is not known when the program is traced is data in the result.
    assert np.array_equal(np.isnan(jax.jit(lipschitz.margins)(logits, labels - 1)), labels == 0)
    assert np.isnan(lipschitz.margins(np.array([1.0, np.nan]), 0))
    # There may be more classes than a narrow type of labels has numbers.
    many = gaussian((1, 300))
    for dtype in (np.uint8, np.int8):
        found = lipschitz.margins(many, np.array([3], dtype))
        np.testing.assert_allclose(found, literal_margin(many[0], 3), rtol=1e-12)


def test_jac_norm_is_literal():
    params, x, labels = kernels(), gaussian((6, *INPUT)), np.array([0, 1, 2, 0, 1, 2])
    _, second, last = matrices(params)
    own, sums = [], []
    for sample, label in zip(x, labels, strict=True):
        hidden, logits, _ = explicit(params, sample)
        other = np.argmax(np.where(np.arange(3) == label, -np.inf, logits))
        slope = last[label] - last[other]
        before = second.T @ (slope * (hidden[1] > 0))
        own.append(literal_margin(logits, label))
        sums.append(sum(np.linalg.norm(h) * np.linalg.norm(j) for h, j in zip(hidden, (before, slope), strict=True)))
    own = np.array(own)
    assert min(own) < 0 < max(own)
    np.testing.assert_allclose(
        lipschitz.jac_norm(chain, params, x, labels), np.where(own > 0, sums / own, np.inf), rtol=1e-10
    )
    np.testing.assert_allclose(
        lipschitz.jac_norm(chain, params, x, labels, margin=0.5), np.multiply(2, sums), rtol=1e-10
    )
    slope = jax.grad(lambda p: lipschitz.jac_norm(chain, p, x, labels, margin=0.5).sum())(params)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in slope.values())


# Data sets


def test_histograms():
    values = np.abs(gaussian((1000,)))
    expected, edges = np.histogram(values, 30)
    for ratios in (values, jnp.asarray(values), (values[i : i + 300] for i in range(0, 1000, 300))):
        found = lipschitz.histogram(ratios, bins=30)
        np.testing.assert_array_equal(found.counts, expected)
        np.testing.assert_array_equal(found.edges, edges)
        assert np.mean(values <= found.percentile) == pytest.approx(0.95, abs=1e-3)
        assert found.largest == max(values)
    assert lipschitz.histogram(values, bins=[0, 1, 2], percentile=50).counts.sum() == np.sum(values <= 2)
    with pytest.raises(ValueError, match=r"bins: got 2\.5, expected an integer or the edges"):
        lipschitz.histogram(values, bins=2.5)


def test_over_batches():
    params, x, y = kernels(), gaussian((23, *INPUT)), gaussian((23, *INPUT), 1)
    pairwise = functools.partial(lipschitz.pairwise, chain, params)
    whole = np.asarray(pairwise(x, y))
    sizes = []

    def seen(*batch):
        sizes.append(len(batch[0]))
        return {"ratio": pairwise(*batch)}

    found = lipschitz.over_batches(seen, x, y, batch_size=10)["ratio"]
    assert isinstance(found, np.ndarray)
    assert sizes == [10, 10, 10]
    np.testing.assert_allclose(found, whole, rtol=1e-12)
    with counted(TRACES) as events:
        lipschitz.over_batches(pairwise, x, y, batch_size=10)
    assert not events
    batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, 23, 8))
    np.testing.assert_allclose(lipschitz.over_batches(pairwise, batches), whole, rtol=1e-12)
    single = lipschitz.over_batches(lambda x: lipschitz.LocalConstant(x[:, 0, 0], x[:, 1]), [x[:10], x[10:]])
    np.testing.assert_array_equal(single.value, x[:, 0, 0])
    assert single.residual.shape == (23, 2)


# What every function promises


def nothing(params, x):
    return 0 * x * params


def test_zero_and_nan():
    """A network without any slope has constants 0 and finite gradients; NaN in is NaN out, for its sample alone."""
    x, y = gaussian((3, 4)), gaussian((3, 4), 1)

    def total(params, x, y):
        constant, norm = lipschitz.local(nothing, params, x), lipschitz.local_frobenius(nothing, params, x)
        estimate = lipschitz.local_frobenius(nothing, params, x, key=jax.random.key(0), num_probes=2)
        climbed = lipschitz.ascent(nothing, params, x, y, num_steps=3)
        found = [*constant, *norm, *estimate, lipschitz.pairwise(nothing, params, x, y), climbed.ratio]
        return sum(map(jnp.sum, found)), found

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, found), slopes = run(1.0, x, y)
    assert all(np.all(leaf == 0) for leaf in found)
    assert all(np.all(np.isfinite(leaf)) for leaf in slopes)
    assert all(np.all(np.isnan(leaf)) for leaf in run(np.nan, x, y)[0][1])

    x[1, 2] = np.nan
    for leaf in run(1.0, x, y)[0][1][-2:]:
        np.testing.assert_array_equal(np.isnan(leaf), [False, True, False])
    found = lipschitz.local(deep, DEEP, np.where(np.arange(3)[:, None] == 1, np.nan, gaussian((3, 30))))
    for leaf in found:
        np.testing.assert_array_equal(np.isnan(leaf), [False, True, False])
    params = kernels()
    params["second"][0, 0, 0] = np.nan
    for function in (lipschitz.spec_fro, lipschitz.spec_l1):
        for log in (False, True):
            assert np.all(np.isnan(function(OPS, params, np.array([1.0, 0.0]), log=log)))
    assert np.isnan(lipschitz.certified_upper_bound(OPS, params))


def test_nan_that_the_jacobian_does_not_show():
    """That of an affine network is its matrix, whatever the sample and the bias."""
    params, x = {"matrix": gaussian((4, 2)), "bias": np.zeros(2)}, gaussian((3, 4))

    def affine(params, x):
        return x @ params["matrix"] + params["bias"][None]

    def all_numbers(params, x):
        estimate = lipschitz.local_frobenius(affine, params, x, key=jax.random.key(0), num_probes=2)
        return [*lipschitz.local(affine, params, x), *lipschitz.local_frobenius(affine, params, x), *estimate]

    x[1, 2] = np.nan
    for leaf in all_numbers(params, x):
        np.testing.assert_array_equal(np.isnan(leaf), [False, True, False])
    for leaf in all_numbers({**params, "bias": np.array([np.nan, 0.0])}, gaussian((3, 4))):
        assert np.all(np.isnan(leaf))


def test_nan_that_a_difference_does_not_show():
    params, (x, y) = {"matrix": gaussian((4, 2)), "unused": np.array(np.nan)}, gaussian((2, 3, 4))

    def linear(params, x):
        return x @ params["matrix"]

    assert np.all(np.isnan(lipschitz.pairwise(linear, params, x, y)))
    assert np.all(np.isnan(lipschitz.ascent(linear, params, x, y, num_steps=2).ratio))
    # The points are equal, and the ratio would be 0.
    assert np.all(np.isnan(lipschitz.pairwise(lambda _, x: x * jnp.nan, 0.0, x, x)))


def test_networks_without_outputs_and_hidden_layers_that_are_none():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="at least one output"):
        lipschitz.local(lambda _, x: x[:, :0], 0.0, x)
    for hidden in (lambda x: (x, x), lambda x: jnp.ones((3, 2), jnp.int32)):

        def network(params, x, tap, hidden=hidden):
            tap(hidden(x))
            return x

        with pytest.raises(ValueError, match="pass every hidden layer through tap"):
            lipschitz.jac_norm(network, 0.0, x, jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("margin", [None, 1.0])
def test_a_label_that_names_no_class(margin):
    def network(params, x, tap):
        return tap(x @ params) @ params.T

    found = lipschitz.jac_norm(network, gaussian((4, 3)), gaussian((3, 4)), np.array([0, 4, -1]), margin=margin)
    np.testing.assert_array_equal(np.isnan(found), [False, True, True])


def test_narrow_dtypes():
    """Of a network in bfloat16: to its own rounding."""
    params, x = DEEP, gaussian((2, 30))
    expected = [np.linalg.norm(jacobian_of_deep(params, sample), 2) for sample in x]

    def rounded(params, x):
        return deep(jax.tree.map(jnp.bfloat16, params), x.astype(jnp.bfloat16))

    found = lipschitz.local(rounded, params, x.astype(jnp.bfloat16))
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, expected, rtol=3e-2)


BAD = [
    (lambda: lipschitz.local(chain, kernels(), np.ones((2, *INPUT), int)), "x: got int64.*real floating-point"),
    (lambda: lipschitz.local(chain, kernels(), np.ones(())), "x: got float64.*expected a real floating-point array"),
    (lambda: lipschitz.local(lambda p, x: x.sum(), None, np.ones((2, 3))), "f: got float64.. for an input of shape"),
    (lambda: lipschitz.local(lambda p, x: (x, x), None, np.ones((2, 3))), "expected one real floating-point array"),
    (lambda: lipschitz.local([], None, np.ones((2, 3))), "f: got .*expected a hashable function"),
    (lambda: lipschitz.local(chain, kernels(), np.ones((2, *INPUT)), tolerance=-1.0), "tolerance: got -1.0"),
    (lambda: lipschitz.local_frobenius(nothing, 1.0, np.ones((2, 3)), num_probes=3), "expected both for an estimate"),
    (lambda: lipschitz.pairwise(nothing, 1.0, np.ones((2, 3)), np.ones((1, 3))), "y: got shape .1, 3. beside x"),
    (lambda: lipschitz.ascent(nothing, 1.0, np.ones((2, 3)), np.ones((2, 3)), box=(1, 0)), "box: got .1, 0."),
    (lambda: lipschitz.ascent(nothing, 1.0, np.ones((2, 3)), np.ones((2, 3)), box=5), "box: got 5, expected a pair"),
    (lambda: lipschitz.ascent(nothing, 1.0, np.ones((2, 3)), np.ones((2, 3)), num_steps=0), "num_steps: got 0"),
    (lambda: lipschitz.upper_bound({}, kernels()), "layers: got none"),
    (lambda: lipschitz.upper_bound({("no",): Dense()}, kernels()), "names 0 arrays"),
    (lambda: lipschitz.upper_bound(OPS, kernels(), norm=lambda k, op: k), "expected a scalar"),
    (
        lambda: lipschitz.upper_bound(OPS, kernels(), norm=lambda k, op: None),
        "got nothing for .'first',., expected a s",
    ),
    (lambda: lipschitz.upper_bound(OPS, kernels(), norm=bounds.certified), "got a NormInterval for each layer"),
    (lambda: lipschitz.spec_fro({("first",): UnboundedConv()}, kernels(), 1.0), "whose image has no size"),
    (lambda: lipschitz.spec_l1({("first",): UnboundedConv()}, kernels(), 1.0), "whose image has no size"),
    (lambda: lipschitz.spec_fro(OPS, kernels(), 1j), "margin: got dtype complex128"),
    (lambda: lipschitz.margins(np.ones((2, 1)), np.zeros(2, int)), "logits: got float64.2, 1., expected"),
    (lambda: lipschitz.margins(np.ones((2, 3)), np.zeros((2, 3), int)), "labels: got int64.2, 3..*argmax"),
    (lambda: lipschitz.margins(np.ones((2, 3)), np.array([0, 3])), "labels: got numbers from 0 to 3, expected 0 to 2"),
    (lambda: lipschitz.jac_norm(lambda p, x, tap: x, None, np.ones((2, 3)), np.zeros(2, int)), "pass every hidden"),
    (
        lambda: lipschitz.jac_norm(chain, kernels(), np.ones((2, *INPUT)), np.zeros(2, int), margin=np.ones(3)),
        "margin: got shape .3,., expected one number",
    ),
    (lambda: lipschitz.histogram(np.array([1.0, np.nan])), "ratios: got 2 of which 1 are not finite"),
    (lambda: lipschitz.histogram([]), "ratios: got 0"),
    (lambda: lipschitz.histogram(np.ones(3), percentile=101), "percentile: got 101"),
    (lambda: lipschitz.over_batches(np.sum, np.ones(3), batch_size=2), "function: got results of shapes"),
    (lambda: lipschitz.over_batches(np.sum, np.ones(3), np.ones(4), batch_size=2), "expected equally many samples"),
    (lambda: lipschitz.over_batches(np.sum, np.ones(3)), "arrays are cut into batches by batch_size"),
    (lambda: lipschitz.over_batches(np.sum, []), "data: got no batches"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_of_the_docstring():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for example in finder.find(jacobians.local, "local", globs={}):
        assert runner.run(example).failed == 0
    assert runner.tries > 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
def test_vanishing_and_exploding_jacobians(scale):
    """Squares of such Jacobians are no numbers of float32."""
    values = np.array([3.0, 2.0, 1.0, 1.0, 1.0, 1.0], np.float32)
    params, x = jnp.asarray(np.diag(values * np.float32(scale))), jnp.ones((1, 6), jnp.float32)

    def linear(params, x):
        return x @ params

    frobenius = np.linalg.norm(values) * scale
    np.testing.assert_allclose(lipschitz.local(linear, params, x).value, 3 * scale, rtol=1e-5)
    np.testing.assert_allclose(lipschitz.local_frobenius(linear, params, x).value, frobenius, rtol=1e-5)
    estimate = lipschitz.local_frobenius(linear, params, x, key=jax.random.key(0), num_probes=4)
    # Each probe has the exact square, as the Jacobian is diagonal.
    np.testing.assert_allclose(estimate.value, frobenius, rtol=1e-5)
    assert estimate.standard_error <= 1e-3 * frobenius
    y = x.at[0, 0].set(2)
    np.testing.assert_allclose(lipschitz.pairwise(linear, params, x, y), 3 * scale, rtol=1e-5)


def test_steep_jacobians():
    """Networks of saturated units have Jacobians whose singular values fall fast."""
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(2 * rng.standard_normal((20, 20)), jnp.float32) for _ in range(6)]

    def network(params, x):
        for kernel in params:
            x = jax.nn.sigmoid(x @ kernel)
        return x

    x = jnp.asarray(rng.standard_normal((3, 20)), jnp.float32)
    explicit = jax.vmap(jax.jacobian(lambda point: network(layers, point[None])[0]))(x)
    expected = np.linalg.norm(np.asarray(explicit, float), 2, axis=(1, 2))
    np.testing.assert_allclose(lipschitz.local(network, layers, x).value, expected, rtol=1e-4)


def test_raw_kernels_of_wrapped_layers_are_refused(as_users_have_it):
    """Small raw kernels, whose layers have norm 1 in every forward: a bound of them would be far below the truth."""
    model = nnx.Sequential(jnnx.SpectralNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), nnx.relu)
    model.layers[0].layer.kernel[...] *= 0.1
    x = jnp.ones((1, 4), jnp.float32)
    linen = jlinen.constrain(nn.Dense(4), lambda path, layer: jlinen.SpectralNorm(layer))
    variables = linen.init(jax.random.key(0), x)
    cases = [
        (jnnx.layer_operators(model), nnx.state(model, nnx.Param)),
        (jlinen.layer_operators(linen, variables, x), variables["params"]),
    ]
    for layers, params in cases:
        assert len(layers.wrapped) == len(layers) == 1
        for function in (lipschitz.upper_bound, lipschitz.certified_upper_bound, total_norm):
            with pytest.raises(ValueError, match="got the raw kernel of a wrapped layer"):
                function(layers, params)
            assert 0 < function(dict(layers), params) < 2
        passed = jax.tree.unflatten(*jax.tree.flatten(layers)[::-1])
        assert passed.wrapped == layers.wrapped
        # Optimizers step on raw kernels.
        jaxsrn.optim.spectral_descent(0.1, layers).init(params)
    plain = jnnx.fold(model)
    bound = lipschitz.certified_upper_bound(jnnx.layer_operators(plain), nnx.state(plain, nnx.Param))
    np.testing.assert_allclose(bound, 1, rtol=1e-5)


def total_norm(layers, params):
    return penalties.total(jaxsrn.spectral_norm, layers, params)
