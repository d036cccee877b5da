"""The formulas of the study of recurrent denoising: `examples/_recurrence.py` and `examples/stable_recurrence.py`."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import _recurrence as recurrence
import _recurrence_report as study_report
import stable_recurrence as study

PLAIN = recurrence.Rule("plain", None, None, 1.0, False)


def cell_of(width: int = 2, depth: int = 2) -> recurrence.Cell:
    """A cell in float32 whose last layer is not zero."""
    cell = recurrence.start(width, depth, PLAIN, seed=0)
    cell.out.kernel[...] = nnx.initializers.normal(0.3)(nnx.Rngs(1).params(), (3, 3, width, 1), jnp.float32)
    return cell


def convolved(image, layer):
    """`layer` on an image `(height, width, c_in)`, in float64."""
    kernel, bias = np.asarray(layer.kernel[...], float), np.asarray(layer.bias[...], float)
    planes = [
        sum(
            scipy.signal.correlate2d(image[..., i], kernel[..., i, j], mode="same", boundary="fill")
            for i in range(kernel.shape[2])
        )
        for j in range(kernel.shape[3])
    ]
    return np.stack(planes, -1) + bias


def test_the_cell_is_the_recurrence_of_the_docstring():
    cell, rng = cell_of(), np.random.default_rng(0)
    frames = rng.uniform(size=(3, 1, 5, 4, 1)).astype(np.float32)
    h, expected = np.zeros((5, 4, 2)), []
    for x in frames[:, 0].astype(float):
        z = np.maximum(convolved(x, cell.feed) + convolved(h, cell.loop[0]), 0)
        h = np.maximum(convolved(z, cell.loop[1]), 0)
        expected.append(x - convolved(h, cell.out))
    np.testing.assert_allclose(recurrence.unrolled(cell, jnp.asarray(frames))[:, 0], expected, atol=1e-5)


def only_centre(layer, value: float) -> None:
    """Every channel times the value: the norm is known."""
    kernel = layer.kernel[...]
    layer.kernel[...] = jnp.zeros_like(kernel).at[1, 1].set(value * jnp.eye(*kernel.shape[2:], dtype=kernel.dtype))


def test_bounds_of_a_cell_whose_norms_are_known():
    cell = cell_of()
    for layer, value in zip((cell.feed, *cell.loop, cell.out), (3.0, 0.5, 0.8, 2.0), strict=True):
        only_centre(layer, value)
    assert recurrence.contraction(cell) == pytest.approx(0.4, rel=2e-3)
    assert recurrence.contraction(cell, 4) == pytest.approx(0.4, rel=1e-5)
    # One channel carries everything, so the bound is met by constant changes of constant frames: 3 * 0.8 / (1 - 0.4).
    assert recurrence.gain(cell) == pytest.approx(1 + 2 * 3 * 0.8 / 0.6, rel=5e-3)
    only_centre(cell.loop[0], 1.5)
    assert recurrence.gain(cell) == float("inf")


def test_the_flattened_norm_is_that_of_flax():
    layer = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    ours = recurrence.flattened(layer.kernel[...])
    wrapper = nnx.SpectralNorm(layer, n_steps=200, rngs=nnx.Rngs(1))
    wrapper(jnp.zeros((1, 3, 3, 2), jnp.float32), update_stats=True)
    np.testing.assert_allclose(ours, layer.kernel[...], rtol=1e-4)


def test_frames_forth_and_back():
    assert recurrence.forth_and_back(4, 10).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]


def test_when_a_run_has_failed():
    good = [25.0] * 40
    assert study_report.failed_at({"short": 24.0, "psnr": good}) is None
    # Of ten frames in a row three have lost 11 dB after 23 frames (21.7 on average), two after 22 (22.8).
    assert study_report.failed_at({"short": 25.0, "psnr": good[:20] + [14.0] * 20}) == 23
    assert study_report.failed_at({"short": 25.0, "psnr": [*good[:30], None, *good[:9]]}) == 31


def test_misses_are_found():
    setting = {"kind": "rank", "norm": 1.0, "fraction": 0.1}
    layer = {"norm": 1.0, "stable_rank": 2.0, "raw": 5.0, "high": 20.0}
    assert not study.missed(setting, [layer, layer | {"stable_rank": 1.5, "raw": 1.5}])
    assert len(study.missed(setting, [layer | {"norm": 1.02}, layer | {"stable_rank": 2.03}])) == 2
