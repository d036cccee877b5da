"""The formulas of `examples/srn_gan.py`: scores of images, losses of discriminators, and the reshaped constraint."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import _gan_scores
import _gans
import srn_gan
from _reshaped import Reshaped

import jaxsrn.nnx as jnnx


def test_frechet_distance_is_that_of_the_fitted_gaussians():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), 1 + rng.normal(size=(60, 5))
    s, t = np.cov(x.T), np.cov(y.T)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    np.testing.assert_allclose(_gan_scores.frechet_distance(x, y), expected, rtol=1e-9)
    # A shift alone; fewer samples than features.
    np.testing.assert_allclose(_gan_scores.frechet_distance(x[:4], x[:4] + 2), 20, atol=1e-5)


def test_class_score_counts_classes():
    # Images that are certain: so many as there are classes. Images that say nothing: 1.
    np.testing.assert_allclose(_gan_scores.class_score(100 * np.eye(4)), 4, rtol=1e-12)
    np.testing.assert_allclose(_gan_scores.class_score(np.zeros((6, 4))), 1, rtol=1e-12)
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    divergences = [sum(q * np.log(q / m) for q, m in zip(row, p.mean(0), strict=True)) for row in p]
    np.testing.assert_allclose(_gan_scores.class_score(np.log(p) + 3), np.exp(np.mean(divergences)), rtol=1e-12)


def test_pooled_images_are_means():
    images = np.random.default_rng(0).integers(256, size=(2, 4, 4, 3)).astype(np.uint8)
    square = images[1, 2:, :2].astype(float)
    np.testing.assert_allclose(srn_gan.pooled(images, 2, 3)[1, 1, 0], square.mean((0, 1)), atol=0.5)
    np.testing.assert_allclose(srn_gan.pooled(images, 2, 1)[1, 1, 0], [square.mean()], atol=0.5)


def test_losses_of_a_linear_discriminator():
    rng = np.random.default_rng(0)
    real, fake = (rng.normal(size=(8, 2, 2, 1)) for _ in range(2))
    w = rng.normal(size=4)

    def linear(x):
        return x.reshape(len(x), -1) @ w

    s, t = linear(real), linear(fake)
    key = jax.random.key(0)
    arrays = jnp.asarray(real), jnp.asarray(fake), key
    expected = np.maximum(1 - s, 0).mean() + np.maximum(1 + t, 0).mean()
    np.testing.assert_allclose(_gans.hinge(linear, *arrays), expected, rtol=1e-12)
    # Its gradient is w everywhere.
    expected = t.mean() - s.mean() + 10 * (np.linalg.norm(w) - 1) ** 2
    np.testing.assert_allclose(_gans.wasserstein(linear, *arrays), expected, rtol=1e-9)


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_the_reshaped_constraint_is_that_of_the_matrix(fraction):
    layer = nnx.Conv(2, 6, (3, 3), rngs=nnx.Rngs(0))
    own = np.linalg.svd(np.asarray(layer.kernel[...], float).reshape(18, 6), compute_uv=False)
    wrapper = jnnx.StableRankNorm(Reshaped(layer), fraction, computes=nnx.Linear)
    held = wrapper.folded().plain()
    values = np.linalg.svd(np.asarray(held.kernel[...], float).reshape(18, 6), compute_uv=False)
    np.testing.assert_allclose(values[0], 1, rtol=1e-5)
    expected = min(fraction * 6, np.sum(own**2) / own[0] ** 2)
    np.testing.assert_allclose(np.sum(values**2), expected, rtol=1e-4)
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 2), jnp.float32)
    np.testing.assert_allclose(wrapper(x, update_stats=False), held(x), rtol=1e-6)
