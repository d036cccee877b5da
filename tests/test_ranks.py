"""Stable rank and the stable ranks that kernels can have, against numpy on explicit matrices."""

import functools
import itertools
import math
import tracemalloc

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_name, derivative, gaussian, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, stable_rank, stable_rank_range
from jaxsrn.spectra.ranks import target_of_fraction

CIRCULAR = [case for case in CASES if isinstance(case.op, CircularConv)]
PADDED = [case for case in CASES if isinstance(case.op, ZeroPaddedConv)]
# One operator of each kind.
KINDS = by_name("dense-wide", "circular-2d-strides", "same-1d")


def rank_of(matrix) -> float:
    """`||T||_F^2 / ||T||_2^2`, without overflow; 0 at zero."""
    scale = np.max(np.abs(matrix))
    return np.sum((matrix / scale) ** 2) / np.linalg.norm(matrix / scale, 2) ** 2 if scale > 0 else 0.0


def oracle(kernel, op) -> float:
    """The stable rank of the explicit matrix."""
    return rank_of(cases.dense(kernel, op))


@jax.jit
def rank_and_gradient(kernel, op):
    return jax.value_and_grad(stable_rank)(kernel, op)


# The stable rank


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stable_rank_and_gradient(case):
    value, gradient = rank_and_gradient(kernel(case), case.op)
    matrix = cases.dense(kernel(case), case.op)
    norm, left, right = cases.leading(matrix)
    squared = np.sum(matrix**2)
    assert value.shape == ()
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, squared / norm**2, rtol=1e-10)
    assert 1 - 1e-12 <= value <= np.linalg.matrix_rank(matrix) + 1e-10
    expected = 2 * matrix / norm**2 - 2 * squared / norm**3 * np.outer(left, right)
    expected = cases.pull_back(expected, case.op, case.kernel_shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-7 * max(1.0, np.linalg.norm(expected)))


