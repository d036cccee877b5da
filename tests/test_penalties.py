"""Penalties: against the paper's formulas assembled from explicit matrices, NumPy's eigenvalues, and Flax."""

import functools
import itertools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BAD_KERNELS, CASES, dense, gaussian
from flax import linen, nnx

import jaxsrn
from jaxsrn import CircularConv, Dense, ZeroPaddedConv, bounds, penalties
from jaxsrn.penalties import guo_ye

SIDES = ("small", "input")


def eigenvalues(matrix, gram: str) -> np.ndarray:
    """Of `M^T M`, or of the smaller Gram matrix."""
    small = gram == "small" and matrix.shape[0] < matrix.shape[1]
    return np.linalg.eigvalsh(matrix @ matrix.T if small else matrix.T @ matrix)


def expected_penalty(matrix, alpha: float, gram: str) -> float:
    return np.max(np.abs(eigenvalues(matrix, gram) - alpha))


@jax.jit
def both_sides(kernel, op, alpha):
    return [penalties.extreme_singular_values(kernel, op, alpha=alpha, gram=gram) for gram in SIDES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operator(case):
    kernel = gaussian(case.kernel_shape)
    matrix = dense(kernel, case.op)
    top = np.linalg.norm(matrix, 2) ** 2
    # The upper end decides, then the lower one.
    for alpha in (0.1 * top, 0.9 * top):
        expected = [expected_penalty(matrix, alpha, gram) for gram in SIDES]
        np.testing.assert_allclose(both_sides(jnp.asarray(kernel), case.op, alpha), expected, rtol=1e-9)


@pytest.mark.parametrize(("taps", "groups"), [((3,), 1), ((3, 3), 1), ((3,), 2)], ids=str)
def test_unbounded_layers_take_both_ends_over_the_frequencies(taps, groups):
    """The smallest value is that of a grid: at least that of any frequency, and the least of its 16 angles a degree."""
    op, kernel = jaxsrn.UnboundedConv(feature_group_count=groups), gaussian((*taps, 2, 2 * groups))
    symbols = np.fft.fftn(kernel, [288] * len(taps), axes=range(len(taps)))
    parts = np.split(symbols, groups, axis=-1)
    values = np.stack([np.linalg.svd(part, compute_uv=False) for part in parts], axis=-2)
    top, bottom = np.max(values), np.min(values)
    # 32 of the 288 angles: a degree of 2.
    coarse = np.min(values[(slice(None, None, 9),) * len(taps)])
    upper, lower = (
        penalties.extreme_singular_values(jnp.asarray(kernel), op, alpha=alpha) for alpha in (1e-3, 2 * top**2)
    )
    np.testing.assert_allclose(upper + 1e-3, top**2, rtol=1e-3)
    assert upper + 1e-3 >= top**2 * (1 - 1e-9)
    smallest = np.sqrt(2 * top**2 - lower)
    assert bottom * (1 - 1e-9) <= smallest <= coarse * (1 + 1e-9)


def test_without_an_explicit_matrix(monkeypatch):
    """Both ends by Lanczos, as in large zero-padded layers: within the stated tolerance of the lower one."""
    monkeypatch.setattr(guo_ye, "BOTH_ENDS_SIZE", 0)
    jax.clear_caches()
    for op, shape in ((ZeroPaddedConv((9, 8)), (3, 3, 2, 3)), (ZeroPaddedConv((9, 8), strides=2), (3, 3, 3, 2))):
        kernel = gaussian(shape)
        matrix = dense(kernel, op)
        top = np.linalg.norm(matrix, 2) ** 2
        for alpha, tolerance in ((0.1 * top, 1e-9), (0.9 * top, 1e-4)):
            expected = [expected_penalty(matrix, alpha, gram) for gram in SIDES]
            found = both_sides(jnp.asarray(kernel), op, alpha)
            assert np.all(np.abs(np.subtract(found, expected)) <= tolerance * top)
    jax.clear_caches()


# Guo and Ye's formulas


def index_sets(op, kernel_shape) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """`Omega`: where in the matrix each entry of the kernel stands, read off the matrix of a kernel of numbers."""
    numbers = np.arange(1, 1 + np.prod(kernel_shape)).reshape(kernel_shape)
    matrix = dense(numbers, op)
    places = {int(n): list(map(tuple, np.argwhere(matrix == n))) for n in np.unique(matrix[matrix > 0])}
    return {index: places[int(n)] for index, n in np.ndenumerate(numbers)}


def published_gradient(kernel, op, alpha: float) -> np.ndarray:
    """(2.3) and (2.5), entry by entry: sums over `Omega` with singular vectors of `M^T M - alpha I`."""
    m = dense(kernel, op)
    u, _, vt = np.linalg.svd(m.T @ m - alpha * np.eye(m.shape[1]))
    u, v = u[:, 0], vt[0]
    gradient = np.zeros(kernel.shape)
    for index, places in index_sets(op, kernel.shape).items():
        for i, j in places:
            gradient[index] += sum(u[j] * v[t] * m[i, t] for t in range(m.shape[1]))
            gradient[index] += sum(u[s] * v[j] * m[i, s] for s in range(m.shape[1]))
    return gradient


@pytest.mark.parametrize("share", [0.1, 0.95], ids=["upper", "lower"])
@pytest.mark.parametrize("shape", [(3, 3, 1, 1), (3, 3, 2, 3), (3, 3, 1, 2)], ids=str)
def test_the_gradient_is_the_published_one(shape, share):
    op = ZeroPaddedConv((5, 5))
    kernel = gaussian(shape)
    alpha = share * np.linalg.norm(dense(kernel, op), 2) ** 2
    expected = published_gradient(kernel, op, alpha)
    found = jax.grad(penalties.extreme_singular_values)(jnp.asarray(kernel), op, alpha=alpha, gram="input")
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_gradients_by_finite_differences():
    """Also of the other Gram matrix, and of the penalty in alpha."""
    for op, shape in (
        (ZeroPaddedConv((5, 4)), (3, 3, 3, 1)),
        (CircularConv((6,), strides=2), (3, 2, 2)),
        (Dense(), (5, 3)),
    ):
        kernel, direction, step = jnp.asarray(gaussian(shape)), gaussian(shape, seed=1), 1e-6
        top = np.linalg.norm(dense(kernel, op), 2) ** 2
        for alpha in (0.1 * top, 0.95 * top):
            function = functools.partial(penalties.extreme_singular_values, op=op, alpha=alpha)
            slope = (function(kernel + step * direction) - function(kernel - step * direction)) / (2 * step)
            np.testing.assert_allclose(jnp.vdot(jax.grad(function)(kernel), direction), slope, rtol=1e-5)
        in_alpha = jax.grad(
            lambda alpha, op=op, kernel=kernel: penalties.extreme_singular_values(kernel, op, alpha=alpha)
        )
        np.testing.assert_allclose([in_alpha(0.1 * top), in_alpha(0.95 * top)], [-1, 1])


def test_theorem_2_1_on_random_kernels():
    """1,000 kernels, from nearly orthogonal to random ones, and a random alpha each."""
    op, rng, count = ZeroPaddedConv((5, 5)), np.random.default_rng(0), 1000
    kernels = 10 ** rng.uniform(-2, 0.5, (count, 1, 1, 1, 1)) * rng.standard_normal((count, 3, 3, 1, 2))
    kernels[:, 1, 1] += rng.standard_normal((count, 1, 2))
    alphas = 10 ** rng.uniform(-1, 1, count)
    basis = np.stack([dense(unit.reshape(kernels.shape[1:]), op) for unit in np.eye(18)], axis=-1)
    values = np.linalg.svd(np.einsum("oip,np->noi", basis, kernels.reshape((count, -1))), compute_uv=False)
    penalty = jax.jit(jax.vmap(lambda k, a: penalties.extreme_singular_values(k, op, alpha=a)))(kernels, alphas)
    t = np.asarray(penalty) / alphas * (1 + 1e-12)
    applies = t <= 1
    assert 100 < np.count_nonzero(applies) < 900
    low, high = np.sqrt((1 - t[applies]) * alphas[applies]), np.sqrt((1 + t[applies]) * alphas[applies])
    assert np.all(low < values[applies, -1])
    assert np.all(values[applies, 0] < high)


def test_the_barrier():
    """Three input channels, one output: below `2 alpha` the input side's penalty is alpha, its gradient exactly 0."""
    op, alpha = ZeroPaddedConv((6, 6)), 1.0
    grad = jax.value_and_grad(penalties.extreme_singular_values)
    for scale in (1.0, 0.1, 1e-3):
        kernel = jnp.asarray(scale * gaussian((3, 3, 3, 1)))
        norm = np.linalg.norm(dense(kernel, op), 2)
        value, gradient = grad(kernel, op, alpha=alpha, gram="input")
        if norm**2 > 2 * alpha:
            np.testing.assert_allclose(value, norm**2 - alpha, rtol=1e-9)
            assert np.linalg.norm(gradient) > 0.1
        else:
            assert value == alpha
            assert not np.any(gradient)
            value, gradient = grad(kernel, op, alpha=alpha)
            assert value < alpha
            assert np.any(gradient != 0)


# Algorithm 2.1


@pytest.mark.parametrize("gram", SIDES)
def test_initial_pairs_are_the_two_farthest(gram):
    for op, shape in ((ZeroPaddedConv((5, 4)), (3, 3, 1, 2)), (ZeroPaddedConv((7,)), (3, 3, 2)), (Dense(), (6, 4))):
        kernel = gaussian(shape)
        matrix = dense(kernel, op)
        for share in (0.1, 0.8):
            alpha = share * np.linalg.norm(matrix, 2) ** 2
            shifted = eigenvalues(matrix, gram) - alpha
            expected = shifted[np.argsort(-np.abs(shifted))][:2]
            pairs = penalties.init_pairs(kernel, op, alpha=alpha, gram=gram)
            np.testing.assert_allclose(pairs.values, expected, rtol=1e-7)
            small = gram == "small" and matrix.shape[0] < matrix.shape[1]
            side = matrix.T if small else matrix
            vectors = np.asarray(pairs.vectors).reshape((2, -1))
            np.testing.assert_allclose(vectors @ vectors.T, np.eye(2), atol=1e-9)
            images = vectors @ side.T @ side - alpha * vectors
            np.testing.assert_allclose(images, expected[:, None] * vectors, atol=1e-5 * np.abs(expected[0]))


def test_pairs_of_huge_kernels():
    """Values whose squares leave the range of float32 are infinite, and the vectors are those of a smaller kernel."""
    kernel = gaussian((6, 4)).astype(np.float32)
    pairs = penalties.init_pairs(kernel * np.float32(1e19), Dense())
    assert np.all(pairs.values == np.inf)
    # The columns are fewer, so that the vectors are right singular ones.
    expected = np.linalg.eigh(kernel.T.astype(np.float64) @ kernel)[1][:, :-3:-1].T
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(pairs.vectors) * expected, axis=1)), 1, rtol=1e-5)
    value, stepped = penalties.extreme_singular_values_step(kernel * np.float32(1e19), pairs, Dense())
    assert value == np.inf
    assert np.all(stepped.values == np.inf)


