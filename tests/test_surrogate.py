"""The log-sum-exp surrogate against literal NumPy transcriptions of the paper, and its solver against the exact one."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BAD_KERNELS, BY_NAME, CASES, dense, gaussian
from jax.test_util import check_grads

import jaxsrn
from jaxsrn import CircularConv, ZeroPaddedConv, optim, sphere, surrogate

CIRCULAR = [case for case in CASES if isinstance(case.op, CircularConv)]
# The setting of Zheng et al. 2025, section 3.3.
PAPER_OP, PAPER_KERNEL = CircularConv((64,)), np.array([1.0, 0.0, 0.0]).reshape(3, 1, 1)


def squared_values(kernel, op):
    """Squares of all singular values of the explicit matrix."""
    return np.linalg.svd(dense(kernel, op), compute_uv=False) ** 2


def symbol_values(kernel, op):
    """`sigma_max(S(w))^2` at every frequency, by the definition, for strides 1 and any groups."""
    groups = op.feature_group_count
    taps = list(itertools.product(*map(range, kernel.shape[:-2])))
    found = []
    for frequency in itertools.product(*map(range, op.input_shape)):
        angles = 2 * np.pi * np.array(frequency) / np.array(op.input_shape)
        symbol = sum(kernel[p] * np.exp(-1j * angles @ (np.array(p) * op.kernel_dilation)) for p in taps)
        blocks = np.split(symbol, groups, axis=-1)
        found.append(max(np.linalg.norm(block, 2) for block in blocks) ** 2)
    return np.array(found)


def log_sum_exp(values, alpha):
    """(14) with nothing but the guard against overflow."""
    largest = np.max(values)
    return largest + np.log(np.sum(np.exp(alpha * (values - largest)))) / alpha


def paper_forms(taps, n):
    """`B_l` from the paper's own vectors."""
    angles = 2 * np.pi * np.arange(n)[:, None] / n * np.arange(taps)
    cos, sin = np.cos(angles), np.sin(angles)
    return cos[:, :, None] * cos[:, None, :] + sin[:, :, None] * sin[:, None, :]


def paper_objective(x, a, n, target, alpha, penalty):
    """`(h, gradient)` of (16) for one channel in one dimension, term by term."""
    forms = paper_forms(len(a), n)
    g = np.einsum("i,lij,j->l", x, forms, x)
    smooth = log_sum_exp(g, alpha)
    weights = np.exp(alpha * (g - smooth))
    norm = np.max(np.abs(np.fft.fft(a, n)))
    radius = np.sqrt(target * norm**2 / n)
    h = (smooth - n / target) ** 2 + penalty * n * np.sum((radius * x - a) ** 2)
    slope = 2 * np.einsum("l,lij,j->i", weights, forms, x)
    return h, 2 * (smooth - n / target) * slope + 2 * penalty * n * radius * (radius * x - a)


