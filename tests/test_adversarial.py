"""Finite numbers from every finite kernel, gradients included, and NaN from NaN; `tests/README.md` has the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, fft_norms, gaussian

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds

SHAPE = (3, 2, 2)
OPS = [Dense(), CircularConv((6,)), ZeroPaddedConv((5,)), UnboundedConv()]


def hard_kernels(shape, dtype):
    """`{name: kernel}`, all of them finite."""
    plain = gaussian(shape)
    first, middle = (0,) * len(shape), (shape[0] // 2,)
    delta, weight, near, equal = (np.zeros(shape) for _ in range(4))
    if len(shape) == 2:
        delta, near, equal = np.eye(*shape), np.eye(*shape) * [1, 1 - 1e-6], np.eye(*shape) * 3
    else:
        delta[middle] = np.eye(*shape[1:])
        near[middle] = np.diag([1, 1 - 1e-6])
        equal[0] = [[0.6, 0.8], [-0.8, 0.6]]
    weight[first] = -2
    silent, apart = plain.copy(), plain * np.eye(*shape[-2:])
    silent[..., 0, :] = 0
    tiny, smallest = np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal
    kernels = {
        "zero": 0 * plain,
        "1e-30": 1e-30 * plain,
        "1e30": 1e30 * plain,
        "denormal": tiny / 16 * plain,
        "smallest denormal": smallest * np.ones(shape),
        "mixed scales": plain * np.logspace(-30, 30, plain.size).reshape(shape),
        "delta": delta,
        "orthogonal": equal,
        "nearly equal": near,
        "rank one": np.ones(shape),
        "one weight": weight,
        "channel zero": silent,
        "without connection": apart,
    }
    return {name: kernel.astype(dtype) for name, kernel in kernels.items()}


def numbers(kernel, op):
    """The scalars of a layer, by name."""
    target = 1.2 * jaxsrn.stable_rank_range(kernel.shape, op).low
    result = jaxsrn.srnc(kernel, op, target)
    ball = jaxsrn.project_spectral_ball(kernel, op, 0.5)
    certified = bounds.certified(kernel, op)
    return {
        "norm": jaxsrn.spectral_norm(kernel, op),
        "stable rank": jaxsrn.stable_rank(kernel, op),
        "lower": certified.lower,
        "upper": certified.upper,
        "distance": result.distance,
        "residual": result.residual,
        "gap": result.gap,
        "projection": jnp.sum(ball.kernel),
        "gap of the projection": ball.gap,
        "l1": bounds.l1(kernel, op),
        "channel_l1": bounds.channel_l1(kernel, op),
        "lip_bound": bounds.lip_bound(kernel, op),
        "gram_iteration": bounds.gram_iteration(kernel, op),
        "fantastic_four": bounds.fantastic_four(kernel, op),
        "tensor_norm": bounds.tensor_norm(kernel, op),
    }


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize(
    ("op", "shape", "value"),
    [
        (Dense(), (56, 56), 0.6),
        (Dense(), (50, 50), 0.3),
        (CircularConv((64, 64)), (7, 7, 8, 8), 0.02),
        (CircularConv((64, 64)), (7, 7, 8, 8), 0.6),
        (CircularConv((64, 64)), (3, 3, 12, 12), 1 / 3),
        (ZeroPaddedConv((12, 12)), (5, 5, 6, 6), 0.3),
        (Dense(), (2000, 2), 0.7),
        (Dense(), (20000, 2), 0.02),
        (Dense(), (2, 20000), 0.02),
        (Dense(), (1, 40000), 0.02),
        (CircularConv((3, 3)), (3, 3, 1000, 4), 0.3),
        (ZeroPaddedConv((2, 2)), (3, 3, 4, 1000), 0.3),
        (CircularConv((3, 3)), (3, 3, 256, 16), 0.6),
    ],
    ids=str,
)
def test_sums_of_equal_terms(op, shape, value, jitted):
    """Rounding errors of equal terms add up where they are added one after another; float32 alone shows it."""
    kernel = np.full(shape, value, np.float32)
    kernel.flat[0] = 1

    def numbers(kernel):
        guaranteed = [getattr(bounds, name)(kernel, op) for name in GUARANTEED]
        return (
            jaxsrn.spectral_norm(kernel, op),
            jaxsrn.stable_rank(kernel, op),
            *bounds.certified(kernel, op),
            *guaranteed,
        )

    norm, rank, lower, upper, *guaranteed = map(float, (jax.jit(numbers) if jitted else numbers)(jnp.asarray(kernel)))
    values = exact_singular_values(kernel, op)
    assert norm == pytest.approx(values[0], rel=2e-6)
    assert rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=5e-6)
    assert lower <= values[0] <= upper
    for name, bound in zip(GUARANTEED, guaranteed, strict=True):
        assert bound >= values[0], name
    assert guaranteed[GUARANTEED.index("l1")] >= np.abs(kernel.astype(np.float64)).sum()


GUARANTEED = ("l1", "channel_l1", "lip_bound", "gram_iteration", "fantastic_four")


def exact_singular_values(kernel, op):
    """In float64: of all frequencies of a circular layer by its discrete Fourier transform, of others by the matrix."""
    wide = kernel.astype(np.float64)
    if isinstance(op, CircularConv):
        wide = np.fft.fft2(wide, op.input_shape, axes=(0, 1))
        return np.sort(np.linalg.svd(wide, compute_uv=False).ravel())[::-1]
    return np.linalg.svd(dense(wide, op), compute_uv=False)


@functools.partial(jax.jit, static_argnums=1)
def with_gradients(kernels, op):
    def one(kernel):
        # Of the sum, so that one transposition serves all: a NaN of any of them is a NaN of the sum.
        (_, values), gradient = jax.value_and_grad(
            lambda k: (sum(numbers(k, op).values()), numbers(k, op)), has_aux=True
        )(kernel)
        return values, gradient

    # One after the other: in a batch all take the steps of the slowest.
    return jax.lax.map(one, kernels)


def measured(op, dtype, kernels):
    shape = SHAPE[1:] if isinstance(op, Dense) else SHAPE
    assert all(kernel.shape == shape for kernel in kernels)
    return jax.tree.map(np.asarray, with_gradients(jnp.asarray(np.stack(kernels), dtype), op))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_finite_from_finite_and_nan_from_nan(op, dtype):
    shape = SHAPE[1:] if isinstance(op, Dense) else SHAPE
    hard = hard_kernels(shape, dtype)
    bad = {}
    for value in (np.nan, np.inf, -np.inf):
        bad[str(value)] = gaussian(shape).astype(dtype)
        bad[str(value)].flat[1] = value
    values, gradient = measured(op, dtype, [*hard.values(), *bad.values()])
    failures = []
    for i, (name, kernel) in enumerate((hard | bad).items()):
        finite = name in hard
        for what, value in {**{k: v[i] for k, v in values.items()}, "gradient": gradient[i]}.items():
            if finite and not np.isfinite(value).all():
                failures.append(f"{name}: {what} is {value}")
            if name == "nan" and not np.isnan(value).any():
                failures.append(f"{name}: {what} is {value}")
            if name in ("inf", "-inf") and what != "gradient" and np.isfinite(value).all():
                failures.append(f"{name}: {what} is {value}")
        if finite and not isinstance(op, UnboundedConv):
            true = np.linalg.norm(dense(kernel, op), 2)
            # XLA takes denormal numbers for 0.
            smallest = np.finfo(dtype).tiny * kernel.size
            exact = 1e-5 if dtype == np.float32 else 1e-10
            if abs(values["norm"][i] - true) > exact * true + smallest:
                failures.append(f"{name}: norm is {values['norm'][i]}, not {true}")
            if not values["lower"][i] <= true * (1 + 1e-13) or not values["upper"][i] + smallest >= true * (1 - 1e-13):
                failures.append(f"{name}: {true} is not in {values['lower'][i], values['upper'][i]}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Dense(), (512, 512)),
        (CircularConv((4,)), (1, 512, 512)),
        (CircularConv((1,)), (1, 3, 2)),
        (CircularConv((4096,)), (3, 2, 2)),
        (ZeroPaddedConv((1,)), (3, 2, 2)),
        (ZeroPaddedConv((4096,)), (3, 2, 2)),
    ],
    ids=str,
)
def test_largest_and_smallest_layers(op, shape):
    """512 channels, 1x1 kernels, one sample, 4096 samples."""
    kernel = gaussian(shape)
    interval, norm = bounds.certified(kernel, op), float(jaxsrn.spectral_norm(kernel, op))
    if getattr(op, "input_shape", None) == (4096,):
        # Zero padding is that of the larger circle, cut out, and is at most its norm.
        true = fft_norms(kernel[None], (4096,))[0]
        close = true * (1 - 1e-4) <= norm <= true if isinstance(op, ZeroPaddedConv) else abs(norm / true - 1) < 1e-10
        assert close
    else:
        tap = dense(kernel, op) if max(shape) < 512 else kernel.reshape(512, 512)
        true = np.linalg.norm(tap, 2)
        np.testing.assert_allclose(norm, true, rtol=1e-10)
    assert interval.lower <= norm * (1 + 1e-10)
    assert interval.upper >= norm * (1 - 1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", [CircularConv((8,)), ZeroPaddedConv((8,)), UnboundedConv()], ids=str)
def test_entries_near_the_largest_number(op, dtype):
    """The reciprocal of such an entry is denormal, which XLA takes for 0."""
    largest = 0.8 * np.finfo(dtype).max
    kernel = jnp.asarray([largest, 0, 0], dtype).reshape(3, 1, 1)
    samples = {CircularConv: 8, ZeroPaddedConv: 7, UnboundedConv: 1}[type(op)]
    np.testing.assert_allclose(jaxsrn.spectral_norm(kernel, op), largest, rtol=1e-6)
    np.testing.assert_allclose(jaxsrn.stable_rank(kernel, op), samples, rtol=1e-6)
    lower, upper = bounds.certified(kernel, op)
    assert 0.99 * largest < lower <= largest <= upper < 1.02 * largest
    projected = jaxsrn.project_spectral_ball(kernel, op, 1.0)
    assert np.max(np.abs(projected.kernel)) <= 1 + 1e-6
