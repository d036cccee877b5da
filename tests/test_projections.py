"""Projection on the spectral ball: against SciPy on explicit matrices, Dykstra and brute force; raising by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import by_name, dense, gaussian, kernel, pull_back, weights

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn.projections import nearest

KINDS = by_name(
    "dense-wide",
    "circular-1d",
    "circular-1d-even-taps",
    "circular-1d-one-tap",
    "circular-1d-stride-odd-dilation",
    "circular-1d-groups",
    "circular-2d-one-channel",
    "circular-2d-strides",
    "circular-3d",
    "same-1d",
    "same-1d-even-image-stride",
    "same-1d-five-taps-on-two",
    "valid-2d-dilation",
    "causal-1d",
    "pairs-1d-crop",
    "transposed-1d-stride",
    "transposed-2d",
    "same-3d",
)
LARGE = [
    (ZeroPaddedConv((9, 8)), (3, 3, 2, 2)),
    (ZeroPaddedConv((8, 8), strides=2), (3, 3, 1, 2)),
    (ZeroPaddedConv((12,), padding="VALID"), (3, 2, 3)),
    (ZeroPaddedConv((7,), padding=((2, 2),), input_dilation=2), (3, 2, 3)),
    (ZeroPaddedConv((9,), padding=((1, 3),), input_dilation=3, strides=2), (4, 1, 2)),
]


def norm_of(array, op):
    return np.linalg.norm(dense(array, op), 2)


def distance(a, b, op):
    """`||T(a) - T(b)||_F`."""
    return np.linalg.norm(dense(np.asarray(a) - np.asarray(b), op))


# Oracles


def least_distance(rows, limits):
    """The shortest `x` with `rows @ x <= limits`, by non-negative least squares (Lawson, Hanson 1974, chapter 23).

    By bounded least squares: SciPy 1.18's `nnls` stops short of the optimum of some of these.
    """
    # The solver stops short of it too where columns differ in length and `x` is far from length 1.
    scale = np.max(np.abs(limits) / np.linalg.norm(rows, axis=1))
    limits = limits / scale
    system = np.vstack([-rows.T, -limits])
    system = system / np.linalg.norm(system, axis=0)
    target = np.zeros(len(system))
    target[-1] = 1
    bounded = {"bounds": (0, np.inf), "method": "bvls", "tol": 1e-16, "max_iter": 100 * len(limits)}
    y = scipy.optimize.lsq_linear(system, target, **bounded).x
    residual = system @ y - target
    return -scale * residual[:-1] / residual[-1]


def by_cutting_planes(a, op, limit, accuracy=1e-8):
    """The projection by linear constraints alone: those of the leading pairs of every kernel found so far."""
    a = np.asarray(a)
    d = np.broadcast_to(weights(a.shape, op), a.shape)
    live, root = d > 0, np.sqrt(d[d > 0])
    rows, limits, k = [], [], a
    for _ in range(400):
        u, s, vt = np.linalg.svd(dense(k, op), full_matrices=False)
        if s[0] <= limit * (1 + accuracy):
            return k
        for i in np.flatnonzero(s > limit * (1 + accuracy)):
            gradient = pull_back(np.outer(u[:, i], vt[i]), op, a.shape)[live]
            rows.append(gradient / root)
            limits.append(limit - gradient @ a[live])
        k = a.copy()
        k[live] += least_distance(np.array(rows), np.array(limits)) / root
    raise AssertionError("the cutting planes did not converge")


def by_sequential_programming(a, n, limit):
    """One channel in one dimension, by SciPy's SLSQP."""
    rows = np.exp(-2j * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(len(a))) / n)
    inside = {
        "type": "ineq",
        "fun": lambda k: limit**2 - np.abs(rows @ k) ** 2,
        "jac": lambda k: -2 * np.real(np.conj(rows @ k)[:, None] * rows),
    }
    options = {"ftol": 1e-16, "maxiter": 1000}

    def function(k):
        return np.sum((k - a) ** 2) / 2, k - a

    return scipy.optimize.minimize(function, 0.3 * a, jac=True, constraints=[inside], method="SLSQP", options=options).x


def clip_by_fft(array, size, limit):
    """One pass of Sedghi, Gupta, Long 2019 in plain NumPy."""
    axes = tuple(range(len(size)))
    u, s, vh = np.linalg.svd(np.fft.fftn(array, size, axes=axes), full_matrices=False)
    clipped = np.fft.ifftn((u * np.minimum(s, limit)[..., None, :]) @ vh, axes=axes).real
    return clipped[tuple(slice(t) for t in array.shape[: len(size)])]


