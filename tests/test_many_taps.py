"""Products by FFT against explicit matrices built from the definition, and the choice between them and convolutions."""

import functools
import re

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_name, gaussian, kernel, one_dimensional_geometries
from hypothesis import given, settings
from jax import lax

import jaxsrn.operators.convolutions
from jaxsrn import CircularConv, Dense, ZeroPaddedConv
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import search_tolerance
from jaxsrn.normalization.reverse_mode import in_reverse
from jaxsrn.spectra.image_pairs import matrix_free

CONVOLUTIONS = [case for case in CASES if not isinstance(case.op, Dense)]
# One axis and two, groups, strides, dilations, cropping and a circular image.
SOME = by_name("circular-2d-stride-groups", "pairs-1d-crop-and-pad", "transposed-2d", "same-1d-depthwise")
HIGHEST = lax.Precision.HIGHEST
# Depthwise with many taps.
MANY = ZeroPaddedConv((16, 16), feature_group_count=4)
MANY_SHAPE = (9, 9, 1, 4)


@pytest.fixture
def by_fft(monkeypatch):
    """Chooses the FFT for every kernel."""
    monkeypatch.setattr(jaxsrn.operators.convolutions, "is_cheaper_by_fft", lambda *_: True)


def products(kernel, op, x, y):
    """`T(K) x`, `T(K)^T y` and `grad_K <y, T(K) x>`, in full precision."""
    gradient = op._kernel_gradient(kernel.shape, x, y, precision=HIGHEST)
    return op.apply(kernel, x, precision=HIGHEST), op.transpose(kernel, y, precision=HIGHEST), gradient


def images(case, seed, *batch):
    """An input and an output of the case, Gaussian."""
    in_shape, out_shape = cases.shapes(case.kernel_shape, case.op)
    return jnp.asarray(gaussian((*batch, *in_shape), seed)), jnp.asarray(gaussian((*batch, *out_shape), seed + 1))


def by_definition(kernel, op, x, y):
    """The three products by the explicit matrix."""
    matrix = cases.dense(kernel, op)
    in_shape, out_shape = cases.shapes(kernel.shape, op)
    x, y = np.reshape(x, (-1, matrix.shape[1])), np.reshape(y, (-1, matrix.shape[0]))
    applied, transposed = (x @ matrix.T).reshape((-1, *out_shape)), (y @ matrix).reshape((-1, *in_shape))
    return applied, transposed, cases.pull_back(y.T @ x, op, kernel.shape)


def uses(function, *args):
    """Which of `fft` and `convolution` the lowered program has."""
    text = jax.jit(function).lower(*args).as_text()
    return {name for name in ("fft", "convolution") if re.search(rf"stablehlo\.{name}\b", text)}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.usefixtures("by_fft")
def test_products_by_fft_equal_the_definition(case):
    weights, (x, y) = kernel(case), images(case, 1, 2)
    found = jax.jit(functools.partial(products, op=case.op))(weights, x=x, y=y)
    chex.assert_trees_all_close(found, by_definition(weights, case.op, x, y), rtol=0, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(geometry=one_dimensional_geometries(-3, 9))
def test_any_one_dimensional_geometry(geometry):
    op, shape, has_output = cases.one_dimensional(*geometry)
    if not has_output:
        return
    weights, basis = gaussian(shape), np.eye(*op.input_shape)[..., None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxsrn.operators.convolutions, "is_cheaper_by_fft", lambda *_: True)
        columns = jax.jit(functools.partial(op.apply, precision=HIGHEST))(jnp.asarray(weights), jnp.asarray(basis))
    np.testing.assert_allclose(columns[..., 0].T, cases.dense(weights, op), atol=1e-13)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
@pytest.mark.usefixtures("by_fft")
def test_leading_batch_axes(batch):
    case = cases.BY_NAME["same-2d-stride-groups"]
    weights, (x, y) = kernel(case), images(case, 1, *batch)
    applied, transposed, gradient = by_definition(weights, case.op, x, y)
    expected = applied.reshape(y.shape), transposed.reshape(x.shape), gradient
    found = jax.jit(functools.partial(products, op=case.op))(weights, x=x, y=y)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-12)


