"""The spectral norm and the leading singular triplet, against numpy's SVD of the explicit matrix."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_name, derivative, gaussian, gaussian32, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsrn
from jaxsrn import (
    CircularConv,
    Dense,
    SingularTriplet,
    UnboundedConv,
    ZeroPaddedConv,
    bounds,
    leading_triplet,
    spectral_norm,
)
from jaxsrn.spectra.padded import leading
from jaxsrn.spectra.padded.starts import circular_peaks, circular_waves

# One operator of each kind.
KINDS = by_name("dense-wide", "circular-2d-strides", "same-1d")


def norm(kernel, op) -> float:
    """The largest singular value of the explicit matrix."""
    return np.linalg.norm(cases.dense(kernel, op), 2)


def check_triplet(triplet, kernel, op, tolerance):
    """The defining identities of a leading singular triplet, and that its residual is what it says."""
    matrix = cases.dense(kernel, op)
    in_shape, out_shape = cases.shapes(kernel.shape, op)
    assert triplet.left.shape == out_shape
    assert triplet.right.shape == in_shape
    value, left, right = (np.asarray(part, np.float64).ravel() for part in triplet[:3])
    expected = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose([np.linalg.norm(left), np.linalg.norm(right)], 1, rtol=tolerance)
    errors = np.linalg.norm(matrix @ right - value * left), np.linalg.norm(matrix.T @ left - value * right)
    # Vectors converge to the square root of the value's accuracy.
    assert max(errors) <= np.sqrt(tolerance) * expected
    np.testing.assert_allclose(triplet.residual, max(errors) / expected, rtol=1e-2, atol=tolerance)


@jax.jit
def norm_and_triplet(kernel, op):
    """The norm, the triplet, and the gradient of the triplet's value."""

    def value(kernel):
        triplet = leading_triplet(kernel, op)
        return triplet.value, triplet

    gradient, triplet = jax.grad(value, has_aux=True)(kernel)
    return spectral_norm(kernel, op), triplet, gradient


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 3, 32, 16), (5, 4, 4)], ids=str)
def test_gradients_without_edges_are_exact_in_float32(shape):
    """The frequency has to be exact: where values alone are compared it is off by the root of rounding."""
    gradient = jax.jit(jax.grad(lambda kernel: spectral_norm(kernel, UnboundedConv())))
    for seed in range(4):
        single = np.float32(gaussian(shape, seed))
        found, expected = (np.asarray(gradient(jnp.asarray(single, dtype))) for dtype in (np.float32, np.float64))
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_triplet_and_gradient(case):
    result, triplet, gradient = norm_and_triplet(kernel(case), case.op)
    expected, left, right = cases.leading(cases.dense(kernel(case), case.op))
    assert result.shape == ()
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-10)
    check_triplet(triplet, kernel(case), case.op, 1e-10)
    # The outer product of the vectors, contracted with the layer's dependence on its kernel.
    outer = cases.pull_back(np.outer(left, right), case.op, case.kernel_shape)
    np.testing.assert_allclose(gradient, outer, atol=1e-8 * np.linalg.norm(outer))


# Gradients


@jax.jit
def both_jacobians(kernel, op):
    return jax.jacfwd(spectral_norm)(kernel, op), jax.jacrev(spectral_norm)(kernel, op)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradient_by_finite_differences_in_both_modes(case):
    forward, reverse = both_jacobians(kernel(case), case.op)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12, atol=1e-12)
    for seed in (1, 2):
        direction = gaussian(case.kernel_shape, seed)
        expected = derivative(lambda kernel: norm(kernel, case.op), kernel(case), direction)
        np.testing.assert_allclose(np.sum(reverse * direction), expected, rtol=1e-6)


def test_triplet_vectors_are_constants():
    case = cases.BY_NAME["same-1d"]
    jacobian = jax.jacrev(lambda kernel: leading_triplet(kernel, case.op).right)(kernel(case))
    np.testing.assert_array_equal(jacobian, 0)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_zero_kernel(case):
    zero = jnp.zeros(case.kernel_shape)
    result, triplet, gradient = norm_and_triplet(zero, case.op)
    assert result == 0
    assert triplet.value == 0
    assert triplet.residual == 0
    for vector in (triplet.left, triplet.right, gradient):
        assert np.all(np.isfinite(vector))
    np.testing.assert_allclose([np.linalg.norm(triplet.left), np.linalg.norm(triplet.right)], 1, rtol=1e-12)
    for jacobian in both_jacobians(zero, case.op):
        assert np.all(np.isfinite(jacobian))