@pytest.mark.parametrize(("shape", "gram"), [((3, 3, 1, 3), "small"), ((3, 3, 3, 1), "small"), ((3, 3, 2, 2), "input")])
def test_tracked_pairs_follow_gradient_descent(shape, gram):
    """Algorithm 2.1: never above the exact penalty, and with enough power steps close to it."""
    op, rate = ZeroPaddedConv((7, 7)), 0.01
    kernel = jnp.asarray(np.random.default_rng(0).uniform(0, 1, shape))

    @jax.jit
    def step(kernel, pairs):
        def tracked(kernel):
            return penalties.extreme_singular_values_step(kernel, pairs, op, gram=gram, num_steps=50)

        (value, stepped), gradient = jax.value_and_grad(tracked, has_aux=True)(kernel)
        exact = jax.value_and_grad(penalties.extreme_singular_values)(kernel, op, gram=gram)
        return kernel - rate * gradient, stepped, (value, gradient), exact

    pairs = penalties.init_pairs(kernel, op, gram=gram)
    for count in range(10):
        kernel, pairs, (value, gradient), (exact, slope) = step(kernel, pairs)
        assert value <= exact * (1 + 1e-9)
        np.testing.assert_allclose(value, exact, rtol=0.02)
        if count == 0:
            np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6)