def alternating_clips(a, size, limit, dykstra, max_steps, until):
    """Clips over and over, with Dykstra's correction or without: `(kernel, steps)` when `until(kernel)` holds."""
    axes = tuple(range(len(size)))
    k, correction = np.asarray(a), 0.0
    for step in range(1, max_steps + 1):
        stack = np.fft.fftn(k, size, axes=axes) + correction
        u, s, vh = np.linalg.svd(stack, full_matrices=False)
        clipped = (u * np.minimum(s, limit)[..., None, :]) @ vh
        if dykstra:
            correction = stack - clipped
        k = np.fft.ifftn(clipped, axes=axes).real[tuple(slice(t) for t in a.shape[: len(size)])]
        if until(k):
            return k, step
    return k, max_steps


# The projection


@pytest.mark.parametrize("n", [5, 8, 16, 33])
def test_three_taps_equal_a_general_convex_solver(n):
    rng, op = np.random.default_rng(n), CircularConv((n,))
    for fraction in (0.9, 0.5, 0.2):
        a = rng.standard_normal(3)
        limit = fraction * norm_of(a[:, None, None], op)
        result = jaxsrn.project_spectral_ball(a[:, None, None], op, limit, tolerance=1e-13)
        np.testing.assert_allclose(result.kernel[:, 0, 0], by_sequential_programming(a, n, limit), atol=1e-6)
        assert norm_of(result.kernel, op) <= limit * (1 + 1e-12)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_equals_cutting_planes(case):
    a, d = kernel(case), weights(case.kernel_shape, case.op)
    project = jax.jit(lambda k, c: jaxsrn.project_spectral_ball(k, case.op, c, tolerance=1e-13))
    for fraction in (0.8, 0.4):
        limit = fraction * norm_of(a, case.op)
        result = project(a, limit)
        expected = by_cutting_planes(a, case.op, limit)
        assert norm_of(result.kernel, case.op) <= limit * (1 + 1e-12)
        # The cutting planes come from outside, and are no farther than the projection: as good a distance from inside
        # proves the optimum. The kernels themselves are known to the square root of that.
        size, reached = np.linalg.norm(dense(a, case.op)), distance(result.kernel, a, case.op)
        np.testing.assert_allclose(reached, distance(expected, a, case.op), rtol=2e-7)
        np.testing.assert_allclose(np.sqrt(d) * result.kernel, np.sqrt(d) * expected, atol=2e-4 * size)
        assert reached - float(result.gap) * size <= distance(expected, a, case.op) * (1 + 2e-7)
        assert 0 <= float(result.gap) <= 1e-9


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_the_residual_is_a_bound_also_when_it_is_coarse(tolerance):
    (case,) = by_name("circular-1d")
    a = kernel(case)
    limit, size = 0.4 * norm_of(a, case.op), np.linalg.norm(dense(a, case.op))
    result = jaxsrn.project_spectral_ball(a, case.op, limit, tolerance=tolerance)
    best = distance(jaxsrn.project_spectral_ball(a, case.op, limit, tolerance=1e-13).kernel, a, case.op)
    assert norm_of(result.kernel, case.op) <= limit * (1 + 1e-12)
    assert float(result.gap) <= tolerance
    assert best <= distance(result.kernel, a, case.op) <= best + float(result.gap) * size
    early = jaxsrn.project_spectral_ball(a, case.op, limit, max_steps=2)
    assert int(early.num_steps) == 2
    assert float(early.gap) * size >= distance(early.kernel, a, case.op) - best


@pytest.mark.parametrize("name", ["dense-wide", "circular-1d-stride", "circular-2d", "same-1d", "transposed-2d"])
def test_what_is_inside_stays(name):
    (case,) = by_name(name)
    a = kernel(case)
    norm = norm_of(a, case.op)
    project = jax.jit(lambda k, c: jaxsrn.project_spectral_ball(k, case.op, c))
    same = project(a, 1.001 * norm)
    np.testing.assert_array_equal(same.kernel, a)
    assert int(same.num_steps) == float(same.gap) == 0
    once = project(a, 0.5 * norm).kernel
    assert np.any(once != a)
    np.testing.assert_array_equal(project(once, 0.5 * norm).kernel, once)


