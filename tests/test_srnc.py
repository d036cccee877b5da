"""Exact SRN-C: both constraints by the explicit matrix, optimality by brute force, the certificate by what beats it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import by_name, dense, gaussian, kernel, pull_back, weights
from scipy.optimize import minimize

import jaxsrn
from jaxsrn import CircularConv, Dense, ZeroPaddedConv
from jaxsrn.normalization.scan import _frobenius_norms as frobenius_norms

SOLVED = by_name(
    "dense-wide",
    "circular-1d",
    "circular-1d-even-taps",
    "circular-1d-stride",
    "circular-1d-stride-odd-dilation",
    "circular-1d-groups",
    "circular-2d",
    "circular-2d-non-square",
    "circular-2d-stride-groups",
    "circular-3d",
    "same-1d",
    "same-2d-stride-groups",
    "valid-2d-dilation",
    "causal-1d",
    "pairs-1d-crop",
    "transposed-2d",
)


def measure(array, op):
    """`(stable rank, spectral norm)` by NumPy on the explicit matrix."""
    s = np.linalg.svd(dense(array, op), compute_uv=False)
    return np.sum(s**2) / s[0] ** 2, s[0]


def between(array, op, fraction):
    """A target between the smallest stable rank that is certain not to be missed and the kernel's own."""
    low, _ = jaxsrn.stable_rank_range(array.shape, op)
    return low + fraction * (measure(array, op)[0] - low)


def distance_between(a, b, op):
    return np.linalg.norm(dense(a, op) - dense(b, op)) / np.linalg.norm(dense(b, op))


@pytest.mark.parametrize("case", SOLVED, ids=str)
def test_both_constraints_hold_and_the_numbers_are_true(case):
    for fraction in (0.3, 0.6, 0.9):
        a = kernel(case, seed=3)
        target = between(a, case.op, fraction)
        result = jaxsrn.srnc(a, case.op, target)
        rank, norm = measure(result.kernel, case.op)
        if not bool(result.feasible):
            assert isinstance(case.op, ZeroPaddedConv), "circular and dense: every target in the range is feasible"
            continue
        np.testing.assert_allclose([rank, norm], [target, measure(a, case.op)[1]], rtol=1e-10)
        np.testing.assert_allclose([result.stable_rank, result.spectral_norm], [rank, norm], rtol=1e-10)
        np.testing.assert_allclose(result.distance, distance_between(result.kernel, a, case.op), rtol=1e-9)
        assert float(result.residual) <= 1e-10
        assert 0 <= float(result.gap) <= float(result.distance)


@pytest.mark.parametrize("name", ["circular-1d-stride", "circular-2d", "same-1d", "transposed-2d"])
def test_float32(name):
    (case,) = by_name(name)
    a = kernel(case, np.float32)
    target = between(a, case.op, 0.5)
    result = jaxsrn.srnc(a, case.op, target)
    assert result.kernel.dtype == jnp.float32
    np.testing.assert_allclose(measure(result.kernel, case.op), [target, measure(a, case.op)[1]], rtol=1e-4)


def test_the_papers_case():
    # Zheng et al. 2025, section 3.3: a = (1, 0, 0), N = 64.
    a, op = jnp.array([1.0, 0, 0])[:, None, None], CircularConv((64,))
    for target, expected in ((24.0, (1 / 2, 1 / 4, 1 / 4)), (32.0, (2 / 3, 1 / 6, 1 / 6))):
        result = jaxsrn.srnc(a, op, target)
        # The frequency pi does as well as 0: signs may alternate.
        np.testing.assert_allclose(np.abs(result.kernel[:, 0, 0]), expected, rtol=1e-12)
        np.testing.assert_allclose(measure(result.kernel, op), [target, 1.0], rtol=1e-12)
        assert float(result.gap) <= 1e-14


# Global optimality, one channel


