"""The duality of projections, against NumPy on few numbers; mutation testing runs these tests (`mutation.py`)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, derivative, gaussian, weights

from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn.projections import augmented_lagrangian, frequency_passes
from jaxsrn.projections.clipping import stack_map_of


def stacks(op, shape, *seeds):
    """Gaussian stacks of the matrices that carry an operator, with its map."""
    stack_map = stack_map_of(op, shape, np.float64)
    like = stack_map.stack(jnp.zeros(shape))
    return stack_map, *(jnp.asarray(as_dtype(gaussian((*like.shape, 2), seed), like.dtype)) for seed in seeds)


def as_dtype(parts, dtype):
    return parts[..., 0] + 1j * parts[..., 1] if np.issubdtype(dtype, np.complexfloating) else parts[..., 0]


def stack_product(stack_map, a, b) -> float:
    return float(np.sum(np.asarray(stack_map.counts) * np.real(np.conj(a) * np.asarray(b))))


def nuclear(stack_map, stack) -> float:
    return float(np.sum(np.asarray(stack_map.counts)[..., 0] * np.linalg.svd(stack, compute_uv=False)))


CARRIED = [(Dense(), (4, 3)), (CircularConv((5,), strides=1), (3, 2, 2)), (ZeroPaddedConv((4,)), (3, 2, 1))]


@pytest.mark.parametrize(("op", "shape"), CARRIED, ids=str)
def test_augmented_lagrangian_and_its_dual_point(op, shape):
    """Every field, from NumPy's SVD."""
    stack_map, multiplier = stacks(op, shape, 3)
    kernel, target = jnp.asarray(gaussian(shape)), jnp.asarray(gaussian(shape, 1))
    counts, limit, penalty = np.broadcast_to(weights(shape, op), shape), 0.8, 3.0

    def evaluated(kernel):
        arguments = jnp.asarray(limit), multiplier, jnp.asarray(penalty)
        return augmented_lagrangian._evaluate(kernel, target, stack_map, *arguments)

    found = evaluated(kernel)
    shifted = np.asarray(stack_map.stack(kernel)) + np.asarray(multiplier) / penalty
    rows, values, columns = np.linalg.svd(shifted, full_matrices=False)
    beyond = (rows * np.maximum(values - limit, 0)[:, None]) @ columns
    inside = (rows * np.minimum(values, limit)[:, None]) @ columns
    change = np.asarray(kernel - target)
    expected = 0.5 * np.sum(counts * change**2) + 0.5 * penalty * stack_product(stack_map, beyond, beyond)
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    np.testing.assert_allclose(found.multiplier, penalty * beyond, atol=1e-12)
    off = np.asarray(stack_map.stack(kernel)) - inside
    np.testing.assert_allclose(found.infeasibility**2, stack_product(stack_map, off, off), rtol=1e-12)
    # The gradient is that of the value, and the dual kernel is `A - S^* Y`.
    direction = gaussian(shape, 2)
    slope = derivative(lambda k: float(evaluated(jnp.asarray(k)).value), kernel, direction)
    np.testing.assert_allclose(np.sum(counts * found.gradient * direction), slope, rtol=1e-6)
    point, seen = found.candidate, np.asarray(stack_map.stack(jnp.asarray(direction)))
    pulled = np.sum(counts * target * direction) - stack_product(stack_map, found.multiplier, seen)
    np.testing.assert_allclose(np.sum(counts * point.kernel * direction), pulled, rtol=1e-10)
    stack = np.asarray(stack_map.stack(point.kernel))
    support = stack_product(stack_map, stack, found.multiplier)
    np.testing.assert_allclose(point.support, support, rtol=1e-10)
    np.testing.assert_allclose(point.slack, limit * nuclear(stack_map, found.multiplier) - support, rtol=1e-10)
    np.testing.assert_allclose(point.bound, limit + np.linalg.norm(stack - inside, axis=(1, 2)).max(), rtol=1e-10)
    assert np.linalg.norm(stack, 2, axis=(1, 2)).max() <= point.bound


