"""Bounds that read the kernel alone: against explicit matrices, NumPy's reshapings, and closed cases."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BAD_KERNELS, CASES, dense, gaussian, spectral_kinds

from jaxsrn import CircularConv, Dense, ZeroPaddedConv, bounds

GUARANTEED = (bounds.fantastic_four, bounds.lip_bound, bounds.channel_l1, bounds.l1)
ALL = (bounds.tensor_norm, *GUARANTEED)


@functools.partial(jax.jit, static_argnames="num_starts")
def all_bounds(kernel, op, num_starts=8):
    tensor = bounds.tensor_norm(kernel, op, num_starts=num_starts)
    return [tensor, *(function(kernel, op) for function in GUARANTEED)], bounds.certified(
        kernel, op, resolution=0.0
    ).upper


# Every kind of geometry is there in several forms; compiling all of them would take minutes.
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_every_operator(case):
    """Never below the norm, each not above the looser ones, and certified is the tightest where there are taps."""
    kernel = gaussian(case.kernel_shape)
    norm = np.linalg.norm(dense(kernel, case.op), 2)
    (tensor, four, frobenius, channels, total), certified = all_bounds(jnp.asarray(kernel), case.op)
    for bound in (tensor, four, frobenius, channels, total):
        assert bound >= norm * (1 - 1e-10)
    assert tensor <= four * (1 + 1e-10)
    assert channels <= total * (1 + 1e-12)
    for bound in (tensor, four, frobenius, channels):
        assert certified <= bound * (1 + 1e-10)


@pytest.mark.parametrize("taps", [(3,), (3, 3)], ids=str)
def test_certified_is_never_looser(taps):
    """On kernels of all kinds of spectra, in float32; the tensor norm from enough starts to be above the norm."""
    op = CircularConv((24,) * len(taps))
    compared = jax.jit(jax.vmap(lambda kernel: all_bounds.__wrapped__(kernel, op, num_starts=32)))
    for name, kernels in spectral_kinds(40, taps, 3).items():
        found, certified = compared(jnp.asarray(kernels, jnp.float32))
        for function, bound in zip(ALL, found, strict=True):
            assert np.all(certified <= bound * (1 + 1e-5)), (name, function)


# The tensor norm


def test_tensor_norm_of_matrices():
    """One channel, two axes: the matrix norm of the taps. One axis, one input channel: of the taps by channels."""
    taps = gaussian((3, 4))
    expected = np.sqrt(12) * np.linalg.norm(taps, 2)
    np.testing.assert_allclose(bounds.tensor_norm(taps[..., None, None], CircularConv((9, 9))), expected, rtol=1e-9)
    kernel = gaussian((5, 1, 3))
    expected = np.sqrt(5) * np.linalg.norm(kernel[:, 0], 2)
    np.testing.assert_allclose(bounds.tensor_norm(kernel, ZeroPaddedConv((9,))), expected, rtol=1e-9)


def test_tensor_norm_needs_complex_vectors():
    """`Re (e_1 + i e_2)^3` has norm 1 over real unit vectors, and the root of 2 over complex ones."""
    tensor = np.zeros((2, 2, 2))
    tensor[0, 0, 0], tensor[0, 1, 1], tensor[1, 0, 1], tensor[1, 1, 0] = 1, -1, -1, -1
    np.testing.assert_allclose(bounds.tensor_norm(tensor, CircularConv((8,))), 2, rtol=1e-9)


def alternating_norm(tensor, starts: int) -> float:
    """The spectral norm of a tensor over complex vectors: alternating maximisation from many random starts."""
    rng, letters = np.random.default_rng(0), "abcdefg"[: tensor.ndim]
    best = 0.0
    for _ in range(starts):
        vectors = [rng.standard_normal(n) + 1j * rng.standard_normal(n) for n in tensor.shape]
        for _ in range(300):
            for axis in range(tensor.ndim):
                others = [v for i, v in enumerate(vectors) if i != axis]
                spec = ",".join([letters, *(c for i, c in enumerate(letters) if i != axis)]) + "->" + letters[axis]
                image = np.conj(np.einsum(spec, tensor, *others))
                size = np.linalg.norm(image)
                vectors[axis] = image / size
        best = max(best, size)
    return best


@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 3, 2, 3), (2, 2, 2, 2, 2)], ids=str)
def test_tensor_norm_by_brute_force(shape):
    kernel = gaussian(shape)
    expected = np.sqrt(np.prod(shape[:-2])) * alternating_norm(kernel, starts=40)
    op = CircularConv((4,) * (len(shape) - 2))
    np.testing.assert_allclose(bounds.tensor_norm(kernel, op, num_starts=16, num_steps=300), expected, rtol=1e-6)
    # Fewer starts and steps: from below.
    assert bounds.tensor_norm(kernel, op, num_starts=1, num_steps=2) <= expected * (1 + 1e-9)


# Strides: the taps split into phases, padded on an axis of its own


def polyphase(kernel, strides):
    """`(terms, terms, phases * c_in, c_out)`, by hand, each axis filled up to a multiple of its stride."""
    (k0, k1), (s0, s1) = kernel.shape[:2], strides
    terms = -(-k0 // s0), -(-k1 // s1)
    c_in, c_out = kernel.shape[2:]
    split = np.zeros((*terms, s0, s1, c_in, c_out))
    for i, j in itertools.product(range(k0), range(k1)):
        split[i // s0, j // s1, i % s0, j % s1] = kernel[i, j]
    return split.reshape((*terms, s0 * s1 * c_in, c_out))


def four_norms(tensor) -> float:
    h, w, i, o = tensor.shape
    matrices = (
        tensor.transpose((2, 0, 1, 3)).reshape((i * h * w, o)),
        tensor.transpose((2, 0, 3, 1)).reshape((i * h, o * w)),
        tensor.transpose((2, 1, 3, 0)).reshape((i * w, o * h)),
        tensor.transpose((2, 3, 0, 1)).reshape((i, o * h * w)),
    )
    return np.sqrt(h * w) * min(np.linalg.norm(matrix, 2) for matrix in matrices)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)], ids=str)
def test_strides(strides):
    kernel = gaussian((3, 5, 2, 3))
    split = polyphase(kernel, strides)
    norm = np.linalg.norm(dense(kernel, ZeroPaddedConv((9, 8), strides=strides)), 2)
    for op in (ZeroPaddedConv((9, 8), strides=strides), CircularConv((12, 12), strides=strides)):
        np.testing.assert_allclose(bounds.fantastic_four(kernel, op), four_norms(split), rtol=1e-9)
        expected = np.sqrt(split.shape[0] * split.shape[1]) * alternating_norm(split, starts=10)
        tensor = bounds.tensor_norm(kernel, op, num_starts=16, num_steps=300)
        np.testing.assert_allclose(tensor, expected, rtol=1e-6)
        assert norm <= tensor


def test_fantastic_four_by_lanczos_and_by_the_power_method():
    """Matrices too large for an SVD each; few power steps stay below, many do not."""
    kernel, op = gaussian((3, 3, 40, 30)), CircularConv((8, 8))
    exact = four_norms(kernel)
    np.testing.assert_allclose(bounds.fantastic_four(kernel, op), exact, rtol=1e-9)
    few, many = (bounds.fantastic_four(kernel, op, num_steps=steps) for steps in (2, 2000))
    assert few < 0.99 * exact
    np.testing.assert_allclose(many, exact, rtol=1e-4)


def test_sizes_and_padding_do_not_matter():
    """Nor does dilation: the same taps, the same bound."""
    kernel = gaussian((3, 2, 2, 3))
    ops = [CircularConv((4, 4)), CircularConv((30, 7)), ZeroPaddedConv((5, 5)), ZeroPaddedConv((9, 9), padding="VALID")]
    ops.append(ZeroPaddedConv((9, 9), kernel_dilation=2))
    for function in ALL:
        np.testing.assert_allclose([function(kernel, op) for op in ops], function(kernel, ops[0]), rtol=1e-9)


def test_groups_are_bounded_by_the_largest():
    kernel = gaussian((3, 3, 2, 4))
    op = CircularConv((6, 6), feature_group_count=2)
    for function in (bounds.tensor_norm, bounds.fantastic_four, bounds.lip_bound, bounds.channel_l1):
        alone = [function(kernel[..., g : g + 2], dataclasses.replace(op, feature_group_count=1)) for g in (0, 2)]
        np.testing.assert_allclose(function(kernel, op), max(alone), rtol=1e-9)


def test_layers_without_taps():
    """Dense layers and 1x1 kernels: the tensor norm and the reshapings are the spectral norm."""
    for shape, op in (((4, 6), Dense()), ((1, 1, 4, 6), ZeroPaddedConv((5, 5), strides=2)), ((90, 70), Dense())):
        kernel = gaussian(shape)
        norm = np.linalg.norm(kernel.reshape(shape[-2:]), 2)
        for function in (bounds.tensor_norm, bounds.fantastic_four):
            np.testing.assert_allclose(function(kernel, op), norm, rtol=1e-9)
        np.testing.assert_allclose(bounds.lip_bound(kernel, op), np.linalg.norm(kernel), rtol=1e-9)


# LipBound, sums of absolute values


def test_lip_bound_is_the_published_one():
    kernel = gaussian((3, 3, 2, 4))
    for oversampling in (2, 8):
        m = 2 * oversampling
        symbol = np.fft.fft2(kernel, (m, m), axes=(0, 1))
        expected = np.max(np.linalg.norm(symbol, axis=(2, 3))) / (1 - 2 / m)
        bound = bounds.lip_bound(kernel, CircularConv((50, 50)), oversampling=oversampling)
        np.testing.assert_allclose(bound, expected, rtol=1e-9)


def test_lip_bound_between_the_samples():
    """`1 + exp(-i w (k - 1))`, where the certificate is attained: the factor suffices also on the coarsest grid."""
    for taps, oversampling in itertools.product((2, 3, 6), (2, 3, 8)):
        angle = np.pi / (oversampling * (taps - 1))  # half a step of the grid
        kernel = np.zeros((2 * taps - 1, 1, 2))
        kernel[0, 0], kernel[taps - 1, 0] = [1, 0], [np.cos(angle), 0]
        kernel[taps - 1, 0, 1] = np.sin(angle)
        fine = np.linalg.norm(np.fft.fft(kernel, 10_000, axis=0), axis=2).max()
        assert bounds.lip_bound(kernel, CircularConv((64,)), oversampling=oversampling) >= fine


def test_channel_l1_corrects_proposition_11():
    ones = np.ones((1, 1, 2, 2))
    op = CircularConv((3, 3))
    printed = np.sqrt(np.sum(np.max(np.abs(ones).sum(axis=(0, 1)), axis=0) ** 2))
    assert printed < 1.42
    np.testing.assert_allclose(bounds.channel_l1(ones, op), 2, rtol=1e-12)
    kernel = gaussian((3, 3, 4, 2))
    channels = np.abs(kernel).sum(axis=(0, 1))
    found = bounds.channel_l1(kernel, op)
    np.testing.assert_allclose(found, np.linalg.norm(channels, 2), rtol=1e-9)
    assert found <= np.sqrt(np.linalg.norm(channels, 1) * np.linalg.norm(channels, np.inf))
    assert found <= np.linalg.norm(channels) <= bounds.l1(kernel, op)
    # Proposition 7, for several channels.
    norm = np.linalg.norm(dense(np.abs(kernel), op), 2)
    np.testing.assert_allclose(bounds.channel_l1(np.abs(kernel), op), norm, rtol=1e-9)


def test_l1():
    kernel = gaussian((3, 3, 1, 1))
    np.testing.assert_allclose(bounds.l1(kernel, CircularConv((7, 7))), np.abs(kernel).sum(), rtol=1e-12)
    np.testing.assert_allclose(
        bounds.l1(np.abs(kernel), CircularConv((7, 7))), np.linalg.norm(dense(np.abs(kernel), CircularConv((7, 7))), 2)
    )


OPERATORS = [(CircularConv((6, 5)), (3, 3, 2, 3)), (ZeroPaddedConv((7,), strides=2), (3, 2, 2)), (Dense(), (4, 3))]


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_gradients(function):
    if function is bounds.tensor_norm:  # at the maximum, not on the way
        function = functools.partial(function, num_steps=1000)
    for op, shape in OPERATORS:
        kernel, direction, step = jnp.asarray(gaussian(shape)), gaussian(shape, seed=1), 1e-6
        slope = (function(kernel + step * direction, op) - function(kernel - step * direction, op)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(jax.grad(function)(kernel, op), direction), slope, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    op, shape = OPERATORS[0]
    kernel = gaussian(shape)
    for function in ALL:
        expected = function(kernel, op) * scale
        np.testing.assert_allclose(function(jnp.asarray(scale * kernel, jnp.float32), op), expected, rtol=1e-4)


def test_errors():
    op, kernel = CircularConv((8, 8)), gaussian((3, 3, 1, 2))
    for (bad, message), function in itertools.product(BAD_KERNELS, ALL):
        with pytest.raises(ValueError, match=message):
            function(bad, op)
    for name in ("num_starts", "num_steps"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected a static integer >= 1"):
            bounds.tensor_norm(kernel, op, **{name: 0})
    with pytest.raises(ValueError, match="num_steps: got 0, expected a static integer >= 1"):
        bounds.fantastic_four(kernel, op, num_steps=0)
    with pytest.raises(ValueError, match="oversampling: got 1, expected a static integer >= 2"):
        bounds.lip_bound(kernel, op, oversampling=1)


def test_channel_l1_is_not_found_from_below():
    """Values so near each other that a search alone ends below the largest."""
    matrix = jnp.diag(1 - 1e-12 * jnp.arange(100.0))
    assert 1 <= bounds.channel_l1(matrix, Dense()) <= 1 + 1e-11