def brute_force(a, n, target, num_points=100_000):
    """The smallest distance over the sphere `||K||^2 = r M^2 / n` with `max |fft(K, n)| >= M`, refined locally."""
    rng = np.random.default_rng(0)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(3)) / n)
    norm = np.abs(fourier @ a).max()
    radius = norm * np.sqrt(target / n)

    def onto_sphere(points):
        return radius * points / np.linalg.norm(points, axis=-1, keepdims=True)

    def distances(points):
        feasible = np.abs(points @ fourier.T).max(axis=-1) >= norm
        return np.where(feasible, np.linalg.norm(points - a, axis=-1), np.inf)

    points = onto_sphere(rng.standard_normal((num_points, 3)))
    found = distances(points)
    order = np.argsort(found)[: np.isfinite(found).sum()]
    seeds = points[order[:: max(len(order) // 40, 1)][:8]]
    best = np.full(len(seeds), np.inf)
    for i, point in enumerate(seeds):
        step = 0.1 * radius
        while step > 1e-7 * radius:
            trial = onto_sphere(point + step * rng.standard_normal((300, 3)))
            trial_distances = distances(trial)
            j = np.argmin(trial_distances)
            if trial_distances[j] < best[i]:
                point, best[i] = trial[j], trial_distances[j]
            else:
                step *= 0.6
    return best.min()


def closest_by_descent(a, op, target):
    """The least distance of a kernel that meets both constraints, by SLSQP on the explicit matrix from many starts."""
    basis = np.stack([dense(row.reshape(a.shape), op) for row in np.eye(a.size)])
    gram, flat = np.einsum("iab,jab->ij", basis, basis), a.ravel()
    norm = np.linalg.norm(dense(a, op), 2)

    def misses(k):
        return np.linalg.norm(np.tensordot(k, basis, 1), 2) - norm, k @ gram @ k - target * norm**2

    best, rng = np.inf, np.random.default_rng(0)
    for _ in range(12):
        start = flat + rng.standard_normal(a.size)
        constraint = {"type": "eq", "fun": misses}
        end = minimize(lambda k: (k - flat) @ gram @ (k - flat), start, constraints=constraint, method="SLSQP")
        if np.max(np.abs(misses(end.x))) < 1e-6:
            best = min(best, end.fun)
    return np.sqrt(best / (flat @ gram @ flat))


@pytest.mark.parametrize("op", [ZeroPaddedConv((7,), strides=2), CircularConv((8,), strides=2)], ids=str)
@pytest.mark.parametrize("kind", ["one tap", "orthogonal rows"])
def test_taps_that_are_zero_in_the_kernel_are_used(op, kind):
    """All singular values are equal, and a leading pair may touch only taps that allow too large stable ranks."""
    a = np.zeros((3, 1, 2))
    if kind == "one tap":
        a[1, 0] = 0.6, 0.8
    else:
        a[:2, 0] = [[0.6, 0.8], [-0.8, 0.6]]
    for target in (2.2, 3.0, 3.3):
        result = jaxsrn.srnc(a, op, target)
        assert bool(result.feasible)
        np.testing.assert_allclose(measure(result.kernel, op), [target, measure(a, op)[1]], rtol=1e-10)
        assert float(result.distance) <= closest_by_descent(a, op, target) * (1 + 1e-4)


def closest_on_a_grid(a, op, target):
    """The least relative distance over directions of three taps, a degree apart.

    Kernels of the right stable rank and of a larger norm are nearer than those of the right norm, so that the norm need
    not be met exactly: it is a bound.
    """
    weight, norm = weights((3, 1, 1), op).ravel(), measure(a, op)[1]
    polar, azimuth = np.meshgrid(np.linspace(0, np.pi, 181), np.linspace(0, 2 * np.pi, 361))
    directions = np.stack(
        [np.cos(polar), np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth)], axis=-1
    ).reshape((-1, 3))
    kernels = norm * np.sqrt(target) * directions / np.sqrt(weight)
    taps = np.stack([dense(np.eye(3)[tap][:, None, None], op) for tap in range(3)])
    reached = np.linalg.norm(np.einsum("kt,tij->kij", kernels, taps), 2, axis=(1, 2)) >= norm
    change = kernels[reached] - a.ravel()
    return np.sqrt(np.min(change**2 @ weight) / np.sum(weight * a.ravel() ** 2))


@pytest.mark.parametrize(
    ("op", "a"),
    [
        (ZeroPaddedConv((6,), padding="VALID"), (-0.922, -0.458, 0.22)),
        (ZeroPaddedConv((6,), padding="VALID"), (-1.288, 0.395, 0.43)),
        (ZeroPaddedConv((6,)), (-1.208, -0.004, 0.656)),
        (ZeroPaddedConv((4,), padding="CAUSAL"), (0.696, -1.184, -0.662)),
    ],
)
def test_few_samples_with_zero_padding_equal_brute_force(op, a):
    """From waves alone these ended at twice the distance and more, or as infeasible."""
    a = np.array(a)[:, None, None]
    rank, norm = measure(a, op)
    result = jaxsrn.srnc(jnp.asarray(a), op, 0.9 * rank)
    assert bool(result.feasible)
    np.testing.assert_allclose(measure(result.kernel, op), [0.9 * rank, norm], rtol=1e-7)
    assert result.distance <= closest_on_a_grid(a, op, 0.9 * rank) * (1 + 1e-2)


@pytest.mark.parametrize("op", [CircularConv((8,)), Dense()], ids=["circular", "dense"])
def test_a_traced_target_of_zero_is_missed(op):
    kernel = jnp.asarray(gaussian((4, 3) if isinstance(op, Dense) else (3, 2, 2)))
    found = jax.jit(lambda target: jaxsrn.srnc(kernel, op, target))(0.0)
    assert not bool(found.feasible)
    assert found.residual == 1


@pytest.mark.parametrize("n", [5, 6, 9, 16, 33, 64])
def test_one_channel_is_globally_optimal(n):
    rng, op = np.random.default_rng(n), CircularConv((n,))
    problems = [(rng.standard_normal(3), share) for share in (0.15, 0.5, 0.9)]
    if n == 5:
        problems.append((np.array([2.0, -1.0, 0.0]), None))
    for a, share in problems:
        array = jnp.asarray(a)[:, None, None]
        target = 2.3 if share is None else between(array, op, share)
        result = jaxsrn.srnc(array, op, target)
        distance = float(result.distance) * np.linalg.norm(a)
        np.testing.assert_allclose(distance, brute_force(a, n, target), atol=1e-4)
        assert float(result.gap) <= 1e-12
        if share is None:
            np.testing.assert_allclose(distance, 0.876, atol=5e-4)


# The certificate


def feasible_by_bisection(a, op, target, seed):
    """A kernel that meets both constraints, on the segment from `A` to a random kernel of small stable rank."""
    rng = np.random.default_rng(seed)
    norm, low = measure(a, op)[1], None
    # Random rank-one taps along a wave have a small stable rank.
    wave = np.cos(rng.choice([0, np.pi], 1) * np.arange(a.shape[0]))
    low = wave[:, None, None] * np.outer(rng.standard_normal(a.shape[1]), rng.standard_normal(a.shape[2]))
    low = low * np.linalg.norm(a) / np.linalg.norm(low)
    if measure(low, op)[0] > target:
        return None
    t0, t1 = 0.0, 1.0
    for _ in range(45):
        t = (t0 + t1) / 2
        t0, t1 = (t, t1) if measure((1 - t) * a + t * low, op)[0] > target else (t0, t)
    found = (1 - t1) * a + t1 * low
    return found * norm / measure(found, op)[1]


@pytest.mark.parametrize(
    ("op", "shape", "num_starts"),
    [
        (CircularConv((6,)), (3, 2, 2), 1000),
        (CircularConv((6,), strides=2), (3, 2, 2), 1000),
        (ZeroPaddedConv((6,)), (3, 1, 2), 50),
    ],
    ids=["circular", "strided", "same"],
)
def test_nothing_feasible_is_below_the_certificate(op, shape, num_starts):
    a = jnp.asarray(np.random.default_rng(5).standard_normal(shape))
    target = between(a, op, 0.6)
    result = jaxsrn.srnc(a, op, target)
    bound = float(result.distance - result.gap)

    found = [feasible_by_bisection(np.asarray(a), op, target, seed) for seed in range(30)]
    others = [distance_between(k, a, op) for k in found if k is not None]
    assert len(others) >= 5
    assert min(others) >= bound
    assert min(others) >= float(result.distance) * (1 - 1e-9)

    # The same passes from random pairs: none ends below the bound, nor below the starts of the scan.
    kernels = jnp.asarray(np.random.default_rng(6).standard_normal((num_starts, *shape)))
    triplets = jax.jit(jax.vmap(lambda k: jaxsrn.leading_triplet(k, op)))(kernels)
    many = jax.jit(jax.vmap(lambda t: jaxsrn.srnc(a, op, target, initial=t)))(triplets)
    ended = np.asarray(many.feasible) & (np.asarray(many.residual) < 1e-8)
    assert ended.sum() >= num_starts // 2
    best = np.asarray(many.distance)[ended].min()
    assert bound <= best * (1 + 1e-9)
    assert float(result.distance) <= best * (1 + 1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("op", "shape"), [(CircularConv((8, 8)), (3, 3, 2, 3)), (CircularConv((32,)), (3, 2, 2))])
def test_the_bound_is_that_of_the_vectors_of_all_sites_seen(op, shape, seed):
    """40 and 17 sites are no multiples of a chunk. The best prove their own solution; their sizes alone would not."""
    kernel = np.random.default_rng(seed).standard_normal(shape)
    low, own = jaxsrn.stable_rank_range(kernel.shape, op).low, float(jaxsrn.stable_rank(kernel, op))
    result = jaxsrn.srnc(kernel, op, low + 0.3 * (own - low))
    assert 0 <= result.gap <= 1e-12


def test_a_bad_start_is_told_by_its_gap():
    a, op = jnp.array([2.0, -1.0, 0.0])[:, None, None], CircularConv((5,))
    best = jaxsrn.srnc(a, op, 2.3)
    # Random starts end in several local minima; the worst of them must not claim to be good.
    kernels = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3, 1, 1)))
    triplets = jax.vmap(lambda k: jaxsrn.leading_triplet(k, op))(kernels)
    many = jax.vmap(lambda t: jaxsrn.srnc(a, op, 2.3, initial=t))(triplets)
    excess = np.asarray(many.distance - best.distance)
    assert excess.max() > 0.05
    assert np.all(np.asarray(many.gap) >= excess - 1e-12)


