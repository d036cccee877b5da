"""Matrices of many sizes share compiled programs, and their numbers are those of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from events import COMPILATIONS, counted

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds
from jaxsrn.spectra.common_shapes import in_common_shape

# The first fills the common shape of all others, in either direction.
SIZES = [(32, 128), (20, 120), (128, 31), (30, 100), (110, 29)]


def numbers(kernel, op):
    return [*bounds.certified(kernel, op), jaxsrn.spectral_norm(kernel, op), jaxsrn.stable_rank(kernel, op)]


def test_many_sizes_share_their_programs():
    matrices = [np.random.default_rng(i).standard_normal(size) for i, size in enumerate(SIZES)]
    layers = [(jnp.asarray(matrix), Dense()) for matrix in matrices]
    layers += [(jnp.asarray(matrix[None, None]), UnboundedConv(strides=2)) for matrix in matrices]
    first = numbers(*layers[0])
    with counted(COMPILATIONS) as compiled:
        found = [first] + [numbers(*layer) for layer in layers[1:]]
    assert not compiled
    for matrix, (lower, upper, norm, rank) in zip(matrices * 2, found, strict=True):
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose([norm, rank], [values[0], np.sum(values**2) / values[0] ** 2], rtol=1e-12)
        assert lower <= values[0] <= upper
        assert upper - lower <= 1e-11 * values[0]


@pytest.mark.parametrize(
    "op",
    [
        CircularConv((4, 6), strides=2),
        ZeroPaddedConv((3, 5), strides=2),
        ZeroPaddedConv((3, 4), padding=[(2, 0), (1, 3)], strides=(2, 3)),
        ZeroPaddedConv((2, 3), padding=[(0, 1), (1, 1)], input_dilation=2),
    ],
    ids=str,
)
def test_one_tap_is_a_matrix_many_times(op):
    kernel = np.random.default_rng(0).standard_normal((1, 1, 20, 30))
    assert in_common_shape(jnp.asarray(kernel), op)[1] == Dense()
    dense = np.asarray(op.to_dense(kernel))
    values = np.linalg.svd(dense.reshape(np.prod(op.out_shape(kernel.shape)), -1), compute_uv=False)
    lower, upper, norm, rank = numbers(kernel, op)
    np.testing.assert_allclose([norm, rank], [values[0], np.sum(values**2) / values[0] ** 2], rtol=1e-12)
    assert lower <= values[0] <= upper <= lower * (1 + 1e-11)


@pytest.mark.parametrize(
    ("shape", "op"),
    [
        ((3, 2), Dense()),
        ((40, 300), Dense()),
        ((3, 30, 100), UnboundedConv()),
        ((1, 15, 100), UnboundedConv(feature_group_count=2)),
        ((1, 30, 100), ZeroPaddedConv((1,), padding=[(3, -2)])),
    ],
    ids=["much-filling", "more-filling", "taps", "groups", "beside-the-image"],
)
def test_what_is_no_matrix_or_far_from_a_common_shape_stays(shape, op):
    kernel = jnp.ones(shape)
    assert in_common_shape(kernel, op) == (kernel, op, 1)


def test_traced_matrices_stay():
    def shape(kernel):
        return in_common_shape(kernel, Dense())[0].shape

    assert shape(jnp.ones((30, 100))) == (32, 128)
    assert jax.eval_shape(lambda kernel: jnp.zeros(shape(kernel)), jnp.ones((30, 100))).shape == (30, 100)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_stay(dtype):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((30, 100)), dtype)
    assert in_common_shape(kernel, Dense())[0].dtype == dtype
    expected = np.linalg.norm(np.asarray(kernel, np.float64), 2)
    np.testing.assert_allclose(jaxsrn.spectral_norm(kernel, Dense()), expected, rtol=1e-5)
