"""SRN of a matrix: the theorem's closed cases, and independent constrained optimisation over the singular values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import jaxsrn


def matrix_with(values, shape=(4, 5), seed=0):
    """A matrix with prescribed singular values, and its factors."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0]
    n = min(shape)
    return jnp.asarray(u[:, :n] * np.asarray(values) @ v[:, :n].T)


def measure(matrix):
    """`(stable rank, spectral norm, singular values)` by NumPy."""
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return np.sum(s**2) / s[0] ** 2, s[0], s


def closest_values(s, target, fixed, cap):
    """Constrained least squares over the singular values (the optimum shares the vectors, von Neumann)."""

    def constraint(x):
        return np.sum(x**2) - target * x[0] ** 2

    bounds = [(v, v) if i < fixed else (0, cap) for i, v in enumerate(s)]
    ordered = [{"type": "ineq", "fun": lambda x, i=i: x[0] - x[i]} for i in range(1, len(s))]
    best = np.inf
    for scale in (0.3, 0.7, 1.0):
        start = np.where(np.arange(len(s)) < max(fixed, 1), s, scale * s)
        found = minimize(
            lambda x: np.sum((x - s) ** 2),
            start,
            bounds=bounds,
            constraints=[{"type": "eq", "fun": constraint}, *ordered],
            options={"ftol": 1e-15, "maxiter": 500},
        )
        if abs(constraint(found.x)) < 1e-8:
            best = min(best, np.sqrt(found.fun))
    return best


def test_identity_of_three():
    expected = {0: ([1.2071068, 0.8535534, 0.8535534], 0.2928932), 1: ([1, 0.7071068, 0.7071068], 0.4142136)}
    for k, (diagonal, distance) in expected.items():
        result = jaxsrn.srn(jnp.eye(3), 2.0, num_preserved=k)
        # The leading vector of the identity is a choice: compare the spectra.
        np.testing.assert_allclose(measure(result.kernel)[2], diagonal, atol=1e-7)
        np.testing.assert_allclose(result.distance * np.sqrt(3), distance, atol=1e-7)
        assert int(result.num_preserved) == k


@pytest.mark.parametrize("k", [0, 1, 2])
def test_is_the_constrained_optimum(k):
    s = np.array([3.0, 2.0, 1.5, 0.7])
    a = matrix_with(s)
    target = 1.7
    result = jaxsrn.srn(a, target, num_preserved=k)
    rank, norm, values = measure(result.kernel)
    np.testing.assert_allclose(rank, target, rtol=1e-12)
    np.testing.assert_allclose(values[:k], s[:k], rtol=1e-12)
    np.testing.assert_allclose([result.stable_rank, result.spectral_norm], [rank, norm], rtol=1e-12)
    distance = np.linalg.norm(np.asarray(result.kernel - a))
    np.testing.assert_allclose(result.distance, distance / np.linalg.norm(s), rtol=1e-10)
    best = closest_values(s, target, k, cap=np.inf if k == 0 else s[0])
    np.testing.assert_allclose(distance, best, rtol=1e-6)
    assert float(result.gap) == 0
    assert bool(result.feasible)


def test_more_values_to_preserve_than_there_are():
    result = jaxsrn.srn(jnp.diag(jnp.asarray([3.0, 1.0, 1.0])), 10.0, num_preserved=100)
    assert int(result.num_preserved) == 3


def test_distance_grows_with_num_preserved_and_the_norm_grows_without():
    a = matrix_with([3.0, 1.5, 1.2, 0.7])
    results = [jaxsrn.srn(a, 1.4, num_preserved=k) for k in range(3)]
    assert np.all(np.diff([float(r.distance) for r in results]) > 0)
    assert float(results[0].spectral_norm) > 3.0