def test_a_kernel_that_never_meets_the_image_has_norm_zero():
    op, weights = ZeroPaddedConv((2,)), jnp.asarray([3.0, 0, 0, 0, -2.0]).reshape((5, 1, 1))
    value, gradient = jax.value_and_grad(spectral_norm)(weights, op)
    assert value == 0
    np.testing.assert_array_equal(gradient[jnp.asarray([0, 4])], 0)


# Small integers: zero kernels, repeated leading values and symmetric kernels all occur.
DEGENERATE = by_name("dense-square", "circular-1d-groups", "circular-2d-one-channel", "same-1d", "transposed-2d")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.sampled_from(DEGENERATE), st.data())
def test_degenerate_kernels(case, data):
    """The value is right, and the gradient a subgradient: the norm is convex, so it supports it from below."""
    size = int(np.prod(case.kernel_shape))
    numbers = data.draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    weights = np.reshape(np.asarray(numbers, float), case.kernel_shape)
    result, triplet, gradient = norm_and_triplet(jnp.asarray(weights), case.op)
    expected = norm(weights, case.op)
    np.testing.assert_allclose([result, triplet.value], expected, rtol=1e-10)
    np.testing.assert_allclose(np.sum(gradient * weights), expected, atol=1e-10)
    for seed, scale in ((1, 1.0), (2, 1e-3)):
        step = scale * gaussian(case.kernel_shape, seed)
        assert norm(weights + step, case.op) >= expected + np.sum(gradient * step) - 1e-9


# Cold starts


def test_a_cold_start_is_near_the_answer_whatever_the_image():
    """Differences of neighbours: their leading frequency, pi, is none of an image of 21 samples."""
    channels = np.linalg.qr(gaussian((64, 64)))[0] * 0.8 ** np.arange(64)
    weights, op = np.stack([channels, -channels]), ZeroPaddedConv((21,))
    weights = jnp.asarray(weights)
    phases = circular_waves(circular_peaks(weights, op), weights, op).phases[0]
    # The layer is the tensor product of both factors.
    _, _, samples = np.linalg.svd(cases.dense(np.asarray([1.0, -1.0]).reshape((2, 1, 1)), op))
    leading, _, _ = np.linalg.svd(channels)
    assert np.linalg.norm(np.tensordot(phases, np.outer(samples[0], leading[:, 0]), 2)) > 0.95


@pytest.mark.parametrize("seed", [227, 302])
def test_float32_tells_values_apart_that_are_close(seed):
    """Two values within 5e-5: what a looser search ends at lies between them, or is the smaller one."""
    op, weights = ZeroPaddedConv((48,)), gaussian32((3, 4, 4), seed)
    searched = leading_triplet(weights, op, proven=False).value
    np.testing.assert_allclose(searched, norm(weights, op), rtol=2e-6)


@pytest.mark.parametrize(
    ("seed", "sizes", "channels"), [(211, (8, 8), 4), (270, (8, 8), 4), (115, (10, 10), 6), (65, (18, 18), 2)]
)
def test_the_larger_of_two_phases_is_found(seed, sizes, channels):
    """Nothing but the edges tells them apart, here by 2e-5 to 1e-3; a start in one of them is no way to the other."""
    op, weights = ZeroPaddedConv(sizes), gaussian32((3, 3, channels, channels), seed)
    searched = leading_triplet(weights, op, proven=False).value
    np.testing.assert_allclose([searched, spectral_norm(weights, op)], norm(weights, op), rtol=5e-6)


def test_norms_of_small_layers_with_zero_padding_do_not_rest_on_a_search(monkeypatch):
    monkeypatch.delattr(leading, "search")
    op, weights = ZeroPaddedConv((11,)), gaussian((3, 46, 47))
    np.testing.assert_allclose(spectral_norm(weights, op), norm(weights, op), rtol=1e-12)
    with pytest.raises(NameError, match="search"):
        spectral_norm(gaussian((3, 47, 47)), op)


