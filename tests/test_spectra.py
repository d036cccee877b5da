"""The symbol, all singular values and the largest few, against numpy's SVD of the explicit matrix."""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_name, derivative, gaussian, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsrn import CircularConv, Dense, ZeroPaddedConv, singular_values, symbol, top_singular_values
from jaxsrn.spectra.circular.angles import angles_of, phases

CIRCULAR = [case for case in CASES if isinstance(case.op, CircularConv)]
KINDS = by_name("dense-wide", "circular-2d-strides", "same-1d")


def oracle(kernel, op) -> np.ndarray:
    """All singular values, descending."""
    return np.linalg.svd(cases.dense(kernel, op), compute_uv=False)


# The symbol


def transcribed_symbol(kernel, op) -> np.ndarray:
    """`S(w) = sum_p K_p exp(-i <w, p>)`, tap by tap: `(*grid, groups, phases * c_in, c_out)`.

    With strides a tap at offset `t` lies `t // stride` steps into phase `t % stride`.
    """
    kernel, groups = np.asarray(kernel), op.feature_group_count
    grid = [n // s for n, s in zip(op.input_shape, op.strides, strict=True)]
    c_in, c_out = kernel.shape[-2], kernel.shape[-1] // groups
    result = np.zeros((*grid, groups, *op.strides, c_in, c_out), complex)
    for index in itertools.product(*map(range, grid)):
        for tap in itertools.product(*map(range, kernel.shape[:-2])):
            offsets = [t * d for t, d in zip(tap, op.kernel_dilation, strict=True)]
            steps = [t // s for t, s in zip(offsets, op.strides, strict=True)]
            phase = tuple(t % s for t, s in zip(offsets, op.strides, strict=True))
            angle = sum(2 * np.pi * i * t / n for i, t, n in zip(index, steps, grid, strict=True))
            for g in range(groups):
                block = kernel[tap][:, g * c_out : (g + 1) * c_out]
                result[(*index, g, *phase)] += block * np.exp(-1j * angle)
    return result.reshape((*grid, groups, -1, c_out))


@pytest.mark.parametrize("case", CIRCULAR, ids=str)
def test_symbol_equals_its_definition(case):
    expected = transcribed_symbol(kernel(case), case.op)
    if case.op.feature_group_count == 1:
        expected = expected.squeeze(-3)
    result = symbol(kernel(case), case.op)
    assert result.shape == expected.shape
    assert result.dtype == np.complex128
    np.testing.assert_allclose(result, expected, atol=1e-13)
    values = np.sort(np.linalg.svd(result, compute_uv=False).ravel())[::-1]
    np.testing.assert_allclose(values, oracle(kernel(case), case.op), atol=1e-12)


@pytest.mark.parametrize("case", by_name("circular-1d", "circular-2d-non-square"), ids=str)
def test_symbol_acts_on_the_spectrum_of_the_image(case):
    """In frequency the layer is a product with the conjugate symbol, delayed by Flax's centring."""
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    axes = tuple(range(len(in_shape) - 1))
    x = gaussian(in_shape)
    y = (cases.dense(kernel(case), case.op) @ x.ravel()).reshape(out_shape)
    centre = [(taps - 1) // 2 for taps in case.kernel_shape[:-2]]
    product = np.einsum("...i,...io->...o", np.fft.fftn(x, axes=axes), np.conj(symbol(kernel(case), case.op)))
    result = np.roll(np.fft.ifftn(product, axes=axes), centre, axes)
    np.testing.assert_allclose(result, y, atol=1e-12)


def test_symbol_in_single_precision_on_a_long_grid():
    """Angles are reduced before they are rounded: no error that grows with the frequency."""
    op, weights = CircularConv((4096,)), gaussian((3, 1, 1))
    result = symbol(jnp.asarray(weights, jnp.float32), op)
    assert result.dtype == np.complex64
    np.testing.assert_allclose(result, np.fft.fft(weights, 4096, axis=0), atol=2e-6)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("op", [Dense(), ZeroPaddedConv((4,))], ids=str)
def test_only_circular_convolutions_have_a_symbol(op):
    with pytest.raises(ValueError, match=r"op: got .*expected a CircularConv; other operators have no symbol"):
        symbol(jnp.ones((3, 1, 2)), op)


# All singular values


@jax.jit
def values_and_gradient(kernel, op):
    """All singular values, and the gradient of the sum of their cubes (smooth wherever they coincide)."""

    def cubes(kernel):
        values = singular_values(kernel, op)
        return jnp.sum(values**3), values

    gradient, values = jax.grad(cubes, has_aux=True)(kernel)
    return values, gradient


@pytest.mark.parametrize("case", CASES, ids=str)
def test_singular_values_and_their_gradient(case):
    matrix = cases.dense(kernel(case), case.op)
    left, expected, right = np.linalg.svd(matrix, full_matrices=False)
    values, gradient = values_and_gradient(kernel(case), case.op)
    assert values.shape == (min(matrix.shape),)
    assert values.dtype == np.float64
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(values, expected, atol=1e-10 * expected[0], rtol=0)
    expected_gradient = cases.pull_back(left * (3 * expected**2) @ right, case.op, case.kernel_shape)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-10 * np.max(np.abs(expected_gradient)), rtol=0)


@pytest.mark.parametrize("case", by_name("dense-wide", "circular-1d", "circular-2d-groups", "same-1d"), ids=str)
def test_gradient_of_the_nuclear_norm_by_finite_differences(case):
    gradient = jax.grad(lambda kernel: jnp.sum(singular_values(kernel, case.op)))(kernel(case))
    for seed in (1, 2):
        direction = gaussian(case.kernel_shape, seed)
        expected = derivative(lambda kernel: np.sum(oracle(kernel, case.op)), kernel(case), direction)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-7)


def identity_kernel(case) -> np.ndarray:
    """One tap, the identity between channels: an orthogonal map where all input samples are read."""
    weights = np.zeros(case.kernel_shape)
    middle = tuple((taps - 1) // 2 for taps in case.kernel_shape[:-2])
    weights[middle] = np.eye(*case.kernel_shape[-2:])
    return weights


@pytest.mark.parametrize("case", by_name("dense-square", "circular-2d", "same-2d"), ids=str)
def test_repeated_singular_values_have_finite_gradients(case):
    weights = identity_kernel(case)
    np.testing.assert_array_equal(oracle(weights, case.op), 1)
    values, gradient = values_and_gradient(jnp.asarray(weights), case.op)
    np.testing.assert_allclose(values, 1, rtol=1e-12)
    # The nuclear norm is differentiable at an orthogonal map T, and so are the cubes: grad = 3 T.
    expected = 3 * cases.weights(case.kernel_shape, case.op) * weights
    np.testing.assert_allclose(gradient, expected, atol=1e-10)
    assert np.all(np.isfinite(jax.jacrev(singular_values)(jnp.asarray(weights), case.op)))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_singular_values_of_the_zero_kernel(case):
    values, gradient = values_and_gradient(jnp.zeros(case.kernel_shape), case.op)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)
    assert np.all(np.isfinite(jax.jacrev(singular_values)(jnp.zeros(case.kernel_shape), case.op)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_singular_values_in_lower_precision(case, dtype):
    weights = kernel(case, dtype)
    values, expected = singular_values(weights, case.op), oracle(weights.astype(jnp.float64), case.op)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-5 * expected[0], rtol=0)


@pytest.mark.parametrize("case", by_name("dense-wide", "circular-1d", "circular-1d-depthwise", "same-1d"), ids=str)
def test_one_nan_is_never_a_plausible_largest_value(case):
    weights = kernel(case).at[(0,) * len(case.kernel_shape)].set(jnp.nan)
    assert np.isnan(singular_values(weights, case.op)[0])
    assert np.isnan(top_singular_values(weights, case.op, 1)[0])


def test_singular_values_accept_numpy_and_vmap():
    case = cases.BY_NAME["circular-2d-strides"]
    np.testing.assert_allclose(singular_values(np.asarray(kernel(case)), case.op), oracle(kernel(case), case.op))
    stack = jnp.stack([kernel(case), kernel(case, seed=1)])
    expected = [oracle(weights, case.op) for weights in stack]
    np.testing.assert_allclose(jax.vmap(singular_values, (0, None))(stack, case.op), expected, rtol=1e-10)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.sampled_from(by_name("circular-1d-stride-dilation", "circular-1d-groups", "same-1d", "transposed-1d")), st.data()
)
def test_singular_values_of_degenerate_kernels(case, data):
    """Small integers: zero kernels, repeated values and rank deficiency all occur."""
    size = int(np.prod(case.kernel_shape))
    numbers = data.draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    weights = np.reshape(np.asarray(numbers, float), case.kernel_shape)
    values, gradient = values_and_gradient(jnp.asarray(weights), case.op)
    np.testing.assert_allclose(values, oracle(weights, case.op), atol=1e-10)
    assert np.all(np.isfinite(gradient))


def test_a_matrix_too_large_to_form_is_refused():
    op = ZeroPaddedConv((64, 64))
    with pytest.raises(ValueError, match=r"matrix of .* has 33554432 entries, expected at most .*top_singular_values"):
        singular_values(jnp.ones((3, 3, 1, 2)), op)


# The largest few


@pytest.mark.parametrize(
    ("name", "k"),
    [
        # Matrix-free while 5 k < n, on either side; then from the explicit matrix; circular and dense from all values.
        ("same-2d", 1),
        ("same-2d", 7),
        ("same-2d", 8),
        ("same-2d", 40),
        ("transposed-2d", 3),
        ("valid-2d-dilation", 4),
        ("circular-2d", 5),
        ("circular-2d", 32),
        ("dense-wide", 2),
        ("dense-scalar", 1),
    ],
)
def test_top_singular_values(name, k):
    case = cases.BY_NAME[name]
    expected = oracle(kernel(case), case.op)[:k]
    values = top_singular_values(kernel(case), case.op, k)
    assert values.shape == (k,)
    np.testing.assert_allclose(values, expected, atol=1e-10 * expected[0], rtol=0)


def test_top_singular_values_count_multiplicity():
    """Three identical groups: every singular value three times."""
    op = ZeroPaddedConv((12,), feature_group_count=3)
    weights = np.tile(gaussian((3, 1, 1)), (1, 1, 3))
    expected = oracle(weights, op)
    np.testing.assert_allclose(expected[:6].reshape((2, 3)), expected[:6:3, None] * np.ones(3), rtol=1e-12)
    assert expected[3] < 0.999 * expected[0]
    np.testing.assert_allclose(top_singular_values(jnp.asarray(weights), op, 7), expected[:7], rtol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_top_singular_values_of_multiples_of_the_identity(scale, dtype):
    op = ZeroPaddedConv((16,))

    def total(kernel):
        values = top_singular_values(kernel, op, 3)
        return jnp.sum(values), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray([0, scale, 0], dtype).reshape((3, 1, 1)))
    np.testing.assert_allclose(values, scale, rtol=1e-10 if dtype == jnp.float64 else 1e-5)
    assert np.all(np.isfinite(gradient))
    if scale:
        # The derivative along the kernel itself is the value.
        np.testing.assert_allclose(gradient[1, 0, 0], 3, rtol=1e-5)


def test_top_singular_values_of_tiny_kernels():
    """Products of entries of the kernel and of vectors are below the smallest normal number."""
    op, weights = ZeroPaddedConv((20, 20)), gaussian((3, 3, 1, 1))
    expected = np.linalg.svd(cases.dense(weights, op), compute_uv=False)[:3]
    values = top_singular_values(jnp.asarray(1e-36 * weights, jnp.float32), op, 3)
    np.testing.assert_allclose(np.float64(values) * 1e36, expected, rtol=1e-5)


def test_top_singular_values_in_single_precision():
    case = cases.BY_NAME["same-2d"]
    for seed in range(5):
        weights = kernel(case, jnp.float32, seed)
        expected = oracle(weights, case.op)[:3]
        values = top_singular_values(weights, case.op, 3)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.float32, 1e-5)])
