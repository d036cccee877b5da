"""Certified intervals and Gram iteration: never violated, against explicit matrices and NumPy's FFT."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BAD_KERNELS, BY_NAME, CASES, dense, fft_norms, gaussian, spectral_kinds

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.spectra.circular import leading


def holds(interval, norm) -> bool:
    return bool(interval.lower <= norm <= interval.upper)


def as_float64(tree):
    """For comparisons with NumPy's numbers."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@jax.jit
def all_bounds(kernel, op):
    return bounds.certified(kernel, op), bounds.gram_iteration(kernel, op)


def without_edges(op) -> UnboundedConv:
    """The operator of the same taps on an image without edges."""
    return UnboundedConv(
        strides=op.strides, kernel_dilation=op.kernel_dilation, feature_group_count=op.feature_group_count
    )


def adversarial(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Gaussian kernels, signs, and taps at both ends alone, which attain the certificate: of all scales, in float32."""
    rng = np.random.default_rng(list(shape))
    kernels = rng.standard_normal((count, *shape))
    kernels[count // 3 :] = rng.choice([-1.0, 1.0], kernels[count // 3 :].shape)
    ends = np.zeros(shape, bool)
    ends[np.ix_(*[sorted({0, taps - 1}) for taps in shape[:-2]])] = True
    kernels[2 * count // 3 :] *= ends
    # Near the extremal ones, too.
    kernels[5 * count // 6 :] += 1e-4 * rng.standard_normal(kernels[5 * count // 6 :].shape)
    kernels *= 10.0 ** rng.uniform(-6, 6, (count, *(1,) * len(shape)))
    return kernels.astype(np.float32).astype(np.float64)


def dense_norms(kernels: np.ndarray, op) -> np.ndarray:
    """Norms of the explicit matrices, which are linear in the kernel."""
    entries = np.eye(kernels[0].size).reshape((-1, *kernels.shape[1:]))
    matrices = np.stack([dense(entry, op) for entry in entries])
    return np.linalg.norm(np.tensordot(kernels.reshape((len(kernels), -1)), matrices, 1), 2, axis=(1, 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operator(case):
    """200 kernels each, more than ten thousand: not one violation."""
    kernels = adversarial(case.kernel_shape, 200)
    norms = dense_norms(kernels, case.op)
    stacked = jax.jit(jax.vmap(all_bounds.__wrapped__, (0, None)))
    interval, gram = as_float64(stacked(jnp.asarray(kernels, jnp.float32), case.op))
    assert np.all(interval.lower <= norms)
    assert np.all(norms <= interval.upper)
    assert np.all(norms <= gram)
    if not isinstance(case.op, ZeroPaddedConv):
        # What taps that cancel leave is known less well.
        scales = np.abs(kernels).max(axis=tuple(range(1, kernels.ndim)))
        assert np.all(interval.upper - interval.lower <= 1e-4 * scales)
        # The coarse grid may cost 1 / cos(pi / 16) per axis, equal singular values a little more.
        assert np.all(gram <= 1.1 * norms + 1e-4 * scales)


SIZES = [(4, 9), (3, 5), (16, 31), (8, 8)]


@pytest.mark.parametrize(
    "name", ["circular-2d", "circular-2d-dilation", "circular-2d-groups", "same-2d", "valid-2d-dilation"]
)
def test_one_interval_for_all_sizes(name):
    _, op, shape = BY_NAME[name]
    kernel = gaussian(shape)
    interval = bounds.certified(kernel, without_edges(op), resolution=1e-3)
    norms = [np.linalg.norm(dense(kernel, dataclasses.replace(op, input_shape=size)), 2) for size in SIZES]
    assert max(norms) <= interval.upper
    # It is the supremum over sizes: large images come close.
    if isinstance(op, CircularConv):
        assert interval.upper <= 1.02 * max(norms)
    assert interval.upper <= 1.0012 * interval.lower


@pytest.mark.parametrize("name", ["circular-1d-stride", "same-1d-stride", "same-1d-depthwise"])
def test_all_sizes_of_strided_layers(name):
    _, op, shape = BY_NAME[name]
    for seed in range(3):
        kernel = gaussian(shape, seed)
        interval = bounds.certified(kernel, without_edges(op))
        for n in (8, 12, 30):
            assert np.linalg.norm(dense(kernel, dataclasses.replace(op, input_shape=(n,))), 2) <= interval.upper


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize(("size", "taps"), [((4096,), (4,)), ((768, 768), (3, 2))], ids=str)
def test_the_norm_without_edges_is_the_supremum(size, taps, dtype):
    """Against NumPy on a grid so fine that it misses less than `1 / cos(pi d / 2 m)` per axis; all kinds of spectra."""
    missed = 1 / np.prod([np.cos(np.pi * (k - 1) / (2 * m)) for k, m in zip(taps, size, strict=True)])
    for name, kernels in spectral_kinds(2, taps, 2).items():
        for kernel in jnp.asarray(kernels, dtype):
            low = fft_norms(kernel[None], size)[0]
            op = UnboundedConv()
            norm, interval = as_float64((jaxsrn.spectral_norm(kernel, op), bounds.certified(kernel, op)))
            rounding = 20 * np.finfo(dtype).eps
            assert low * (1 - rounding) <= norm <= low * missed * (1 + rounding), name
            # Not against the norm that was computed: that of a torus is off by up to 1e-13 (`sites.py`).
            assert interval.lower <= low * missed, name
            assert low <= interval.upper, name
            assert interval.upper <= 1.011 * norm


def test_bounds_of_layers_without_edges():
    """Each bounds the norm at sizes of its own choice."""
    kernel = jnp.asarray(gaussian((3, 3, 2, 4)), jnp.float32)
    for options in ({}, {"strides": 2}, {"kernel_dilation": (1, 2)}, {"feature_group_count": 2}):
        norm = np.linalg.norm(dense(kernel, CircularConv((12, 12), **options)), 2)
        op = UnboundedConv(**options)
        for bound in (bounds.lip_bound, bounds.fantastic_four, bounds.gram_iteration, bounds.l1, bounds.channel_l1):
            assert norm <= float(bound(kernel, op)), (options, bound)
        assert norm <= float(bounds.tensor_norm(kernel, op)) * (1 + 1e-5), options


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 33])
def test_thousands_of_extremal_polynomials(n):
    """One channel in float32: two taps at the ends attain the certificate at a half-step offset; random phases."""
    op, count = CircularConv((n,)), 2000
    rng = np.random.default_rng(n)
    taps = rng.standard_normal((count, 3))
    taps[: count // 2, 1] = 0
    taps[: count // 4, 2] = taps[: count // 4, 0] * rng.choice([-1, 1], count // 4)
    taps *= 10.0 ** rng.uniform(-6, 6, (count, 1))
    kernels = jnp.asarray(taps.reshape((count, 3, 1, 1)), jnp.float32)
    wide = np.asarray(kernels, np.float64)[..., 0, 0]
    folded = np.zeros((count, n))
    for p in range(3):
        folded[:, p % n] += wide[:, p]
    norms = np.abs(np.fft.fft(folded, axis=-1)).max(axis=-1)
    interval, gram = as_float64(jax.vmap(all_bounds.__wrapped__, (0, None))(kernels, op))
    assert np.all(interval.lower <= norms)
    assert np.all(norms <= interval.upper)
    assert np.all(norms <= gram)


@pytest.fixture
def branch_and_bound_always(monkeypatch):
    """Also where SVDs would take less; nothing compiled otherwise is used again."""
    monkeypatch.setattr(leading, "branch_and_bound_pays", lambda *_: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


GRIDS = [((61,), (5,)), ((24, 24), (3, 3)), ((9, 8, 10), (3, 2, 3))]


@pytest.mark.parametrize("resolution", [0.0, 0.01, 0.2])
@pytest.mark.parametrize(("size", "taps"), GRIDS, ids=str)
@pytest.mark.usefixtures("branch_and_bound_always")
def test_interval_by_branch_and_bound(size, taps, resolution):
    """As in large layers, on small ones of all kinds of spectra, in float32."""
    interval_of = jax.jit(jax.vmap(lambda kernel: bounds.certified(kernel, CircularConv(size), resolution=resolution)))
    for name, kernels in spectral_kinds(12, taps, 3).items():
        kernels = jnp.asarray(kernels, jnp.float32)
        interval, norms = as_float64(interval_of(kernels)), fft_norms(kernels, size)
        assert np.all(interval.lower <= norms), name
        assert np.all(norms <= interval.upper), name
        assert np.all(interval.upper <= (1 + resolution) * (1 + 1e-4) * interval.lower), name


@pytest.mark.usefixtures("branch_and_bound_always")
def test_zero_padding_is_never_looser_than_the_tensor_norm():
    """Where that is the norm of the cover, an interval of the cover as wide as the resolution would be."""
    kernel = jnp.broadcast_to(gaussian((4, 5)), (3, 3, 4, 5))
    upper = bounds.certified(kernel, ZeroPaddedConv((13, 12)), resolution=0.2).upper
    np.testing.assert_allclose(upper, bounds.tensor_norm(kernel, ZeroPaddedConv((13, 12))), rtol=1e-9)
    small = ZeroPaddedConv((9, 8))
    assert bounds.certified(kernel, small).upper < 0.95 * bounds.tensor_norm(kernel, small)


def test_gram_iteration_is_the_published_one():
    """On a layer's own frequencies: `||G^(2^t)||_F^(1/2^(t+1))`, written out."""
    op, kernel = CircularConv((5, 4)), gaussian((3, 3, 2, 3))
    symbol = np.fft.fft2(kernel, (5, 4), axes=(0, 1)).reshape((-1, 2, 3))
    gram = symbol @ symbol.conj().swapaxes(1, 2)
    for steps in (1, 2, 5):
        power = np.linalg.matrix_power(gram, 2**steps)
        expected = np.max(np.linalg.norm(power, axis=(1, 2)) ** (1 / 2 ** (steps + 1)))
        np.testing.assert_allclose(bounds.gram_iteration(kernel, op, num_steps=steps), expected, rtol=1e-6)
        assert bounds.gram_iteration(kernel, op, num_steps=steps) >= expected


def test_gram_iteration_beside_a_matrix_of_rounding():
    """Taps that sum to 0: the symbol is nothing but rounding at frequency 0, whose second derivatives overflow."""
    kernel = gaussian((2, 2, 2))
    kernel = jnp.asarray(np.concatenate([kernel, -kernel.sum(axis=0, keepdims=True)]), jnp.float32)
    direction, op, step = jnp.ones_like(kernel).at[0, 0, 0].set(2), CircularConv((8,)), 1e-5
    slope = jax.grad(lambda kernel: bounds.gram_iteration(kernel, op))
    found = jax.jvp(slope, (kernel,), (direction,))[1]
    wide, along = (np.asarray(array, np.float64) for array in (kernel, direction))
    expected = (slope(jnp.asarray(wide + step * along)) - slope(jnp.asarray(wide - step * along))) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gram_iteration_of_many_steps():
    """The power 2**31 is no 32-bit integer. The bound decreases to the norm."""
    op, kernel = CircularConv((8,)), gaussian((3, 2, 2)).astype(np.float32)
    with jax.enable_x64(False):
        bound = bounds.gram_iteration(kernel, op, num_steps=32)
    np.testing.assert_allclose(bound, np.linalg.norm(dense(kernel, op), 2), rtol=1e-5)


def test_gram_iteration_on_a_coarse_grid():
    op, kernel = CircularConv((200,)), gaussian((3, 4, 4))
    norm = fft_norms(kernel[None], (200,))[0]
    previous = np.inf
    for oversampling in (2, 4, 16):
        bound = bounds.gram_iteration(kernel, op, num_steps=10, oversampling=oversampling)
        assert norm <= bound < previous
        assert bound <= norm * (1 + 1e-3) / np.cos(np.pi / (2 * oversampling))
        previous = bound


def test_gradients():
    """The ends move as the norm does; Gram iteration is smooth."""
    for op, shape in ((CircularConv((6, 5)), (3, 3, 2, 3)), (Dense(), (4, 3))):
        kernel, direction = jnp.asarray(gaussian(shape)), gaussian(shape, seed=1)
        for function in (lambda k, op=op: bounds.certified(k, op).upper, lambda k, op=op: bounds.gram_iteration(k, op)):
            step = 1e-6
            slope = (function(kernel + step * direction) - function(kernel - step * direction)) / (2 * step)
            np.testing.assert_allclose(jnp.vdot(jax.grad(function)(kernel), direction), slope, rtol=1e-5)


@pytest.mark.usefixtures("no_type_checks")
def test_numbers_of_numpy_are_static():
    op, kernel = CircularConv((8, 8)), gaussian((3, 3, 1, 2))
    assert bounds.certified(kernel, op, resolution=np.float32(0.01)) == bounds.certified(kernel, op, resolution=0.01)


@pytest.mark.parametrize("op", [UnboundedConv(), CircularConv((2**15,))], ids=["unbounded", "circular"])
def test_a_flat_spectrum_beside_a_value_that_climbing_does_not_see(op):
    """Climbing starts at right angles to the larger value, whose spectrum is nearly flat: the end was 0.9% too low."""
    middle = [[1.006330132484436, 0.0070603336207568645], [0.0070603336207568645, 1.0078524351119995]]
    beside = [[0.0020865462720394135, 0.0023347153328359127], [0.0023347153328359127, 0.00258994079194963]]
    kernel = np.array([middle, beside], np.float32)
    norm = np.linalg.norm(dense(kernel, CircularConv((64,))), 2)
    lower, upper = map(float, bounds.certified(jnp.asarray(kernel), op))
    assert lower <= norm <= upper
    assert norm > 1.0185


@pytest.mark.parametrize("channels", [24, 64])
@pytest.mark.parametrize(
    "op", [UnboundedConv(), CircularConv((2**12,)), ZeroPaddedConv((64,))], ids=["unbounded", "circular", "same"]
)
def test_a_kernel_at_right_angles_to_every_start(channels, op):
    """Climbing ends at 0 everywhere, which was taken for the norm of a zero kernel."""
    kernel = np.zeros((3, channels, channels), np.float32)
    kernel[1, [1, 2, 8, 9, 17, 23], 0] = -0.25, 1, -0.5, 0.5, -0.5, 0.25
    norm = np.linalg.norm(kernel[1, :, 0].astype(np.float64))
    lower, upper = map(float, bounds.certified(jnp.asarray(kernel), op))
    assert lower <= norm <= upper
    np.testing.assert_allclose(jaxsrn.spectral_norm(jnp.asarray(kernel), op), norm, rtol=1e-5)


@pytest.mark.parametrize("op", [UnboundedConv(), CircularConv((2**10,))], ids=["unbounded", "circular"])
def test_the_proof_holds_where_the_search_sees_another_part(op):
    """Searches start from a fixed vector. What is at right angles to it, and larger, is for the proof to find."""
    rng, channels = np.random.default_rng(0), 24
    seen = np.array(fixed_start((channels,), jnp.float32), np.float64)
    seen /= np.linalg.norm(seen)
    unseen = np.eye(channels) - np.outer(seen, seen)
    kernels = []
    # Spectra of all kinds, and nearly flat ones.
    for above, beside in itertools.product((1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 1.5e-2, 0.1, 3.0), (1, 1e-3)):
        taps = np.array([beside, 1, beside])[:, None, None]
        filters = taps * rng.standard_normal((3, 1, 1)) * np.outer(seen, seen)
        hidden = taps * (unseen @ rng.standard_normal((3, channels, channels)) @ unseen)
        filters, hidden = (part / fft_norms(part[None], (2**10,)) for part in (filters, hidden))
        kernels.append(filters + (1 + above) * hidden)
    kernels = np.array(kernels, np.float32)
    lower, upper = jax.jit(jax.vmap(lambda kernel: tuple(bounds.certified(kernel, op))))(jnp.asarray(kernels))
    norms = fft_norms(kernels, (2**10,))
    assert np.all(norms <= np.asarray(upper, np.float64))
    assert np.all(np.asarray(lower, np.float64) <= norms * (1 + (1e-4 if isinstance(op, UnboundedConv) else 0)))


def test_rounding_of_reshapings_with_all_taps_on_one_side():
    """The longer side of such a matrix has more entries than any sum over the taps and inputs."""
    seen = np.array(fixed_start((126,), jnp.float32), np.float64)
    seen /= np.linalg.norm(seen)
    unseen = np.random.default_rng(1).standard_normal(126)
    unseen -= seen * (seen @ unseen)
    kernel = np.zeros((3, 3, 126, 1134), np.float32)
    kernel[..., 0], kernel[..., 1] = seen, (1 + 2.2e-5) * unseen / np.linalg.norm(unseen)
    # At frequency 0 the taps add up.
    norm = np.linalg.norm(kernel.astype(np.float64).sum(axis=(0, 1)), 2)
    assert float(bounds.fantastic_four(jnp.asarray(kernel), UnboundedConv())) >= norm


def test_rounding_grows_with_the_longer_side():
    """The largest value is a little above one that the search finds, by less than its proof allows for rounding."""
    rows, columns, above = 128, 20000, 2e-5
    rng = np.random.default_rng(0)
    seen = np.array(fixed_start((rows,), jnp.float32), np.float64)
    seen /= np.linalg.norm(seen)
    unseen = rng.standard_normal(rows)
    unseen -= seen * (seen @ unseen)
    right = np.linalg.qr(rng.standard_normal((columns, 2)))[0]
    matrix = np.outer(seen, right[:, 0]) + (1 + above) * np.outer(unseen / np.linalg.norm(unseen), right[:, 1])
    kernel = matrix.astype(np.float32)
    norm = np.sqrt(np.linalg.eigvalsh(kernel.astype(np.float64) @ kernel.astype(np.float64).T)[-1])
    lower, upper = map(float, bounds.certified(jnp.asarray(kernel), Dense()))
    assert lower <= norm <= upper


def test_errors():
    op, kernel = CircularConv((8, 8)), gaussian((3, 3, 1, 2))
    for (bad, message), function in itertools.product(BAD_KERNELS, (bounds.certified, bounds.gram_iteration)):
        with pytest.raises(ValueError, match=message):
            function(bad, op)
    with pytest.raises(ValueError, match=r"resolution: got 1\.5, expected a static number, at least 0 and below 1"):
        bounds.certified(kernel, op, resolution=1.5)
    with pytest.raises(ValueError, match="num_steps: got 0, expected a static integer >= 1"):
        bounds.gram_iteration(kernel, op, num_steps=0)
    with pytest.raises(ValueError, match="oversampling: got 1, expected a static integer >= 2"):
        bounds.gram_iteration(kernel, op, oversampling=1)