def test_taps_without_effect_stay():
    (case,) = by_name("same-1d-five-taps-on-two")
    a = kernel(case)
    dead = np.broadcast_to(weights(a.shape, case.op) == 0, a.shape)
    for function in (lambda *args: jaxsrn.project_spectral_ball(*args).kernel, jaxsrn.clip_singular_values):
        found = np.asarray(function(a, case.op, 0.5 * norm_of(a, case.op)))
        np.testing.assert_array_equal(found[dead], np.asarray(a)[dead])
        assert np.all(found[~dead] != np.asarray(a)[~dead])


def test_nearer_than_repeated_clips_and_sooner_than_dykstra():
    size, op = (8, 8), CircularConv((8, 8))
    a = gaussian((3, 3, 3, 3))
    limit = 0.5 * norm_of(a, op)
    ours = jaxsrn.project_spectral_ball(a, op, limit, tolerance=1e-3)
    best = jaxsrn.project_spectral_ball(a, op, limit, tolerance=1e-10).kernel

    def feasible(k):
        return norm_of(k, op) <= limit * (1 + 1e-5)

    clipped, _ = alternating_clips(a, size, limit, False, 3000, feasible)
    assert feasible(clipped)
    assert distance(ours.kernel, a, op) < distance(clipped, a, op)
    assert distance(best, a, op) < 0.999 * distance(clipped, a, op)

    accuracy, many = distance(ours.kernel, best, op), 5 * int(ours.num_steps)
    _, steps = alternating_clips(a, size, limit, True, many, lambda k: distance(k, best, op) <= accuracy)
    assert steps == many, "Dykstra is there within five times as many SVDs"


