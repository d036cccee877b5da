"""The formulas of the studies of norms in training and of Sedghi et al.'s figures, beside NumPy."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import _cifar10
import _norms_report
import _resnet
import _sedghi_timing
import _studies
import norms_in_training

from jaxsrn import ZeroPaddedConv


def clip_operator_norm(kernel, input_shape, clip_to):
    """The paper's code, as it is printed there."""
    transform_coefficients = np.fft.fft2(kernel, input_shape, axes=[0, 1])
    u, d, v = np.linalg.svd(transform_coefficients, compute_uv=True, full_matrices=False)
    d_clipped = np.minimum(d, clip_to)
    if kernel.shape[2] > kernel.shape[3]:
        clipped = np.matmul(u, d_clipped[..., None] * v)
    else:
        clipped = np.matmul(u * d_clipped[..., None, :], v)
    return np.fft.ifft2(clipped, axes=[0, 1]).real[np.ix_(*[range(d) for d in kernel.shape])]


def test_a_clip_is_the_code_of_the_paper():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 2))
    found = norms_in_training.corrected(jnp.asarray(kernel), ZeroPaddedConv((6, 6)), "clip", 2.0)
    np.testing.assert_allclose(found, clip_operator_norm(kernel, (6, 6), 2.0), atol=1e-6)


def test_the_full_matrix_has_the_singular_values_of_the_two_lines():
    kernel = np.random.default_rng(1).standard_normal((3, 3, 2, 3))
    whole = np.linalg.svd(_sedghi_timing.explicit_matrix(kernel, 5), compute_uv=False)
    np.testing.assert_allclose(_sedghi_timing.two_lines(kernel, 5), whole, atol=1e-12)


@pytest.mark.parametrize(
    ("constraint", "strength", "norm", "rank", "number"),
    [
        ("plain", 0.0, 9.0, 8.0, 0),
        ("clip", 1.0, 1.3, 8.0, 0),
        ("projection", 2.0, 2.01, 8.0, 0),
        ("projection", 2.0, 2.03, 8.0, 1),
        ("projection", 2.0, 0.5, 8.0, 0),
        ("spectral", 1.0, 0.98, 8.0, 1),
        ("stable rank", 0.2, 1.005, 2.0, 0),
        ("stable rank", 0.2, 1.0, 1.0, 0),
        ("stable rank", 0.2, 1.02, 2.1, 2),
    ],
)
def test_what_is_more_than_one_percent_from_what_was_asked(constraint, strength, norm, rank, number):
    setting = {"constraint": constraint, "strength": strength}
    values = {"norm": norm, "rank": rank, "largest": 10.0}
    assert len(_norms_report.wrong_with(setting, values)) == number


def test_a_difference_of_three_seeds_has_the_p_value_of_the_t_distribution():
    values, others = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    difference = values - others
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(3))
    # The distribution with two degrees of freedom in closed form.
    p = 1 - t / np.sqrt(2 + t**2)
    assert _studies.mean_difference(values, others, ".2f") == f"{difference.mean():+.2f} (p = {p:.2g})"
    assert _studies.mean_difference([2.0], [1.5], ".1f") == "+0.5"


@pytest.mark.parametrize(
    ("value", "misses", "exceeds"),
    [(2.03, True, True), (2.01, False, False), (1.99, False, False), (1.97, True, False), (np.nan, True, True)],
)
def test_what_misses_a_target_of_two(value, misses, exceeds):
    assert _studies.misses_target(value, 2.0) == misses
    assert _studies.misses_target(value, 2.0, at_most=True) == exceeds


def test_images_are_made_smaller_by_the_mean_over_squares():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 2:4, 4:6, 1] = [[10, 20], [30, 40]]
    labels = np.zeros(1, np.int32)
    small = _cifar10.Data("zeros", images, labels, images, labels).of_size(16).x_train
    assert small.shape == (1, 16, 16, 3)
    assert small[0, 1, 2].tolist() == [0, 25, 0]
    assert small.sum() == 25


def conv(x, kernel, strides):
    """A 3x3 convolution with zero padding SAME, in NumPy float64."""
    n, out = x.shape[0], -(-x.shape[0] // strides)
    low = max((out - 1) * strides + 3 - n, 0) // 2
    padded = np.pad(x, ((low, 3), (low, 3), (0, 0)))
    result = np.zeros((out, out, kernel.shape[-1]))
    for i, j in np.ndindex(out, out):
        patch = padded[i * strides : i * strides + 3, j * strides : j * strides + 3]
        result[i, j] = np.tensordot(patch, kernel, 3)
    return result


@pytest.mark.parametrize("pre_activation", [False, True])
def test_blocks_are_those_of_the_two_papers(pre_activation):
    """In evaluation a fresh batch norm divides by sqrt(1 + epsilon)."""
    kind = _resnet.PreActivationBlock if pre_activation else _resnet.Block
    block = kind(2, 3, 2, nnx.Rngs(0))
    block.eval()
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 4, 2)), np.float64)
    first, second = (np.asarray(part.kernel[...], np.float64) for part in (block.conv1, block.conv2))
    skip = np.pad(x[::2, ::2], ((0, 0), (0, 0), (0, 1)))
    norm = 1 / np.sqrt(1 + 1e-5)
    if pre_activation:
        y = conv(np.maximum(conv(np.maximum(norm * x, 0), first, 2) * norm, 0), second, 1) + skip
    else:
        y = np.maximum(norm * conv(np.maximum(norm * conv(x, first, 2), 0), second, 1) + skip, 0)
    np.testing.assert_allclose(block(jnp.asarray(x[None], jnp.float32))[0], y, atol=1e-5)