def test_top_singular_values_of_a_clustered_spectrum(dtype, tolerance, k):
    """The largest values of a smoothing kernel lie within 1e-4 of each other."""
    op = ZeroPaddedConv((300,))
    top = jax.jit(lambda kernel: top_singular_values(kernel, op, k))
    # The identity plus a path graph, whose eigenvalues are known.
    expected = 1 + 2 * np.cos(np.pi * np.arange(1, k + 1) / 301)
    np.testing.assert_allclose(top(jnp.ones((3, 1, 1), dtype)), expected, rtol=tolerance)


@pytest.mark.parametrize("name", ["same-2d", "circular-2d-groups", "dense-wide"])
def test_gradient_of_top_singular_values_by_finite_differences(name):
    case = cases.BY_NAME[name]
    coefficients = np.asarray([3.0, 2.0, -1.0])
    gradient = jax.grad(lambda kernel: jnp.sum(coefficients * top_singular_values(kernel, case.op, 3)))(kernel(case))
    direction = gaussian(case.kernel_shape, 1)
    expected = derivative(lambda kernel: coefficients @ oracle(kernel, case.op)[:3], kernel(case), direction)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-6)


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, -1, "too many"])
def test_bad_k(case, k):
    n = min(cases.dense(kernel(case), case.op).shape)
    k = n + 1 if k == "too many" else k
    with pytest.raises(ValueError, match=f"k: got {k}, expected an integer from 1 to {n}"):
        top_singular_values(kernel(case), case.op, k)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("k", [1.5, "2", None])
