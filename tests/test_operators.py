"""Operators against explicit matrices built from the definition, and against Flax element by element."""

import functools
import re

import cases
import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_name, gaussian, is_aliased, kernel, one_dimensional_geometries
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn.normalization.reverse_mode import in_reverse

CONVOLUTIONS = [case for case in CASES if not isinstance(case.op, Dense)]
# One operator of each kind.
SOME = by_name("dense-tall", "circular-2d-strides", "same-1d", "transposed-2d")


@jax.jit
def matrix_and_adjoints(kernel, op, x, y):
    """The explicit matrix, `T(K)^T y` and `grad_K <y, T(K) x>`."""
    return op.to_dense(kernel), op.transpose(kernel, y), op._kernel_gradient(kernel.shape, x, y)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_and_adjoints_equal_the_definition(case):
    weights, matrix = kernel(case), cases.dense(kernel(case), case.op)
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    assert case.op.in_shape(case.kernel_shape) == in_shape
    assert case.op.out_shape(case.kernel_shape) == out_shape
    x, y = jnp.asarray(gaussian(in_shape, 1)), jnp.asarray(gaussian(out_shape, 2))
    dense, transposed, gradient = matrix_and_adjoints(weights, case.op, x, y)
    assert transposed.shape == in_shape
    np.testing.assert_allclose(dense, matrix, atol=1e-13)
    np.testing.assert_allclose(transposed.ravel(), matrix.T @ y.ravel(), atol=1e-12)
    expected = cases.pull_back(np.outer(y, x), case.op, case.kernel_shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    # The adjoint identity itself: <y, T(K) x> = <grad, K>.
    np.testing.assert_allclose(np.sum(gradient * weights), np.vdot(y, matrix @ x.ravel()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "op",
    [
        ZeroPaddedConv((10, 10), padding=((-1, 1), (-1, 1))),
        ZeroPaddedConv((10, 10), padding=((4, 0), (4, 0))),
        ZeroPaddedConv((10, 10), padding=((-1, 1), (4, -1)), kernel_dilation=2, strides=(1, 2)),
        ZeroPaddedConv((10, 10), padding=((5, -2), (4, 0)), input_dilation=2, strides=2),
    ],
    ids=str,
)
def test_products_that_crop_at_one_end_and_pad_at_the_other(op):
    """XLA's own convolutions of this kind in float32 are wrong by 1e13 on CPUs (jaxlib 0.10.2)."""
    shape = (3, 3, 4, 4)
    weights, (in_shape, out_shape) = gaussian(shape).astype(np.float32), cases.shapes(shape, op)
    matrix = cases.dense(weights, op)
    x, y = jnp.asarray(gaussian(in_shape, 1), jnp.float32), jnp.asarray(gaussian(out_shape, 2), jnp.float32)
    dense, transposed, gradient = matrix_and_adjoints(jnp.asarray(weights), op, x, y)
    np.testing.assert_allclose(dense, matrix, atol=1e-6)
    np.testing.assert_allclose(op.apply(weights, x).ravel(), matrix @ np.ravel(x), atol=1e-4)
    np.testing.assert_allclose(transposed.ravel(), matrix.T @ np.ravel(y), atol=1e-4)
    np.testing.assert_allclose(gradient, cases.pull_back(np.outer(y, x), op, shape), atol=1e-4)


def layouts(case, function, *args):
    """Of all convolutions in the lowered program, and the one in which XLA is fast within loops on CPUs."""
    text, spatial = jax.jit(function).lower(*args).as_text(), ", ".join(map(str, range(case.op.num_axes)))
    found = set(re.findall(r"dim_numbers = (\S.*?\]->\[.*?\])", text))
    return found, {f"[b, {spatial}, f]x[{spatial}, i, o]->[b, {spatial}, f]"}


@pytest.mark.parametrize("case", by_name("circular-2d-strides", "same-1d", "transposed-2d"), ids=str)
def test_the_adjoints_are_convolutions_in_the_layout_of_the_map(case):
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)

    def products(kernel, x, y):
        return case.op.apply(kernel, x), case.op.transpose(kernel, y), case.op._kernel_gradient(case.kernel_shape, x, y)

    found, fast = layouts(case, products, kernel(case), jnp.zeros(in_shape), jnp.zeros(out_shape))
    assert found == fast


def pulled_back(op, kernel, x, y):
    """The derivatives of all three products in reverse mode."""
    gradient = functools.partial(op._kernel_gradient, kernel.shape)
    products = (op.apply, (kernel, x), y), (op.transpose, (kernel, y), x), (gradient, (x, y), kernel)
    return [jax.vjp(function, *arguments)[1](cotangent) for function, arguments, cotangent in products]


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.op, ZeroPaddedConv)], ids=str)
def test_in_reverse_derivatives_are_those_of_jax(case):
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    x, y = jnp.asarray(gaussian((2, *in_shape), 1)), jnp.asarray(gaussian((2, *out_shape), 2))
    own, expected = (pulled_back(op, kernel(case), x, y) for op in (in_reverse(case.op), case.op))
    chex.assert_trees_all_close(own, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", by_name("same-1d", "transposed-2d"), ids=str)
def test_in_reverse_derivatives_are_convolutions_in_the_layout_of_the_map(case):
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    function = functools.partial(pulled_back, in_reverse(case.op))
    found, fast = layouts(case, function, kernel(case), jnp.zeros(in_shape), jnp.zeros(out_shape))
    assert found == fast


def test_in_reverse_leaves_other_operators_as_they_are():
    for case in by_name("dense-tall", "circular-2d-strides"):
        assert in_reverse(case.op) is case.op


@pytest.mark.parametrize("case", [case for case in CASES if not is_aliased(case)], ids=str)
def test_frobenius_weights(case):
    values = case.op.frobenius_weights(case.kernel_shape)
    taps = case.kernel_shape[:-2]
    assert values.shape == (*taps, 1, 1)
    np.testing.assert_array_equal(values, cases.weights(case.kernel_shape, case.op))
    squared = np.sum(cases.dense(kernel(case), case.op) ** 2)
    np.testing.assert_allclose(jnp.sum(values * kernel(case) ** 2), squared, rtol=1e-13)


def test_frobenius_weights_of_five_taps_on_two_samples():
    weights = ZeroPaddedConv((2,)).frobenius_weights((5, 1, 1))
    np.testing.assert_array_equal(weights.ravel(), [0, 1, 2, 1, 0])


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32, np.float64])
def test_frobenius_weights_dtype(dtype):
    weights = ZeroPaddedConv((4,)).frobenius_weights((3, 2, 1), dtype)
    assert weights.dtype == (np.float64 if dtype is None else dtype)
    np.testing.assert_array_equal(weights.ravel(), [3, 4, 3])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_leading_batch_axes(case, batch):
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    matrix = cases.dense(kernel(case), case.op)
    x, y = gaussian((*batch, *in_shape)), gaussian((*batch, *out_shape))
    applied = case.op.apply(kernel(case), jnp.asarray(x))
    transposed = case.op.transpose(kernel(case), jnp.asarray(y))
    assert applied.shape == (*batch, *out_shape)
    assert transposed.shape == (*batch, *in_shape)
    expected = x.reshape((-1, matrix.shape[1])) @ matrix.T
    np.testing.assert_allclose(applied, expected.reshape((*batch, *out_shape)), atol=1e-12)
    expected = y.reshape((-1, matrix.shape[0])) @ matrix
    np.testing.assert_allclose(transposed, expected.reshape((*batch, *in_shape)), atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_apply_keeps_the_dtype(dtype):
    case = cases.BY_NAME["same-1d"]
    y = case.op.apply(kernel(case, dtype), jnp.ones((7, 2), dtype))
    assert y.dtype == dtype
    expected = cases.dense(np.asarray(kernel(case, dtype), np.float64), case.op) @ np.ones(14)
    np.testing.assert_allclose(np.asarray(y, np.float64).ravel(), expected, atol=0.05 if dtype != jnp.float32 else 1e-5)


def test_the_reference_matrix_and_its_adjoint_agree():
    """The oracle of all tests, checked on itself: `<dense(K), G> = <K, pull_back(G)>`."""
    for case in CASES:
        matrix = cases.dense(kernel(case), case.op)
        other = gaussian(matrix.shape, 3)
        pulled = cases.pull_back(other, case.op, case.kernel_shape)
        np.testing.assert_allclose(np.sum(matrix * other), np.sum(pulled * kernel(case)), rtol=1e-11, atol=1e-11)


# Flax


def flax_arguments(case):
    """The constructor arguments of the Flax convolution that the case stands for."""
    op, taps = case.op, case.kernel_shape[:-2]
    arguments = {
        "kernel_size": taps,
        "strides": op.strides,
        "kernel_dilation": op.kernel_dilation,
        "feature_group_count": op.feature_group_count,
        "use_bias": False,
        "param_dtype": jnp.float64,
    }
    if isinstance(op, CircularConv):
        return arguments | {"padding": "CIRCULAR"}
    return arguments | {"padding": op.padding, "input_dilation": op.input_dilation}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_apply_equals_nnx_conv_and_the_definition(case):
    channels = (case.kernel_shape[-2] * case.op.feature_group_count, case.kernel_shape[-1])
    given_kernel = kernel(case)
    init = lambda key, shape, dtype: given_kernel.astype(dtype).reshape(shape)  # noqa: E731
    layer = nnx.Conv(*channels, **flax_arguments(case), kernel_init=init, rngs=nnx.Rngs(0))
    x = jnp.asarray(gaussian((2, *cases.shapes(case.kernel_shape, case.op)[0])))
    y = case.op.apply(given_kernel, x)
    np.testing.assert_allclose(y, layer(x), rtol=1e-13, atol=1e-13)
    matrix = cases.dense(given_kernel, case.op)
    np.testing.assert_allclose(y.reshape((2, -1)), x.reshape((2, -1)) @ matrix.T, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    by_name(
        "circular-1d-even-taps",
        "circular-2d-strides",
        "circular-2d-dilation",
        "circular-2d-stride-groups",
        "aliased-2d",
        "same-1d-even-taps",
        "same-2d-stride-groups",
        "valid-2d-dilation",
        "causal-1d",
        "pairs-1d-crop-and-pad",
        "transposed-2d",
        "same-3d",
    ),
    ids=str,
)
def test_apply_equals_linen_conv(case):
    layer = linen.Conv(case.kernel_shape[-1], **flax_arguments(case))
    x = jnp.asarray(gaussian((2, *cases.shapes(case.kernel_shape, case.op)[0])))
    expected = layer.apply({"params": {"kernel": kernel(case)}}, x)
    np.testing.assert_allclose(case.op.apply(kernel(case), x), expected, rtol=1e-13, atol=1e-13)


def test_apply_equals_nnx_linear_and_linen_dense():
    weights, x = jnp.asarray(gaussian((4, 3))), jnp.asarray(gaussian((5, 4)))
    layer = nnx.Linear(4, 3, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    layer.kernel[...] = weights
    np.testing.assert_allclose(Dense().apply(weights, x), layer(x), rtol=1e-14)
    module = linen.Dense(3, use_bias=False, param_dtype=jnp.float64)
    np.testing.assert_allclose(Dense().apply(weights, x), module.apply({"params": {"kernel": weights}}, x), rtol=1e-14)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (ZeroPaddedConv((16, 16), padding="VALID"), (16, 16, 3, 2)),
        (ZeroPaddedConv((2, 1), padding=((15, 15), (7, 7))), (16, 8, 2, 3)),
    ],
    ids=["few-outputs", "few-inputs"],
)
def test_explicit_matrices_take_no_array_of_the_square_of_the_larger_side(op, shape):
    weights, numbers = jnp.asarray(gaussian(shape)), 0
    expected = cases.dense(weights, op)
    for equation in jax.make_jaxpr(op.to_dense)(weights).eqns:
        numbers = max(numbers, *(variable.aval.size for variable in equation.outvars))
    # Products with padding are a few times the matrix.
    assert numbers <= 4 * expected.size
    assert numbers < max(expected.shape) ** 2 / 8
    np.testing.assert_array_equal(op.to_dense(weights), expected)