@pytest.mark.parametrize("alpha", [0.1, 10.0, 1e8])
@pytest.mark.parametrize("case", CIRCULAR, ids=str)
def test_bounds_the_largest_value(case, alpha):
    kernel = gaussian(case.kernel_shape)
    values, count = squared_values(kernel, case.op), np.prod(case.op.grid)
    g = surrogate.log_sum_exp(kernel, case.op, alpha=alpha)
    rounding = 1e-12 * values[0]
    assert values[0] - rounding <= g <= values[0] + np.log(count) / alpha + rounding
    # tr exp of the smaller Gram matrix: every singular value of the layer once.
    smooth = surrogate.log_sum_exp(kernel, case.op, alpha=alpha, smooth=True)
    np.testing.assert_allclose(smooth, log_sum_exp(values, alpha), rtol=1e-12)
    assert smooth >= g - rounding


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("alpha", [1e6, 1e10, 1e20, 1e30])
def test_sharpness_does_not_overflow(alpha, smooth):
    """In float32, where what rounding leaves of `alpha` times the largest value is itself a large number."""
    op, kernel = CircularConv((8,)), jnp.asarray([[[2.3]], [[-1.1]], [[0.7]]], jnp.float32)
    values = symbol_values(np.asarray(kernel, np.float64), op)
    value, slope = jax.value_and_grad(lambda k: surrogate.log_sum_exp(k, op, alpha=alpha, smooth=smooth))(kernel)
    np.testing.assert_allclose(value, np.max(values), rtol=1e-5)
    # The largest value is attained at an opposite pair of frequencies or at one that is its own opposite.
    norm, gradient = jax.value_and_grad(lambda k: jaxsrn.spectral_norm(k, op))(kernel)
    np.testing.assert_allclose(slope, 2 * norm * gradient, rtol=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_the_start_is_a_direction_at_every_scale():
    op, kernel = CircularConv((8,)), jnp.asarray(gaussian((3, 1, 1)), jnp.float32)
    initial = jnp.asarray([1.0, 2.0, 3.0], jnp.float32).reshape((3, 1, 1))
    for scale in (1e-30, 1.0, 1e30):
        found = surrogate.trajectory(kernel, op, 4.0, key=jax.random.key(0), num_steps=2, initial=scale * initial)
        np.testing.assert_allclose(found.points[0], initial / np.sqrt(14), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["circular-1d", "circular-1d-dilation", "circular-1d-groups", "circular-2d-non-square", "circular-2d-groups"],
)
def test_log_sum_exp_of_the_top_values(name):
    _, op, shape = BY_NAME[name]
    kernel = gaussian(shape)
    got = surrogate.log_sum_exp(kernel, op, alpha=0.7)
    np.testing.assert_allclose(got, log_sum_exp(symbol_values(kernel, op), 0.7), rtol=1e-12)


@pytest.mark.parametrize("n", [5, 8, 64])
def test_one_channel_is_the_papers_formula(n):
    x, a = gaussian((3,)), gaussian((3,), seed=1)
    x /= np.linalg.norm(x)
    op, shape = CircularConv((n,)), (3, 1, 1)
    g = np.einsum("i,lij,j->l", x, paper_forms(3, n), x)
    got = surrogate.log_sum_exp(x.reshape(shape), op, alpha=10.0)
    np.testing.assert_allclose(got, log_sum_exp(g, 10.0), rtol=1e-12)
    h = functools.partial(surrogate.objective, kernel=a.reshape(shape), op=op, target=n / 2, alpha=10.0, penalty=0.1)
    value, gradient = jax.value_and_grad(h)(jnp.asarray(x).reshape(shape))
    expected, slope = paper_objective(x, a, n, n / 2, 10.0, 0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.reshape(-1), slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["circular-2d", "circular-1d-stride", "circular-3d-stride-groups"])
def test_objective_of_any_circular_operator(name):
    """(16) from explicit matrices: `N` frequencies, and the penalty in the norm of the layer."""
    _, op, shape = BY_NAME[name]
    kernel, x = gaussian(shape), gaussian(shape, seed=1)
    x /= np.linalg.norm(x)
    n, target = np.prod(op.grid), 0.7 * np.prod(op.grid)
    norm = np.linalg.norm(dense(kernel, op), 2)
    solution = np.sqrt(target * norm**2 / n) * x
    change = np.linalg.norm(dense(solution, op) - dense(kernel, op)) ** 2
    expected = (log_sum_exp(squared_values(x, op), 3.0) - n / target) ** 2 + 0.2 * change
    got = surrogate.objective(x, kernel, op, target, alpha=3.0, penalty=0.2, smooth=True)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", ["circular-1d-one-sample", "circular-2d", "circular-2d-stride-groups", "circular-3d"])
def test_gradients_are_those_of_finite_differences(name, smooth):
    _, op, shape = BY_NAME[name]
    kernel, x = jnp.asarray(gaussian(shape)), jnp.asarray(gaussian(shape, seed=1))
    functions = [
        lambda k: surrogate.log_sum_exp(k, op, alpha=0.5, smooth=smooth),
        lambda k: surrogate.objective(k, kernel, op, 2.0, alpha=0.5, penalty=0.1, smooth=smooth),
    ]
    for function in functions:
        check_grads(function, (x,), order=1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-6)


# The forms


@pytest.mark.parametrize(("taps", "n"), [(3, 64), (4, 7), (1, 6), (2, 2)])
def test_forms_of_one_axis(taps, n):
    op, shape = CircularConv((n,)), (taps, 1, 1)
    forms = surrogate.forms(shape, op)
    np.testing.assert_allclose(forms, paper_forms(taps, n), atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(paper_forms(taps, n))[:, ::-1]
    np.testing.assert_allclose(surrogate.form_eigenvalues(shape, op)[:, : min(taps, 2)], eigenvalues[:, :2], atol=1e-12)
    np.testing.assert_allclose(eigenvalues[:, 2:], 0, atol=1e-12)
    # What they imply: the feasible interval of Zheng et al. 2025, section 3.1.
    assert n / eigenvalues.max() == pytest.approx(jaxsrn.stable_rank_range(shape, op)[0], rel=1e-12)


def test_forms_of_two_axes():
    op, shape = CircularConv((5, 4), kernel_dilation=(1, 3)), (3, 2, 1, 1)
    x = gaussian(shape)
    g = np.einsum("i,lij,j->l", x.ravel(), surrogate.forms(shape, op), x.ravel())
    np.testing.assert_allclose(np.sort(g)[::-1], squared_values(x, op), rtol=1e-12, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(surrogate.forms(shape, op))[:, ::-1]
    np.testing.assert_allclose(surrogate.form_eigenvalues(shape, op), eigenvalues[:, :2], atol=1e-12)
    np.testing.assert_allclose(eigenvalues[:, 2:], 0, atol=1e-12)


# The solver


def test_published_descent():
    """The iterates are those of (17) to (19), written out."""
    n, target, alpha, penalty, rate = 16, 6.0, 10.0, 0.1, 1e-3
    a, op = gaussian((3,)), CircularConv((n,))
    options = {"alpha": alpha, "penalty": penalty, "optimizer": optim.sphere_sgd(rate), "num_steps": 50}
    path = surrogate.trajectory(a.reshape(3, 1, 1), op, target, key=jax.random.key(0), every=5, **options)
    x = np.asarray(path.points[0]).reshape(3)
    for step in range(51):
        h, d = paper_objective(x, a, n, target, alpha, penalty)
        if step % 5 == 0:
            record = step // 5
            assert path.steps[record] == step
            np.testing.assert_allclose(path.points[record].reshape(3), x, rtol=1e-10)
            np.testing.assert_allclose(path.objective[record], h, rtol=1e-10)
            rank = n * np.sum(x**2) / np.max(np.abs(np.fft.fft(x, n))) ** 2
            np.testing.assert_allclose(path.stable_rank[record], rank, rtol=1e-10)
        x = x - rate * (d - (d @ x) * x)
        x /= np.linalg.norm(x)
    assert len(path.points) == 11


@pytest.mark.usefixtures("standard_promotion")
def test_solution_is_the_end_of_the_trajectory():
    _, op, shape = BY_NAME["circular-2d"]
    kernel, target = gaussian(shape), 6.0
    options = {"key": jax.random.key(1), "num_steps": 40}
    path = surrogate.trajectory(kernel, op, target, every=20, **options)
    result = surrogate.solve(kernel, op, target, num_restarts=1, **options)
    # Without most of XLA's optimizations, as here, reciprocals of roots are approximations.
    np.testing.assert_allclose(np.linalg.norm(path.points.reshape(3, -1), axis=-1), 1, rtol=1e-8)
    norm = np.linalg.norm(dense(kernel, op), 2)
    expected = np.sqrt(target * norm**2 / 16) * path.points[-1]
    np.testing.assert_allclose(result.kernel, expected, rtol=1e-10)
    values = squared_values(np.asarray(result.kernel), op)
    np.testing.assert_allclose(result.stable_rank, values.sum() / values[0], rtol=1e-10)
    np.testing.assert_allclose(result.spectral_norm, np.sqrt(values[0]), rtol=1e-10)
    change = np.linalg.norm(dense(np.asarray(result.kernel) - kernel, op)) / np.linalg.norm(dense(kernel, op))
    np.testing.assert_allclose(result.distance, change, rtol=1e-10)
    missed = max(abs(values.sum() / values[0] / target - 1), abs(np.sqrt(values[0]) / norm - 1))
    np.testing.assert_allclose(result.residual, missed, rtol=1e-8)
    assert result.num_steps == 40


def test_descent_goes_on_from_a_given_point():
    op, kernel = CircularConv((16,)), gaussian((3, 1, 1))
    options = {"key": jax.random.key(0), "alpha": 10.0, "penalty": 0.1, "optimizer": optim.sphere_sgd(1e-3)}
    whole = surrogate.trajectory(kernel, op, 6.0, num_steps=40, every=20, **options)
    rest = surrogate.trajectory(kernel, op, 6.0, num_steps=20, every=20, initial=3.0 * whole.points[1], **options)
    np.testing.assert_allclose(rest.points, whole.points[1:], rtol=1e-12)
    alone = surrogate.solve(kernel, op, 6.0, num_steps=20, num_restarts=1, initial=whole.points[1], **options)
    cosine = jnp.vdot(alone.kernel, whole.points[2]) / jnp.linalg.norm(alone.kernel)
    np.testing.assert_allclose(cosine, 1, rtol=1e-12)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("op", "shape"),
    [(CircularConv((16,)), (3, 1, 1)), (CircularConv((8,)), (3, 2, 3)), (CircularConv((6, 6)), (3, 3, 2, 2))],
)
def test_continuation_confirms_the_exact_solution(op, shape):
    for seed, share in ((0, 0.3), (1, 0.7)):
        kernel = gaussian(shape, seed)
        low, _ = jaxsrn.stable_rank_range(shape, op)
        target = low + share * (float(jaxsrn.stable_rank(kernel, op)) - low)
        exact = jaxsrn.srnc(kernel, op, target)
        result = surrogate.solve(kernel, op, target, key=jax.random.key(seed))
        assert result.residual <= 1e-3
        assert abs(result.distance / exact.distance - 1) <= 1e-2
        assert result.feasible
        # The bound of the exact problem, and no other.
        np.testing.assert_allclose(result.distance - result.gap, exact.distance - exact.gap, rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_smooth_variant_solves_too():
    op, kernel = CircularConv((8,)), gaussian((3, 2, 3))
    target = 0.7 * float(jaxsrn.stable_rank(kernel, op))
    exact = jaxsrn.srnc(kernel, op, target)
    result = surrogate.solve(kernel, op, target, key=jax.random.key(0), smooth=True)
    assert result.residual <= 1e-3
    assert abs(result.distance / exact.distance - 1) <= 1e-2


@pytest.mark.usefixtures("standard_promotion")
def test_raising():
    """Beyond the kernel's own stable rank, up to what only isometries have; nothing is claimed to be proven."""
    op, kernel = CircularConv((6, 6)), gaussian((3, 3, 2, 2))
    target = 70.0
    assert jaxsrn.stable_rank(kernel, op) < 30
    result = surrogate.solve(kernel, op, target, key=jax.random.key(0))
    values = squared_values(np.asarray(result.kernel), op)
    assert values.sum() / values[0] > 0.95 * target
    assert result.gap == result.distance
    assert result.feasible
    assert not surrogate.solve(kernel, op, 73.0, key=jax.random.key(0)).feasible


@pytest.mark.usefixtures("standard_promotion")
def test_scale_of_the_kernel_does_not_matter():
    """Its square may lie beyond the range of float32."""
    op, kernel = CircularConv((8,)), gaussian((3, 2, 3)).astype(np.float32)
    options = {"key": jax.random.key(0), "num_restarts": 2, "num_steps": 100}
    small, large = (surrogate.solve(np.float32(scale) * kernel, op, 5.0, **options) for scale in (2.0**-70, 2.0**70))
    np.testing.assert_allclose(np.float64(2.0**140) * small.kernel, large.kernel, rtol=1e-3)
    np.testing.assert_allclose(small.stable_rank, large.stable_rank, rtol=1e-4)


def test_paper_setting_has_a_stationary_start_and_a_ceiling():
    """At its own kernel the descent cannot move, and no point of the sphere has `g_lse` below `1 + log(N) / alpha`."""
    h = functools.partial(surrogate.objective, kernel=PAPER_KERNEL, op=PAPER_OP, target=24.0, alpha=10.0, penalty=0.1)
    start = jnp.asarray(PAPER_KERNEL)
    gradient = jax.grad(h)(start)
    assert np.linalg.norm(gradient) > 0.1
    np.testing.assert_allclose(sphere.tangent(start, gradient, axis=None), 0, atol=1e-13)

    points = sphere.random(jax.random.key(0), (2000, 3)).reshape((-1, 3, 1, 1))
    values = jax.vmap(lambda x: surrogate.log_sum_exp(x, PAPER_OP, alpha=10.0))(points)
    floor = 1 + np.log(64) / 10
    assert np.min(values) >= floor
    np.testing.assert_allclose(surrogate.log_sum_exp(start, PAPER_OP, alpha=10.0), floor, rtol=1e-12)
    assert 64 / floor == pytest.approx(45.2, abs=0.05)


DECAYING = optax.cosine_decay_schedule(0.05, 300)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "inner",
    [
        optax.lbfgs(),
        optax.sgd(DECAYING, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(DECAYING)),
    ],
    ids=["lbfgs", "momentum", "adam"],
)
def test_any_optimizer_and_schedule(inner):
    op, kernel = CircularConv((16,)), gaussian((3, 1, 1))
    options = {"key": jax.random.key(0), "num_restarts": 4, "num_steps": 300, "optimizer": optim.on_sphere(inner)}
    schedule = optax.exponential_decay(0.1, 300, 1e-3)
    target = 0.8 * float(jaxsrn.stable_rank(kernel, op))
    result = surrogate.solve(kernel, op, target, alpha=200.0, penalty=schedule, **options)
    exact = jaxsrn.srnc(kernel, op, target)
    assert exact.distance > 0.05
    assert result.residual <= 0.05
    assert abs(result.distance / exact.distance - 1) <= 0.1


def test_errors(no_type_checks):
    op, kernel, key = CircularConv((8, 8)), gaussian((3, 3, 1, 2)), jax.random.key(0)
    for bad, message in BAD_KERNELS:
        with pytest.raises(ValueError, match=message):
            surrogate.log_sum_exp(bad, op, alpha=1.0)
        with pytest.raises(ValueError, match=message):
            surrogate.solve(bad, op, 2.0, key=key)
    with pytest.raises(ValueError, match="expected a CircularConv"):
        surrogate.log_sum_exp(kernel, ZeroPaddedConv((8, 8)), alpha=1.0)
    with pytest.raises(ValueError, match=r"alpha: got 0\.0, expected a positive finite number"):
        surrogate.log_sum_exp(kernel, op, alpha=0.0)
    with pytest.raises(ValueError, match=r"penalty: got -1, expected a positive finite number or 0"):
        surrogate.objective(kernel, kernel, op, 2.0, alpha=1.0, penalty=-1)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 1, 2\), expected that of the kernel"):
        surrogate.objective(kernel[:2], kernel, op, 2.0, alpha=1.0, penalty=0)
    with pytest.raises(ValueError, match=r"initial: got shape \(2, 3, 1, 2\), expected that of the kernel"):
        surrogate.solve(kernel, op, 2.0, key=key, initial=kernel[:2])
    with pytest.raises(ValueError, match="fall on each other"):
        surrogate.solve(kernel, CircularConv((2, 2)), 2.0, key=key)
    with pytest.raises(ValueError, match=r"optimizer: got 0\.1, expected an optax.GradientTransformation"):
        surrogate.solve(kernel, op, 2.0, key=key, optimizer=0.1)
    with pytest.raises(ValueError, match="num_restarts: got 0"):
        surrogate.solve(kernel, op, 2.0, key=key, num_restarts=0)
    with pytest.raises(ValueError, match="every: got 3, expected a divisor of num_steps=10"):
        surrogate.trajectory(kernel, op, 2.0, key=key, num_steps=10, every=3)
    for shape, bad_op in (((3, 2, 1), CircularConv((8,))), ((3, 1, 1), CircularConv((8,), strides=2))):
        with pytest.raises(ValueError, match="expected one channel"):
            surrogate.forms(shape, bad_op)
    np.testing.assert_array_equal(
        surrogate.forms([3, 1, 1], CircularConv((8,))), surrogate.forms((3, 1, 1), CircularConv((8,)))
    )
