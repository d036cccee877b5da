"""Branch and bound over frequencies against NumPy's SVD at all of them, with good starts and with bad ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense, fft_norms, gaussian, spectral_kinds

import jaxsrn
from jaxsrn import CircularConv, spectral_norm
from jaxsrn._tools.lanczos import LONGEST_BASIS, leading_singular_vectors
from jaxsrn._tools.linalg import matmul
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import search_tolerance
from jaxsrn.spectra import dense as dense_layers
from jaxsrn.spectra.circular import branch_and_bound as proof
from jaxsrn.spectra.circular import grams
from jaxsrn.spectra.circular.angles import angles_of
from jaxsrn.spectra.circular.fourier import half_symbol, site_symbol
from jaxsrn.spectra.circular.grams import gram_polynomial, grams_at, is_reduced
from jaxsrn.spectra.circular.leading import branch_and_bound_pays, search_arguments
from jaxsrn.spectra.circular.peaks import climbed, proven_pair
from jaxsrn.spectra.singular_pair import Found, Pair

CIRCULAR = [case for case in CASES if isinstance(case.op, CircularConv)]


def branch_and_bound(kernel, op):
    """Traced anew by every caller: some tests change what the library's compiled programs hold."""
    single, grid, *rest = search_arguments(op, kernel)
    found = climbed.__wrapped__(kernel, single, grid, *rest)
    return proven_pair.__wrapped__(found, single, kernel.shape, grid, 0.0, False)


def found(kernel, op):
    """The value of the vectors found, at the frequency found."""
    site, left, right = branch_and_bound(kernel, op)
    symbol = site_symbol(kernel, op, site)
    return jnp.vdot(left, symbol @ right), jnp.linalg.norm(left), jnp.linalg.norm(right)


one = jax.jit(found)
several = jax.jit(lambda kernels, op: jax.vmap(found, (0, None))(kernels, op))


@pytest.mark.parametrize("case", CIRCULAR, ids=str)
def test_every_circular_operator(case):
    kernel = gaussian(case.kernel_shape)
    value, *norms = one(jnp.asarray(kernel), case.op)
    np.testing.assert_allclose(value, np.linalg.norm(dense(kernel, case.op), 2), rtol=1e-12)
    np.testing.assert_allclose(norms, 1, rtol=1e-12)


GRIDS = [
    ((61,), (5,)),
    ((64,), (3,)),
    ((24, 24), (3, 3)),
    ((31, 18), (3, 4)),
    ((9, 8, 10), (3, 2, 3)),
    ((96, 5), (7, 2)),
]


