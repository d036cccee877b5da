"""The formulas of `examples/reproduce_sanyal2020.py`: Sanyal's constraint, folded normalizations, gaps."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _reshaped import Reshaped
from _sanyal_network import CNN, Size, constrained, plain_of
from _sanyal_report import gap_at
from reproduce_sanyal2020 import images_of

SIZE = Size((6, 8), (1, 2), 4, 8, 8, 1, 4, 0.1, 0, 1)


def normalized(matrix: np.ndarray, fraction: float) -> np.ndarray:
    """Algorithm 2 of the paper with an exact SVD: norm 1, then all but the leading term scaled."""
    matrix = matrix / np.linalg.norm(matrix, 2)
    target, squared = fraction * min(matrix.shape), np.sum(matrix**2)
    if squared <= target:
        return matrix
    u, _, vt = np.linalg.svd(matrix)
    leading = np.outer(u[:, 0], vt[0])
    return leading + np.sqrt((target - 1) / (squared - 1)) * (matrix - leading)


def test_sanyals_constraint_is_that_of_the_reshaped_kernel():
    model = CNN(SIZE, nnx.Rngs(0))
    held = plain_of(constrained(model, SIZE, "matrix", (0.4, 0.9, 0.3)))
    layers = zip((*model.convs, model.head), (*held.convs, held.head), (0.4, 0.9, 0.3), strict=True)
    for layer, own, fraction in layers:
        raw = np.asarray(layer.kernel[...], float)
        expected = normalized(raw.reshape(-1, raw.shape[-1]), fraction).reshape(raw.shape)
        np.testing.assert_allclose(own.kernel[...], expected, atol=1e-4)
    # The stable rank of the second layer is below its target already.
    ranks = [np.sum(layer.kernel[...] ** 2) for layer in (*held.convs, held.head)]
    np.testing.assert_allclose(ranks[::2], [0.4 * 6, 0.3 * 10], rtol=1e-3)
    assert ranks[1] < 0.9 * 8


def test_reshaped_is_the_convolution():
    conv = CNN(SIZE, nnx.Rngs(0)).convs[1]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 6)), jnp.float32)
    assert Reshaped(conv).kernel.shape == (54, 8)
    np.testing.assert_array_equal(Reshaped(conv)(x), conv(x))


def test_folded_normalization_is_the_convolution_and_the_normalization():
    model, rng = CNN(SIZE, nnx.Rngs(0)), np.random.default_rng(0)
    norm = model.norms[0]
    norm.scale[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=6), jnp.float32)
    model.eval()
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32)
    slope = norm(model.convs[0](x)) - norm(model.convs[0](0 * x))
    model.convs[0].kernel[...] = model.without_batch_norm()["convs"][0]["kernel"]
    np.testing.assert_allclose(model.convs[0](x), slope, rtol=1e-4, atol=1e-5)


def test_gap_at_a_training_loss():
    losses = ((3.0, 3.0), (2.0, 2.5), (1.0, 2.0), (1.5, 9.0), (0.5, 9.0))
    curve = [{"train_loss": train, "test_loss": test} for train, test in losses]
    # A quarter of the way from (2, 2.5) to (1, 2), and the first of two crossings.
    assert gap_at(curve, 1.75) == pytest.approx(0.5 + 0.25 * 0.5)
    assert gap_at(curve, 1.25) == pytest.approx(0.5 + 0.75 * 0.5)
    assert np.isnan(gap_at(curve, 0.1))


def test_images_are_averaged():
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    expected = (pixels[1, 2:4, 4:6, 2].astype(float).mean() / 255 - 0.47) * 4
    np.testing.assert_allclose(images_of(pixels, SIZE)[1, 1, 2, 2], expected, rtol=1e-6)