def test_initial_continues_from_an_earlier_result():
    (case,) = by_name("same-1d")
    a = kernel(case)
    target = between(a, case.op, 0.5)
    first = jaxsrn.srnc(a, case.op, target)
    again = jaxsrn.srnc(a, case.op, target, initial=jaxsrn.leading_triplet(first.kernel, case.op))
    np.testing.assert_allclose(again.kernel, first.kernel, atol=1e-6)
    assert int(again.num_steps) < int(first.num_steps)


@pytest.mark.parametrize("name", ["circular-2d", "same-2d"])
def test_initial_from_the_compact_state_of_training(name):
    (case,) = by_name(name)
    a = kernel(case)
    target = between(a, case.op, 0.5)
    first = jaxsrn.srnc(a, case.op, target)
    pair = jaxsrn.srnc_state(a, case.op, target).normalized.pair
    again = jaxsrn.srnc(a, case.op, target, initial=pair)
    assert again.num_steps <= first.num_steps
    assert again.residual < 1e-9
    np.testing.assert_allclose(again.distance, first.distance, rtol=1e-6)
    with pytest.raises(ValueError, match="initial: got Pair"):
        jaxsrn.srnc(a, case.op, target, initial=pair._replace(output=pair.output[..., :1]))


# The other forms


@pytest.mark.parametrize("op", [Dense(), CircularConv((1,)), ZeroPaddedConv((1, 1))], ids=["dense", "circular", "same"])
def test_a_single_sample_is_a_matrix(op):
    """A one-tap convolution of one sample: the theorem on matrices against the iteration on convolutions."""
    matrix = kernel(by_name("dense-wide")[0])
    taps = (1,) * (len(op.input_shape) if op != Dense() else 0)
    a = matrix.reshape((*taps, *matrix.shape))
    for target, keep_norm in ((1.1, True), (1.6, True), (1.5, False)):
        result = jaxsrn.srnc(a, op, target, keep_norm=keep_norm)
        expected = jaxsrn.srn(matrix, target, num_preserved=1 if keep_norm else 0)
        np.testing.assert_allclose(result.kernel.reshape(matrix.shape), expected.kernel, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(result.distance, expected.distance, rtol=1e-9)
        assert float(result.gap) <= 1e-7


def test_raising_a_dense_layer():
    a = kernel(by_name("dense-wide")[0])
    raised = jaxsrn.srnc(a, Dense(), 2.9, raise_rank=True)
    np.testing.assert_array_equal(raised.kernel, jaxsrn.srn(a, 2.9, raise_rank=True).kernel)
    np.testing.assert_allclose(measure(raised.kernel, Dense())[0], 2.9, rtol=1e-10)


def test_norm_free_is_globally_optimal_with_one_channel():
    a, n, target = np.array([0.9, -0.4, 1.3]), 16, 5.7
    op = CircularConv((n,))
    result = jaxsrn.srnc(jnp.asarray(a)[:, None, None], op, target, keep_norm=False)
    np.testing.assert_allclose(measure(result.kernel, op)[0], target, rtol=1e-10)
    # Over all directions with srank <= r (the binding side): the distance to the ray is |a| sin(angle).
    directions = np.random.default_rng(0).standard_normal((400_000, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(3)) / n)
    low_rank = n / np.abs(directions @ fourier.T).max(axis=-1) ** 2 <= target
    cosine = (directions[low_rank] @ a).max() / np.linalg.norm(a)
    sampled = np.sqrt(1 - cosine**2)
    assert float(result.distance) <= sampled
    np.testing.assert_allclose(result.distance, sampled, atol=5e-3)
    assert float(result.gap) <= 1e-7
    assert float(result.distance) < float(jaxsrn.srnc(jnp.asarray(a)[:, None, None], op, target).distance)


def test_above_the_stable_rank_nothing_changes():
    (case,) = by_name("same-1d")
    a = kernel(case)
    result = jaxsrn.srnc(a, case.op, 1e3)
    np.testing.assert_array_equal(result.kernel, a)
    np.testing.assert_allclose(result.stable_rank, measure(a, case.op)[0], rtol=1e-12)
    assert bool(result.feasible)
    assert float(result.distance) == float(result.gap) == 0


def test_infeasible_circular_has_the_smallest_stable_rank():
    a, op = jnp.array([1.0, 0, -1])[:, None, None], CircularConv((16,))
    result = jaxsrn.srnc(a, op, 3.0)
    assert not bool(result.feasible)
    rank, norm = measure(result.kernel, op)
    np.testing.assert_allclose([rank, norm], [16 / 3, measure(a, op)[1]], rtol=1e-12)
    np.testing.assert_allclose(result.residual, 16 / 3 / 3 - 1, rtol=1e-10)


def test_infeasible_strided_reaches_the_largest_phase():
    op = CircularConv((12,), strides=2)
    a = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, 2)))
    result = jaxsrn.srnc(a, op, 1.0)
    assert not bool(result.feasible)
    # Taps 0 and 2 share a phase: 6 / 2.
    np.testing.assert_allclose(measure(result.kernel, op)[0], 3.0, rtol=1e-8)


