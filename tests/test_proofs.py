"""The steps of the proofs one by one, each against NumPy on few numbers; mutation testing runs them (`mutation.py`)."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, derivative, gaussian, pull_back, weights

from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn._tools.proofs import are_below, rounding, squared_limit
from jaxsrn.bounds import coefficients, entries, gram, interval, reshapings
from jaxsrn.bounds.covers import NormInterval, covers, slack_of, widened
from jaxsrn.normalization import closed_form as closed
from jaxsrn.projections import augmented_lagrangian, frequency_passes
from jaxsrn.projections.clipping import matrix_stack
from jaxsrn.spectra.circular import boxes, branch_and_bound, grid_certificate
from jaxsrn.spectra.circular.grams import gram_polynomial
from jaxsrn.spectra.circular.sites import half_grid
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import Pair

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


# Covers


@pytest.mark.parametrize(
    ("op", "shape", "count"),
    [
        (ZeroPaddedConv((6,)), (3, 2, 3), 1),
        (ZeroPaddedConv((7,), strides=2), (3, 2, 3), 1),
        (ZeroPaddedConv((3,), padding=((2, 2),), input_dilation=2), (3, 2, 4), 1),
        (ZeroPaddedConv((5,), padding=((1, 3),), input_dilation=3, strides=2), (4, 1, 2), 2),
        (
            ZeroPaddedConv((3, 4), padding=((1, 1), (1, 2)), input_dilation=(1, 2), feature_group_count=2),
            (2, 3, 1, 4),
            1,
        ),
    ],
    ids=str,
)
def test_covers_are_circular_layers_above(op, shape, count):
    """A layer with a stride and an input dilation has one for each. They bound all kernels."""
    for seed in range(3):
        kernel = gaussian(shape, seed)
        found = covers(jnp.asarray(kernel), op)
        assert len(found) == count
        for kernel_of_cover, cover in found:
            assert isinstance(cover, CircularConv)
            assert np.linalg.norm(dense(kernel, op), 2) <= np.linalg.norm(dense(kernel_of_cover, cover), 2)
            # Each holds the kernel's own entries.
            np.testing.assert_array_equal(np.sort(kernel_of_cover, axis=None), np.sort(kernel, axis=None))


def test_a_cover_is_no_larger_than_it_must_be():
    """On one long axis the edges hardly matter, whatever is strided or dilated."""
    kernel = gaussian((3, 2, 4))
    for op in (
        ZeroPaddedConv((60,), strides=2),
        ZeroPaddedConv((60,), padding=((2, 2),), input_dilation=2),
        ZeroPaddedConv((60,), feature_group_count=2),
    ):
        [(kernel_of_cover, cover)] = covers(jnp.asarray(kernel), op)
        norm = np.linalg.norm(dense(kernel, op), 2)
        assert np.linalg.norm(dense(kernel_of_cover, cover), 2) <= 1.01 * norm


def test_layers_without_padding_are_their_own_covers():
    kernel = jnp.asarray(gaussian((3, 2, 2)))
    for op in (CircularConv((6,), strides=2), UnboundedConv(kernel_dilation=2)):
        [(same, cover)] = covers(kernel, op)
        assert same is kernel
        assert cover == op


def test_intervals_are_widened_for_rounding():
    """Each end moves by its share, and by that of the whole kernel where taps may cancel; never below 0."""
    kernel, eps = jnp.asarray(gaussian((3, 3, 4, 5)), jnp.float32), np.finfo(np.float32).eps
    slack = 2 * 2 * 6 * eps
    assert slack_of(kernel) == slack
    ends = NormInterval(jnp.asarray(2.0), jnp.asarray(3.0))
    np.testing.assert_allclose(widened(ends, kernel, False), [2 * (1 - slack), 3 * (1 + slack)], rtol=1e-14)
    margin = slack * np.linalg.norm(kernel)
    expected = [2 * (1 - slack) - margin, 3 * (1 + slack) + margin]
    np.testing.assert_allclose(widened(ends, kernel, True), expected, rtol=1e-10)
    assert widened(NormInterval(jnp.asarray(0.5 * margin), jnp.asarray(1.0)), kernel, True).lower == 0


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
        sizes = np.asarray(boxes.edges(grid, levels))
        np.testing.assert_array_equal(sizes, np.broadcast_to(np.ceil(np.asarray(grid.sizes) / 2**level), sizes.shape))
        places = [frequencies_of(corner, size) for corner, size in zip(corners, sizes, strict=True)]
        assert set.union(*places) == everything
        middles = np.asarray(boxes.centres(jnp.asarray(corners), jnp.asarray(sizes)))
        np.testing.assert_array_equal(middles, 2 * corners + sizes - 1)
        halves, exist = (np.asarray(part) for part in boxes.split(grid, jnp.asarray(corners), levels))
        below = np.asarray(boxes.edges(grid, levels + 1))
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
    assert boxes.num_boxes(CircularConv((9, 9)), (3, 3, 2, 2), is_reduced=True) == (9, 5)
    reduced = boxes.grid_of(CircularConv((9, 9)), (3, 3, 2, 2), np.float64, is_reduced=True)
    assert (reduced.tangent, reduced.last_level, *reduced.sizes) == (0, 0, 1, 1)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_overshoot_is_attained(n):
    """By `1 +- exp(-i w)`, whose largest value lies half a step from the nearest frequencies."""
    sign = -1 if n % 2 else np.exp(1j * np.pi * (1 + 1 / n))
    values = np.abs(1 + sign * np.exp(-2j * np.pi * np.arange(n) / n))
    np.testing.assert_allclose(2 / values.max(), grid_certificate.overshoot(CircularConv((n,)), (2, 1, 1)), rtol=1e-12)


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


# The closed form of one pair

OPERATORS = [
    (Dense(), (4, 3)),
    (CircularConv((5,)), (3, 2, 2)),
    (ZeroPaddedConv((4,)), (3, 2, 2)),
    (ZeroPaddedConv((1, 4)), (3, 2, 2, 1)),
]


def problem_and_direction(op, shape, share: float):
    """The problem of a kernel with a target between the two ends, with the functional of its leading pair, by NumPy."""
    kernel, counts = gaussian(shape), np.broadcast_to(weights(shape, op), shape)
    kernel = np.where(counts == 0, 0, kernel)
    left, values, right = np.linalg.svd(dense(kernel, op))
    gradient = pull_back(np.outer(left[:, 0], right[0]), op, shape)
    direction = np.where(counts == 0, 0, gradient / np.maximum(counts, 1))
    # From the smallest stable rank that the pair allows to that of the kernel.
    smallest = 1 / np.sum(counts * direction**2)
    target = smallest + share * (np.sum(values**2) / values[0] ** 2 - smallest)
    problem = closed.problem_of(jnp.asarray(kernel), op, jnp.asarray(target), jnp.asarray(values[0]))
    return problem, direction, counts, gradient


@pytest.mark.parametrize(("op", "shape"), OPERATORS, ids=str)
def test_problem(op, shape):
    problem, direction, counts, gradient = problem_and_direction(op, shape, 0.7)
    matrix = dense(problem.kernel, op)
    np.testing.assert_allclose(problem.squared, np.sum(matrix**2), rtol=1e-12)
    np.testing.assert_allclose(problem.stable_rank, np.sum(matrix**2) / np.linalg.norm(matrix, 2) ** 2, rtol=1e-12)
    other = jnp.asarray(gaussian(shape, 1))
    np.testing.assert_allclose(problem.inner(other, problem.kernel), np.sum(dense(other, op) * matrix), rtol=1e-12)
    distance = np.linalg.norm(dense(other, op) - matrix) / np.linalg.norm(matrix)
    np.testing.assert_allclose(problem.distance(other), distance, rtol=1e-12)
    np.testing.assert_allclose(closed.over_weights(jnp.asarray(gradient), op), direction, rtol=1e-12)
    # A gradient at a tap that meets no sample counts for nothing.
    inverse = np.where(counts == 0, 0, 1 / np.maximum(counts, 1))
    np.testing.assert_array_equal(closed.over_weights(jnp.ones(shape), op), inverse)
    zero = problem._replace(kernel=jnp.zeros(shape), norm=jnp.zeros(()), squared=jnp.zeros(()))
    assert zero.stable_rank == zero.distance(jnp.zeros(shape)) == 0


def test_functional_is_that_of_the_pair():
    op, shape = Dense(), (4, 3)
    left, right = gaussian((3,)), gaussian((4,))
    pair = Pair(None, jnp.asarray(right), jnp.asarray(left))
    other = gaussian(shape, 1)
    found = closed.functional(pair, op, shape)
    np.testing.assert_allclose(np.sum(other * found), left @ dense(other, op) @ right, rtol=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize(("op", "shape"), OPERATORS, ids=str)
def test_closed_form_is_the_nearest_that_meets_both_constraints(op, shape, share):
    """Nearer than others that meet them, which differ from it by a turn of the part that no constraint holds."""
    problem, direction, counts, _ = problem_and_direction(op, shape, share)

    def inner(a, b):
        return np.sum(counts * a * b)

    def meets(kernel):
        np.testing.assert_allclose(inner(kernel, kernel), problem.target * problem.norm**2, rtol=1e-10)
        np.testing.assert_allclose(inner(kernel, direction), problem.norm, rtol=1e-10)

    found = closed.closed_form(problem, jnp.asarray(direction))
    kernel, original = np.asarray(found.kernel), np.asarray(problem.kernel)
    meets(kernel)
    assert found.feasible
    squared = inner(kernel - original, kernel - original)
    np.testing.assert_allclose(found.merit, squared, rtol=1e-9)
    along = direction / inner(direction, direction) * float(problem.norm)
    rest = kernel - along
    for seed in range(1, 20):
        turned = np.where(counts == 0, 0, rest + 0.3 * gaussian(shape, seed))
        turned = turned - inner(turned, direction) / inner(direction, direction) * direction
        turned = along + turned * np.sqrt(inner(rest, rest) / inner(turned, turned))
        meets(turned)
        assert inner(turned - original, turned - original) > squared
    e, m = jnp.asarray(inner(direction, direction)), jnp.asarray(inner(original, direction))
    np.testing.assert_allclose(closed.squared_distance(e, m, problem), squared, rtol=1e-9)
    # Away from the pair of the kernel itself too.
    other = direction + 0.1 * np.where(counts == 0, 0, gaussian(shape, 7))
    found = closed.closed_form(problem, jnp.asarray(other))
    change = np.asarray(found.kernel) - original
    np.testing.assert_allclose(found.merit, inner(change, change), rtol=1e-9)
    e, m = jnp.asarray(inner(other, other)), jnp.asarray(inner(original, other))
    np.testing.assert_allclose(closed.squared_distance(e, m, problem), inner(change, change), rtol=1e-9)


def test_infeasible_pairs_have_the_smallest_stable_rank():
    """A functional so short that the norm alone takes more length than the target allows; merits order such ones."""
    problem, direction, *_ = problem_and_direction(Dense(), (4, 3), 0.9)
    problem = problem._replace(target=jnp.asarray(1.5))
    merits = []
    for length in (0.5, 0.8):
        short = jnp.asarray(np.sqrt(length) * direction)
        found = closed.closed_form(problem, short)
        assert not found.feasible
        assert not closed.is_feasible(problem.inner(short, short), problem.target) or length * 1.5 >= 1
        np.testing.assert_allclose(found.kernel, problem.norm / length * short, rtol=1e-12)
        merits.append(float(found.merit))
        if length == 0.5:
            problem = problem._replace(target=jnp.asarray(1.2))
    assert merits[0] > merits[1] > closed.INFEASIBLE_FROM
    np.testing.assert_allclose(merits[0] / merits[1], 0.8 / 0.5, rtol=1e-12)


def test_feasible_up_to_rounding():
    """To 16 units of it; the numbers below 1 are half a unit apart."""
    target, eps = jnp.asarray(4.0), np.finfo(np.float64).eps
    for units, feasible in ((0, True), (16, True), (16.5, False)):
        assert bool(closed.is_feasible(jnp.asarray(0.25 * (1 - units * eps)), target)) is feasible


def test_closed_form_of_nothing():
    """A kernel that the functional determines alone, a zero functional, and a zero kernel give finite kernels."""
    problem, *_ = problem_and_direction(Dense(), (4, 3), 0.7)
    single = jnp.zeros((4, 3)).at[1, 2].set(2.0)
    found = closed.closed_form(problem._replace(kernel=3 * single, squared=jnp.asarray(36.0)), single)
    np.testing.assert_allclose(found.kernel, problem.norm / 4 * single, rtol=1e-12)
    for kernel in (problem.kernel, 0 * problem.kernel):
        assert np.all(np.isfinite(closed.closed_form(problem._replace(kernel=kernel), jnp.zeros((4, 3))).kernel))


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
@pytest.mark.parametrize(("op", "shape"), SEARCHED, ids=str)
def test_boxes_are_low_by_bernstein_and_szegoe(op, shape, loss):
    """Exactly where the centre is below `limit (cos phi - tangent sin phi)`, by the formula of the module."""
    kernel, grid = gaussian(shape), boxes.grid_of(op, shape, np.float64)
    poly = dataclasses.replace(gram_polynomial(jnp.asarray(kernel), op, False), loss=jnp.asarray(loss))
    corners, levels = boxes_of_all_levels(op, grid)
    sizes = np.ceil(np.asarray(grid.sizes) / 2.0 ** np.asarray(levels)[:, None])
    phi = (sizes - 1) @ [d * np.pi / (2 * n) for d, n in zip(degrees_of(op, shape), op.grid, strict=True)]
    values = np.linalg.norm(symbol_at(kernel, op, 2 * np.asarray(corners) + sizes - 1), 2, axis=(1, 2))
    squares = symbol_at(kernel, op, 2 * np.indices(op.grid).reshape((op.num_axes, -1)).T)
    largest = np.linalg.norm(squares, 2, axis=(1, 2)).max()
    tangent = np.sqrt(grid_certificate.overshoot(op, shape) ** 2 - 1)
    for limit in (0.6 * largest, largest, 1.3 * largest):
        share = np.maximum(np.cos(phi) - tangent * np.sin(phi), 0)
        found = np.asarray(branch_and_bound._are_low(poly, grid, corners, levels, jnp.asarray(limit)))
        sure = np.abs(values**2 + loss - (limit * share) ** 2) > 1e-9
        np.testing.assert_array_equal(found[sure], (values**2 + loss < (limit * share) ** 2)[sure])


@pytest.mark.parametrize(("op", "shape"), SEARCHED, ids=str)
def test_no_box_with_the_maximum_is_low(op, shape):
    """Two taps at the ends attain the inequality; Gaussian kernels do not."""
    ends = np.zeros(shape)
    ends[(0,) * op.num_axes] = ends[(-1,) * op.num_axes] = gaussian(shape[-2:])
    grid = boxes.grid_of(op, shape, np.float64)
    corners, levels = boxes_of_all_levels(op, grid)
    sizes = np.ceil(np.asarray(grid.sizes) / 2.0 ** np.asarray(levels)[:, None])
    for kernel in (ends, gaussian(shape)):
        poly = gram_polynomial(jnp.asarray(kernel), op, False)
        everywhere = np.indices(half_grid(op)).reshape((op.num_axes, -1)).T
        values = np.linalg.norm(symbol_at(kernel, op, 2 * everywhere), 2, axis=(1, 2))
        limit = jnp.asarray(values.max() * (1 - 1e-10))
        low = np.asarray(branch_and_bound._are_low(poly, grid, corners, levels, limit))
        for place in everywhere[values > limit]:
            held = np.all((place >= np.asarray(corners)) & (place < np.asarray(corners) + sizes), axis=1)
            assert np.any(held)
            assert not np.any(low & held)


def test_flat_spectra_are_flat():
    """What is called so is, and kernels near an orthogonal one are called so."""
    op, shape, allowed = CircularConv((8, 9)), (3, 3, 2, 3), 0.02
    orthogonal = np.zeros(shape)
    orthogonal[1, 1] = np.linalg.qr(gaussian((3, 2)))[0].T
    everywhere = 2 * np.indices(op.grid).reshape((2, -1)).T
    called = {}
    for noise in (0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1):
        kernel = 5 * (orthogonal + noise * gaussian(shape))
        values = np.linalg.norm(symbol_at(kernel, op, everywhere), 2, axis=(1, 2))
        poly = gram_polynomial(jnp.asarray(kernel), op, False)
        called[noise] = bool(branch_and_bound._is_flat(poly, allowed, jnp.asarray(values.min())))
        assert not called[noise] or values.max() <= (1 + allowed) * values.min()
    assert called[0]
    assert called[3e-4]
    assert not called[0.1]


@pytest.mark.parametrize("shape", [(2, 3, 2), (4, 2, 2), (3, 2, 2, 3)], ids=str)
def test_spectra_are_called_flat_by_the_norms_of_all_lags(shape):
    """`sum_l ||G_l||_F <= allowed * value^2`, by Cauchy and Schwarz, over half of the lags of the autocorrelation."""
    kernel, op, value = gaussian(shape), CircularConv((9,) * (len(shape) - 2)), 3.0
    products = {}
    for a, b in itertools.product(np.ndindex(shape[:-2]), repeat=2):
        lag = tuple(np.subtract(a, b))
        # The columns of the symbol are its shorter side, the inputs if both are equal.
        one, other = (kernel[a], kernel[b]) if shape[-1] < shape[-2] else (kernel[a].T, kernel[b].T)
        products[lag] = products.get(lag, 0) + one.T @ other
    half = [lag for lag in products if lag > (0,) * len(lag)]
    opposite = [tuple(-step for step in lag) for lag in half]
    pairs = [(products[lag], products[other]) for lag, other in zip(half, opposite, strict=True)]
    squares = sum(np.sum(np.maximum((a + b) ** 2, (a - b) ** 2)) for a, b in pairs)
    edge = np.sqrt(len(half) * squares) / value**2
    poly = gram_polynomial(jnp.asarray(kernel), op, False)
    for allowed, flat in ((edge * (1 + 1e-9), True), (edge * (1 - 1e-9), False)):
        assert bool(branch_and_bound._is_flat(poly, allowed, jnp.asarray(value))) is flat
    # The Gram matrix of few directions says nothing of the others.
    reduced = dataclasses.replace(poly, basis=jnp.eye(2)[None])
    assert not branch_and_bound._is_flat(reduced, 10 * edge, jnp.asarray(value))


@pytest.mark.parametrize("taps", [1, 3])
def test_one_tap_is_flat_to_the_last_digit(taps):
    kernel = jnp.zeros((taps, 2, 2)).at[taps // 2].set(gaussian((2, 2)))
    poly = gram_polynomial(kernel, CircularConv((9,)), False)
    assert branch_and_bound._is_flat(poly, 0.0, jnp.ones(()))


# Duality of projections


def stacks(op, shape, *seeds):
    """Gaussian stacks of the matrices that carry an operator, with its map."""
    blocks = matrix_stack(op, shape, np.float64)
    like = blocks.stack(jnp.zeros(shape))
    return blocks, *(jnp.asarray(as_dtype(gaussian((*like.shape, 2), seed), like.dtype)) for seed in seeds)


def as_dtype(parts, dtype):
    return parts[..., 0] + 1j * parts[..., 1] if np.issubdtype(dtype, np.complexfloating) else parts[..., 0]


def stack_product(blocks, a, b) -> float:
    return float(np.sum(np.asarray(blocks.counts) * np.real(np.conj(a) * np.asarray(b))))


def nuclear(blocks, stack) -> float:
    return float(np.sum(np.asarray(blocks.counts)[..., 0] * np.linalg.svd(stack, compute_uv=False)))


CARRIED = [(Dense(), (4, 3)), (CircularConv((5,), strides=1), (3, 2, 2)), (ZeroPaddedConv((4,)), (3, 2, 1))]


@pytest.mark.parametrize(("op", "shape"), CARRIED, ids=str)
def test_augmented_lagrangian_and_its_dual_point(op, shape):
    """Every field, from NumPy's SVD."""
    blocks, multiplier = stacks(op, shape, 3)
    kernel, target = jnp.asarray(gaussian(shape)), jnp.asarray(gaussian(shape, 1))
    counts, limit, penalty = np.broadcast_to(weights(shape, op), shape), 0.8, 3.0

    def evaluated(kernel):
        arguments = jnp.asarray(limit), multiplier, jnp.asarray(penalty)
        return augmented_lagrangian._evaluate(kernel, target, blocks, *arguments)

    found = evaluated(kernel)
    shifted = np.asarray(blocks.stack(kernel)) + np.asarray(multiplier) / penalty
    rows, values, columns = np.linalg.svd(shifted, full_matrices=False)
    beyond = (rows * np.maximum(values - limit, 0)[:, None]) @ columns
    inside = (rows * np.minimum(values, limit)[:, None]) @ columns
    change = np.asarray(kernel - target)
    expected = 0.5 * np.sum(counts * change**2) + 0.5 * penalty * stack_product(blocks, beyond, beyond)
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    np.testing.assert_allclose(found.multiplier, penalty * beyond, atol=1e-12)
    off = np.asarray(blocks.stack(kernel)) - inside
    np.testing.assert_allclose(found.infeasibility**2, stack_product(blocks, off, off), rtol=1e-12)
    # The gradient is that of the value, and the dual kernel is `A - S^* Y`.
    direction = gaussian(shape, 2)
    slope = derivative(lambda k: float(evaluated(jnp.asarray(k)).value), kernel, direction)
    np.testing.assert_allclose(np.sum(counts * found.gradient * direction), slope, rtol=1e-6)
    point, seen = found.candidate, np.asarray(blocks.stack(jnp.asarray(direction)))
    pulled = np.sum(counts * target * direction) - stack_product(blocks, found.multiplier, seen)
    np.testing.assert_allclose(np.sum(counts * point.kernel * direction), pulled, rtol=1e-10)
    stack = np.asarray(blocks.stack(point.kernel))
    support = stack_product(blocks, stack, found.multiplier)
    np.testing.assert_allclose(point.support, support, rtol=1e-10)
    np.testing.assert_allclose(point.slack, limit * nuclear(blocks, found.multiplier) - support, rtol=1e-10)
    np.testing.assert_allclose(point.bound, limit + np.linalg.norm(stack - inside, axis=(1, 2)).max(), rtol=1e-10)
    assert np.linalg.norm(stack, 2, axis=(1, 2)).max() <= point.bound