def test_a_tolerance_takes_no_proof_away(monkeypatch):
    """However loose: there is nothing to search. Without a proof the same layer is searched."""
    monkeypatch.delattr(leading, "search")
    weights, initial = jnp.asarray(BINOMIAL), top_two(cases.dense(BINOMIAL, LONG), LONG, BINOMIAL.shape)[1]
    for options in ({}, {"initial": initial}):
        found = leading_triplet(weights, LONG, tolerance=0.5, **options)
        check_triplet(found, BINOMIAL, LONG, 1e-12)
    with pytest.raises(NameError, match="search"):
        leading_triplet(weights, LONG, proven=False)


# Warm starts


def top_two(matrix, op, kernel_shape) -> list[SingularTriplet]:
    """The two leading triplets of a matrix, as the library's results."""
    in_shape, out_shape = cases.shapes(kernel_shape, op)
    left, values, right = np.linalg.svd(matrix)
    return [
        SingularTriplet(
            jnp.asarray(values[i]),
            jnp.asarray(left[:, i].reshape(out_shape)),
            jnp.asarray(right[i].reshape(in_shape)),
            jnp.asarray(0.0),
        )
        for i in (0, 1)
    ]


# A symmetric kernel on a long image: its leading vector is even, its second one odd, the two values close.
LONG = ZeroPaddedConv((50,))
BINOMIAL = np.asarray([1.0, 2.0, 1.0]).reshape((3, 1, 1))


@pytest.mark.parametrize(
    ("op", "weights"),
    [(LONG, BINOMIAL), *((case.op, np.asarray(kernel(case))) for case in by_name("same-2d", "circular-2d"))],
    ids=["binomial", "same-2d", "circular-2d"],
)
def test_no_initial_triplet_changes_what_is_found(op, weights):
    matrix = cases.dense(weights, op)
    in_shape, out_shape = cases.shapes(weights.shape, op)
    first, second = top_two(matrix, op, weights.shape)
    assert second.value < (1 - 1e-4) * first.value
    zero = SingularTriplet(jnp.zeros(()), jnp.zeros(out_shape), jnp.zeros(in_shape), jnp.zeros(()))
    # The right one; another singular vector of the same operator, which a plain Krylov space would never leave.
    solve = jax.jit(lambda initial: leading_triplet(jnp.asarray(weights), op, initial=initial, proven=False))
    for initial in (first, second, zero, first._replace(left=-first.left)):
        check_triplet(solve(initial), weights, op, 1e-10)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2])
def test_a_second_singular_vector_does_not_pass_at_loose_tolerances(tolerance):
    """The residual of another singular vector is zero, so a loose tolerance alone would accept it."""
    _, second = top_two(cases.dense(BINOMIAL, LONG), LONG, BINOMIAL.shape)
    triplet = leading_triplet(jnp.asarray(BINOMIAL), LONG, initial=second, tolerance=tolerance, proven=False)
    assert triplet.value >= (1 - tolerance**2) * norm(BINOMIAL, LONG)
    assert np.linalg.norm(np.vdot(triplet.right, second.right)) < 0.9


def test_products_of_small_numbers_do_not_vanish():
    """The entries of both vectors are 0.02, so that the products of three factors are denormal."""
    kernel = jnp.full((2048, 2048), 5e-36, jnp.float32)
    np.testing.assert_allclose(jaxsrn.spectral_norm(kernel, Dense()), 2048 * 5e-36, rtol=1e-5)
    np.testing.assert_allclose(leading_triplet(kernel, Dense()).value, 2048 * 5e-36, rtol=1e-5)


def test_tolerance_is_traced_and_has_an_effect():
    op, weights = ZeroPaddedConv((24, 24)), jnp.asarray(gaussian((3, 3, 1, 1)))
    matrix = cases.dense(weights, op)
    traces = []

    @jax.jit
    def solve(tolerance):
        traces.append(tolerance)
        return leading_triplet(weights, op, tolerance=tolerance, proven=False)

    loose, tight = solve(0.3), solve(1e-12)
    assert len(traces) == 1
    assert 1e-6 < loose.residual <= 0.3
    assert tight.residual <= 1e-11
    assert loose.value < tight.value
    # The loose residual is measured, not the one that the search estimates.
    for triplet in (loose, tight):
        value, left, right = np.asarray(triplet.value), np.ravel(triplet.left), np.ravel(triplet.right)
        errors = np.linalg.norm(matrix @ right - value * left), np.linalg.norm(matrix.T @ left - value * right)
        np.testing.assert_allclose(triplet.residual, max(errors) / value, rtol=1e-6, atol=1e-14)
        # Temple: a singular value lies within the residual.
        assert abs(value - np.linalg.norm(matrix, 2)) <= max(errors)