def test_a_norm_is_positive_where_the_result_is_at_right_angles_to_the_kernel():
    """Nearly equal entries: two equal singular values, and then rounding has the sign of the pair."""
    op, kernel = (
        ZeroPaddedConv((2, 2, 2)),
        np.float32(1 + 1e-3 * np.stack([gaussian((3, 3, 1, 2, 2), i) for i in range(24)])),
    )
    found = jax.jit(jax.vmap(lambda kernel: jaxsrn.srnc(kernel, op, jnp.float32(1.4))))(jnp.asarray(kernel))
    norms = [np.linalg.norm(dense(one, op), 2) for one in np.asarray(found.kernel, np.float64)]
    np.testing.assert_allclose(found.spectral_norm, norms, rtol=1e-5)


def test_infeasible_zero_padding_has_the_smallest_stable_rank():
    op, a = ZeroPaddedConv((7,)), np.array([0.4, -1.0, 0.7])[:, None, None]
    result = jaxsrn.srnc(jnp.asarray(a), op, 1.0)
    assert not bool(result.feasible)
    rank, norm = measure(result.kernel, op)
    np.testing.assert_allclose([result.stable_rank, result.spectral_norm], [rank, norm], rtol=1e-10)
    # Brute force over all directions of the three taps.
    directions = np.random.default_rng(0).standard_normal((30_000, 3))
    basis = np.stack([dense(np.eye(3)[p][:, None, None], op) for p in range(3)])
    s = np.linalg.svd(np.tensordot(directions, basis, axes=1), compute_uv=False)
    smallest = np.min(np.sum(s**2, axis=-1) / s[:, 0] ** 2)
    assert rank <= smallest
    np.testing.assert_allclose(rank, smallest, rtol=1e-3)