@pytest.mark.parametrize("limit", [0.5, 5.0])
@pytest.mark.parametrize(("op", "shape"), CARRIED, ids=str)
def test_the_gap_is_the_primal_value_less_the_dual(op, shape, limit):
    """`1/2 ||K' - A||^2 - (1/2 ||A||^2 - 1/2 ||A - S^* Y||^2 - c ||Y||_*)`; a negative dual value proves nothing."""
    blocks, multiplier = stacks(op, shape, 3)
    counts, target = np.broadcast_to(weights(shape, op), shape), jnp.asarray(gaussian(shape, 1))

    def squared(kernel):
        return np.sum(counts * np.asarray(kernel) ** 2)

    for share in (0.01, 0.1, 1.0):
        scaled = share * multiplier
        kernel = target - blocks.pull_back(scaled)
        support = jnp.asarray(stack_product(blocks, blocks.stack(kernel), scaled))
        slack = limit * nuclear(blocks, scaled) - support
        point = augmented_lagrangian.DualPoint(kernel, slack, support, jnp.asarray(np.inf))
        dual = 0.5 * squared(target) - 0.5 * squared(kernel) - limit * nuclear(blocks, scaled)
        for factor in (1.0, 0.7):
            distance = np.sqrt(squared(factor * kernel - target))
            gap = augmented_lagrangian.duality_gap(blocks, point, jnp.asarray(factor))
            np.testing.assert_allclose(gap, 0.5 * distance**2 - dual, rtol=1e-9, atol=1e-12)
            found = augmented_lagrangian.distance_and_excess(target, blocks, point, jnp.asarray(factor))
            least = np.sqrt(2 * dual) if dual > 0 else 0.0
            np.testing.assert_allclose(found, [distance, np.clip(distance - least, 0, distance)], rtol=1e-8, atol=1e-9)
    nothing = augmented_lagrangian.DualPoint(target, jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    assert augmented_lagrangian.distance_and_excess(target, blocks, nothing, jnp.ones(())) == (0, 0)


@pytest.mark.parametrize(
    ("op", "shape"), [*CARRIED, (ZeroPaddedConv((1, 4)), (3, 2, 2, 1)), (UnboundedConv(), (3, 2, 2))], ids=str
)
def test_unit_directions_and_dual_points_of_passes(op, shape):
    blocks, multiplier = stacks(op, shape, 3)
    gradient, other = jnp.asarray(gaussian(shape)), gaussian(shape, 1)
    counts = np.broadcast_to(1.0 if isinstance(op, UnboundedConv) else weights(shape, op), shape)
    direction, scale = frequency_passes.unit_direction(gradient, blocks)
    np.testing.assert_array_equal(direction[counts == 0], 0)
    seen = np.where(counts == 0, 0, gradient * other)
    np.testing.assert_allclose(scale * np.sum(counts * direction * other), np.sum(seen), rtol=1e-10)
    stack = np.asarray(blocks.stack(direction))
    every = np.sum(np.broadcast_to(blocks.counts, (len(stack), 1, 1))) * min(stack.shape[1:])
    np.testing.assert_allclose(stack_product(blocks, stack, stack) / every, 1, rtol=1e-12)
    zero, length = frequency_passes.unit_direction(0 * gradient, blocks)
    assert np.all(zero == 0)
    assert length == 0
    # `S^* Z = B`, and every kernel of the ball has at most the value `||Z||_*`.
    point = frequency_passes.dual_point(blocks, direction, multiplier)
    against = stack_product(blocks, point, blocks.stack(jnp.asarray(other)))
    np.testing.assert_allclose(against, np.sum(counts * direction * other), rtol=1e-9)
    np.testing.assert_allclose(frequency_passes.nuclear_norm(blocks, point), nuclear(blocks, point), rtol=1e-12)
    # It is the nearest: what it differs by is a stack of a kernel, and so orthogonal to all stacks that pull back to 0.
    free = multiplier - blocks.stack(blocks.pull_back(multiplier) / _gain(blocks, counts))
    np.testing.assert_allclose(stack_product(blocks, point - multiplier, free), 0, atol=1e-9)


def _gain(blocks, counts):
    gain = np.asarray(blocks.pull_back(blocks.stack(jnp.ones(counts.shape))))
    return jnp.asarray(np.where(counts == 0, 1, gain))


def test_polar_factors():
    matrices = gaussian((3, 4, 3)) + 1j * gaussian((3, 4, 3), 1)
    rows, values, columns = np.linalg.svd(matrices, full_matrices=False)
    np.testing.assert_allclose(frequency_passes.polar(jnp.asarray(matrices)), rows @ columns, atol=1e-12)
    values[:, 2] = 1e-17
    poor = (rows * values[:, None]) @ columns
    found = frequency_passes.polar(jnp.asarray(poor))
    np.testing.assert_allclose(found, rows[..., :2] @ columns[:, :2], atol=1e-12)
    values[:, 2] = 1e-13
    found = frequency_passes.polar(jnp.asarray((rows * values[:, None]) @ columns))
    np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), np.sqrt(3), rtol=1e-12)
    # What counts as 0 does so relative to the largest value.
    found = frequency_passes.polar(jnp.asarray(1e3 * poor))
    np.testing.assert_allclose(found, rows[..., :2] @ columns[:, :2], atol=1e-12)
    assert np.all(frequency_passes.polar(jnp.zeros((1, 2, 2))) == 0)
    assert np.all(np.isnan(frequency_passes.polar(jnp.full((1, 2, 2), jnp.nan))))


