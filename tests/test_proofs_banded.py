"""The banded proof for zero padding, and intervals that rest on it: against explicit matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense, gaussian

from jaxsrn import ZeroPaddedConv, bounds
from jaxsrn.bounds import banded, interval
from jaxsrn.spectra.pairs_by_kind import leading_pair

PADDED = [case for case in CASES if isinstance(case.op, ZeroPaddedConv)]
# A little above the size of explicit matrices: 600 x 600.
LARGE, SHAPE = ZeroPaddedConv((10, 10)), (3, 3, 6, 6)


@pytest.fixture
def smallest_blocks(monkeypatch):
    """Blocks of as few rows as the taps allow, so that small layers have several."""
    monkeypatch.setattr(banded, "_LEAST_ROWS", 1)
    banded._blocks.cache_clear()
    yield
    banded._blocks.cache_clear()


def blocks_of(op, kernel_shape, between_outputs: bool, axis: int):
    """The blocks along a given axis, whatever they cost."""
    image = (op.out_shape if between_outputs else op.in_shape)(kernel_shape)
    steps = op.strides if between_outputs else op.input_dilation
    groups, length = op.feature_group_count, image[axis]
    samples = min(length, max(1, (op._extents(kernel_shape)[axis] - 1) // steps[axis]))
    rows = samples * np.prod(image, dtype=int) // length // groups
    return banded._Blocks(between_outputs, axis, samples, -(-length // samples), int(rows), groups)


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_the_proof_tells_limits_above_the_norm_from_those_below(case, smallest_blocks):
    kernel = gaussian(case.kernel_shape, 3)
    norm = np.linalg.norm(dense(kernel, case.op), 2)
    for scale in (1.0, 1e-3):
        scaled, limit = jnp.asarray(scale * kernel), jnp.asarray(scale * norm)
        assert not banded.is_below(scaled, case.op, (1 - 1e-9) * limit)
        assert banded.is_below(scaled, case.op, (1 + 1e-9) * limit)
    assert not banded.is_below(jnp.asarray(kernel), case.op, jnp.asarray(0.0))
    assert not banded.is_below(jnp.full_like(scaled, jnp.nan), case.op, limit)


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_the_blocks_are_those_of_the_explicit_gram_matrix(case):
    """Along every axis, of both Gram matrices; what lies outside of the blocks is zero."""
    _, op, shape = case
    kernel = gaussian(shape)
    matrix = dense(kernel, op)
    for between_outputs, axis in np.ndindex(2, op.num_axes):
        blocks = blocks_of(op, shape, bool(between_outputs), axis)
        *_, count, rows, groups = blocks
        *image, channels = (op.out_shape if between_outputs else op.in_shape)(shape)
        gram = matrix @ matrix.T if between_outputs else matrix.T @ matrix
        # Rows in the order of the blocks: the axis first, and groups apart.
        order = np.arange(len(gram)).reshape((*image, groups, channels // groups))
        order = np.moveaxis(np.moveaxis(order, axis, 0), -2, 0).reshape((groups, -1))
        room = count * rows
        expected = np.zeros((groups, room, room))
        for group, own in enumerate(order):
            expected[group, : len(own), : len(own)] = gram[np.ix_(own, own)]
        diagonal, above = map(np.asarray, banded._gram_blocks(jnp.asarray(kernel), op, blocks))
        found = np.zeros_like(expected)
        for i in range(count):
            here, before = slice(i * rows, (i + 1) * rows), slice((i - 1) * rows, i * rows)
            found[:, here, here] = diagonal[i]
            if i:
                found[:, before, here] = above[i]
                found[:, here, before] = np.swapaxes(above[i], 1, 2)
        np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(gram).max())


def test_the_least_work_is_chosen():
    """Lines of the shorter side, along the longer one; inputs or outputs, whichever are fewer."""
    square = banded._blocks(ZeroPaddedConv((40, 8)), (3, 3, 4, 4))
    assert square == (False, 0, 2, 20, 64, 1)
    assert banded._blocks(ZeroPaddedConv((8, 40)), (3, 3, 4, 4)) == (False, 1, 2, 20, 64, 1)
    assert banded._blocks(ZeroPaddedConv((40, 16)), (5, 5, 8, 4)) == (True, 0, 4, 10, 256, 1)
    # Outputs at a stride of 4 of five taps: neighbours alone have a sample in common.
    assert banded._blocks(ZeroPaddedConv((64, 16), strides=(4, 1)), (5, 3, 8, 8)) == (True, 0, 1, 16, 128, 1)
    assert banded._blocks(ZeroPaddedConv((40, 8), feature_group_count=4), (3, 3, 4, 16))[3:] == (20, 64, 4)
    for size, most in ((8, 64), (16, 32), (32, 11)):
        assert banded.is_affordable(ZeroPaddedConv((size, size)), (3, 3, most, most))
        assert not banded.is_affordable(ZeroPaddedConv((size, size)), (3, 3, most + 1, most + 1))
    assert not banded.is_affordable(ZeroPaddedConv((2**18,)), (3, 4, 4))
    # The blocks of few channels come from images of many.
    for channels in ((64, 1), (1, 64)):
        assert banded.is_affordable(ZeroPaddedConv((64, 64)), (3, 3, *channels))
    for channels in ((65, 1), (1, 512)):
        assert not banded.is_affordable(ZeroPaddedConv((64, 64)), (3, 3, *channels))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (LARGE, SHAPE),
        (ZeroPaddedConv((12, 12), strides=2), (3, 3, 8, 16)),
        (ZeroPaddedConv((8, 9), feature_group_count=2), (3, 3, 8, 16)),
        (ZeroPaddedConv((6, 6), padding=((2, 2), (1, 1)), input_dilation=(2, 1)), (3, 3, 16, 8)),
        (ZeroPaddedConv((150,), padding="CAUSAL"), (9, 4, 4)),
    ],
    ids=str,
)
def test_intervals_are_as_narrow_as_was_asked_for(op, shape, dtype):
    kernel = jnp.asarray(gaussian(shape), dtype)
    norm = np.linalg.norm(dense(kernel, op), 2)
    for resolution in (0.01, 1e-4, 0.0):
        low, high = (float(end) for end in bounds.certified(kernel, op, resolution=resolution))
        assert low <= norm <= high
        assert high / low - 1 <= max(resolution, 6e-5) * (1 + 1e-6), resolution


def test_covers_that_are_close_need_no_proof(monkeypatch):
    """With room for the cover the interval is that of the cover, and nothing is factorized."""
    kernel = jnp.asarray(gaussian(SHAPE))
    with monkeypatch.context() as patch:
        patch.setattr(banded, "is_affordable", lambda op, shape: False)
        _, cover = interval.certified(kernel, LARGE)
    low, high = interval.certified(kernel, LARGE, resolution=0.2)
    np.testing.assert_allclose(high, cover, rtol=1e-12)
    assert low < cover
    assert interval.certified(kernel, LARGE).upper < 0.999 * cover


def test_a_search_that_misses_is_found_out():
    """The interval of a pair far below the leading one still holds the norm: the proof fails, and the cover stands."""
    kernel = jnp.asarray(gaussian(SHAPE))
    norm = np.linalg.norm(dense(kernel, LARGE), 2)
    pair = leading_pair(kernel, LARGE)
    pairs = tuple(interval.leading_wave(k, cover, 0.0) for k, cover in interval.covers(kernel, LARGE))
    missed = pair._replace(input=jnp.roll(pair.input, 1, axis=0))
    found = interval._interval(kernel, LARGE, missed, pairs, 1e-3)
    assert found.lower < 0.999 * norm
    assert found.upper > norm
    np.testing.assert_allclose(found.upper, interval._interval(kernel, LARGE, pair, pairs, None).upper, rtol=1e-12)
    # The proof of the right pair succeeds.
    assert interval._interval(kernel, LARGE, pair, pairs, 1e-3).upper < 1.0011 * norm


def test_stacks_and_gradients():
    """Each kernel of a stack has its own proof, and the upper end has the gradient of the lower one."""
    kernels = jnp.asarray(gaussian((3, *SHAPE)))
    stacked = jax.vmap(lambda kernel: bounds.certified(kernel, LARGE, resolution=1e-3))(kernels)
    for kernel, low, high in zip(kernels, *stacked, strict=True):
        norm = np.linalg.norm(dense(kernel, LARGE), 2)
        assert low <= norm <= high <= 1.001 * low
    lower, upper = jax.jacrev(lambda kernel: bounds.certified(kernel, LARGE, resolution=1e-3))(kernels[0])
    np.testing.assert_allclose(upper, 1.001 * lower, rtol=1e-3, atol=1e-6)