def test_too_many_preserved_keeps_the_largest_feasible():
    a = matrix_with([3.0, 2.0, 1.5, 0.7])
    # (9 + 4) / 9 = 1.44 fits a target of 1.6, (9 + 4 + 2.25) / 9 = 1.69 does not.
    result = jaxsrn.srn(a, 1.6, num_preserved=4)
    assert int(result.num_preserved) == 2
    np.testing.assert_array_equal(result.kernel, jaxsrn.srn(a, 1.6, num_preserved=2).kernel)
    np.testing.assert_allclose(measure(result.kernel)[0], 1.6, rtol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_target_one_is_rank_one(k):
    a = matrix_with([3.0, 2.0, 1.5, 0.7])
    result = jaxsrn.srn(a, 1.0, num_preserved=k)
    np.testing.assert_allclose(measure(result.kernel)[2], [3.0, 0, 0, 0], atol=1e-12)


def test_above_the_stable_rank_nothing_changes():
    a = matrix_with([3.0, 2.0, 1.5, 0.7])
    result = jaxsrn.srn(a, 2.5, num_preserved=2)
    np.testing.assert_array_equal(result.kernel, a)
    assert float(result.distance) == 0
    assert bool(result.feasible)
    assert int(result.num_preserved) == 2


def test_below_one_is_infeasible_and_gives_rank_one():
    result = jaxsrn.srn(matrix_with([3.0, 2.0, 1.5, 0.7]), 0.5)
    assert not bool(result.feasible)
    np.testing.assert_allclose(measure(result.kernel)[0], 1.0, rtol=1e-12)
    np.testing.assert_allclose(result.residual, 1.0, rtol=1e-12)


@pytest.mark.parametrize("target", [2.0, 2.9, 3.5, 3.999, 4.0])
def test_raising_is_the_constrained_optimum(target):
    s = np.array([3.0, 2.0, 1.5, 0.7])
    result = jaxsrn.srn(matrix_with(s), target, raise_rank=True)
    rank, norm, values = measure(result.kernel)
    np.testing.assert_allclose([rank, norm], [target, 3.0], rtol=1e-10)
    # Clipped values of tau s, for one tau.
    free = values < 3.0 - 1e-9
    np.testing.assert_allclose(values[free] / s[free], np.full(free.sum(), (values / s)[-1]), rtol=1e-9)
    distance = float(result.distance) * np.linalg.norm(s)
    np.testing.assert_allclose(distance, np.linalg.norm(values - s), rtol=1e-9)
    # ftol limits the reference where the feasible set is a corner (target 4).
    assert distance <= closest_values(s, target, 1, cap=3.0) * (1 + 1e-6)


def test_raising_fills_null_directions():
    result = jaxsrn.srn(matrix_with([2.0, 1.0, 0.0, 0.0]), 3.5, raise_rank=True)
    np.testing.assert_allclose(measure(result.kernel)[2], 2 * np.sqrt([1, 1, 0.75, 0.75]), rtol=1e-12)
    assert bool(result.feasible)


def test_raising_above_the_smaller_side_is_infeasible():
    result = jaxsrn.srn(matrix_with([3.0, 2.0, 1.5, 0.7]), 5.0, raise_rank=True)
    assert not bool(result.feasible)
    np.testing.assert_allclose(measure(result.kernel)[0], 4.0, rtol=1e-12)


def test_raising_below_the_stable_rank_lowers():
    a = matrix_with([3.0, 2.0, 1.5, 0.7])
    np.testing.assert_array_equal(jaxsrn.srn(a, 1.2, raise_rank=True).kernel, jaxsrn.srn(a, 1.2).kernel)


@pytest.mark.parametrize("raise_rank", [False, True])
def test_zero_matrix_stays(raise_rank):
    result = jaxsrn.srn(jnp.zeros((3, 4)), 1.5, raise_rank=raise_rank)
    np.testing.assert_array_equal(result.kernel, np.zeros((3, 4)))
    assert all(np.all(np.isfinite(leaf)) for leaf in result)


def test_scalars_have_exact_derivatives():
    a = matrix_with([3.0, 2.0, 1.5, 0.7])
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(a.shape))
    step = 1e-6
    for field in ("distance", "spectral_norm"):
        for k in (0, 1, 2):

            def scalar(matrix, k=k, field=field):
                return getattr(jaxsrn.srn(matrix, 1.6, num_preserved=k), field)

            slope = (scalar(a + step * direction) - scalar(a - step * direction)) / (2 * step)
            np.testing.assert_allclose(jax.jvp(scalar, (a,), (direction,))[1], slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((jnp.ones(3), 1.5), {}, r"shape \(3,\), expected \(c_in, c_out\)"),
        ((jnp.ones((3, 3), jnp.int32), 1.5), {}, "dtype int32, expected a real floating-point"),
        ((jnp.ones((3, 3), jnp.complex64), 1.5), {}, "dtype complex64"),
        ((jnp.ones((3, 3)), 0.0), {}, "target: got 0.0, expected a positive finite number"),
        ((jnp.ones((3, 3)), -1), {}, "target: got -1"),
        ((jnp.ones((3, 3)), float("nan")), {}, "target: got nan"),
        ((jnp.ones((3, 3)), float("inf")), {}, "target: got inf"),
        ((jnp.ones((3, 3)), jnp.ones(2)), {}, r"target: got shape \(2,\), expected a scalar; use jax.vmap"),
        ((jnp.ones((3, 3)), 1.5), {"num_preserved": -1}, "num_preserved: got -1"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        jaxsrn.srn(*arguments, **options)


@pytest.mark.parametrize("seed", range(8))
def test_rounding_does_not_decide_how_many_fit(seed):
    """Of an orthogonal matrix two values are exactly a stable rank of 2."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    result = jaxsrn.srn(jnp.asarray(q), 2.0, num_preserved=2)
    assert int(result.num_preserved) == 2
    np.testing.assert_allclose(result.stable_rank, 2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_raising_to_the_rank_itself(n, dtype):
    """There all singular values are equal, and rounding must not decide which of them are clipped."""
    rng = np.random.default_rng(0)
    for rank in {n, n - 1}:
        values = np.where(np.arange(n) < rank, rng.uniform(0.1, 1, (20, n)), 0)
        left, right = np.linalg.qr(rng.standard_normal((2, 20, n, n)))[0]
        matrices = jnp.asarray(np.sort(values)[:, None, ::-1] * left @ right, dtype)
        raise_to = functools.partial(jaxsrn.srn, target=float(rank), raise_rank=True)
        raised = jax.jit(jax.vmap(raise_to))(matrices)
        found = np.linalg.svd(np.asarray(raised.kernel, float), compute_uv=False)
        largest = np.linalg.svd(np.asarray(matrices, float), compute_uv=False)[:, :1]
        expected = np.where(np.arange(n) < rank, largest, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == np.float32 else 1e-12)
        assert np.all(raised.feasible)


def test_a_target_of_nan_is_nan_in_every_number():
    found = jax.jit(lambda target: jaxsrn.srn(jnp.eye(3), target))(jnp.nan)
    assert np.isnan(found.gap)