def test_k_must_be_an_integer(k):
    with pytest.raises(ValueError, match=f"k: got {k!r}, expected an integer from 1 to 3"):
        top_singular_values(jnp.ones((4, 3)), Dense(), k)


@pytest.mark.parametrize("function", [singular_values, symbol, lambda kernel, op: top_singular_values(kernel, op, 1)])
@pytest.mark.parametrize(("weights", "message"), cases.BAD_KERNELS)
def test_bad_kernels(function, weights, message):
    with pytest.raises(ValueError, match=message):
        function(weights, CircularConv((4, 4)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize("n", [1, 7, 1000, 46_341, 2**24])
def test_angles_are_exact_to_rounding_on_large_grids(n, dtype):
    """In units of a turn, against Python's integers; half steps too."""
    rng = np.random.default_rng(0)
    doubled = np.unique(np.r_[0, 1, 2 * n - 1, rng.integers(0, 2 * n, 20)])
    factor = np.r_[-n, -3, 0, 2, 97, rng.integers(0, min(n, 4096), 20)]
    found = phases(angles_of((n,), dtype), jnp.asarray(doubled[:, None], jnp.int32), factor[:, None])
    assert found.dtype == dtype
    exact = np.array([[int(i) * int(f) % (2 * n) / (2 * n) for f in factor] for i in doubled])
    missed = (np.asarray(found, float) / (2 * np.pi) - exact + 0.5) % 1 - 0.5
    # A unit of the fixed point is multiplied by the factor.
    units = (1 + np.abs(factor)) * 2.0 ** -np.finfo(dtype).bits
    assert np.all(np.abs(missed) <= units + np.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "room"), [(jnp.float64, 1e-12), (jnp.float32, 2e-5)], ids=str)
def test_more_values_than_the_rank(dtype, room):
    """A layer with one output channel that is not zero has a value for each sample, and then zeros."""
    op, kernel = ZeroPaddedConv((16,)), np.asarray(gaussian((3, 8, 8)))
    kernel = kernel * (np.arange(8) == 0)
    expected = oracle(kernel, op)[:20]
    assert expected[15] > 0.1 > 1e-9 > expected[16]
    np.testing.assert_allclose(
        top_singular_values(jnp.asarray(kernel, dtype), op, 20), expected, atol=room * expected[0]
    )