@jax.jit
def both_jacobians(kernel, op):
    return jax.jacfwd(stable_rank)(kernel, op), jax.jacrev(stable_rank)(kernel, op)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradient_by_finite_differences_in_both_modes(case):
    forward, reverse = both_jacobians(kernel(case), case.op)
    np.testing.assert_allclose(forward, reverse, rtol=1e-11, atol=1e-11)
    for seed in (1, 2):
        direction = gaussian(case.kernel_shape, seed)
        expected = derivative(lambda kernel: oracle(kernel, case.op), kernel(case), direction)
        np.testing.assert_allclose(np.sum(reverse * direction), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (jnp.float64, (1e-30, 1e30, 1e-200, 1e200, -3.0)),
        (jnp.float32, (1e-20, 1e20, 1e-30, 1e30, -3.0)),
        (jnp.bfloat16, (1e-20, 1e20)),
        (jnp.float16, (1e-3, 1e3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [*KINDS, cases.BY_NAME["circular-1d-odd-image"]], ids=str)
def test_scale_invariance(case, dtype, scales):
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-5
    for scale in (1.0, *scales):
        weights = kernel(case, dtype) * jnp.asarray(scale, dtype)
        value, gradient = rank_and_gradient(weights, case.op)
        assert value.dtype == (np.float64 if dtype == jnp.float64 else np.float32)
        np.testing.assert_allclose(value, oracle(weights, case.op), rtol=tolerance)
        # Euler: the gradient is orthogonal to the kernel (in bfloat16 it is itself rounded).
        if dtype in (jnp.float64, jnp.float32):
            product = np.asarray(gradient, np.float64) * np.asarray(weights, np.float64)
            np.testing.assert_allclose(np.sum(product), 0, atol=10 * tolerance * max(1.0, np.sum(np.abs(product))))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_zero_kernel(case):
    zero = jnp.zeros(case.kernel_shape)
    assert rank_and_gradient(zero, case.op)[0] == 0
    for jacobian in both_jacobians(zero, case.op):
        assert np.all(np.isfinite(jacobian))


@pytest.mark.parametrize(
    ("op", "taps"),
    [
        # Only taps that never meet the image.
        (ZeroPaddedConv((2,)), [1, 0, 0, 0, -2]),
        # No tap meets it.
        (ZeroPaddedConv((3,), padding=((-5, 7),)), [1, 2]),
        # Taps that fall on each other and cancel.
        (CircularConv((2,)), [1, 3, -1, -3]),
    ],
    ids=["dead-taps", "no-contact", "cancelling-aliases"],
)
def test_kernels_other_than_zero_of_the_zero_map(op, taps):
    weights = np.asarray(taps, float).reshape((-1, 1, 1))
    np.testing.assert_array_equal(cases.dense(weights, op), 0)
    value, gradient = rank_and_gradient(jnp.asarray(weights), op)
    assert value == 0
    assert np.all(np.isfinite(gradient))


def test_taps_that_never_meet_the_image_do_not_matter():
    op = ZeroPaddedConv((2,))
    for size in (0.0, 1.0, 1e100):
        weights = np.asarray([size, 1e-100, 2e-100, -1e-100, size]).reshape((5, 1, 1))
        value, gradient = rank_and_gradient(jnp.asarray(weights), op)
        np.testing.assert_allclose(value, oracle(weights, op), rtol=1e-10)
        np.testing.assert_array_equal(gradient[jnp.asarray([0, 4])], 0)


@pytest.mark.parametrize("case", by_name("dense-wide", "circular-1d", "circular-1d-depthwise", "same-1d"), ids=str)
def test_nan_in_nan_out(case):
    for index in [(0,) * len(case.kernel_shape), (-1,) * len(case.kernel_shape)]:
        assert np.isnan(rank_and_gradient(kernel(case).at[index].set(jnp.nan), case.op)[0])


def test_identity_and_rank_one():
    np.testing.assert_allclose(stable_rank(jnp.eye(4, 3), Dense()), 3, rtol=1e-14)
    outer = np.outer(gaussian((4,)), gaussian((3,), 1))
    np.testing.assert_allclose(stable_rank(jnp.asarray(outer), Dense()), 1, rtol=1e-14)
    delta = jnp.zeros((3, 1, 1)).at[1].set(-2.0)
    np.testing.assert_allclose(stable_rank(delta, CircularConv((9,))), 9, rtol=1e-14)
    np.testing.assert_allclose(stable_rank(delta, ZeroPaddedConv((9,))), 9, rtol=1e-14)
    # Figure of the closed form in math: (1/2, 1/4, 1/4) has norm 1, so N (1/4 + 1/8) at N = 64.
    weights = jnp.asarray([0.5, 0.25, 0.25]).reshape((3, 1, 1))
    np.testing.assert_allclose(stable_rank(weights, CircularConv((64,))), 24, rtol=1e-14)


def test_vmap_and_numpy_kernels():
    case = cases.BY_NAME["circular-2d-strides"]
    stack = np.stack([kernel(case), np.zeros(case.kernel_shape), kernel(case, seed=1)])
    expected = [oracle(weights, case.op) for weights in stack]
    np.testing.assert_allclose(jax.vmap(stable_rank, (0, None))(jnp.asarray(stack), case.op), expected, rtol=1e-10)
    np.testing.assert_allclose(stable_rank(stack[0], case.op), expected[0], rtol=1e-10)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(by_name("dense-square", "circular-1d-groups", "aliased-1d", "same-1d", "transposed-1d")), st.data()
)
def test_degenerate_kernels(case, data):
    """Small integers: zero maps, cancelling aliases and repeated leading values all occur."""
    size = int(np.prod(case.kernel_shape))
    numbers = data.draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    weights = np.reshape(np.asarray(numbers, float), case.kernel_shape)
    value, gradient = rank_and_gradient(jnp.asarray(weights), case.op)
    expected = oracle(weights, case.op)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.all(np.isfinite(gradient))
    low, high = stable_rank_range(case.kernel_shape, case.op)
    assert expected == 0 or low * (1 - 1e-9) <= expected <= high * (1 + 1e-9)


# The feasible range


def test_range_is_static():
    for case in KINDS:
        low, high = stable_rank_range(case.kernel_shape, case.op)
        assert type(low) is float
        assert type(high) is float


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (4, 4)], ids=str)
def test_range_of_matrices(shape):
    assert stable_rank_range(shape, Dense()) == (1.0, float(min(shape)))


def taps_by_phase(case) -> dict[tuple, list[tuple]]:
    """Distinct taps of a circular convolution, by the stride phase that they read."""
    op, phases, offsets = case.op, {}, set()
    for tap in itertools.product(*map(range, case.kernel_shape[:-2])):
        offset = tuple(t * d % n for t, d, n in zip(tap, op.kernel_dilation, op.input_shape, strict=True))
        if offset not in offsets:
            offsets.add(offset)
            phases.setdefault(tuple(o % s for o, s in zip(offset, op.strides, strict=True)), []).append(tap)
    return phases