def test_taps_without_effect_stay():
    (case,) = by_name("same-1d-five-taps-on-two")
    a = kernel(case)
    result = jaxsrn.srnc(a, case.op, 0.95 * measure(a, case.op)[0])
    dead = np.broadcast_to(weights(a.shape, case.op) == 0, a.shape)
    assert dead.sum() == 2
    np.testing.assert_array_equal(np.asarray(result.kernel)[dead], np.asarray(a)[dead])
    np.testing.assert_allclose(measure(result.kernel, case.op)[0], 0.95 * measure(a, case.op)[0], rtol=1e-8)


@pytest.mark.parametrize(
    ("a", "op", "target"),
    [
        (np.array([1.0, 0, 0])[:, None, None], CircularConv((64,)), 24.0),
        (np.random.default_rng(1).standard_normal((3, 3, 1, 1)), CircularConv((8, 8)), 16.0),
    ],
    ids=["paper", "3x3"],
)
def test_the_original_misses_both_constraints(a, op, target):
    result = jaxsrn.srnc_tanay(jnp.asarray(a), op, target)
    # Transcribed: a1 = sigma grad <u, T(K) v>, with the circulant matrix's own vectors.
    frequencies = np.fft.fftn(a[..., 0, 0], op.input_shape, axes=range(a.ndim - 2))
    leading = np.unravel_index(np.argmax(np.abs(frequencies)), op.input_shape)
    sigma, phase = np.abs(frequencies[leading]), np.angle(frequencies[leading])
    taps = np.stack(np.meshgrid(*map(np.arange, a.shape[:-2]), indexing="ij"), axis=-1)
    angle = taps @ (2 * np.pi * np.asarray(leading) / np.asarray(op.input_shape))
    first = sigma * np.cos(angle + phase)[..., None, None]
    rest = a - first
    gamma = np.sqrt(target - 1) * sigma / np.linalg.norm(dense(rest, op))
    np.testing.assert_allclose(result.kernel, first + gamma * rest, rtol=1e-9, atol=1e-12)

    rank, norm = measure(result.kernel, op)
    np.testing.assert_allclose([result.stable_rank, result.spectral_norm], [rank, norm], rtol=1e-10)
    assert abs(rank / target - 1) > 0.01
    assert abs(norm / sigma - 1) > 0.1
    exact = jaxsrn.srnc(jnp.asarray(a), op, target)
    np.testing.assert_allclose(result.distance - result.gap, exact.distance - exact.gap, rtol=1e-9)