def test_two_pairs_survive_a_crossing():
    """The farthest eigenvalue passes from one end to the other: the second pair takes over, one alone would not."""
    op, alpha = Dense(), 1.0
    before, after = np.diag([1.5, 1.0, 0.2]), np.diag([1.2, 1.0, 0.2])
    pairs = penalties.init_pairs(before, op, alpha=alpha)
    np.testing.assert_allclose(pairs.values, [1.5**2 - 1, 0.2**2 - 1], rtol=1e-9)
    value, stepped = penalties.extreme_singular_values_step(after, pairs, op, alpha=alpha)
    np.testing.assert_allclose(value, 1 - 0.2**2, rtol=1e-9)
    np.testing.assert_allclose(stepped.values, [0.2**2 - 1, 1.2**2 - 1], rtol=1e-9)
    gradient = jax.grad(lambda k: penalties.extreme_singular_values_step(k, pairs, op, alpha=alpha)[0])(after)
    np.testing.assert_allclose(gradient, np.diag([0, 0, -0.4]), atol=1e-9)


# Batch normalization


def test_batch_norm_is_folded_in(standard_promotion):
    """Flax's convolution and batch norm in evaluation, less their constant part, are the folded kernel."""
    conv = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(3, use_running_average=True, epsilon=1e-3, rngs=nnx.Rngs(0))
    scale, mean, root = (jnp.asarray(gaussian((3,), seed), jnp.float32) for seed in range(3))
    norm.scale[...], norm.mean[...], norm.var[...] = scale, mean, root**2
    op, x = ZeroPaddedConv((5, 4)), jnp.asarray(gaussian((1, 5, 4, 2)), jnp.float32)
    folded = penalties.fold_batch_norm(conv.kernel[...], scale, root**2, epsilon=1e-3)
    expected = norm(conv(x)) - norm(conv(jnp.zeros_like(x)))
    np.testing.assert_allclose(op.apply(folded, x), expected, rtol=1e-4, atol=1e-5)
    assert penalties.fold_batch_norm(np.ones((3, 2, 3), np.float16), np.ones(3), np.zeros(3)).dtype == jnp.float32