@pytest.mark.parametrize("case", CIRCULAR, ids=str)
def test_low_end_of_circular_ranges_is_attained(case):
    """All taps of the fullest phase equal (frequency 0), between one input and one output channel."""
    fullest = max(taps_by_phase(case).values(), key=len)
    weights = np.zeros(case.kernel_shape)
    for tap in fullest:
        weights[(*tap, 0, 0)] = 1
    outputs = math.prod(n // s for n, s in zip(case.op.input_shape, case.op.strides, strict=True))
    low, _ = stable_rank_range(case.kernel_shape, case.op)
    np.testing.assert_allclose(low, outputs / len(fullest), rtol=1e-12)
    np.testing.assert_allclose(oracle(weights, case.op), low, rtol=1e-12)


@pytest.mark.parametrize("case", by_name("circular-1d", "circular-2d", "circular-1d-groups"), ids=str)
def test_low_end_is_attained_at_every_real_frequency(case):
    """Alternating signs, and an outer product between the channels of one group."""
    groups = case.op.feature_group_count
    channels = np.zeros(case.kernel_shape[-2:])
    width = case.kernel_shape[-1] // groups
    channels[:, :width] = np.outer(gaussian((case.kernel_shape[-2],)), gaussian((width,), 1))
    axes = [(-1.0) ** np.arange(taps) for taps in case.kernel_shape[:-2]]
    weights = functools.reduce(np.multiply.outer, [*axes, channels])
    low, _ = stable_rank_range(case.kernel_shape, case.op)
    np.testing.assert_allclose(oracle(weights, case.op), low, rtol=1e-12)


@pytest.mark.parametrize("case", CIRCULAR, ids=str)
def test_high_end_of_circular_ranges_is_attained(case):
    """Every output channel reads another sample, as far as there are any: all singular values 0 or 1."""
    groups, phases = case.op.feature_group_count, taps_by_phase(case)
    c_in, width = case.kernel_shape[-2], case.kernel_shape[-1] // case.op.feature_group_count
    weights = np.zeros(case.kernel_shape)
    sources = [(taps[0], channel) for taps in phases.values() for channel in range(c_in)]
    for group in range(groups):
        for output, (tap, channel) in zip(range(width), sources, strict=False):
            weights[(*tap, channel, group * width + output)] = 1
    outputs = math.prod(n // s for n, s in zip(case.op.input_shape, case.op.strides, strict=True))
    _, high = stable_rank_range(case.kernel_shape, case.op)
    assert high == outputs * min(case.kernel_shape[-1], c_in * groups * len(phases))
    np.testing.assert_allclose(oracle(weights, case.op), high, rtol=1e-12)


@pytest.mark.parametrize(
    ("op", "kernel_shape", "expected"),
    [
        (CircularConv((16,)), (3, 2, 5), (16 / 3, 32)),
        (CircularConv((8, 8)), (3, 3, 4, 4), (64 / 9, 256)),
        # Two taps of three phases: one tap in each, and a third of the samples is never read.
        (CircularConv((9,), strides=3), (2, 1, 4), (3, 6)),
        (CircularConv((8,), strides=2), (3, 1, 4), (2, 8)),
        (CircularConv((6,), feature_group_count=3), (2, 2, 3), (3, 18)),
        # Six taps on four samples: four distinct ones.
        (CircularConv((4,)), (6, 1, 1), (1, 4)),
    ],
    ids=str,
)
def test_known_circular_ranges(op, kernel_shape, expected):
    np.testing.assert_allclose(stable_rank_range(kernel_shape, op), expected, rtol=1e-14)


def functional_kernel(left, right, op, kernel_shape) -> np.ndarray:
    """`E = grad_K <u, T(K) v> / d`: of all kernels with this `<u, T(K) v>`, the one of the smallest Frobenius norm."""
    counts = cases.weights(kernel_shape, op)
    gradient = cases.pull_back(np.outer(left, right), op, kernel_shape)
    return np.divide(gradient, counts, out=np.zeros(kernel_shape), where=counts > 0)


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_ranges_with_zero_padding_are_certified(case):
    """No kernel lies outside: random ones, and ones of smallest stable rank, descended to from random pairs."""
    low, high = stable_rank_range(case.kernel_shape, case.op)
    shape = cases.dense(kernel(case), case.op).shape
    lowest = np.inf
    for seed in range(6):
        value = oracle(gaussian(case.kernel_shape, seed), case.op)
        assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
        rng = np.random.default_rng(seed)
        # Constant images are close to the leading vectors of low stable ranks.
        left, right = (rng.standard_normal(size) + (seed % 2) for size in shape)
        for _ in range(8):
            matrix = cases.dense(functional_kernel(left, right, case.op, case.kernel_shape), case.op)
            _, left, right = cases.leading(matrix)
            value = rank_of(matrix)
            lowest = min(lowest, value)
            assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
    # The descent does reach low stable ranks: the bound is not idle.
    assert lowest < 4 * max(low, 1.0)


@pytest.mark.parametrize("name", ["same-1d-one-sample", "valid-1d", "transposed-1d-empty-phase", "same-2d"])
def test_high_end_with_zero_padding_is_attained(name):
    """A tap that meets every sample, with orthonormal channels."""
    case = cases.BY_NAME[name]
    weights = np.zeros(case.kernel_shape)
    middle = tuple((taps - 1) // 2 for taps in case.kernel_shape[:-2])
    weights[middle] = np.eye(*case.kernel_shape[-2:])
    _, high = stable_rank_range(case.kernel_shape, case.op)
    np.testing.assert_allclose(oracle(weights, case.op), high, rtol=1e-12)


def test_range_of_five_taps_on_two_samples():
    """Weights 0, 1, 2, 1, 0: the outer taps count neither way; all three maps below are reached by the inner ones."""
    low, high = stable_rank_range((5, 1, 1), ZeroPaddedConv((2,)))
    assert 1 / (1 / 1 + 1 / 2 + 1 / 1) <= low <= 1.0
    assert high == 2.0
    ones, identity = np.zeros((5, 1, 1)), np.zeros((5, 1, 1))
    ones[1:4], identity[2] = 1, 1
    np.testing.assert_allclose(oracle(ones, ZeroPaddedConv((2,))), 1, rtol=1e-14)
    np.testing.assert_allclose(oracle(identity, ZeroPaddedConv((2,))), 2, rtol=1e-14)


@pytest.mark.parametrize(
    ("op", "kernel_shape", "low"),
    [
        # The sum of 1 / d over the taps, of one phase.
        (ZeroPaddedConv((10,)), (3, 1, 1), 1 / (1 / 9 + 1 / 10 + 1 / 9)),
        (ZeroPaddedConv((10,), padding="VALID"), (3, 4, 2), 8 / 3),
        (ZeroPaddedConv((10,), padding="CAUSAL"), (2, 1, 1), 1 / (1 / 9 + 1 / 10)),
        (ZeroPaddedConv((8,), padding="VALID", strides=2), (2, 1, 1), 4),
        (ZeroPaddedConv((8,), padding="VALID", strides=2), (3, 1, 1), 3 / 2),
        (ZeroPaddedConv((10, 10)), (3, 3, 2, 2), 1 / (1 / 9 + 1 / 10 + 1 / 9) ** 2),
    ],
    ids=str,
)
def test_known_low_ends_with_zero_padding(op, kernel_shape, low):
    np.testing.assert_allclose(stable_rank_range(kernel_shape, op)[0], low, rtol=1e-14)


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_high_ends_count_the_samples_that_any_tap_meets(case):
    met = [(output, sample) for output, _, sample in cases.meetings(case.op, case.kernel_shape[:-2])]
    outputs, inputs = (len(set(samples)) for samples in zip(*met, strict=True))
    channels_in, channels_out = case.kernel_shape[-2] * case.op.feature_group_count, case.kernel_shape[-1]
    assert stable_rank_range(case.kernel_shape, case.op).high == min(outputs * channels_out, inputs * channels_in)


def test_long_convolutions_are_counted_by_little_more_than_their_taps():
    """A causal layer over a whole sequence: tap `t` meets `t + 1` samples."""
    n = 2**15
    op, shape = ZeroPaddedConv((n,), padding="CAUSAL"), (n, 1, 1)
    tracemalloc.start()
    low, high = stable_rank_range(shape, op)
    counts = op._tap_counts(shape)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Lists of all samples that each tap meets would take 8 GB.
    assert most < 1000 * n
    np.testing.assert_array_equal(counts[:, 0, 0], np.arange(1, n + 1))
    assert (low, high) == (1.0, n)


def test_range_of_a_map_that_is_always_zero():
    assert stable_rank_range((2, 1, 1), ZeroPaddedConv((3,), padding=((-5, 7),))) == (0.0, 0.0)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    n=st.integers(1, 8),
    taps=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    stride=st.integers(1, 3),
    input_dilation=st.integers(1, 3),
    kernel_dilation=st.integers(1, 2),
    pads=st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    seed=st.integers(0, 99),
)
def test_any_one_dimensional_range_is_certified(n, taps, channels, stride, input_dilation, kernel_dilation, pads, seed):
    """Plain numpy: no compilation, so many geometries."""
    op = ZeroPaddedConv(
        (n,), padding=(pads,), strides=stride, input_dilation=input_dilation, kernel_dilation=kernel_dilation
    )
    shape = (taps, *channels)
    if (n - 1) * input_dilation + 1 + sum(pads) < (taps - 1) * kernel_dilation + 1:
        return
    low, high = stable_rank_range(shape, op)
    matrix = cases.dense(gaussian(shape, seed), op)
    for _ in range(6):
        value = rank_of(matrix)
        assert value == 0 or low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
        _, left, right = cases.leading(matrix)
        matrix = cases.dense(functional_kernel(left, right, op, shape), op)
    assert np.linalg.matrix_rank(cases.dense(gaussian(shape, seed), op)) <= high


# Bad input


@pytest.mark.parametrize("function", [stable_rank, lambda kernel, op: stable_rank_range(kernel.shape, op)])
@pytest.mark.parametrize(
    ("weights", "op", "message"),
    [
        (jnp.ones((3, 1, 2)), CircularConv((4, 4)), r"kernel: got shape \(3, 1, 2\), expected \(2 tap sizes"),
        (jnp.ones((3, 1, 2)), Dense(), r"kernel: got shape \(3, 1, 2\), expected \(c_in, c_out\)"),
        (jnp.ones((5, 1, 1)), ZeroPaddedConv((4,), padding="VALID"), "leave no output"),
    ],
)
def test_bad_kernels(function, weights, op, message):
    with pytest.raises(ValueError, match=message):
        function(weights, op)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_kernels_must_be_real_and_floating(dtype):
    with pytest.raises(ValueError, match=r"kernel: got dtype .*expected a real floating-point"):
        stable_rank(jnp.ones((2, 2), dtype), Dense())


@pytest.mark.parametrize("case", by_name("dense-tall", "circular-2d-stride-groups", "same-2d", "transposed-1d"))
def test_targets_are_shares_of_the_largest_stable_rank(case):
    """The largest is that of a matrix of the layer's shape with equal singular values."""
    largest = min(cases.dense(kernel(case), case.op).shape)
    for fraction in (0.7, 1.0):
        target = target_of_fraction(fraction, case.kernel_shape, case.op)
        assert target == pytest.approx(fraction * largest, rel=1e-12)
    for fraction in (0.0, -0.5, 1.01, np.nan):
        with pytest.raises(ValueError, match=r"expected a static number in \(0, 1\]"):
            target_of_fraction(fraction, case.kernel_shape, case.op)


def test_shapes_and_operators_that_are_none(no_type_checks):
    for shape in (4, (3.5, 3, 4, 4), None, "ab"):
        with pytest.raises(ValueError, match=r"kernel_shape: got .*, expected a tuple of integers"):
            stable_rank_range(shape, Dense())
    for op in (None, Dense):
        with pytest.raises(ValueError, match=r"op: got .*, expected an operator"):
            stable_rank_range((4, 4), op)
    for fraction in (np.array(1j), np.array(True)):
        with pytest.raises(ValueError, match=r"fraction: got .*, expected a static number"):
            target_of_fraction(fraction, (4, 4), Dense())


def test_samples_that_strides_leave_out_do_not_count():
    """The shortcuts of a ResNet read one sample of each four, so that their largest stable rank is that of a matrix."""
    assert target_of_fraction(0.5, (1, 1, 64, 128), UnboundedConv(strides=2)) == 32
    assert target_of_fraction(0.5, (3, 3, 64, 128), UnboundedConv(strides=2)) == 64
    for op in (CircularConv((8, 8), strides=2), ZeroPaddedConv((8, 8), strides=2)):
        assert target_of_fraction(0.5, (1, 1, 4, 8), op) == 0.5 * 16 * 4


def test_a_fraction_where_all_kernels_have_the_same_stable_rank():
    """Such as a head of one unit, whose matrix has rank one."""
    assert target_of_fraction(0.3, (8, 1), Dense()) == 1
    with pytest.raises(ValueError, match=r"fraction: got 0.05, expected at least 0.0555556"):
        target_of_fraction(0.05, (3, 3, 2, 3), CircularConv((8, 8)))


@pytest.mark.usefixtures("no_type_checks")
def test_a_fraction_is_any_static_number():
    shape, op = (3, 2, 2), CircularConv((8,))
    expected = target_of_fraction(0.5, shape, op)
    for fraction in (np.float32(0.5), np.array(0.5), jnp.asarray(0.5)):
        assert target_of_fraction(fraction, shape, op) == expected