# Precision and range


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", by_name("dense-wide", "circular-2d-strides", "same-2d"), ids=str)
def test_lower_precision(case, dtype):
    """Computed in float32, from the kernel as it was rounded."""
    for seed in range(4):
        weights = kernel(case, dtype, seed)
        result, triplet, gradient = norm_and_triplet(weights, case.op)
        assert result.dtype == triplet.value.dtype == triplet.left.dtype == triplet.right.dtype == np.float32
        assert gradient.dtype == dtype
        rounded = np.asarray(weights.astype(jnp.float64))
        np.testing.assert_allclose(result, norm(rounded, case.op), rtol=1e-5)
        check_triplet(triplet, rounded, case.op, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float64, 1e-200), (jnp.float64, 1e200), (jnp.float32, 1e-25), (jnp.float32, 1e25)]
)
@pytest.mark.parametrize("case", by_name("dense-wide", "circular-1d-odd-image", "circular-1d", "same-1d"), ids=str)
def test_extreme_scales(case, dtype, scale):
    """Squares of these kernels leave the range of the dtype; the norm itself does not."""
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-5
    for seed in range(3):
        weights = kernel(case, dtype, seed) * jnp.asarray(scale, dtype)
        expected = norm(weights, case.op)
        result, triplet, gradient = norm_and_triplet(weights, case.op)
        np.testing.assert_allclose([result, triplet.value], expected, rtol=tolerance)
        product = np.sum(np.asarray(gradient, np.float64) * np.asarray(weights, np.float64))
        np.testing.assert_allclose(product, expected, rtol=tolerance)


def test_taps_that_never_meet_the_image_set_no_scale():
    """Beside a tap of size 1 that has no effect, the squares of the others leave the range of the dtype."""
    op = ZeroPaddedConv((2,))
    weights = jnp.asarray([1, 1e-25, 2e-25, -1e-25, 1], jnp.float32).reshape((5, 1, 1))
    result, triplet, _ = norm_and_triplet(weights, op)
    np.testing.assert_allclose([result, triplet.value], norm(weights, op), rtol=1e-5)


@pytest.mark.parametrize("case", by_name("dense-wide", "circular-1d", "circular-1d-depthwise", "same-1d"), ids=str)
def test_nan_in_nan_out(case):
    for index in [(0,) * len(case.kernel_shape), (-1,) * len(case.kernel_shape)]:
        result, triplet, _ = norm_and_triplet(kernel(case).at[index].set(jnp.nan), case.op)
        assert np.isnan(result)
        assert np.isnan(triplet.value)


def test_nan_at_a_tap_that_never_meets_the_image():
    case = cases.BY_NAME["same-1d-five-taps-on-two"]
    result, _, _ = norm_and_triplet(kernel(case).at[0].set(jnp.nan), case.op)
    assert np.isnan(result)


def test_vmap_and_numpy_kernels():
    for case in KINDS:
        stack = np.stack([kernel(case), kernel(case, seed=1), np.zeros(case.kernel_shape)])
        expected = [norm(weights, case.op) for weights in stack]
        np.testing.assert_allclose(
            jax.vmap(spectral_norm, (0, None))(jnp.asarray(stack), case.op), expected, rtol=1e-10
        )
        np.testing.assert_allclose(spectral_norm(stack[0], case.op), expected[0], rtol=1e-10)


# Known values


@pytest.mark.parametrize("op", [CircularConv((8,)), CircularConv((7,), kernel_dilation=2), CircularConv((3,))], ids=str)
def test_non_negative_kernels_have_the_sum_of_their_taps(op):
    """Sedghi, Gupta, Long 2019, Proposition 7; the aliased third operator too."""
    weights = np.abs(gaussian((4, 1, 1)))
    np.testing.assert_allclose(spectral_norm(jnp.asarray(weights), op), np.sum(weights), rtol=1e-12)
    # The popular shortcut, the norm of the flattened kernel, is far away.
    assert np.linalg.norm(weights.reshape((-1, 1)), 2) < 0.8 * np.sum(weights)