@pytest.mark.parametrize(
    ("op", "shape", "grid"),
    [
        (CircularConv((28,)), (3, 2, 2), (7,)),
        (CircularConv((12, 5)), (3, 3, 2, 2), (6, 5)),
        (CircularConv((16, 9)), (2, 1, 2, 2), (4, 1)),
        (CircularConv((56,), strides=2), (5, 1, 2), (7,)),
        (UnboundedConv(), (3, 2, 2), (8,)),
        (UnboundedConv(strides=2), (5, 2, 2), (8,)),
        (ZeroPaddedConv((9,)), (3, 2, 2), (8,)),
        (ZeroPaddedConv((5,), padding=((2, 2),), input_dilation=2), (4, 2, 3), (4,)),
        (ZeroPaddedConv((5,), padding=((2, 2),), input_dilation=3, strides=2), (4, 2, 3), (4,)),
    ],
    ids=str,
)
def test_few_frequencies_are_some_of_the_layers(op, shape, grid):
    """Inner products are the plain ones, and each matrix stands for its frequencies."""
    blocks = frequency_passes.few_frequencies(op, shape, np.float64)
    a, b = jnp.asarray(gaussian(shape)), jnp.asarray(gaussian(shape, 1))
    assert len(blocks.stack(a)) == math.prod((*grid[:-1], grid[-1] // 2 + 1))
    np.testing.assert_allclose(np.sum(np.asarray(blocks.counts)), 1, rtol=1e-12)
    np.testing.assert_allclose(stack_product(blocks, blocks.stack(a), blocks.stack(b)), np.sum(a * b), rtol=1e-10)
    np.testing.assert_array_equal(blocks.weights, 1)
    if isinstance(op, CircularConv):
        every = np.linalg.svd(dense(a, op), compute_uv=False)
        few = np.linalg.svd(blocks.stack(a), compute_uv=False).reshape(-1)
        assert np.all(np.abs(few[:, None] - every[None]).min(axis=1) < 1e-10)


def test_passes_end_with_a_proof():
    """Nothing random of the ball exceeds the bound, which is as near to the value as was asked."""
    op, shape = CircularConv((6,)), (3, 2, 2)
    blocks = matrix_stack(op, shape, np.float64)
    direction, _ = frequency_passes.unit_direction(jnp.asarray(gaussian(shape)), blocks)
    found = frequency_passes.solved(direction, blocks, 1e-3, 1000)
    assert np.linalg.norm(dense(found.kernel, op), 2) <= 1 + 1e-12
    np.testing.assert_allclose(found.value, 6 * np.sum(direction * found.kernel), rtol=1e-12)
    assert found.value >= (1 - 1e-3) * found.bound
    assert found.value < found.bound
    for seed in range(50):
        other = np.asarray(found.kernel) + 0.05 * gaussian(shape, seed)
        other = other / max(np.linalg.norm(dense(other, op), 2), 1)
        assert 6 * np.sum(direction * other) <= found.bound
    assert 0 < found.num_passes <= 1000
    few = frequency_passes.solved(direction, blocks, 0.0, 5)
    assert few.num_passes == 5
    nothing = frequency_passes.solved(0 * direction, blocks, 1e-3, 20)
    assert nothing.value == nothing.bound == 0


# Bounds that read the coefficients alone, on one axis

BOUNDED = [
    (CircularConv((40,)), (3, 2, 3)),
    (CircularConv((5,), feature_group_count=2), (4, 2, 6)),
    (CircularConv((60,), strides=2, kernel_dilation=3), (3, 2, 2)),
    (UnboundedConv(strides=2), (5, 2, 3)),
    (ZeroPaddedConv((50,), strides=2), (5, 3, 2)),
    (ZeroPaddedConv((30,), padding=((2, 2),), input_dilation=3, feature_group_count=2), (4, 2, 6)),
    (ZeroPaddedConv((30,), padding=((2, 2),), input_dilation=3, strides=2), (5, 2, 1)),
]


def literal_tensors(kernel, op) -> list[np.ndarray]:
    """`(groups, terms, phases * c_in // groups, c_out // groups)` of every cover: taps sorted by phase and stride."""
    groups, dilation = op.feature_group_count, op.kernel_dilation[0] if not isinstance(op, UnboundedConv) else 1
    stride = op.strides if isinstance(op.strides, int) else op.strides[0]
    by_group = np.stack(np.split(kernel, groups, axis=-1))
    of_covers = [(by_group, stride)]
    input_dilation = getattr(op, "input_dilation", (1,))[0]
    if input_dilation > 1:
        adjoint = by_group.swapaxes(-1, -2), input_dilation
        of_covers = [*of_covers, adjoint] if stride > 1 else [adjoint]
    found = []
    for taps, step in of_covers:
        offsets = [dilation * t for t in range(taps.shape[1])]
        terms = sorted({offset // step for offset in offsets})
        tensor = np.zeros((groups, len(terms), step, *taps.shape[2:]))
        for t, offset in enumerate(offsets):
            tensor[:, terms.index(offset // step), offset % step] = taps[:, t]
        found.append(tensor.reshape((groups, len(terms), -1, taps.shape[-1])))
    return found


def literal_lip_bound(tensor, oversampling: int) -> float:
    terms = tensor.shape[1]
    angles = 2 * np.pi * np.arange(oversampling * max(terms - 1, 1)) / (oversampling * max(terms - 1, 1))
    symbols = np.einsum("wt,gtio->wgio", np.exp(-1j * np.outer(angles, np.arange(terms))), tensor)
    return np.linalg.norm(symbols, axis=(2, 3)).max() / np.sqrt(1 - (terms - 1) / len(angles))


def literal_fantastic(tensor) -> float:
    groups, terms, rows, columns = tensor.shape
    tall, wide = tensor.reshape((groups, -1, columns)), tensor.swapaxes(1, 2).reshape((groups, rows, -1))
    return np.sqrt(terms) * min(np.linalg.norm(side, 2, axis=(1, 2)).max() for side in (tall, wide))


@pytest.mark.parametrize(("op", "shape"), BOUNDED, ids=str)
def test_coefficients_and_the_bounds_that_read_them(op, shape):
    kernel = 1e3 * gaussian(shape)
    expected = literal_tensors(kernel, op)
    found = coefficients.tensors(jnp.asarray(kernel), op)
    assert [coefficients.num_terms(tensor) for tensor in found] == [tensor.shape[1] for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(other, axis=None))
    bounds_of = {
        lambda k: entries._lip_bound.__wrapped__(k, op, 2): lambda tensor: literal_lip_bound(tensor, 2),
        lambda k: entries._lip_bound.__wrapped__(k, op, 8): lambda tensor: literal_lip_bound(tensor, 8),
        lambda k: entries._l1.__wrapped__(k, op): lambda tensor: np.abs(tensor).sum(),
        lambda k: entries._channel_l1.__wrapped__(k, op): lambda tensor: np.linalg.norm(
            np.abs(tensor).sum(axis=1), 2, axis=(1, 2)
        ).max(),
        lambda k: reshapings._fantastic_four.__wrapped__(k, op, None): literal_fantastic,
    }
    for function, literal in bounds_of.items():
        value, least = float(function(jnp.asarray(kernel))), min(map(literal, expected))
        # Never below, and above by the room for rounding alone.
        assert least <= value <= least * (1 + 1e-12)


def test_coefficients_and_lip_bound_on_two_axes_and_of_one_tap():
    kernel = gaussian((3, 2, 2, 3))
    [tensor] = coefficients.tensors(jnp.asarray(kernel), CircularConv((9, 9)))
    np.testing.assert_array_equal(tensor[0], kernel)
    assert coefficients.num_terms(tensor) == 6
    symbol = np.fft.fft2(kernel, (8, 4), axes=(0, 1))
    expected = np.linalg.norm(symbol, axis=(2, 3)).max() / np.sqrt((1 - 2 / 8) * (1 - 1 / 4))
    found = entries._lip_bound.__wrapped__(jnp.asarray(kernel), CircularConv((9, 9)), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    single = jnp.asarray(gaussian((1, 2, 3)))
    found = entries._lip_bound.__wrapped__(single, CircularConv((9,)), 4)
    np.testing.assert_allclose(found, np.linalg.norm(single), rtol=1e-12)


def test_matrix_norms_of_stacks():
    """Exact, with the derivative of the largest; power steps are from below, and have no second derivative."""
    stack = jnp.asarray(gaussian((3, 4, 5)))
    norms = np.linalg.norm(stack, 2, axis=(1, 2))
    np.testing.assert_allclose(coefficients.matrix_norm(stack), norms.max(), rtol=1e-12)
    few, many = (float(coefficients.matrix_norm(stack, steps)) for steps in (1, 300))
    assert few < norms.max() * (1 - 1e-6)
    np.testing.assert_allclose(many, norms.max(), rtol=1e-9)
    largest = norms.argmax()
    left, _, right = np.linalg.svd(stack[largest])
    expected = np.zeros(stack.shape)
    expected[largest] = np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(jax.grad(coefficients.matrix_norm)(stack), expected, atol=1e-9)
    with pytest.raises(ValueError, match="num_steps"):
        jax.jvp(jax.grad(lambda s: coefficients.matrix_norm(s, 2)), (stack,), (stack,))


# The last one has as many frequencies as the coarse grid, and so needs no factor.
ITERATED = [*BOUNDED, (Dense(), (4, 3)), (CircularConv((16,)), (3, 2, 2))]


@pytest.mark.parametrize(("num_steps", "oversampling"), [(1, 2), (3, 8)])
@pytest.mark.parametrize(("op", "shape"), ITERATED, ids=str)
def test_gram_iteration_written_out(op, shape, num_steps, oversampling):
    """`||G^(2^t)||_F^(1/2^(t+1))` over the layer's frequencies, or over fewer with what they may miss."""
    kernel = 1e3 * gaussian(shape)
    tensors = [kernel[None, None]] if isinstance(op, Dense) else literal_tensors(kernel, op)
    found = []
    for k, tensor in enumerate(tensors):
        terms = tensor.shape[1]
        own, factor = 1, 1.0
        exponents = np.arange(terms)
        if not isinstance(op, Dense):
            _, cover = covers(jnp.asarray(kernel), op)[k]
            stride = cover.strides if isinstance(cover.strides, int) else cover.strides[0]
            dilation = 1 if isinstance(op, UnboundedConv) else op.kernel_dilation[0]
            exponents = np.unique(np.arange(shape[0]) * dilation // stride)
            own = 2**24 if isinstance(op, UnboundedConv) else cover.grid[0]
            degree = exponents[-1]
            if oversampling * degree < own:
                own, factor = oversampling * degree, 1 / np.cos(np.pi / (2 * oversampling))
        waves = np.exp(-2j * np.pi * np.outer(np.arange(own), exponents) / own)
        symbols = np.einsum("wt,gtio->wgio", waves, tensor)
        powers = np.linalg.matrix_power(symbols.conj().swapaxes(-1, -2) @ symbols, 2**num_steps)
        found.append(factor * np.linalg.norm(powers, axis=(-2, -1)).max() ** (1 / 2 ** (num_steps + 1)))
    value = float(gram._gram_iteration.__wrapped__(jnp.asarray(kernel), op, num_steps, oversampling))
    assert min(found) <= value <= min(found) * (1 + 1e-12)


@pytest.mark.parametrize("excess", [0.0, 0.25])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Dense(), (4, 3)),
        (CircularConv((6,)), (3, 2, 2)),
        (CircularConv((3,)), (5, 1, 2)),
        (ZeroPaddedConv((6,), strides=2), (3, 2, 2)),
        (ZeroPaddedConv((5,), padding=((2, 2),), input_dilation=3, strides=2), (5, 2, 1)),
    ],
    ids=str,
)
def test_intervals_by_pairs(op, shape, excess):
    """The lower end is the layer's norm; the upper one that of the smallest cover, with what may exceed it."""
    kernel = jnp.asarray(1e3 * gaussian(shape))
    covered = [] if isinstance(op, Dense) else covers(kernel, op)
    above = tuple((leading_pair(k, cover), excess) for k, cover in covered)
    below = leading_pair(kernel, op)
    longer = below._replace(input=1.1 * below.input, output=1.1 * below.output)
    norm = np.linalg.norm(dense(kernel, op), 2)
    highest = min([np.linalg.norm(dense(k, cover), 2) for k, cover in covered], default=norm)
    highest = highest * (1 + excess) if covered else highest
    for pair in (below, longer):
        found = interval._interval.__wrapped__(kernel, op, pair, above)
        assert norm * (1 - 1e-12) <= found.lower <= norm
        assert highest <= found.upper <= highest * (1 + 1e-12)


def test_the_upper_end_holds_frequencies_beyond_the_grid(monkeypatch):
    op, kernel = CircularConv((6,)), jnp.asarray(gaussian((3, 2, 2)))
    monkeypatch.setattr(interval, "_beyond", lambda *_: 1.5)
    pair = leading_pair(kernel, op)
    found = interval._interval.__wrapped__(kernel, op, pair, ((pair, 0.0),))
    np.testing.assert_allclose(found.upper, 1.5 * np.linalg.norm(dense(kernel, op), 2), rtol=1e-12)


def test_rounding_of_taps_that_cancel_is_that_of_the_taps():
    """Two large taps fall on each other with opposite signs. The room of other layers is that of the norm."""
    op, kernel = CircularConv((3,)), gaussian((5, 1, 1))
    kernel[0], kernel[3] = 1e9, -1e9
    pair = leading_pair(jnp.asarray(kernel), op)
    found = interval._interval.__wrapped__(jnp.asarray(kernel), op, pair, ((pair, 0.0),))
    room = 4 * np.sqrt(5) * np.finfo(np.float64).eps * np.linalg.norm(kernel)
    assert found.upper - found.lower >= 1.8 * room
    value = float(gram._gram_iteration.__wrapped__(jnp.asarray(kernel), op, 8, 8))
    assert value >= np.linalg.norm(dense(kernel, op), 2) + 0.9 * room
    identity = jnp.eye(64)
    found = interval._interval.__wrapped__(identity, Dense(), leading_pair(identity, Dense()), ())
    assert found.upper - 1 <= 2 * 4 * np.sqrt(64) * np.finfo(np.float64).eps


def test_only_layers_without_edges_see_frequencies_beyond_their_grid():
    """On one of `2**24` angles they may exceed it by the square of half the angle, degrees and all."""
    assert interval._beyond(CircularConv((7,)), (5, 1, 1)) == 1
    beyond = interval._beyond(UnboundedConv(), (101, 1, 1))
    np.testing.assert_allclose(beyond - 1, (np.pi * 100 / 2**25) ** 2 / 2, rtol=1e-3)