# Derivatives: exact for scalars, frozen vectors for the kernel


@pytest.mark.parametrize("name", ["circular-1d", "same-1d"])
def test_distance_and_norm_have_exact_derivatives(name):
    (case,) = by_name(name)
    a, direction = kernel(case, seed=1), kernel(case, seed=2)
    target, step = between(a, case.op, 0.6), 1e-5
    solve = jax.jit(lambda array: jaxsrn.srnc(array, case.op, target, tolerance=1e-12)[1:4])
    above, below = solve(a + step * direction), solve(a - step * direction)
    slopes = jax.jvp(solve, (a,), (direction,))[1]
    # The stable rank is the target, whatever the kernel; to first order in the error of the vectors.
    np.testing.assert_allclose(slopes[0], 0, atol=1e-7)
    for slope, up, down in zip(slopes[1:], above[1:], below[1:], strict=True):
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5)


def test_kernel_derivative_is_the_frozen_vector_surrogate():
    (case,) = by_name("circular-1d")
    a, direction = np.asarray(kernel(case, seed=1)), np.asarray(kernel(case, seed=2))
    target = between(a, case.op, 0.6)
    result, slope = jax.jvp(
        lambda array: jaxsrn.srnc(array, case.op, target, tolerance=1e-12).kernel,
        (jnp.asarray(a),),
        (jnp.asarray(direction),),
    )
    # math: K = alpha A + beta E with E and the vectors of A held constant, differenced numerically.
    d = weights(a.shape, case.op)
    u, _, vt = np.linalg.svd(dense(result, case.op))
    e_kernel = pull(u[:, 0], vt[0], case.op, a.shape) / d
    u, _, vt = np.linalg.svd(dense(a, case.op))
    own = pull(u[:, 0], vt[0], case.op, a.shape)

    def frozen(array):
        norm = np.sum(own * array)
        e, m, squared = (np.sum(d * x * y) for x, y in ((e_kernel, e_kernel), (array, e_kernel), (array, array)))
        alpha = np.sqrt((target * norm**2 - norm**2 / e) / (squared - m**2 / e))
        return alpha * array + (norm - alpha * m) / e * e_kernel

    # The leading pair of an odd circulant at a complex frequency is defined up to a translation of both vectors,
    # under which the functional does not change.
    np.testing.assert_allclose(frozen(a), result, rtol=1e-6, atol=1e-8)
    step = 1e-5
    expected = (frozen(a + step * direction) - frozen(a - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def pull(left, right, op, shape):
    """`grad_K <u, T(K) v>` from the explicit matrix."""
    return pull_back(np.outer(left, right), op, shape)


# Errors

WRONG_TRIPLET = jaxsrn.SingularTriplet(jnp.ones(()), jnp.ones(8), jnp.ones(8), jnp.ones(()))


@pytest.mark.parametrize(
    ("array", "op", "target", "options", "message"),
    [
        (jnp.ones((3, 2)), CircularConv((8,)), 2.0, {}, r"kernel: got shape \(3, 2\), expected"),
        (jnp.ones((3, 2, 3)), CircularConv((8,), feature_group_count=2), 2.0, {}, "expected a multiple of feature"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), 0.0, {}, "target: got 0.0, expected a positive finite number"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), float("inf"), {}, "target: got inf"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), np.nan, {}, "target: got nan"),
        (jnp.ones((5, 2, 2)), CircularConv((4,)), 2.0, {}, "fall on each other"),
        (jnp.ones((3, 2, 2), jnp.int32), CircularConv((8,)), 2.0, {}, "dtype int32"),
        (jnp.ones((2, 2)), Dense(), 2.0, {"raise_rank": True, "keep_norm": False}, "keep_norm: got False"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), 2.0, {"raise_rank": True, "keep_norm": False}, "keep_norm: got"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), 2.0, {"max_steps": 0}, "max_steps: got 0"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), 2.0, {"tolerance": -1.0}, "tolerance: got -1.0"),
        (jnp.ones((3, 2, 2)), CircularConv((8,)), 2.0, {"initial": WRONG_TRIPLET}, "expected a SingularTriplet with"),
    ],
)
def test_bad_input(array, op, target, options, message):
    with pytest.raises(ValueError, match=message):
        jaxsrn.srnc(array, op, target, **options)