@pytest.mark.parametrize(("size", "taps"), GRIDS, ids=str)
def test_spectra_of_all_kinds(size, taps):
    """In float32, over stacks: not one miss."""
    op = CircularConv(size)
    for name, kernels in spectral_kinds(16, taps, 3).items():
        values, *_ = several(jnp.asarray(kernels, jnp.float32), op)
        np.testing.assert_allclose(values, fft_norms(kernels, size), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("size", "taps"), GRIDS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_the_proof_alone_finds_the_largest(size, taps, wide, monkeypatch):
    """From the pair of frequency 0, whatever that is, instead of the climb; it climbs on from what it finds."""

    def poor(peaks):
        first = jax.tree.map(lambda leaf: leaf[0], peaks)
        return first._replace(index=jnp.zeros_like(first.index), value=1e-3 * first.value)

    monkeypatch.setattr(proof, "_highest_of", poor)
    monkeypatch.setattr(proof, "_LANCZOS_FROM", 3 if wide else 128)
    op = CircularConv(size)
    # A new function: nothing compiled with the climb is used again.
    search = jax.jit(lambda kernels: jax.vmap(lambda kernel: branch_and_bound(kernel, op))(kernels))
    for name, kernels in spectral_kinds(4, taps, 3).items():
        sites, *_ = search(jnp.asarray(kernels))
        symbols = jax.vmap(site_symbol, (0, None, 0))(jnp.asarray(kernels), op, sites)
        reached = np.linalg.svd(symbols, compute_uv=False)[:, 0]
        np.testing.assert_allclose(reached, fft_norms(kernels, size), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("size", [(96,), (97,), (128, 96)], ids=str)
def test_climbing_looks_at_frequencies_that_are_their_own_opposites(size):
    """There the norm of a real kernel is stationary, and those of trained kernels often highest."""
    op, rng = CircularConv(size), np.random.default_rng(0)
    corners = np.stack(np.meshgrid(*((0, n // 2) for n in size), indexing="ij"), axis=-1).reshape((-1, len(size)))
    for _ in range(20 if len(size) == 1 else 5):
        kernel = rng.standard_normal((5,) * len(size) + (3, 3))
        kernel = kernel / np.abs(kernel).max()
        symbol = np.fft.fftn(kernel, size, axes=range(len(size)))[tuple(corners.T)]
        found = climbed(jnp.asarray(kernel), *search_arguments(op, jnp.asarray(kernel))).peaks
        assert jnp.max(found.value) >= np.linalg.norm(symbol, 2, axis=(1, 2)).max() * (1 - 1e-6)


def reduce_to(kept: int, columns: int, monkeypatch):
    monkeypatch.setattr(grams, "_REDUCED_FROM", columns)
    monkeypatch.setattr(grams, "_BASIS_ENTRIES", kept * columns)


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize(("size", "shape"), [((7, 7), (3, 3, 16, 20)), ((6,), (3, 24, 16))], ids=str)
def test_reduced_kernels(size, shape, kept, monkeypatch):
    """Few leading directions stand for all of a wide kernel: however many they are, nothing is missed."""
    reduce_to(kept, 16, monkeypatch)
    op, tapered = CircularConv(size), np.exp(-np.arange(shape[-1]) / 2)
    assert is_reduced(op, shape)
    kernels = np.stack([gaussian(shape, seed) * taper for seed in range(8) for taper in (1, tapered)])
    search = jax.jit(lambda kernels: jax.vmap(lambda kernel: found(kernel, op)[0])(kernels))
    np.testing.assert_allclose(search(jnp.asarray(kernels)), fft_norms(kernels, size), rtol=1e-12)


@pytest.mark.parametrize("kept", [1, 4])
def test_the_loss_covers_the_other_directions(kept, monkeypatch):
    reduce_to(kept, 8, monkeypatch)
    op, kernel = CircularConv((5, 6)), gaussian((3, 2, 8, 9)) * np.exp(-np.arange(9))
    poly = gram_polynomial(jnp.asarray(kernel), op, True)
    values = np.linalg.svd(half_symbol(jnp.asarray(kernel), op), compute_uv=False)[:, 0].reshape((5, 4))
    for index in np.ndindex(5, 4):
        reduced = np.linalg.eigvalsh(grams_at(poly, angles_of(op.grid, kernel.dtype), jnp.asarray([index]) * 2)[0, 0])[
            -1
        ]
        assert reduced <= values[index] ** 2 * (1 + 1e-12)
        assert values[index] ** 2 <= reduced + poly.loss


def test_large_images():
    size, kernel = (1024, 1000), gaussian((3, 3, 2, 2))
    np.testing.assert_allclose(spectral_norm(kernel, CircularConv(size)), fft_norms(kernel[None], size)[0], rtol=1e-12)


def test_degenerate_kernels():
    op, shape = CircularConv((16, 16)), (3, 3, 4, 4)
    assert one(jnp.zeros(shape), op)[0] == 0
    assert np.isnan(one(jnp.zeros(shape).at[1, 1, 0, 0].set(jnp.nan), op)[0])


def test_it_is_used_where_it_pays():
    """Not for small layers, nor where the singular values are norms of vectors."""
    assert not branch_and_bound_pays((3, 3, 8, 8), CircularConv((16, 16)))
    assert not branch_and_bound_pays((3, 3, 1, 64), CircularConv((64, 64)))
    assert branch_and_bound_pays((3, 3, 64, 64), CircularConv((32, 32)))
    assert branch_and_bound_pays((3, 3, 512, 512), CircularConv((7, 7)))


@pytest.mark.parametrize("strides", [1, 2, (2, 1)])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_axes_of_one_tap(taps, strides):
    """All frequencies of such an axis are alike: one is looked at, and its vectors belong to the whole image."""
    op, kernel = CircularConv((8, 6), strides=strides), gaussian((*taps, 4, 5))
    matrix = dense(kernel, op)
    triplet = jaxsrn.leading_triplet(kernel, op)
    np.testing.assert_allclose(triplet.value, np.linalg.norm(matrix, 2), rtol=1e-12)
    np.testing.assert_allclose(triplet.residual, 0, atol=1e-12)
    np.testing.assert_allclose(triplet.left.ravel() @ matrix @ triplet.right.ravel(), triplet.value, rtol=1e-12)
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(jaxsrn.singular_values(kernel, op), expected, atol=1e-12 * expected[0])


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "rank one"])
def test_large_matrices(kind):
    """No SVD where Lanczos and one factorization will do; exact all the same."""
    matrix = gaussian((150, 160))
    if kind == "orthogonal":
        matrix = np.linalg.qr(matrix.T)[0].T
    if kind == "rank one":
        matrix = np.outer(matrix[:, 0], matrix[0])
    triplet = jaxsrn.leading_triplet(matrix, jaxsrn.Dense())
    in_layer = spectral_norm(matrix[None, None], CircularConv((9, 9)))
    np.testing.assert_allclose([triplet.value, in_layer], np.linalg.norm(matrix, 2), rtol=1e-12)
    np.testing.assert_allclose(triplet.residual, 0, atol=1e-9)


def test_a_matrix_without_proof_gets_an_svd(monkeypatch):
    """Also where Lanczos stops at another singular value: the proof fails, and the SVD is taken."""
    poor = Found(jnp.ones(()), Pair(None, jnp.eye(170)[0], jnp.eye(170)[0]))
    monkeypatch.setattr(dense_layers, "matrix_free", lambda *_: poor)
    matrix = np.diag(1 + np.arange(170.0))
    triplet = jaxsrn.leading_triplet(matrix, jaxsrn.Dense())
    np.testing.assert_allclose(triplet.value, 170, rtol=1e-12)
    np.testing.assert_allclose(triplet.residual, 0, atol=1e-12)
    values = jax.vmap(spectral_norm, (0, None))(np.stack([matrix, 2 * matrix]), jaxsrn.Dense())
    np.testing.assert_allclose(values, [170, 340], rtol=1e-12)


def test_wide_kernels_start_a_state_at_a_pair_that_is_exact():
    """The start of a training step has no proof that its frequency is the best; with a clear peak it is."""
    kernel, op = 1 + gaussian((3, 128, 130)), CircularConv((8,))
    result = jaxsrn.srnc_step(kernel, jaxsrn.srnc_state(kernel, op, None), op, None)
    np.testing.assert_allclose(fft_norms(result[0][None], (8,)), 1, rtol=1e-9)


@pytest.mark.parametrize("shape", [(40, 900), (900, 40)], ids=str)
def test_lanczos_keeps_its_basis_on_the_smaller_side(shape):
    matrix = gaussian(shape)
    start = fixed_start((shape[1],), matrix.dtype)

    def search(matrix):
        return leading_singular_vectors(
            lambda x: matmul(matrix, x), lambda y: matmul(y, matrix), start, shape[0], search_tolerance(matrix.dtype)
        )

    value, (entry, output) = np.linalg.norm(matrix, 2), (search(jnp.asarray(matrix))[i] for i in (1, 2))
    np.testing.assert_allclose([np.linalg.norm(entry), np.linalg.norm(output), output @ matrix @ entry], [1, 1, value])
    residuals = np.linalg.norm(matrix.T @ output - value * entry), np.linalg.norm(matrix @ entry - value * output)
    assert max(residuals) <= 10 * search_tolerance(matrix.dtype) * value
    # A basis of the larger side would have rows of 900 numbers.
    text = jax.jit(search).lower(jnp.asarray(matrix)).as_text()
    assert set(re.findall(r"tensor<(\d+)x900xf64>", text)) <= {"40"}
    assert f"tensor<{LONGEST_BASIS + 1}x40xf64>" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(20, 20), (60, 30), (30, 60)], ids=str)
def test_lanczos_finds_the_leading_value_of_steep_spectra(shape, dtype):
    """In nearly null directions a product with `T^T T` is the rounding of the largest ones."""
    rng, size = np.random.default_rng(0), min(shape)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0][:, :size] for n in shape)

    @jax.jit
    def search(matrix):
        start = fixed_start((shape[1],), dtype)
        tolerance = search_tolerance(dtype)
        return leading_singular_vectors(
            lambda x: matmul(matrix, x), lambda y: matmul(y, matrix), start, shape[0], tolerance
        )

    for ratio in (0.9, 0.5, 0.3, 0.1, 0.03, 1e-3):
        found = search(jnp.asarray((left * ratio ** np.arange(size)) @ right.T, dtype))
        np.testing.assert_allclose(found.value, 1, rtol=1e-6 if dtype == np.float32 else 1e-12, err_msg=str(ratio))
        assert found.residual <= search_tolerance(dtype)