@pytest.mark.parametrize("limit", [0.5, 5.0])
@pytest.mark.parametrize(("op", "shape"), CARRIED, ids=str)
def test_the_gap_is_the_primal_value_less_the_dual(op, shape, limit):
    """`1/2 ||K' - A||^2 - (1/2 ||A||^2 - 1/2 ||A - S^* Y||^2 - c ||Y||_*)`; a negative dual value proves nothing."""
    stack_map, multiplier = stacks(op, shape, 3)
    counts, target = np.broadcast_to(weights(shape, op), shape), jnp.asarray(gaussian(shape, 1))

    def squared(kernel):
        return np.sum(counts * np.asarray(kernel) ** 2)

    for share in (0.01, 0.1, 1.0):
        scaled = share * multiplier
        kernel = target - stack_map.pull_back(scaled)
        support = jnp.asarray(stack_product(stack_map, stack_map.stack(kernel), scaled))
        slack = limit * nuclear(stack_map, scaled) - support
        point = augmented_lagrangian.DualPoint(kernel, slack, support, jnp.asarray(np.inf))
        dual = 0.5 * squared(target) - 0.5 * squared(kernel) - limit * nuclear(stack_map, scaled)
        for factor in (1.0, 0.7):
            distance = np.sqrt(squared(factor * kernel - target))
            gap = augmented_lagrangian.duality_gap(stack_map, point, jnp.asarray(factor))
            np.testing.assert_allclose(gap, 0.5 * distance**2 - dual, rtol=1e-9, atol=1e-12)
            found = augmented_lagrangian.distance_and_excess(target, stack_map, point, jnp.asarray(factor))
            least = np.sqrt(2 * dual) if dual > 0 else 0.0
            np.testing.assert_allclose(found, [distance, np.clip(distance - least, 0, distance)], rtol=1e-8, atol=1e-9)
    nothing = augmented_lagrangian.DualPoint(target, jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    assert augmented_lagrangian.distance_and_excess(target, stack_map, nothing, jnp.ones(())) == (0, 0)


@pytest.mark.parametrize(
    ("op", "shape"), [*CARRIED, (ZeroPaddedConv((1, 4)), (3, 2, 2, 1)), (UnboundedConv(), (3, 2, 2))], ids=str
)
def test_unit_directions_and_dual_points_of_passes(op, shape):
    stack_map, multiplier = stacks(op, shape, 3)
    gradient, other = jnp.asarray(gaussian(shape)), gaussian(shape, 1)
    counts = np.broadcast_to(1.0 if isinstance(op, UnboundedConv) else weights(shape, op), shape)
    direction, scale = frequency_passes.unit_direction(gradient, stack_map)
    np.testing.assert_array_equal(direction[counts == 0], 0)
    seen = np.where(counts == 0, 0, gradient * other)
    np.testing.assert_allclose(scale * np.sum(counts * direction * other), np.sum(seen), rtol=1e-10)
    stack = np.asarray(stack_map.stack(direction))
    every = np.sum(np.broadcast_to(stack_map.counts, (len(stack), 1, 1))) * min(stack.shape[1:])
    np.testing.assert_allclose(stack_product(stack_map, stack, stack) / every, 1, rtol=1e-12)
    zero, length = frequency_passes.unit_direction(0 * gradient, stack_map)
    assert np.all(zero == 0)
    assert length == 0
    # `S^* Z = B`, and every kernel of the ball has at most the value `||Z||_*`.
    point = frequency_passes.feasible_multiplier(stack_map, direction, multiplier)
    against = stack_product(stack_map, point, stack_map.stack(jnp.asarray(other)))
    np.testing.assert_allclose(against, np.sum(counts * direction * other), rtol=1e-9)
    np.testing.assert_allclose(frequency_passes.nuclear_norm(stack_map, point), nuclear(stack_map, point), rtol=1e-12)
    # It is the nearest: what it differs by is a stack of a kernel, and so orthogonal to all stacks that pull back to 0.
    free = multiplier - stack_map.stack(stack_map.pull_back(multiplier) / _gain(stack_map, counts))
    np.testing.assert_allclose(stack_product(stack_map, point - multiplier, free), 0, atol=1e-9)


def _gain(stack_map, counts):
    gain = np.asarray(stack_map.pull_back(stack_map.stack(jnp.ones(counts.shape))))
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
    stack_map = frequency_passes.few_frequencies(op, shape, np.float64)
    a, b = jnp.asarray(gaussian(shape)), jnp.asarray(gaussian(shape, 1))
    assert len(stack_map.stack(a)) == math.prod((*grid[:-1], grid[-1] // 2 + 1))
    np.testing.assert_allclose(np.sum(np.asarray(stack_map.counts)), 1, rtol=1e-12)
    np.testing.assert_allclose(
        stack_product(stack_map, stack_map.stack(a), stack_map.stack(b)), np.sum(a * b), rtol=1e-10
    )
    np.testing.assert_array_equal(stack_map.weights, 1)
    if isinstance(op, CircularConv):
        every = np.linalg.svd(dense(a, op), compute_uv=False)
        few = np.linalg.svd(stack_map.stack(a), compute_uv=False).reshape(-1)
        assert np.all(np.abs(few[:, None] - every[None]).min(axis=1) < 1e-10)


def test_passes_end_with_a_proof():
    """Nothing random of the ball exceeds the bound, which is as near to the value as was asked."""
    op, shape = CircularConv((6,)), (3, 2, 2)
    stack_map = stack_map_of(op, shape, np.float64)
    direction, _ = frequency_passes.unit_direction(jnp.asarray(gaussian(shape)), stack_map)
    found = frequency_passes.solved(direction, stack_map, 1e-3, 1000)
    assert np.linalg.norm(dense(found.kernel, op), 2) <= 1 + 1e-12
    np.testing.assert_allclose(found.value, 6 * np.sum(direction * found.kernel), rtol=1e-12)
    assert found.value >= (1 - 1e-3) * found.bound
    assert found.value < found.bound
    for seed in range(50):
        other = np.asarray(found.kernel) + 0.05 * gaussian(shape, seed)
        other = other / max(np.linalg.norm(dense(other, op), 2), 1)
        assert 6 * np.sum(direction * other) <= found.bound
    assert 0 < found.num_passes <= 1000
    few = frequency_passes.solved(direction, stack_map, 0.0, 5)
    assert few.num_passes == 5
    # A proof is tried after every 20 passes, and the last ones are fewer.
    assert frequency_passes.solved(direction, stack_map, 0.0, 30).num_passes == 30
    nothing = frequency_passes.solved(0 * direction, stack_map, 1e-3, 20)
    assert nothing.value == nothing.bound == 0
