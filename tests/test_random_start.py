"""The probabilistic interval: it holds the norm, its failures are as rare as promised, and it is as narrow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense
from numpy.polynomial import chebyshev

import jaxsrn
from jaxsrn import Dense, UnboundedConv, ZeroPaddedConv, bounds
from jaxsrn.bounds import random_start

KEY = jax.random.key(5)
SAMPLED = [case for case in CASES if isinstance(case.op, ZeroPaddedConv)][::4] + CASES[::9]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_it_holds_the_norm_of_the_explicit_matrix(case, dtype):
    kernel = np.random.default_rng(0).standard_normal(case.kernel_shape).astype(dtype)
    norm = np.linalg.norm(dense(kernel.astype(np.float64), case.op), 2)
    lower, upper = map(float, bounds.probabilistic(kernel, case.op, key=KEY))
    slack = 1e-4 if dtype == np.float32 else 1e-12
    assert lower <= norm <= upper <= norm * 1.01 * (1 + slack)


@pytest.mark.parametrize("failure", [0.5, 0.1, 0.01])
def test_it_fails_as_rarely_as_promised(failure):
    """As many further values as steps: polynomials vanish there, and the bound fails wherever the start is unlucky."""
    size, resolution = 64, 0.99
    steps = random_start._num_steps(failure * np.sqrt(np.pi / (2 * size)), resolution)
    values = np.concatenate([[1.0], np.resize(np.linspace(0.2, 0.7, steps), size - 1)])
    keys = jax.random.split(KEY, 8000)
    of_key = functools.partial(bounds.probabilistic, jnp.diag(values), Dense(), resolution=resolution, failure=failure)
    interval = jax.vmap(lambda key: of_key(key=key))(keys)
    rate = np.mean(np.asarray(interval.upper) < 1)
    deviation = np.sqrt(failure * (1 - failure) / len(keys))
    assert 0.8 * failure - 3 * deviation < rate < failure + 3 * deviation
    assert np.all(np.asarray(interval.lower) <= 1)


def test_whatever_the_start_is_it_is_not_wider():
    """Of a start without any part along the leading vector the upper end still does not exceed the norm."""
    values = jnp.concatenate([jnp.ones(1), jnp.linspace(0.1, 0.9, 60)])
    start = np.ones(61)
    start[0] = 0
    for resolution in (0.3, 0.03, 0.003):
        part = 1e-6
        steps = random_start._num_steps(part, resolution)
        recurrence = random_start._lanczos(lambda x: values**2 * x, jnp.asarray(start / np.linalg.norm(start)), steps)
        within = recurrence.diagonal[0], jnp.sum(values**2)
        _, upper = random_start._halved(recurrence, -2 * float(np.log(part)), *within)
        assert np.sqrt(upper) <= 1 + resolution


def test_sum_is_that_of_orthonormal_polynomials():
    """For a measure of twelve masses, with polynomials that QR makes orthonormal at them."""
    rng = np.random.default_rng(1)
    places, parts = np.sort(rng.uniform(0, 1, 12)), rng.uniform(0.2, 1, 12)
    parts /= np.linalg.norm(parts)
    steps, x = 5, 1.3
    recurrence = random_start._lanczos(lambda vector: places * vector, jnp.asarray(parts), steps)
    # The rows at the masses, times their roots, are orthonormal once multiplied by the inverse of R.
    columns = chebyshev.chebvander(places, steps) * parts[:, None]
    at_x = np.linalg.solve(np.linalg.qr(columns)[1].T, chebyshev.chebvander(np.array([x]), steps)[0])
    np.testing.assert_allclose(random_start._log_sum(recurrence, jnp.asarray(x)), np.log(np.sum(at_x**2)), rtol=1e-10)
    roots = np.linalg.eigvalsh(np.diag(recurrence.diagonal) + np.diag(recurrence.coupling[:-1], 1), UPLO="U")
    assert random_start._log_sum(recurrence, jnp.asarray(roots[-1] * (1 - 1e-9))) == -np.inf
    assert random_start._log_sum(recurrence, jnp.asarray(roots[-1] * (1 + 1e-9))) > 0


def test_steps_are_those_of_chebyshev():
    for part, resolution in [(1e-12, 0.01), (1e-3, 0.2), (1e-9, 1e-4)]:
        steps = random_start._num_steps(part, resolution)
        value = [chebyshev.chebval(2 * (1 + resolution) ** 2 - 1, [0] * k + [1]) for k in (steps - 1, steps)]
        assert value[0] < 1 / part <= value[1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_and_zeros(scale):
    op, kernel = ZeroPaddedConv((6, 6)), np.random.default_rng(2).standard_normal((3, 3, 2, 3)).astype(np.float32)
    norm = np.linalg.norm(dense(kernel.astype(np.float64), op), 2)
    lower, upper = map(float, bounds.probabilistic(kernel * np.float32(scale), op, key=KEY))
    assert lower <= norm * scale <= upper <= 1.01 * norm * scale
    assert [float(end) for end in bounds.probabilistic(0 * kernel, op, key=KEY)] == [0, 0]
    # All singular values are equal, and the first step exhausts the space.
    tap = np.zeros((3, 3, 1, 1))
    tap[1, 1] = scale
    np.testing.assert_allclose(bounds.probabilistic(tap, op, key=KEY), scale, rtol=1e-12)


def test_batches_and_keys():
    op, kernels = ZeroPaddedConv((6,)), np.random.default_rng(3).standard_normal((3, 3, 2, 2))
    keys = jax.random.split(KEY, 3)
    of_key = functools.partial(bounds.probabilistic, resolution=0.1)
    stacked = jax.vmap(lambda kernel, key: of_key(kernel, op, key=key))(kernels, keys)
    alone = [of_key(kernel, op, key=key) for kernel, key in zip(kernels, keys, strict=True)]
    np.testing.assert_allclose(np.transpose(alone), stacked, rtol=1e-10)
    assert alone[0] == of_key(kernels[0], op, key=keys[0]) != of_key(kernels[0], op, key=keys[1])


def test_it_is_narrower_than_the_certified_one_where_that_has_covers():
    """At 7x7 the covers lose several percent, and of so many channels only they prove anything."""
    op = ZeroPaddedConv((7, 7))
    kernel = np.random.default_rng(4).standard_normal((3, 3, 80, 80))
    norm = float(jaxsrn.spectral_norm(kernel, op))
    lower, upper = map(float, bounds.probabilistic(kernel, op, key=KEY, resolution=1e-3))
    assert lower <= norm * (1 + 1e-12)
    assert norm <= upper <= norm * (1 + 1e-3)
    assert float(bounds.certified(kernel, op).upper) > 1.02 * norm


def test_arguments(no_type_checks):
    kernel = np.ones((3, 2, 2))
    for key in (0, None, jax.random.split(jax.random.key(0)), jnp.zeros((2, 2), jnp.uint32)):
        with pytest.raises(ValueError, match=r"key: got .*, expected one key"):
            bounds.probabilistic(kernel, ZeroPaddedConv((4,)), key=key)
    with pytest.raises(ValueError, match="an operator with an image"):
        bounds.probabilistic(kernel, UnboundedConv(), key=KEY)
    for name in ("resolution", "failure"):
        for value in (0, 1.1, -0.1, "small"):
            with pytest.raises(ValueError, match=f"{name}: got"):
                bounds.probabilistic(kernel, ZeroPaddedConv((4,)), key=KEY, **{name: value})