# Sums over layers

OP, WIDE = CircularConv((6, 6)), ZeroPaddedConv((6, 6), strides=2)
LAYERS = {("a", "kernel"): OP, ("b", "kernel"): OP, ("c", "kernel"): WIDE, ("d", "inner", "kernel"): Dense()}


def nested():
    shapes = {"a": (3, 3, 2, 2), "b": (3, 3, 2, 2), "c": (3, 3, 2, 2)}
    params = {
        name: {"kernel": jnp.asarray(gaussian(s, i)), "bias": jnp.ones(2)} for i, (name, s) in enumerate(shapes.items())
    }
    return params | {"d": {"inner": {"kernel": jnp.asarray(gaussian((4, 3)))}}}


FUNCTIONS = (
    jaxsrn.spectral_norm,
    jaxsrn.stable_rank,
    bounds.lip_bound,
    functools.partial(penalties.extreme_singular_values, alpha=2.0),
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["norm", "stable rank", "LipBound", "Guo-Ye"])
def test_total_is_the_sum_over_layers(function):
    params, flat = nested(), flax.traverse_util.flatten_dict(nested())
    expected = sum(function(flat[path], op) for path, op in LAYERS.items())
    total = jax.jit(jax.value_and_grad(lambda params: penalties.total(function, LAYERS, params)))
    value, gradient = total(params)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for path, leaf in flax.traverse_util.flatten_dict(gradient).items():
        assert np.any(leaf != 0) == (path in LAYERS)