def test_bad_input_of_the_original():
    with pytest.raises(ValueError, match="fall on each other"):
        jaxsrn.srnc_tanay(jnp.ones((5, 2, 2)), CircularConv((4,)), 2.0)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5])
def test_no_more_steps_than_allowed(max_steps):
    """Also where the passes end at a kernel that is larger elsewhere, and go on from there."""
    for seed in range(6):
        a, op = jnp.asarray(gaussian((3, 2, 2), seed)), CircularConv((16,))
        result = jaxsrn.srnc(a, op, 0.3 * jaxsrn.stable_rank(a, op), max_steps=max_steps)
        assert int(result.num_steps) <= max_steps


@pytest.mark.parametrize("taps", [3, 300])
def test_frobenius_norms_at_all_frequencies(taps):
    """Of few taps from the products of all pairs, of many from the symbols."""
    weights = gaussian((taps, 2, 3))
    symbols = np.fft.rfft(weights, 400, axis=0)
    norms = frobenius_norms(jnp.asarray(weights), CircularConv((400,)))
    np.testing.assert_allclose(norms, np.linalg.norm(symbols, axis=(1, 2)), rtol=1e-9)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_samples_that_no_tap_meets_prescribe_nothing(keep_norm):
    """Their singular vectors have no functional. A target that no kernel meets is called infeasible beside them."""
    op, kernel = ZeroPaddedConv((4,), padding=((0, 3),)), jnp.asarray(gaussian((3, 2, 1)), jnp.float32)
    norm = float(jaxsrn.spectral_norm(kernel, op))
    lowest = jaxsrn.srnc(kernel, op, 1.05, keep_norm=keep_norm)
    assert not lowest.feasible
    rank = float(jaxsrn.stable_rank(lowest.kernel, op))
    np.testing.assert_allclose(lowest.stable_rank, rank, rtol=1e-5)
    if keep_norm:
        np.testing.assert_allclose(jaxsrn.spectral_norm(lowest.kernel, op), norm, rtol=1e-5)
    met = jaxsrn.srnc(kernel, op, 1.02 * rank, keep_norm=keep_norm)
    assert met.feasible
    np.testing.assert_allclose(jaxsrn.stable_rank(met.kernel, op), 1.02 * rank, rtol=1e-4)


@pytest.mark.parametrize("target", [3.66, 3.8, 3.95])
def test_targets_between_feasible_ones_are_feasible(target):
    """On the way from a kernel of a lower stable rank to the given one every stable rank between is met."""
    kernel, op = jnp.asarray([0.6908, 0.1276, -0.4484]).reshape(3, 1, 1), ZeroPaddedConv((8,))
    found = jaxsrn.srnc(kernel, op, target)
    s = np.linalg.svd(dense(found.kernel, op), compute_uv=False)
    assert found.feasible
    np.testing.assert_allclose(np.sum(s**2) / s[0] ** 2, target, rtol=1e-9)
    np.testing.assert_allclose(s[0], np.linalg.norm(dense(kernel, op), 2), rtol=1e-9)
