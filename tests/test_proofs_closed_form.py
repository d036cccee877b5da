"""The closed form of one pair, against NumPy on few numbers; mutation testing runs these tests (`mutation.py`)."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, gaussian, pull_back, weights

from jaxsrn import CircularConv, Dense, ZeroPaddedConv
from jaxsrn.normalization import closed_form as closed
from jaxsrn.spectra.singular_pair import Pair

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
    # A functional of 0 prescribes nothing.
    for kernel in (problem.kernel, 0 * problem.kernel):
        found = closed.closed_form(problem._replace(kernel=kernel), jnp.zeros((4, 3)))
        assert np.all(np.isfinite(found.kernel))
        assert found.merit == np.inf
        assert not found.feasible


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_the_negative_of_a_functional_gives_the_same_kernel(size):
    """`(u, v)` and `(u, -v)` are one pair; kernels of both sizes have an `m` on either side of 1."""
    problem, direction, *_ = problem_and_direction(Dense(), (4, 3), 0.7)
    problem = problem._replace(
        kernel=size * problem.kernel, norm=size * problem.norm, squared=size**2 * problem.squared
    )
    kernels = [closed.closed_form(problem, sign * jnp.asarray(direction)).kernel for sign in (1, -1)]
    np.testing.assert_allclose(*kernels, rtol=1e-12)
    np.testing.assert_allclose(np.sum(np.asarray(kernels[0]) * direction), problem.norm, rtol=1e-12)