@pytest.mark.parametrize("name", ["dense-tall", "circular-2d", "same-1d"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes(name, dtype):
    (case,) = by_name(name)
    a = kernel(case, np.float32).astype(dtype)
    wide = a.astype(jnp.float64)
    limit = 0.6 * norm_of(wide, case.op)
    result = jaxsrn.project_spectral_ball(a, case.op, limit)
    assert result.kernel.dtype == dtype
    assert result.gap.dtype == jnp.float32
    assert norm_of(result.kernel.astype(jnp.float64), case.op) <= limit * (1 + (1e-5 if dtype == jnp.float32 else 1e-2))
    size, expected = np.linalg.norm(dense(wide, case.op)), jaxsrn.project_spectral_ball(wide, case.op, limit).kernel
    # What the residual promises of the kernel, and rounding.
    reached = distance(expected, wide, case.op) / size
    off = distance(result.kernel.astype(jnp.float64), expected, case.op) / size
    assert off <= np.sqrt(2 * reached * float(result.gap)) + (1e-4 if dtype == jnp.float32 else 1e-2)
    assert float(result.gap) <= 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["circular-1d", "same-1d"])
def test_extreme_scales(name, scale):
    (case,) = by_name(name)
    a = kernel(case, np.float32)
    limit = np.float32(0.6 * norm_of(a, case.op))
    plain = jaxsrn.project_spectral_ball(a, case.op, limit)
    scaled = jaxsrn.project_spectral_ball(a * np.float32(scale), case.op, limit * np.float32(scale))
    np.testing.assert_allclose(scaled.kernel / np.float32(scale), plain.kernel, atol=2e-3)
    clipped = jaxsrn.clip_singular_values(a * np.float32(scale), case.op, limit * np.float32(scale))
    expected = jaxsrn.clip_singular_values(a, case.op, limit)
    np.testing.assert_allclose(clipped / np.float32(scale), expected, rtol=1e-4, atol=1e-5)


# Zero-padded layers that are too large to split


@pytest.fixture
def nothing_is_split(monkeypatch):
    """Every zero-padded layer is treated as a large one."""
    monkeypatch.setattr(nearest, "SPLIT_SIZE", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(("op", "shape"), LARGE, ids=["same", "strided", "valid", "transposed", "both"])
def test_large_zero_padded_layers_are_bracketed(op, shape, nothing_is_split):
    a = jnp.asarray(gaussian(shape))
    size = np.linalg.norm(dense(a, op))
    project = jax.jit(lambda k, c: jaxsrn.project_spectral_ball(k, op, c, tolerance=1e-6))
    for fraction in (0.8, 0.4):
        limit = fraction * norm_of(a, op)
        result = project(a, limit)
        best = distance(by_cutting_planes(a, op, limit, 1e-6), a, op)
        reached = distance(result.kernel, a, op)
        assert norm_of(result.kernel, op) <= limit * (1 + 1e-8)
        assert norm_of(result.kernel, op) >= limit * (1 - 1e-8)
        assert reached - float(result.gap) * size <= best * (1 + 1e-5)
        # Seen: 0 to 6% farther; 26% where the cover has to ignore one of stride and input dilation.
        both = max(op.strides) > 1 and max(op.input_dilation) > 1
        assert best * (1 - 1e-5) <= reached <= (1.3 if both else 1.1) * best


WINDOWED = [
    *LARGE,
    (ZeroPaddedConv((9,), padding="CAUSAL"), (3, 2, 2)),
    (ZeroPaddedConv((6,), padding="VALID", strides=3), (3, 2, 2)),
    (ZeroPaddedConv((7, 6), strides=(2, 1), kernel_dilation=(1, 2)), (5, 2, 2, 3)),
    (ZeroPaddedConv((4, 5), padding=((2, 1), (0, 3)), input_dilation=(3, 1)), (4, 3, 2, 2)),
]


@pytest.mark.parametrize(("op", "shape"), WINDOWED, ids=str)
def test_tapers_are_what_taps_connect_of_two_windows(op, shape):
    """Each tap alone, as the explicit matrix of one channel, between half sines whose phases have length 1."""
    adjoint = set(op.strides) == {1} and set(op.input_dilation) != {1}
    step = op.input_dilation if adjoint else op.strides
    sizes = op.input_shape, op.out_shape(shape)[:-1]
    places = [np.indices(size).reshape((op.num_axes, -1)).T for size in sizes]
    waves = [np.sin(np.pi * (where + 1) / (np.array(size) + 1)) for where, size in zip(places, sizes, strict=True)]
    inputs, outputs = (np.prod(wave, axis=1) for wave in waves)
    expected = np.zeros(shape[: op.num_axes])
    for tap in np.ndindex(expected.shape):
        basis = np.zeros((*expected.shape, 1, 1))
        basis[tap] = 1
        offset = np.array(tap) * op.kernel_dilation - [low for low, _ in op._pads(shape)]
        phases = places[1] + offset if adjoint else places[0] * op.input_dilation - offset
        own = np.all(phases % np.array(step) == 0, axis=1)
        lengths = (inputs, outputs * own) if adjoint else (inputs * own, outputs)
        value = outputs @ dense(jnp.asarray(basis), op) @ inputs
        expected[tap] = value / (np.linalg.norm(lengths[0]) * np.linalg.norm(lengths[1]))
    taper = nearest._taper(op, shape, step)
    np.testing.assert_allclose(taper[..., 0, 0], expected, atol=1e-12)


@pytest.mark.parametrize(("op", "shape"), WINDOWED, ids=str)
def test_tapered_layers_are_never_above_their_own(op, shape, nothing_is_split):
    stack = nearest.outer_map(op, shape, jnp.float64).stack
    for seed in range(3):
        for array in (gaussian(shape, seed), gaussian(shape, seed) + 3):
            tapered = np.linalg.norm(stack(jnp.asarray(array)), 2, axis=(1, 2)).max()
            assert tapered <= norm_of(jnp.asarray(array), op) * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_one_tap_from_the_middle_tapers_lose_little(n):
    """A half sine and itself one sample further have the inner product `cos(pi / (n + 1))`."""
    loss = 1 - np.cos(np.pi / (n + 1))
    taper = nearest._taper(ZeroPaddedConv((n,)), (3, 1, 1), (1,))
    np.testing.assert_allclose(taper[:, 0, 0], [1 - loss, 1, 1 - loss], atol=1e-12)


# Clipping


@pytest.mark.parametrize("name", ["circular-1d-even-taps", "circular-2d", "circular-2d-non-square", "circular-3d"])
def test_clipping_is_the_published_pass(name):
    (case,) = by_name(name)
    a = kernel(case)
    limit = 0.5 * norm_of(a, case.op)
    expected = clip_by_fft(np.asarray(a), case.op.input_shape, limit)
    np.testing.assert_allclose(jaxsrn.clip_singular_values(a, case.op, limit), expected, rtol=1e-12, atol=1e-12)
    assert norm_of(expected, case.op) > limit * (1 + 1e-3)


def test_clipping_without_edges_is_that_of_a_coarse_grid():
    """Sixteen angles per degree of the symbol: 32 of three taps, for which an image of 32 samples stands."""
    a = gaussian((3, 2, 3))
    expected = clip_by_fft(a, (32,), 1.5)
    np.testing.assert_allclose(jaxsrn.clip_singular_values(a, UnboundedConv(), 1.5), expected, rtol=1e-12, atol=1e-12)
    assert not np.allclose(expected, a)


@pytest.mark.parametrize(
    "name",
    [
        "dense-wide",
        "circular-1d-stride",
        "circular-1d-groups",
        "circular-1d-one-tap",
        "circular-3d-stride-groups",
        "same-1d",
        "transposed-2d",
    ],
)
def test_clipping_is_the_nearest_map_then_its_mean_over_the_taps(name):
    (case,) = by_name(name)
    a = kernel(case)
    limit = 0.5 * norm_of(a, case.op)
    u, s, vt = np.linalg.svd(dense(a, case.op), full_matrices=False)
    expected = pull_back((u * np.minimum(s, limit)) @ vt, case.op, a.shape) / weights(a.shape, case.op)
    np.testing.assert_allclose(jaxsrn.clip_singular_values(a, case.op, limit), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(jaxsrn.clip_singular_values(a, case.op, 1.01 * s[0]), a)


def test_a_dense_layer_is_projected_by_clipping():
    (case,) = by_name("dense-tall")
    a = kernel(case)
    limit = 0.5 * norm_of(a, case.op)
    projected = jaxsrn.project_spectral_ball(a, Dense(), limit)
    np.testing.assert_allclose(projected.kernel, jaxsrn.clip_singular_values(a, Dense(), limit), rtol=1e-13)
    assert float(projected.gap) == 0


# Derivatives


@pytest.mark.parametrize(
    "name", ["dense-wide", "circular-1d", "circular-1d-stride", "circular-2d-non-square", "same-1d"]
)
@pytest.mark.parametrize("which", ["clip", "project"])
def test_derivatives_equal_finite_differences(name, which):
    (case,) = by_name(name)
    a, direction = kernel(case), kernel(case, seed=1)
    limit, step = 0.6 * norm_of(a, case.op), 1e-5
    function = {
        "clip": lambda k, c: jaxsrn.clip_singular_values(k, case.op, c),
        "project": lambda k, c: jaxsrn.project_spectral_ball(k, case.op, c, tolerance=1e-14, max_steps=300).kernel,
    }[which]
    function = jax.jit(function)
    slope = jax.jvp(function, (a, limit), (direction, 0.0))[1]
    expected = (function(a + step * direction, limit) - function(a - step * direction, limit)) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=1e-3)
    slope = jax.jvp(function, (a, limit), (jnp.zeros_like(a), 1.0))[1]
    expected = (function(a, limit + step) - function(a, limit - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_derivatives_without_edges_equal_finite_differences(seed):
    """A peak between two angles of the grid is held by both of them, and these are nearly the same constraint."""
    a, direction = jnp.asarray(gaussian((2, 3, 2, 2), seed))
    limit, step = 0.6 * jaxsrn.spectral_norm(a, UnboundedConv()), 1e-4

    @jax.jit
    def function(a, limit):
        return jaxsrn.project_spectral_ball(a, UnboundedConv(), limit, tolerance=1e-14).kernel

    slope = jax.jvp(function, (a, limit), (direction, 0.0))[1]
    expected = (function(a + step * direction, limit) - function(a - step * direction, limit)) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=3e-5)


# Raising the stable rank


def measure(array, op):
    """`(stable rank, spectral norm)` by NumPy on the explicit matrix."""
    s = np.linalg.svd(dense(array, op), compute_uv=False)
    return np.sum(s**2) / s[0] ** 2, s[0]


def raising_limit(a, n, num_angles=20_000):
    """The stable rank of the three-tap kernel of the same norm that has the largest inner product with `a`.

    By SciPy's linear programming: the discs are polygons of so many sides, 1e-8 larger.
    """
    limit = norm_of(a[:, None, None], CircularConv((n,)))
    turns = np.exp(2j * np.pi * np.arange(num_angles) / num_angles)
    rows = np.exp(-2j * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(3)) / n)
    sides = np.real(turns[:, None, None] * rows).reshape((-1, 3))
    k = scipy.optimize.linprog(-a, sides, np.full(len(sides), limit), bounds=(None, None)).x
    return n * k @ k / limit**2


def nearest_by_brute_force(a, n, target):
    """The smallest distance from `a` over kernels of three taps with the stable rank and the norm, by sampling."""
    rows = np.exp(-2j * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(3)) / n)
    norm = np.abs(rows @ a).max()
    radius = norm * np.sqrt(target / n)
    rng = np.random.default_rng(0)
    centre, spread, best = np.zeros(3), 1.0, np.inf
    for _ in range(14):
        points = centre + spread * rng.standard_normal((50_000, 3))
        points *= radius / np.linalg.norm(points, axis=-1, keepdims=True)
        inside = np.abs(points @ rows.T).max(axis=-1) <= norm
        distances = np.where(inside, np.linalg.norm(points - a, axis=-1), np.inf)
        i = np.argmin(distances)
        if distances[i] < best:
            centre, best = points[i], distances[i]
        spread *= 0.35
    return best


def test_kernels_far_outside_the_ball():
    """Of one channel, 4,096 times too large: of these, seven of forty ended with gaps of 4% to 99.9%."""
    op = CircularConv((4, 6))
    kernels = jnp.asarray(np.stack([gaussian((3, 3, 1, 1), seed) for seed in range(40)]))
    found = jax.jit(jax.vmap(lambda kernel: jaxsrn.project_spectral_ball(4096 * kernel, op, 1.0)))(kernels)
    assert np.all(found.gap < 1e-4)
    assert max(norm_of(projected, op) for projected in found.kernel) <= 1 + 1e-12


@pytest.mark.parametrize("scale", [1e5, 1e8, 1e30])
@pytest.mark.parametrize("op", [CircularConv((8,)), ZeroPaddedConv((8,)), jaxsrn.UnboundedConv()], ids=str)
def test_kernels_so_far_outside_that_their_multipliers_are_rounding(op, scale):
    """Of ten kernels seven were given back outside of the ball, by up to 4e6, with a gap of 0."""
    kernels = jnp.asarray(scale * np.stack([gaussian((3, 2, 2), seed) for seed in range(10)]), jnp.float32)
    found = jax.jit(jax.vmap(lambda kernel: jaxsrn.project_spectral_ball(kernel, op, 1.0)))(kernels)
    # Without edges the norm is at least that on an image of many samples.
    layer = CircularConv((64,)) if isinstance(op, jaxsrn.UnboundedConv) else op
    assert max(norm_of(np.asarray(projected, float), layer) for projected in found.kernel) <= 1 + 2e-6
    assert np.all(found.gap < 1e-3)


def quick_raise(op):
    return jax.jit(lambda a, target: jaxsrn.srnc(a, op, target, raise_rank=True))


@pytest.mark.parametrize("n", [5, 8, 16])
def test_raising_three_taps_equals_brute_force(n):
    a, op = np.random.default_rng(n).standard_normal(3), CircularConv((n,))
    a_kernel = jnp.asarray(a)[:, None, None]
    raise_rank = functools.partial(quick_raise(op), a_kernel)
    rank, norm = measure(a_kernel, op)
    top = raising_limit(a, n)
    for share in (0.3, 0.9):
        target = rank + share * (top - rank)
        result = raise_rank(target)
        assert bool(result.feasible)
        np.testing.assert_allclose(measure(result.kernel, op), [target, norm], rtol=1e-6)
        reached = float(result.distance) * np.linalg.norm(a)
        best = nearest_by_brute_force(a, n, target)
        assert reached <= best * (1 + 1e-6)
        np.testing.assert_allclose(reached, best, atol=1e-4)
        assert 0 <= float(result.gap) <= 1e-6
    beyond = raise_rank(n + 1.0)
    assert not bool(beyond.feasible)
    np.testing.assert_allclose(measure(beyond.kernel, op), [beyond.stable_rank, norm], rtol=1e-8)
    # The limit of the path is reached within 2%. As the highest of all trials is kept, it may be exceeded: by 2.5%.
    assert 0.98 * top <= beyond.stable_rank <= (1.03 if n == 5 else 1.02) * top


def test_raising_beyond_the_limit_keeps_the_highest():
    """The last trial of a depthwise kernel had a much lower stable rank than those before."""
    op, kernel = CircularConv((4, 6), feature_group_count=3), np.random.default_rng(0).standard_normal((3, 3, 1, 3))
    raise_rank = functools.partial(quick_raise(op), jnp.asarray(kernel))
    reached, beyond = raise_rank(59.0), raise_rank(60.0)
    assert bool(reached.feasible)
    np.testing.assert_allclose(measure(reached.kernel, op), [59, norm_of(kernel, op)], rtol=1e-8)
    assert not bool(beyond.feasible)
    assert 59 < beyond.stable_rank < 60
    np.testing.assert_allclose(measure(beyond.kernel, op), [beyond.stable_rank, norm_of(kernel, op)], rtol=1e-8)


@pytest.mark.parametrize("name", ["circular-1d-stride", "circular-2d", "same-1d"])
def test_raising_meets_both_constraints(name):
    (case,) = by_name(name)
    a = kernel(case)
    rank, norm = measure(a, case.op)
    raise_rank = quick_raise(case.op)
    top = raise_rank(a, 1e3)
    assert not bool(top.feasible)
    assert float(top.stable_rank) > 1.01 * rank
    target = (rank + float(top.stable_rank)) / 2
    result = raise_rank(a, target)
    assert bool(result.feasible)
    np.testing.assert_allclose(measure(result.kernel, case.op), [target, norm], rtol=1e-6)
    np.testing.assert_allclose(result.distance, distance(result.kernel, a, case.op) / np.linalg.norm(dense(a, case.op)))
    assert float(result.gap) <= 1e-6
    assert 0 <= float(result.gap) <= 1e-4
    below = raise_rank(a, 0.9 * rank)
    np.testing.assert_allclose(below.kernel, jaxsrn.srnc(a, case.op, 0.9 * rank).kernel, atol=1e-9)


@pytest.mark.parametrize("name", ["circular-1d", "same-1d"])
def test_raising_several_channels_equals_cutting_planes(name):
    (case,) = by_name(name)
    a = kernel(case)
    rank, norm = measure(a, case.op)
    target = 1.3 * rank

    def project(log_tau):
        return by_cutting_planes(np.exp(log_tau) * a, case.op, norm, 1e-7)

    def miss(log_tau):
        return np.linalg.norm(dense(project(log_tau), case.op)) ** 2 / norm**2 - target

    expected = project(scipy.optimize.brentq(miss, 0.0, np.log(50), xtol=1e-6))
    result = quick_raise(case.op)(a, target)
    np.testing.assert_allclose(result.kernel, expected, atol=2e-3)
    np.testing.assert_allclose(
        result.distance * np.linalg.norm(dense(a, case.op)), distance(expected, a, case.op), rtol=1e-5
    )


def test_raising_a_single_sample_is_the_theorem_on_matrices():
    matrix = kernel(by_name("dense-wide")[0])
    expected = jaxsrn.srn(matrix, 2.5, raise_rank=True)
    result = quick_raise(CircularConv((1,)))(matrix[None], 2.5)
    np.testing.assert_allclose(result.kernel[0], expected.kernel, atol=1e-5)
    np.testing.assert_allclose(result.distance, expected.distance, rtol=1e-6)


def test_raising_in_float32():
    (case,) = by_name("circular-2d")
    a = kernel(case, np.float32)
    rank, norm = measure(a, case.op)
    target = 1.2 * rank
    result = quick_raise(case.op)(a, target)
    assert bool(result.feasible)
    np.testing.assert_allclose(measure(result.kernel, case.op), [target, norm], rtol=1e-4)


PROJECTED = [
    (UnboundedConv(), (3, 3, 2, 2)),
    (ZeroPaddedConv((5, 5)), (3, 3, 2, 2)),
    # Too large for clips of its matrix, so that the ball of the cover is widened.
    (ZeroPaddedConv((14, 14)), (3, 3, 2, 2)),
]


@pytest.mark.parametrize(("op", "shape"), PROJECTED, ids=str)
def test_the_norm_of_a_projection_is_the_limit_to_first_order(op, shape):
    kernel, direction = gaussian(shape), gaussian(shape, 7)
    limit, step = 0.65 * float(jaxsrn.spectral_norm(kernel, op)), 1e-3

    def found(share, limit):
        projected = jaxsrn.project_spectral_ball(kernel + share * direction, op, limit).kernel
        return jaxsrn.spectral_norm(projected, op), jnp.sum(direction * projected)

    (norm_by_kernel, norm_by_limit), (along, by_limit) = jax.jit(jax.jacfwd(found, (0, 1)))(0.0, limit)
    np.testing.assert_allclose((norm_by_kernel, norm_by_limit), (0, 1), atol=1e-9)
    (_, high), (_, low) = found(step, limit), found(-step, limit)
    np.testing.assert_allclose(along, (high - low) / (2 * step), rtol=2e-3)
    (_, high), (_, low) = found(0.0, limit + step), found(0.0, limit - step)
    np.testing.assert_allclose(by_limit, (high - low) / (2 * step), rtol=1e-2)


@pytest.mark.parametrize("op", [CircularConv((6,)), ZeroPaddedConv((6,)), UnboundedConv()], ids=str)
def test_raising_keeps_norm_and_target_to_first_order(op):
    kernel, direction, step = gaussian((3, 2, 2)), gaussian((3, 2, 2), 5), 1e-4
    target = 1.1 * float(jaxsrn.stable_rank(kernel, op))

    def found(share, target):
        moved = kernel + share * direction
        result = jaxsrn.srnc(moved, op, target, raise_rank=True)
        ratio = result.spectral_norm / jaxsrn.spectral_norm(moved, op)
        return jnp.stack([result.stable_rank, ratio, result.distance, jnp.sum(direction * result.kernel)])

    found = jax.jit(found)
    by_kernel, by_target = jax.jacfwd(found, (0, 1))(0.0, target)
    np.testing.assert_allclose(by_kernel[:2], (0, 0), atol=1e-9)
    np.testing.assert_allclose(by_target[:2], (1, 0), atol=1e-9)
    # The kernel is known to about the root of rounding, which is divided by the step.
    expected = (found(step, target) - found(-step, target)) / (2 * step)
    np.testing.assert_allclose(by_kernel[2:], expected[2:], rtol=5e-3, atol=1e-4)
    expected = (found(0.0, target + step) - found(0.0, target - step)) / (2 * step)
    np.testing.assert_allclose(by_target[2:], expected[2:], rtol=2e-2)


def test_a_limit_that_is_out_of_range_has_a_derivative():
    for op, shape in ((Dense(), (3, 4)), (CircularConv((6,)), (3, 2, 2))):
        kernel = jnp.asarray(1e-30 * gaussian(shape), jnp.float32)

        def total(kernel, limit, op=op):
            return jnp.sum(jaxsrn.project_spectral_ball(kernel, op, limit).kernel)

        by_kernel, by_limit = jax.grad(total, (0, 1))(kernel, jnp.float32(1e10))
        np.testing.assert_array_equal(by_kernel, 1)
        assert by_limit == 0


def test_raising_has_the_derivative_of_the_projection():
    (case,) = by_name("circular-1d")
    # The error of the kernel, about the square root of rounding, is divided by the step.
    a, direction, step = kernel(case), kernel(case, seed=1), 3e-4
    target = 1.15 * measure(a, case.op)[0]
    function = jax.jit(lambda k: jaxsrn.srnc(k, case.op, target, raise_rank=True, tolerance=1e-12).kernel)
    slope = jax.jvp(function, (a,), (direction,))[1]
    expected = (function(a + step * direction) - function(a - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=3e-3)


# Errors


@pytest.mark.parametrize("function", [jaxsrn.clip_singular_values, jaxsrn.project_spectral_ball])
@pytest.mark.parametrize(
    ("shape", "op", "max_norm", "message"),
    [
        ((3, 2), CircularConv((8,)), 1.0, r"kernel: got shape \(3, 2\), expected"),
        ((5, 2, 2), CircularConv((4,)), 1.0, "fall on each other"),
        ((3, 2, 2), CircularConv((8,)), 0.0, "max_norm: got 0.0, expected a positive finite number"),
        ((3, 2, 2), CircularConv((8,)), np.nan, "max_norm: got nan"),
        ((3, 2, 2), CircularConv((8,)), np.ones(2), r"max_norm: got shape \(2,\)"),
    ],
)
def test_bad_input(function, shape, op, max_norm, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.ones(shape), op, max_norm)


def test_bad_options():
    with pytest.raises(ValueError, match="max_steps: got 0"):
        jaxsrn.project_spectral_ball(jnp.ones((2, 2)), Dense(), 1.0, max_steps=0)
    with pytest.raises(ValueError, match="tolerance: got -1"):
        jaxsrn.project_spectral_ball(jnp.ones((2, 2)), Dense(), 1.0, tolerance=-1.0)
    with pytest.raises(ValueError, match="use project_spectral_ball"):
        jaxsrn.clip_singular_values(jnp.ones((3, 3, 16, 16)), ZeroPaddedConv((32, 32)), 1.0)


@pytest.mark.parametrize("function", ["clip_singular_values", "project_spectral_ball"])
def test_matrices_far_outside_keep_their_digits(function):
    """What is subtracted is a million times what is left."""
    a = 1e6 * jnp.asarray(gaussian((40, 30)), jnp.float32)
    found = getattr(jaxsrn, function)(a, Dense(), 1.0)
    u, s, vt = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    np.testing.assert_allclose(getattr(found, "kernel", found), u @ (np.minimum(s, 1)[:, None] * vt), atol=1e-5)


def test_clipping_in_a_narrow_dtype_rounds_once():
    a = (100 * jnp.asarray(gaussian((48, 48)))).astype(jnp.bfloat16)
    u, s, vt = np.linalg.svd(np.asarray(a, np.float64))
    found = np.asarray(jaxsrn.clip_singular_values(a, Dense(), 1.0), np.float64)
    np.testing.assert_allclose(found, u @ (np.minimum(s, 1)[:, None] * vt), atol=2e-3)