@pytest.mark.parametrize("case", by_name("valid-1d", "circular-2d-strides"), ids=str)
def test_derivatives_of_matrices_with_fewer_outputs_than_inputs(case):
    """The map is linear in the kernel, so that its derivative is the matrix of the direction."""
    weights, other = kernel(case), kernel(case, seed=5)
    matrix = cases.dense(other, case.op)
    assert matrix.shape[0] < matrix.shape[1]
    tangent = jax.jvp(case.op.to_dense, (weights,), (other,))[1]
    np.testing.assert_allclose(tangent, matrix, atol=1e-14)
    cotangent = gaussian(matrix.shape, 6)
    found = jax.vjp(case.op.to_dense, weights)[1](jnp.asarray(cotangent))[0]
    np.testing.assert_allclose(found, cases.pull_back(cotangent, case.op, case.kernel_shape), atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(geometry=one_dimensional_geometries(-4, 9))
def test_contacts_of_any_one_dimensional_geometry(geometry):
    """Plain numbers: no compilation, so many geometries."""
    op, shape, has_output = cases.one_dimensional(*geometry)
    if not has_output:
        return
    expected = [[] for _ in range(shape[0])]
    for (output,), (tap,), (sample,) in cases.meetings(op, shape[:1]):
        expected[tap].append((output, sample))
    found = op._axis_contacts(shape)[0]
    assert [list(zip(tap.outputs, tap.inputs, strict=True)) for tap in found] == expected


@pytest.mark.parametrize("case", [case for case in CONVOLUTIONS if isinstance(case.op, CircularConv)], ids=str)
def test_contacts_of_circular_layers(case):
    found = case.op._axis_contacts(case.kernel_shape)
    expected = [[(set(), set()) for _ in axis] for axis in found]
    for output, tap, sample in cases.meetings(case.op, case.kernel_shape[:-2]):
        for axis, (o, t, i) in enumerate(zip(output, tap, sample, strict=True)):
            expected[axis][t][0].add(o)
            expected[axis][t][1].add(i)
    assert [[(set(tap.outputs), set(tap.inputs)) for tap in axis] for axis in found] == expected


@jax.jit
def dense_and_wrapped(kernel, op):
    return op.to_dense(kernel), op.wrap(kernel)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(geometry=one_dimensional_geometries(-2, 5))
def test_any_one_dimensional_geometry(geometry):
    op, shape, has_output = cases.one_dimensional(*geometry)
    if not has_output:
        with pytest.raises(ValueError, match="leave no output"):
            op._check_kernel_shape(shape)
        return
    weights = gaussian(shape)
    dense, _ = dense_and_wrapped(jnp.asarray(weights), op)
    np.testing.assert_allclose(dense, cases.dense(weights, op), atol=1e-13)
    np.testing.assert_array_equal(op.frobenius_weights(shape), cases.weights(shape, op))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(grid=st.integers(1, 4), taps=st.integers(1, 6), stride=st.integers(1, 3), kernel_dilation=st.integers(1, 3))
def test_any_one_dimensional_circular_geometry(grid, taps, stride, kernel_dilation):
    op = CircularConv((grid * stride,), strides=stride, kernel_dilation=kernel_dilation)
    weights = gaussian((taps, 1, 1))
    matrix = cases.dense(weights, op)
    dense, wrapped = dense_and_wrapped(jnp.asarray(weights), op)
    np.testing.assert_allclose(dense, matrix, atol=1e-13)
    offsets = {tap * kernel_dilation % (grid * stride) for tap in range(taps)}
    assert wrapped.shape == (len(offsets), 1, 1)
    squared = np.sum(np.asarray(op.frobenius_weights(wrapped.shape)) * np.asarray(wrapped) ** 2)
    np.testing.assert_allclose(squared, np.sum(matrix**2), rtol=1e-12)


# Operators as values


@pytest.mark.usefixtures("no_type_checks")
def test_operators_are_equal_and_hash_by_value():
    op = CircularConv((4, 6), strides=(2, 2), kernel_dilation=1)
    same = CircularConv([np.int64(4), 6], strides=2, kernel_dilation=(1, 1), feature_group_count=1)
    assert op == same
    assert hash(op) == hash(same)
    assert op.input_shape == (4, 6)
    assert op.strides == (2, 2)
    padded = ZeroPaddedConv((4,), padding=[[1, 0]], strides=(2,))
    assert padded == ZeroPaddedConv([4], padding=((1, 0),), strides=2)
    assert hash(padded) == hash(ZeroPaddedConv([4], padding=((1, 0),), strides=2))
    assert Dense() == Dense()
    assert len({op, same, Dense(), Dense(), padded}) == 3
    assert CircularConv(5) == CircularConv((5,))


@pytest.mark.parametrize(
    "other",
    [
        ZeroPaddedConv((6,), padding="VALID"),
        ZeroPaddedConv((6,), strides=2),
        ZeroPaddedConv((6,), kernel_dilation=2),
        ZeroPaddedConv((6,), feature_group_count=2),
        ZeroPaddedConv((5,)),
        CircularConv((6,)),
        Dense(),
    ],
    ids=str,
)
def test_different_operators_differ(other):
    assert other != ZeroPaddedConv((6,))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_operators_are_static_under_transformations(case):
    traces = []

    def squared(kernel, op, x):
        traces.append(op)
        return jnp.sum(op.apply(kernel, x) ** 2)

    assert jax.tree.leaves(case.op) == []
    assert jax.tree.map(lambda leaf: leaf, case.op) == case.op
    weights, matrix = kernel(case), cases.dense(kernel(case), case.op)
    in_shape, _ = cases.shapes(case.kernel_shape, case.op)
    x = gaussian(in_shape)
    value = np.sum((matrix @ x.ravel()) ** 2)
    jitted = jax.jit(squared)
    copy = type(case.op)(**vars(case.op))
    assert copy is not case.op
    for op in (case.op, copy):
        np.testing.assert_allclose(jitted(weights, op, jnp.asarray(x)), value, rtol=1e-12)
    assert len(traces) == 1
    stack = jnp.stack([weights, 2 * weights])
    mapped = jax.vmap(squared, (0, None, None))(stack, case.op, jnp.asarray(x))
    np.testing.assert_allclose(mapped, [value, 4 * value], rtol=1e-12)
    gradient = jax.grad(squared)(weights, case.op, jnp.asarray(x))
    expected = cases.pull_back(2 * np.outer(matrix @ x.ravel(), x), case.op, case.kernel_shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-11)


def test_operators_are_frozen():
    with pytest.raises(AttributeError):
        CircularConv((4,)).strides = (2,)


# Aliased taps


@pytest.mark.parametrize(
    ("case", "distinct"),
    [
        ("aliased-1d", (4, 1, 2)),
        ("aliased-1d-dilation", (2, 2, 2)),
        ("aliased-1d-stride", (4, 1, 2)),
        ("aliased-2d", (3, 2, 1, 2)),
    ],
)
def test_wrap_keeps_the_map_up_to_a_translation(case, distinct):
    case = cases.BY_NAME[case]
    wrapped = case.op.wrap(kernel(case))
    assert wrapped.shape == distinct
    expected = np.linalg.svd(cases.dense(kernel(case), case.op), compute_uv=False)
    values = np.linalg.svd(cases.dense(wrapped, case.op), compute_uv=False)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    squared = jnp.sum(case.op.frobenius_weights(wrapped.shape) * wrapped**2)
    np.testing.assert_allclose(squared, np.sum(expected**2), rtol=1e-12)


@pytest.mark.parametrize("case", by_name("dense-tall", "circular-2d", "same-1d-five-taps-on-two"), ids=str)
def test_wrap_leaves_other_kernels_alone(case):
    np.testing.assert_array_equal(case.op.wrap(kernel(case)), kernel(case))


@pytest.mark.parametrize("case", [case for case in CASES if is_aliased(case)], ids=str)
def test_aliased_taps_have_no_frobenius_weights(case):
    with pytest.raises(ValueError, match=r"fall on each other.*op\.wrap\(kernel\)"):
        case.op.frobenius_weights(case.kernel_shape)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CircularConv((6,), strides=4), r"strides: got \(4,\) on an image of \(6,\), expected divisors"),
        (lambda: CircularConv((4, 6), strides=(2, 4)), r"strides: got \(2, 4\).*divisors"),
        (lambda: CircularConv((6,), strides=0), "strides: got 0, expected"),
        (lambda: CircularConv((6,), strides=-1), "strides: got -1, expected"),
        (lambda: CircularConv((6,), strides=True), "strides: got True, expected"),
        (lambda: CircularConv((6,), strides=2.0), r"strides: got 2\.0, expected"),
        (lambda: CircularConv((6,), strides=(1, 1)), r"strides: got \(1, 1\), expected"),
        (lambda: CircularConv((6,), kernel_dilation=0), "kernel_dilation: got 0, expected"),
        (lambda: CircularConv((6,), feature_group_count=0), "feature_group_count: got 0, expected"),
        (lambda: CircularConv(()), r"input_shape: got \(\), expected one to three"),
        (lambda: CircularConv((2, 2, 2, 2)), r"input_shape: got \(2, 2, 2, 2\), expected one to three"),
        (lambda: CircularConv((4, 0)), r"input_shape: got \(4, 0\), expected"),
        (lambda: CircularConv((4.0,)), r"input_shape: got \(4\.0,\), expected"),
        (lambda: ZeroPaddedConv(()), r"input_shape: got \(\), expected one to three"),
        (lambda: ZeroPaddedConv((2, 2, 2, 2)), r"input_shape: got \(2, 2, 2, 2\), expected one to three"),
        (lambda: ZeroPaddedConv((6,), padding="REFLECT"), "padding: got 'REFLECT' for 1 axes, expected one of"),
        (lambda: ZeroPaddedConv((6,), padding="CIRCULAR"), "padding: got 'CIRCULAR'.*CircularConv"),
        (lambda: ZeroPaddedConv((6,), padding="same"), "padding: got 'same'"),
        (lambda: ZeroPaddedConv((6, 6), padding="CAUSAL"), "padding: got 'CAUSAL' for 2 axes"),
        (lambda: ZeroPaddedConv((6,), input_dilation=2), r"padding: got 'SAME' with input_dilation=\(2,\).*pairs"),
        (
            lambda: ZeroPaddedConv((6, 6), padding="VALID", input_dilation=(1, 2)),
            r"padding: got 'VALID' with input_dilation=\(1, 2\).*pairs",
        ),
        (lambda: ZeroPaddedConv((6, 6), padding=((1, 1),)), r"padding: got .* expected a name or 2 \(low, high\)"),
        (lambda: ZeroPaddedConv((6,), padding=((1, 1, 1),)), r"padding: got .* expected a name or 1 \(low, high\)"),
        (lambda: ZeroPaddedConv((6,), padding=((0.5, 1),)), r"padding: got .* expected a name or 1 \(low, high\)"),
        (lambda: UnboundedConv(strides=(1, 1, 1, 1)), r"strides: got \(1, 1, 1, 1\), expected one to three integers"),
        (
            lambda: UnboundedConv(strides=(1, 1), kernel_dilation=(2, 2, 2)),
            r"strides, kernel_dilation: got \(1, 1\) and \(2, 2, 2\), expected one for each axis of both",
        ),
        (lambda: ZeroPaddedConv((6,), strides=0), "strides: got 0, expected"),
        (lambda: ZeroPaddedConv((6,), strides=True), "strides: got True, expected"),
        (lambda: ZeroPaddedConv((6,), strides=1.5), r"strides: got 1\.5, expected"),
        (lambda: ZeroPaddedConv((6, 6), strides=(1, 1, 1)), r"strides: got \(1, 1, 1\), expected"),
        (lambda: ZeroPaddedConv((6,), padding=((1, 1),), input_dilation=0), "input_dilation: got 0, expected"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_bad_geometry(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CIRCULAR, PADDED = CircularConv((4, 4)), ZeroPaddedConv((4, 4))


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        (Dense(), (2,), r"kernel: got shape \(2,\), expected \(c_in, c_out\)"),
        (Dense(), (3, 3, 1, 2), r"kernel: got shape \(3, 3, 1, 2\), expected \(c_in, c_out\)"),
        (Dense(), (0, 2), r"kernel: got shape \(0, 2\), expected \(c_in, c_out\)"),
        (CIRCULAR, (3, 1, 2), r"kernel: got shape \(3, 1, 2\), expected \(2 tap sizes, .*spatial axes only"),
        (PADDED, (3, 3, 3, 1, 2), r"kernel: got shape \(3, 3, 3, 1, 2\), expected \(2 tap sizes"),
        (CIRCULAR, (3, 0, 1, 2), r"kernel: got shape \(3, 0, 1, 2\), .*positive"),
        (PADDED, (3, 3, 1, 0), r"kernel: got shape \(3, 3, 1, 0\), .*positive"),
        (CircularConv((4,), feature_group_count=2), (3, 1, 3), "got 3 output channels.*feature_group_count=2"),
        (ZeroPaddedConv((4,), feature_group_count=2), (3, 1, 3), "got 3 output channels.*feature_group_count=2"),
        (ZeroPaddedConv((4,), padding="VALID"), (5, 1, 1), r"taps \(5,\) leave no output on input_shape=\(4,\)"),
        (ZeroPaddedConv((4,), padding=((-2, -2),)), (1, 1, 1), "leave no output.*more padding"),
    ],
)
def test_bad_kernel_shapes(op, shape, message):
    weights = jnp.ones(shape)
    for call in (
        lambda: op._check_kernel_shape(shape),
        lambda: op.frobenius_weights(shape),
        lambda: op.in_shape(shape),
        lambda: op.out_shape(shape),
        lambda: op.wrap(weights),
        lambda: op.to_dense(weights),
        lambda: op.apply(weights, jnp.ones((4, 4, 1))),
        lambda: op.transpose(weights, jnp.ones((4, 4, 1))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("op", ["circular", None, CircularConv, 32], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        jaxsrn.spectral_norm,
        jaxsrn.stable_rank,
        jaxsrn.singular_values,
        jaxsrn.bounds.certified,
        lambda kernel, op: jaxsrn.srnc(kernel, op, 1.5),
        lambda kernel, op: jaxsrn.project_spectral_ball(kernel, op, 1.0),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_what_is_no_operator(function, op):
    with pytest.raises(ValueError, match=r"op: got .*, expected an operator, such as Dense\(\)"):
        function(jnp.ones((3, 3, 2, 2)), op)


def test_an_operator_prints_what_it_differs_in():
    """A stride for each axis says how many axes a kernel has, so that the two differ."""
    assert repr(UnboundedConv(strides=(1, 1))) == "UnboundedConv(strides=(1, 1))"
    assert repr(UnboundedConv()) == "UnboundedConv()"
    assert repr(CircularConv((4, 4), strides=(1, 1))) == repr(CircularConv((4, 4))) == "CircularConv((4, 4))"


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_kernels_must_be_real_and_floating(case, dtype):
    weights = jnp.ones(case.kernel_shape, dtype)
    x = jnp.ones(case.op.in_shape(case.kernel_shape))
    with pytest.raises(ValueError, match=f"kernel: got dtype {weights.dtype}, expected a real floating-point"):
        case.op.apply(weights, x)
    with pytest.raises(ValueError, match=f"kernel: got dtype {weights.dtype}"):
        case.op.to_dense(weights)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_images_must_fit(case):
    weights = kernel(case)
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    for shape in (in_shape[1:], (*in_shape[:-1], in_shape[-1] + 1), (*in_shape, 1)):
        with pytest.raises(ValueError, match=r"x: got shape .*expected \(\*batch, " + str(in_shape[0])):
            case.op.apply(weights, jnp.ones(shape))
    for shape in (out_shape[1:], (*out_shape[:-1], out_shape[-1] + 1), (*out_shape, 1)):
        with pytest.raises(ValueError, match=r"y: got shape .*expected \(\*batch, " + str(out_shape[0])):
            case.op.transpose(weights, jnp.ones(shape))


def test_errors_are_raised_under_jit_too():
    with pytest.raises(ValueError, match="x: got shape"):
        jax.jit(PADDED.apply)(jnp.ones((3, 3, 1, 2)), jnp.ones((5, 4, 1)))