def test_zero_padding_is_below_circular():
    weights = jnp.ones((3, 1, 1))
    # The matrix of SAME is I plus the path graph, whose eigenvalues are 2 cos(pi j / (n + 1)).
    np.testing.assert_allclose(spectral_norm(weights, ZeroPaddedConv((9,))), 1 + 2 * np.cos(np.pi / 10), rtol=1e-12)
    np.testing.assert_allclose(spectral_norm(weights, CircularConv((9,))), 3, rtol=1e-12)


def test_dense_kernels_with_a_prescribed_spectrum():
    left, _ = np.linalg.qr(gaussian((6, 4)))
    right, _ = np.linalg.qr(gaussian((4, 4)))
    triplet = leading_triplet(jnp.asarray(right @ np.diag([5.0, 3.0, 1.0, 0.1]) @ left.T), Dense())
    np.testing.assert_allclose(triplet.value, 5, rtol=1e-12)
    np.testing.assert_allclose(np.abs(triplet.right @ right[:, 0]), 1, rtol=1e-12)
    np.testing.assert_allclose(np.abs(triplet.left @ left[:, 0]), 1, rtol=1e-12)


def test_a_large_zero_padded_image_with_a_clustered_spectrum():
    """20 basis vectors are far fewer than the 144 unknowns: restarts must work."""
    op, weights = ZeroPaddedConv((144,)), np.asarray([1.0, 1.0, 1.0]).reshape((3, 1, 1))
    expected = 1 + 2 * np.cos(np.pi / 145)
    triplet = leading_triplet(jnp.asarray(weights), op)
    np.testing.assert_allclose(triplet.value, expected, rtol=1e-12)
    check_triplet(triplet, weights, op, 1e-10)


# Bad input


@pytest.mark.parametrize("function", [spectral_norm, leading_triplet])
@pytest.mark.parametrize(("weights", "message"), cases.BAD_KERNELS)
def test_bad_kernels(function, weights, message):
    with pytest.raises(ValueError, match=message):
        function(weights, ZeroPaddedConv((4, 4)))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_an_initial_triplet_must_fit(case):
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    zero = jnp.zeros(())
    wrong_right = SingularTriplet(zero, jnp.ones(out_shape), jnp.ones((*in_shape, 1)), zero)
    wrong_left = SingularTriplet(zero, jnp.ones((*out_shape, 1)), jnp.ones(in_shape), zero)
    for initial in (wrong_right, wrong_left):
        with pytest.raises(ValueError, match=r"initial: got left and right .*, expected a SingularTriplet with"):
            leading_triplet(kernel(case), case.op, initial=initial)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, np.nan, np.inf])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_tolerance_must_be_positive(case, tolerance):
    with pytest.raises(ValueError, match=r"tolerance: got .*, expected a positive finite number"):
        leading_triplet(kernel(case), case.op, tolerance=tolerance)


def test_tolerance_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"tolerance: got shape \(2,\), expected a scalar"):
        leading_triplet(jnp.ones((2, 2)), Dense(), tolerance=jnp.ones(2))


def test_nan_in_a_tap_without_effect_is_no_plausible_number():
    op = ZeroPaddedConv((2,))
    kernel = jnp.ones((5, 1, 1)).at[0].set(jnp.nan)
    for function in (jaxsrn.spectral_norm, jaxsrn.stable_rank, bounds.gram_iteration, bounds.tensor_norm, bounds.l1):
        assert np.isnan(function(kernel, op))
    assert np.isnan(bounds.certified(kernel, op).upper)


def test_initial_triplets_have_no_scale():
    first = leading_triplet(jnp.asarray(BINOMIAL), LONG, tolerance=1e-8, proven=False)
    large = first._replace(right=1e8 * first.right, left=1e8 * first.left)
    again = leading_triplet(jnp.asarray(BINOMIAL), LONG, initial=large, tolerance=1e-8, proven=False)
    np.testing.assert_allclose(again.value, first.value, rtol=1e-12)