def test_one_call_for_each_distinct_shape():
    calls = []

    def function(kernel, op):
        calls.append((op, kernel.shape, kernel.dtype))
        return jnp.sum(kernel)

    params = nested()
    params["e"] = {"kernel": params["a"]["kernel"].astype(jnp.float32)}
    value = penalties.total(function, LAYERS | {("e", "kernel"): OP}, params)
    assert len(calls) == len(set(calls)) == 4
    assert value.dtype == jnp.float64
    with pytest.raises(ValueError, match="got none"):
        penalties.total(function, {}, params)


def test_total_of_a_stack_is_the_sum_over_its_layers():
    """Those of one path, and of another with the same shape of kernels."""
    params = {"scanned": jnp.asarray(gaussian((2, 4, 3))), "grid": jnp.asarray(gaussian((2, 1, 4, 3), seed=1))}
    kernels = [*params["scanned"], *params["grid"][:, 0]]
    value = penalties.total(jaxsrn.spectral_norm, {("scanned",): Dense(), ("grid",): Dense()}, params)
    np.testing.assert_allclose(value, sum(np.linalg.norm(kernel, 2) for kernel in kernels), rtol=1e-12)


def test_trees_that_layers_are_found_in():
    """States and parameters of Flax, boxed ones too: by the paths that Flax itself gives."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs)])

    def function(kernel, op):
        return jnp.sum(kernel**2) * len(op.in_shape(kernel.shape))

    model = Model(nnx.Rngs(0))
    layers = {("conv", "kernel"): ZeroPaddedConv((5, 5)), ("blocks", 0, "kernel"): Dense()}
    assert set(layers) < {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    kernels = model.conv.kernel[...], model.blocks[0].kernel[...]
    expected = sum(function(k, op) for k, op in zip(kernels, layers.values(), strict=True))
    for params in (nnx.state(model), nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model))):
        np.testing.assert_allclose(penalties.total(function, layers, params), expected, rtol=1e-6)

    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None))
    for layer in (linen.Dense(3), linen.Dense(3, kernel_init=init)):
        params = layer.init(jax.random.key(0), jnp.ones((1, 2), jnp.float32))["params"]
        kernel = jax.tree.leaves(params["kernel"])[0]
        value = penalties.total(function, {("kernel",): Dense()}, params)
        np.testing.assert_allclose(value, np.sum(np.square(kernel)), rtol=1e-6)


def test_errors():
    op, kernel = CircularConv((8, 8)), gaussian((3, 3, 1, 2))
    pairs = penalties.init_pairs(kernel, op)
    functions = (
        penalties.extreme_singular_values,
        penalties.init_pairs,
        lambda kernel, op, **options: penalties.extreme_singular_values_step(kernel, pairs, op, **options),
    )
    for (bad, message), function in itertools.product(BAD_KERNELS, functions):
        with pytest.raises(ValueError, match=message):
            function(bad, op)
    for function in functions:
        with pytest.raises(ValueError, match="gram: got 'output', expected one of"):
            function(kernel, op, gram="output")
        with pytest.raises(ValueError, match=r"alpha: got -1\.0, expected a positive finite number"):
            function(kernel, op, alpha=-1.0)
    with pytest.raises(ValueError, match=r"pairs: got vectors of shape \(2, 8, 8, 1\), expected \(2, 9, 9, 1\)"):
        penalties.extreme_singular_values_step(kernel, pairs, CircularConv((9, 9)))
    with pytest.raises(ValueError, match="num_steps: got 0, expected a static integer >= 1"):
        penalties.extreme_singular_values_step(kernel, pairs, op, num_steps=0)
    with pytest.raises(ValueError, match="one row, expected at least two"):
        penalties.init_pairs(np.ones((1, 3)), Dense())
    single = penalties.init_pairs(np.ones((2, 2)), Dense())
    with pytest.raises(ValueError, match="one row, expected at least two"):
        penalties.extreme_singular_values_step(np.ones((1, 3)), single, Dense())


def test_errors_of_batch_norm_and_sums():
    kernel, ones = gaussian((3, 3, 1, 2)), np.ones(2)
    with pytest.raises(ValueError, match=r"scale: got shape \(3,\), expected \(2,\)"):
        penalties.fold_batch_norm(kernel, np.ones(3), ones)
    with pytest.raises(ValueError, match=r"var: got dtype int"):
        penalties.fold_batch_norm(kernel, ones, np.ones(2, int))
    with pytest.raises(ValueError, match=r"epsilon: got 0\.0, expected a positive finite number"):
        penalties.fold_batch_norm(kernel, ones, ones, epsilon=0.0)
    params, norm = nested(), jaxsrn.spectral_norm
    with pytest.raises(ValueError, match=r"the path \('z', 'kernel'\) names 0 arrays, .* has \('a', 'b"):
        penalties.total(norm, {("z", "kernel"): OP}, params)
    with pytest.raises(ValueError, match=r"the path \('a',\) names 0 arrays"):
        penalties.total(norm, {("a",): OP}, params)
    with pytest.raises(ValueError, match="got the path 'a', expected a tuple of plain keys"):
        penalties.total(norm, {"a": OP}, params)
    with pytest.raises(ValueError, match=r"got 3 for \('a', 'kernel'\), expected an operator"):
        penalties.total(norm, {("a", "kernel"): 3}, params)
    with pytest.raises(ValueError, match=r"layers: at \('a', 'bias'\): kernel: got shape \(2,\)"):
        penalties.total(norm, {("a", "bias"): OP}, params)
    with pytest.raises(ValueError, match=r"got a value of shape \(72,\) for \('a', 'kernel'\)"):
        penalties.total(jaxsrn.singular_values, LAYERS, params)
    with pytest.raises(ValueError, match="got a NormInterval for each layer, expected one number"):
        penalties.total(jaxsrn.bounds.certified, LAYERS, params)
    with pytest.raises(ValueError, match=r"got int32 for \('a', 'kernel'\), expected a real floating-point number"):
        penalties.total(lambda kernel, op: jnp.int32(1), LAYERS, params)


def ancestors(program: str) -> dict[str, set[str]]:
    """Everything that the instructions of a compiled program are computed from, directly or not."""
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"%([\w.-]+) = (.*)", program):
        direct = set(re.findall(r"%([\w.-]+)", rest))
        found[name] = direct.union(*(found.get(operand, set()) for operand in direct))
    return found


def test_layers_are_worked_on_in_turn():
    """On CPUs batched SVDs that run at once can wait for each other forever: each needs the one before."""
    params = {name: gaussian((rows, 5)) for name, rows in (("a", 4), ("b", 5), ("c", 6))}
    layers = {(name,): Dense() for name in params}
    program = jax.jit(lambda params: penalties.total(jaxsrn.spectral_norm, layers, params)).lower(params).compile()
    found = ancestors(program.as_text())
    svds = re.findall(r"%([\w.-]+) = [^\n]* custom-call\([^\n]*gesdd", program.as_text())
    assert len(svds) == 3
    assert sorted(len(found[svd].intersection(svds)) for svd in svds) == [0, 1, 2]
