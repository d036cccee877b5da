"""The steps of branch and bound, each against NumPy on few numbers; mutation testing runs them (`mutation.py`)."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian

from jaxsrn import CircularConv, UnboundedConv, spectral_norm
from jaxsrn._tools.proofs import are_below, rounding, squared_limit
from jaxsrn.spectra.circular import boxes, branch_and_bound, grid_certificate
from jaxsrn.spectra.circular.grams import gram_polynomial
from jaxsrn.spectra.circular.sites import half_grid

# Proofs by factorization


def test_room_for_rounding():
    """`2 sqrt(rows) eps` in a singular value, and twice that in its square."""
    for dtype in (np.float32, np.float64):
        eps = np.finfo(dtype).eps
        assert rounding(9, dtype) == 6 * eps
        limits = jnp.asarray([0.5, 3.0], dtype)
        np.testing.assert_allclose(squared_limit(9, limits) / limits**2 - 1, 12 * eps, atol=eps)


def test_are_below_is_the_largest_eigenvalue_of_all_groups():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e3):
        factors = np.sqrt(scale) * (rng.standard_normal((6, 2, 3, 4)) + 1j * rng.standard_normal((6, 2, 3, 4)))
        grams = factors @ factors.conj().swapaxes(-1, -2)
        largest = np.linalg.eigvalsh(grams).max(axis=(-2, -1))
        assert np.all(are_below(jnp.asarray(grams), jnp.asarray(largest * (1 + 1e-12))))
        assert not np.any(are_below(jnp.asarray(grams), jnp.asarray(largest * (1 - 1e-12))))


@pytest.mark.parametrize("level", [-2.0, -0.5, 0.0])
def test_nothing_is_below_a_level_that_is_not_positive(level):
    for grams in (np.zeros((1, 1, 2, 2)), 0.1 * np.eye(2)[None, None]):
        assert not are_below(jnp.asarray(grams), jnp.asarray([level]))[0]


def test_nothing_is_below_with_nan():
    assert not are_below(jnp.full((1, 1, 2, 2), jnp.nan), jnp.ones(1))[0]


# Boxes of frequencies

LAYERS = [
    (CircularConv((61,)), (5, 2, 2)),
    (CircularConv((64,)), (3, 1, 1)),
    (CircularConv((24, 15)), (3, 2, 2, 2)),
    (CircularConv((6, 40), kernel_dilation=(1, 2)), (1, 3, 2, 2)),
    (CircularConv((40, 6)), (3, 1, 2, 2)),
    (CircularConv((16, 12), strides=(1, 2)), (2, 5, 2, 2)),
    (CircularConv((5, 4, 6)), (2, 2, 3, 1, 1)),
    (CircularConv((3,)), (4, 1, 1)),
    (CircularConv((3, 3)), (3, 3, 1, 1)),
]


def frequencies_of(corner, size) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(c, c + s) for c, s in zip(corner, size, strict=True))))


def degrees_of(op, shape) -> list[int]:
    """The largest offset of a tap in whole strides."""
    offsets = zip(shape, op.kernel_dilation, op.strides, strict=False)
    return [(taps - 1) * dilation // stride for taps, dilation, stride in offsets]


@pytest.mark.parametrize(("op", "shape"), LAYERS, ids=str)
def test_boxes_cover_the_half_grid_on_every_level(op, shape):
    grid, counts = boxes.grid_of(op, shape, np.float64), boxes.num_boxes(op, shape)
    everything = frequencies_of((0,) * op.num_axes, half_grid(op))
    corners, exists = boxes.coarse_boxes(grid, counts)
    # The last box of an axis may be missing, as a program is the same for most sizes, but no other.
    assert np.sum(exists) > 0
    corners = np.asarray(corners)[np.asarray(exists)]
    for level in range(int(grid.last_level) + 1):
        levels = jnp.full(len(corners), level)
        sizes = np.asarray(boxes.spans(grid, levels)) + 1
        np.testing.assert_array_equal(sizes, np.broadcast_to(np.ceil(np.asarray(grid.sizes) / 2**level), sizes.shape))
        places = [frequencies_of(corner, size) for corner, size in zip(corners, sizes, strict=True)]
        assert set.union(*places) == everything
        middles = np.asarray(boxes.centres(jnp.asarray(corners), jnp.asarray(sizes - 1)))
        np.testing.assert_array_equal(middles, 2 * corners + sizes - 1)
        halves, exist = (np.asarray(part) for part in boxes.split(grid, jnp.asarray(corners), sizes - 1, levels))
        below = np.asarray(boxes.spans(grid, levels + 1)) + 1
        for k, whole in enumerate(places):
            parts = [frequencies_of(half, below[k]) for half in halves[k][exist[k]]]
            assert set.union(*parts) == whole
            # Halves that do not exist would be the same as others.
            assert len(parts) == len({tuple(half) for half in halves[k]})
        corners = np.unique(halves[exist], axis=0)
    assert np.all(sizes == 1)


@pytest.mark.parametrize(("op", "shape"), LAYERS, ids=str)
def test_grids_hold_what_the_proof_needs(op, shape):
    """Degrees, the supremum over the grid's maximum, and how far phi moves from a box's centre to its corner."""
    degree = degrees_of(op, shape)
    assert grid_certificate.degrees(op, shape) == degree
    grid = boxes.grid_of(op, shape, np.float64)
    np.testing.assert_array_equal(grid.samples, op.grid)
    np.testing.assert_array_equal(grid.ends, half_grid(op))
    ratios = [d / n for d, n in zip(degree, op.grid, strict=True)]
    supremum = 1 / np.prod([np.cos(np.pi * r / 2) for r in ratios]) if max(ratios) < 1 else np.inf
    np.testing.assert_allclose(grid_certificate.overshoot(op, shape), supremum, rtol=1e-12)
    # phi is half the sum of degrees times angles, and a half step between frequencies is pi / n.
    np.testing.assert_allclose(grid.rates, [d / 2 * np.pi / n for d, n in zip(degree, op.grid, strict=True)])
    if np.isinf(supremum):
        assert grid.tangent == 0
        np.testing.assert_array_equal(grid.sizes, 1)
        return
    np.testing.assert_allclose(grid.tangent**2, supremum**2 - 1, rtol=1e-9, atol=1e-15)
    # Single frequencies too are as wide as they are; no box is wider than 0.6.
    assert np.sum((grid.sizes - 1) * grid.rates) <= 0.6 + 1e-12
    constant = np.array(degree) == 0
    np.testing.assert_array_equal(np.asarray(grid.sizes)[constant], np.asarray(grid.ends)[constant])
    # Near a maximum a singular value falls by the square of `degree * angle`.
    moved = np.array(degree) * 2 * np.pi / np.array(op.grid)
    root = np.sqrt(np.finfo(np.float64).eps)
    assert np.all(moved * grid.finest <= root)
    fine = boxes.grid_of(CircularConv((2**24,) * op.num_axes), (*shape[: op.num_axes], 1, 1), np.float32)
    moved = np.maximum(np.array(shape[: op.num_axes]) - 1, 1) * 2 * np.pi / 2**24
    root = np.sqrt(np.finfo(np.float32).eps)
    assert np.all(moved * fine.finest <= root)
    assert np.all(moved * (fine.finest + 1) > root)


def test_boxes_are_few_and_wide():
    """As wide as phi = 0.6 allows, so that their number does not depend on the image."""
    for n in (100, 1000, 2**24):
        op, shape = CircularConv((n, n)), (3, 3, 2, 2)
        grid, counts = boxes.grid_of(op, shape, np.float64), boxes.num_boxes(op, shape)
        assert counts == (math.ceil(np.pi * 2 / (2 * 0.3)), math.ceil(np.pi * 2 / (4 * 0.3)) + 1)
        phi = np.asarray(grid.rates) * np.asarray(grid.sizes)
        assert np.all(phi > 0.3 - 1e-12)
        assert np.all(phi <= 0.3 + np.asarray(grid.rates) * (1 + 1e-12))
    assert boxes.num_boxes(CircularConv((50, 50)), (3, 1, 2, 2)) == (math.ceil(np.pi * 2 / (2 * 0.6)), 1)
    assert boxes.num_boxes(CircularConv((50, 50)), (1, 3, 2, 2)) == (1, math.ceil(np.pi * 2 / (4 * 0.6)) + 1)
    assert boxes.num_boxes(CircularConv((2, 2)), (3, 3, 2, 2)) == (2, 2)
    assert boxes.num_boxes(CircularConv((9, 9)), (3, 3, 2, 2), reduced=True) == (9, 5)
    reduced = boxes.grid_of(CircularConv((9, 9)), (3, 3, 2, 2), np.float64, reduced=True)
    assert (reduced.tangent, reduced.last_level, *reduced.sizes) == (0, 0, 1, 1)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_overshoot_is_attained(n):
    """By `1 +- exp(-i w)`, whose largest value lies half a step from the nearest frequencies."""
    sign = -1 if n % 2 else np.exp(1j * np.pi * (1 + 1 / n))
    values = np.abs(1 + sign * np.exp(-2j * np.pi * np.arange(n) / n))
    np.testing.assert_allclose(2 / values.max(), grid_certificate.overshoot(CircularConv((n,)), (2, 1, 1)), rtol=1e-12)


def test_one_axis_of_too_few_angles_leaves_no_bound():
    assert grid_certificate.overshoot(CircularConv((4, 64)), (5, 3, 1, 1)) == np.inf
    assert grid_certificate.overshoot(CircularConv((5, 64)), (5, 3, 1, 1)) < np.inf


def test_coarse_grids():
    op = CircularConv((30, 30), strides=(2, 1))
    assert grid_certificate.on_coarse_grid(op, (5, 1, 2, 2), 8).input_shape == (32, 1)
    assert grid_certificate.on_coarse_grid(UnboundedConv(strides=(2, 1)), (5, 4, 2, 2), 3).input_shape == (12, 9)
    assert grid_certificate.on_dividing_grid(op, (7, 1, 2, 2), 4).input_shape == (32, 1)
    assert grid_certificate.on_dividing_grid(op, (7, 1, 2, 2), 4, 3).input_shape == (16, 1)
    assert grid_certificate.on_dividing_grid(op, (7, 2, 2, 2), 4, 5).input_shape == (32, 4)


@pytest.mark.parametrize("n", [7, 8])
def test_on_half_grid(n):
    """Every index up to a turn beyond the grid is the same frequency, or the opposite one."""
    op = CircularConv((5, n))
    grid = boxes.grid_of(op, (2, 3, 1, 1), np.float64)
    indices = np.array(list(itertools.product(range(-5, 10), range(-n, 2 * n))))
    found, mirrored = (np.asarray(part) for part in boxes.on_half_grid(grid, jnp.asarray(indices, jnp.int32)))
    assert np.all((found >= 0) & (found < half_grid(op)))
    np.testing.assert_array_equal(np.where(mirrored, -1, 1) * found % op.grid, indices % op.grid)
    # A frequency of the half grid stays.
    inside = np.all((indices >= 0) & (indices < half_grid(op)), axis=1)
    np.testing.assert_array_equal(found[inside], indices[inside])
    assert not np.any(mirrored[inside])


# Branch and bound


def symbol_at(kernel, op, doubled) -> np.ndarray:
    """The symbol without strides at halves of doubled indices of the grid."""
    angles = np.pi * np.asarray(doubled) / np.array(op.grid)
    taps = np.indices(kernel.shape[:-2]).reshape((op.num_axes, -1))
    waves = np.exp(-1j * angles @ (taps * np.array(op.kernel_dilation)[:, None]))
    return np.tensordot(waves, np.asarray(kernel).reshape((-1, *kernel.shape[-2:])), 1)


def boxes_of_all_levels(op, grid):
    """Corners and levels of many boxes in the half grid, of each level."""
    corners, levels = [], []
    for level in range(int(grid.last_level) + 1):
        sizes = np.ceil(np.asarray(grid.sizes) / 2**level).astype(int)
        starts = [range(0, end - size + 1, max(size // 2, 1)) for end, size in zip(half_grid(op), sizes, strict=True)]
        corners += itertools.product(*starts)
        levels += [level] * math.prod(map(len, starts))
    return jnp.asarray(corners, jnp.int32), jnp.asarray(levels, jnp.int32)


SEARCHED = [
    (CircularConv((61,)), (5, 2, 2)),
    (CircularConv((32, 15)), (3, 2, 2, 2)),
    # One axis with so few angles for its degree that wide boxes of the other prove nothing.
    (CircularConv((64, 10)), (3, 10, 1, 2)),
]


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("spread", [math.inf, 0.4])
@pytest.mark.parametrize(("op", "shape"), SEARCHED, ids=str)
def test_boxes_are_low_by_bernstein_and_szegoe(op, shape, spread, loss):
    """Exactly where the centre is below the bound in the text of the module."""
    kernel, grid = gaussian(shape), boxes.grid_of(op, shape, np.float64)
    poly = dataclasses.replace(gram_polynomial(jnp.asarray(kernel), op, False), loss=jnp.asarray(loss))
    corners, levels = boxes_of_all_levels(op, grid)
    sizes = np.ceil(np.asarray(grid.sizes) / 2.0 ** np.asarray(levels)[:, None])
    reach = jnp.asarray(sizes - 1, jnp.int32)
    phi = (sizes - 1) @ [d * np.pi / (2 * n) for d, n in zip(degrees_of(op, shape), op.grid, strict=True)]
    values = np.linalg.norm(symbol_at(kernel, op, 2 * np.asarray(corners) + sizes - 1), 2, axis=(1, 2))
    squares = symbol_at(kernel, op, 2 * np.indices(op.grid).reshape((op.num_axes, -1)).T)
    largest = np.linalg.norm(squares, 2, axis=(1, 2)).max()
    tangent = np.sqrt(grid_certificate.overshoot(op, shape) ** 2 - 1)
    spread = spread * largest**2
    for limit in (0.65 * largest, largest, 1.3 * largest):
        least = max(limit**2 - spread, 0)
        root = np.sqrt(limit**2 - least) * np.cos(phi) - limit * tangent * np.sin(phi)
        bound = least + np.maximum(root, 0) ** 2
        found = np.asarray(branch_and_bound._are_low(poly, grid, spread, corners, reach, jnp.asarray(limit)))
        sure = np.abs(values**2 + loss - bound) > 1e-9
        np.testing.assert_array_equal(found[sure], (values**2 + loss < bound)[sure])


@pytest.mark.parametrize(("op", "shape"), SEARCHED, ids=str)
def test_no_box_with_the_maximum_is_low(op, shape):
    """Two taps at the ends attain the inequality, Gaussian kernels do not, and those of nearly one tap are flat."""
    ends, near, flat = np.zeros(shape), 1e-3 * gaussian(shape), 0.02 * gaussian(shape)
    ends[(0,) * op.num_axes] = ends[(-1,) * op.num_axes] = gaussian(shape[-2:])
    near[(0,) * op.num_axes] += np.eye(*shape[-2:])
    flat[(0,) * op.num_axes] += gaussian(shape[-2:], 1)
    grid = boxes.grid_of(op, shape, np.float64)
    corners, levels = boxes_of_all_levels(op, grid)
    sizes = np.ceil(np.asarray(grid.sizes) / 2.0 ** np.asarray(levels)[:, None])
    reach = jnp.asarray(sizes - 1, jnp.int32)
    for kernel in (ends, gaussian(shape), near, flat):
        poly = gram_polynomial(jnp.asarray(kernel), op, False)
        everywhere = np.indices(half_grid(op)).reshape((op.num_axes, -1)).T
        values = np.linalg.norm(symbol_at(kernel, op, 2 * everywhere), 2, axis=(1, 2))
        limit = jnp.asarray(values.max() * (1 - 1e-10))
        low = np.asarray(branch_and_bound._are_low(poly, grid, branch_and_bound._spread(poly), corners, reach, limit))
        for place in everywhere[values > limit]:
            held = np.all((place >= np.asarray(corners)) & (place < np.asarray(corners) + sizes), axis=1)
            assert np.any(held)
            assert not np.any(low & held)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 2), (4, 2, 2), (3, 2, 2, 4)], ids=str)
def test_no_vector_varies_by_more_than_the_spread(shape, groups):
    """It is twice the largest row of what the Gram matrices have at lags that are not 0."""
    op = CircularConv((9,) * (len(shape) - 2), feature_group_count=groups)
    everywhere = 2 * np.indices(op.grid).reshape((op.num_axes, -1)).T
    for noise in (1.0, 1e-3, 0.0):
        kernel = 3 * noise * gaussian(shape)
        kernel[(1,) * op.num_axes] += gaussian(shape[-2:], 1)
        kernel = kernel.astype(np.float32).astype(np.float64)
        expected, seen = [], []
        for part in np.split(kernel, groups, axis=-1):
            # The columns of the symbol are its shorter side, the inputs if both are equal.
            inputs = part.shape[-2] <= part.shape[-1]
            symbols = symbol_at(part, CircularConv(op.input_shape), everywhere)
            vectors = gaussian((part.shape[-2] if inputs else part.shape[-1], 200), 2)
            vectors = vectors / np.linalg.norm(vectors, axis=0)
            images = np.swapaxes(symbols, 1, 2) @ vectors if inputs else symbols @ vectors
            squares = np.linalg.norm(images, axis=1) ** 2
            seen.append(np.max(np.ptp(squares, axis=0)))
            products = {}
            for a, b in itertools.product(np.ndindex(shape[:-2]), repeat=2):
                one, two = (part[a].T, part[b].T) if inputs else (part[a], part[b])
                lag = tuple(np.subtract(a, b))
                products[lag] = products.get(lag, 0) + one.T @ two
            rows = np.zeros(min(part.shape[-2:]))
            for lag in [lag for lag in products if lag > (0,) * op.num_axes]:
                there, back = products[lag], products[tuple(-step for step in lag)]
                rows += np.sum(np.maximum(np.abs(there + back), np.abs(there - back)), axis=1)
            expected.append(2 * rows.max())
        polynomials = (gram_polynomial(jnp.asarray(kernel, dtype), op, False) for dtype in (np.float64, np.float32))
        spread, single = (float(branch_and_bound._spread(poly)) for poly in polynomials)
        assert max(seen) <= spread + 1e-12
        np.testing.assert_allclose(spread, max(expected), rtol=1e-12)
        # With room for rounding.
        assert (1 + 1e-7) * max(expected) <= single <= (1 + 1e-5) * max(expected)


@pytest.fixture
def looks(monkeypatch):
    """How many boxes each look of branch and bound finds waiting."""
    sizes, real = [], branch_and_bound._look

    def look(*args):
        jax.debug.callback(sizes.append, args[-1].size)
        return real(*args)

    monkeypatch.setattr(branch_and_bound, "_look", look)
    return sizes


@pytest.mark.parametrize("op", [UnboundedConv(), CircularConv((200, 200))], ids=str)
def test_flat_spectra_need_few_boxes(op, looks):
    """Without a bound of how much they vary, branch and bound looks at millions of boxes."""
    norm = jax.jit(lambda k: spectral_norm(k, op))
    for matrix in (np.linalg.qr(gaussian((6, 6), 1))[0], gaussian((6, 6), 1)):
        for noise in (0.0, 1e-6, 1e-5, 1e-4):
            kernel = noise * gaussian((3, 3, 6, 6))
            kernel[1, 1] += matrix
            looks.clear()
            found = norm(jnp.asarray(kernel, jnp.float32))
            values = np.linalg.norm(np.fft.fft2(kernel, (200, 200), axes=(0, 1)), 2, axis=(2, 3))
            np.testing.assert_allclose(found, values.max(), rtol=5e-6)
            jax.effects_barrier()
            assert 0 < len(looks) < 3000
    looks.clear()
    assert norm(jnp.zeros((3, 3, 6, 6), jnp.float32)) == 0
    jax.effects_barrier()
    assert not looks