# The three products are bilinear, and each is a derivative of the others.


def derivatives(kernel, op, x, y, other, dx, dy):
    """The derivatives of the three products, forwards and in reverse."""
    highest = {"precision": HIGHEST}
    apply, transpose = (functools.partial(product, **highest) for product in (op.apply, op.transpose))
    gradient = functools.partial(op._kernel_gradient, kernel.shape, **highest)
    forwards = [
        jax.jvp(function, primals, tangents)[1]
        for function, primals, tangents in (
            (apply, (kernel, x), (other, dx)),
            (transpose, (kernel, y), (other, dy)),
            (gradient, (x, y), (dx, dy)),
        )
    ]
    return forwards, in_reverse_mode(op, kernel, x, y)


def in_reverse_mode(op, kernel, x, y):
    """Of each product, the derivatives in its two arguments along the third one."""
    gradient = functools.partial(op._kernel_gradient, kernel.shape, precision=HIGHEST)
    apply, transpose = (functools.partial(product, precision=HIGHEST) for product in (op.apply, op.transpose))
    calls = (apply, (kernel, x), y), (transpose, (kernel, y), x), (gradient, (x, y), kernel)
    return [jax.vjp(function, *arguments)[1](cotangent) for function, arguments, cotangent in calls]


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.usefixtures("by_fft")
def test_derivatives_by_fft_in_both_modes(case):
    (x, y), (dx, dy) = images(case, 1), images(case, 3)
    weights, other = kernel(case), kernel(case, seed=5)
    forwards, backwards = jax.jit(functools.partial(derivatives, op=case.op))(
        weights, x=x, y=y, other=other, dx=dx, dy=dy
    )
    at = functools.partial(by_definition, op=case.op)
    own, first, second = at(weights, x=x, y=y), at(other, x=x, y=y), at(weights, x=dx, y=dy)
    mixed = at(weights, x=dx, y=y)[2] + at(weights, x=x, y=dy)[2]
    expected = [(first[0] + second[0])[0], (first[1] + second[1])[0], mixed]
    chex.assert_trees_all_close(forwards, expected, rtol=0, atol=1e-11)
    applied, transposed, gradient = own[0][0], own[1][0], own[2]
    expected = [(gradient, transposed), (gradient, applied), (transposed, applied)]
    chex.assert_trees_all_close(backwards, expected, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("by_fft")
def test_rules_for_reverse_mode_use_the_same_products():
    case = cases.BY_NAME["transposed-2d"]
    weights, (x, y) = kernel(case), images(case, 1)
    applied, transposed, gradient = by_definition(weights, case.op, x, y)
    found = jax.jit(functools.partial(in_reverse_mode, in_reverse(case.op)))(weights, x, y)
    expected = [(gradient, transposed[0]), (gradient, applied[0]), (transposed[0], applied[0])]
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", by_name("circular-2d-stride-groups", "transposed-2d"), ids=str)
@pytest.mark.usefixtures("by_fft")
def test_stacks_of_kernels(case):
    stack, (x, y) = jnp.stack([kernel(case), kernel(case, seed=5)]), images(case, 1)
    found = jax.jit(jax.vmap(functools.partial(products, op=case.op, x=x, y=y)))(stack)
    for i, weights in enumerate(stack):
        applied, transposed, gradient = by_definition(weights, case.op, x, y)
        one = [product[i] for product in found]
        chex.assert_trees_all_close(one, [applied[0], transposed[0], gradient], rtol=0, atol=1e-12)


# Which product is chosen


@pytest.mark.parametrize(
    ("op", "kernel_shape", "chosen"),
    [
        (ZeroPaddedConv((56, 56), feature_group_count=16), (31, 31, 1, 16), True),
        (ZeroPaddedConv((56, 56), feature_group_count=96), (7, 7, 1, 96), True),
        (ZeroPaddedConv((4096,), padding="CAUSAL"), (4096, 1, 1), True),
        (ZeroPaddedConv((56, 56)), (31, 31, 32, 32), True),
        (CircularConv((56, 56), feature_group_count=16), (31, 31, 1, 16), True),
        (ZeroPaddedConv((56, 56), feature_group_count=96), (3, 3, 1, 96), False),
        (ZeroPaddedConv((56, 56)), (3, 3, 64, 64), False),
        (ZeroPaddedConv((224, 224), strides=2), (7, 7, 3, 64), False),
        (ZeroPaddedConv((56, 56)), (1, 1, 256, 64), False),
        (ZeroPaddedConv((16,)), (3, 1, 1), False),
        (ZeroPaddedConv((1024,)), (16, 64, 64), False),
        # With three axes convolutions are dearer, but no transform is as cheap as the product of a tiny layer.
        (ZeroPaddedConv((16, 16, 16)), (5, 5, 5, 8, 8), True),
        (ZeroPaddedConv((10, 10, 10)), (7, 7, 7, 8, 16), True),
        (ZeroPaddedConv((16, 16, 16)), (3, 3, 3, 32, 32), False),
        (ZeroPaddedConv((2, 3, 2)), (3, 2, 1, 1, 2), False),
        # Many taps, few of which are computed: one output only.
        (ZeroPaddedConv((31, 31), padding="VALID", feature_group_count=16), (31, 31, 1, 16), False),
    ],
    ids=str,
)
def test_the_fft_is_chosen_where_direct_products_are_dear(op, kernel_shape, chosen):
    assert op._is_cheaper_by_fft(kernel_shape) is chosen


def test_precision_and_dtype_decide_too():
    x = jnp.zeros((16, 16, 4))
    y, weights = jnp.zeros(MANY.out_shape(MANY_SHAPE)), jnp.zeros(MANY_SHAPE)
    assert uses(functools.partial(products, op=MANY, x=x, y=y), weights) == {"fft"}
    assert uses(functools.partial(MANY.apply, precision="highest"), weights, x) == {"fft"}
    # Flax's layer has the default precision, and knows no FFT.
    assert uses(MANY.apply, weights, x) == {"convolution"}
    assert uses(MANY.transpose, weights, y) == {"convolution"}
    assert uses(
        functools.partial(MANY.apply, precision=HIGHEST), weights.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    ) == {"convolution"}


@pytest.mark.parametrize("case", by_name("same-2d-stride-groups", "circular-2d-strides", "pairs-2d"), ids=str)
@pytest.mark.usefixtures("by_fft")
def test_explicit_matrices_are_exact(case):
    """With more outputs than inputs, and with fewer."""
    assert uses(case.op.to_dense, kernel(case)) == {"convolution"}
    np.testing.assert_array_equal(case.op.to_dense(kernel(case)), cases.dense(kernel(case), case.op))


@pytest.mark.parametrize(
    ("op", "kernel_shape"), [(MANY, MANY_SHAPE), (ZeroPaddedConv((256,), padding="CAUSAL"), (256, 1, 1))], ids=str
)
def test_lanczos_converges_with_products_of_float32(op, kernel_shape):
    assert op._is_cheaper_by_fft(kernel_shape)
    weights = jnp.asarray(gaussian(kernel_shape), jnp.float32)
    tolerance = search_tolerance(jnp.float32)

    @jax.jit
    def search(weights):
        start = fixed_start(op.in_shape(kernel_shape), jnp.float32)
        return matrix_free(weights, op, start, tolerance)

    value, pair = search(weights)
    groups = op.feature_group_count
    # The layer acts on every channel alone, which keeps the matrices small.
    matrices = [
        cases.dense(weights[..., i : i + 1], type(op)(op.input_shape, padding=op.padding)) for i in range(groups)
    ]
    np.testing.assert_allclose(value, max(np.linalg.norm(matrix, 2) for matrix in matrices), rtol=1e-6)
    inputs = np.asarray(pair.input, np.float64).reshape((-1, groups))
    back = np.stack([matrix.T @ (matrix @ inputs[:, i]) for i, matrix in enumerate(matrices)], axis=-1)
    squared = float(value) ** 2
    assert np.linalg.norm(back - squared * inputs) <= 1.1 * tolerance * squared
