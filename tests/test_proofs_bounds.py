"""The steps of the bounds, each against NumPy on few numbers; mutation testing runs them (`mutation.py`)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, gaussian

from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import torus_excess
from jaxsrn.bounds import banded, coefficients, entries, gram, interval, reshapings
from jaxsrn.bounds import tensor as power_method
from jaxsrn.bounds.covers import NormInterval, covers, slack_of, widened
from jaxsrn.spectra.pairs_by_kind import leading_pair

# Covers


@pytest.mark.parametrize(
    ("op", "shape", "count"),
    [
        (ZeroPaddedConv((6,)), (3, 2, 3), 1),
        (ZeroPaddedConv((7,), strides=2), (3, 2, 3), 1),
        (ZeroPaddedConv((3,), padding=((2, 2),), input_dilation=2), (3, 2, 4), 1),
        (ZeroPaddedConv((5,), padding=((1, 3),), input_dilation=3, strides=2), (4, 1, 2), 2),
        (
            ZeroPaddedConv((3, 4), padding=((1, 1), (1, 2)), input_dilation=(1, 2), feature_group_count=2),
            (2, 3, 1, 4),
            1,
        ),
    ],
    ids=str,
)
def test_covers_are_circular_layers_above(op, shape, count):
    """A layer with a stride and an input dilation has one for each. They bound all kernels."""
    for seed in range(3):
        kernel = gaussian(shape, seed)
        found = covers(jnp.asarray(kernel), op)
        assert len(found) == count
        for kernel_of_cover, cover in found:
            assert isinstance(cover, CircularConv)
            assert np.linalg.norm(dense(kernel, op), 2) <= np.linalg.norm(dense(kernel_of_cover, cover), 2)
            # Each holds the kernel's own entries.
            np.testing.assert_array_equal(np.sort(kernel_of_cover, axis=None), np.sort(kernel, axis=None))


def test_a_cover_is_no_larger_than_it_must_be():
    """On one long axis the edges hardly matter, whatever is strided or dilated."""
    kernel = gaussian((3, 2, 4))
    for op in (
        ZeroPaddedConv((60,), strides=2),
        ZeroPaddedConv((60,), padding=((2, 2),), input_dilation=2),
        ZeroPaddedConv((60,), feature_group_count=2),
    ):
        [(kernel_of_cover, cover)] = covers(jnp.asarray(kernel), op)
        norm = np.linalg.norm(dense(kernel, op), 2)
        assert np.linalg.norm(dense(kernel_of_cover, cover), 2) <= 1.01 * norm


def test_layers_without_padding_are_their_own_covers():
    kernel = jnp.asarray(gaussian((3, 2, 2)))
    for op in (CircularConv((6,), strides=2), UnboundedConv(kernel_dilation=2)):
        [(same, cover)] = covers(kernel, op)
        assert same is kernel
        assert cover == op


def test_intervals_are_widened_for_rounding():
    """Each end moves by its share, and by that of the whole kernel where taps may cancel; never below 0."""
    kernel, eps = jnp.asarray(gaussian((3, 3, 4, 5)), jnp.float32), np.finfo(np.float32).eps
    slack = 2 * 2 * 6 * eps
    op = CircularConv((8, 8))
    assert slack_of(kernel, op) == slack
    ends = NormInterval(jnp.asarray(2.0), jnp.asarray(3.0))
    np.testing.assert_allclose(widened(ends, kernel, op), [2 * (1 - slack), 3 * (1 + slack)], rtol=1e-14)
    margin, aliased = slack * np.linalg.norm(kernel), CircularConv((2, 8))
    expected = [2 * (1 - slack) - margin, 3 * (1 + slack) + margin]
    np.testing.assert_allclose(widened(ends, kernel, aliased), expected, rtol=1e-10)
    assert widened(NormInterval(jnp.asarray(0.5 * margin), jnp.asarray(1.0)), kernel, aliased).lower == 0
    # The longer side of a symbol may be that of the outputs of a group, or of the phases of a stride.
    wide = jnp.zeros((3, 2, 200), jnp.float32)
    for layer, rows in (
        (CircularConv((8,)), 200),
        (CircularConv((8,), feature_group_count=4), 50),
        (UnboundedConv(strides=64), 200),
        (UnboundedConv(strides=128), 256),
        (ZeroPaddedConv((8,), padding=((1, 1),), input_dilation=3), 600),
    ):
        assert slack_of(wide, layer) == 4 * math.sqrt(rows) * eps
    assert slack_of(jnp.zeros((3, 200), jnp.float32), Dense()) == 4 * math.sqrt(200) * eps


# Bounds that read the coefficients alone, on one axis

BOUNDED = [
    (CircularConv((40,)), (3, 2, 3)),
    (CircularConv((5,), feature_group_count=2), (4, 2, 6)),
    (CircularConv((60,), strides=2, kernel_dilation=3), (3, 2, 2)),
    (UnboundedConv(strides=2), (5, 2, 3)),
    (ZeroPaddedConv((50,), strides=2), (5, 3, 2)),
    (ZeroPaddedConv((30,), padding=((2, 2),), input_dilation=3, feature_group_count=2), (4, 2, 6)),
    (ZeroPaddedConv((30,), padding=((2, 2),), input_dilation=3, strides=2), (5, 2, 1)),
]


def literal_tensors(kernel, op) -> list[np.ndarray]:
    """`(groups, terms, phases * c_in // groups, c_out // groups)` of every cover: taps sorted by phase and stride."""
    groups, dilation = op.feature_group_count, op.kernel_dilation[0] if not isinstance(op, UnboundedConv) else 1
    stride = op.strides if isinstance(op.strides, int) else op.strides[0]
    by_group = np.stack(np.split(kernel, groups, axis=-1))
    of_covers = [(by_group, stride)]
    input_dilation = getattr(op, "input_dilation", (1,))[0]
    if input_dilation > 1:
        adjoint = by_group.swapaxes(-1, -2), input_dilation
        of_covers = [*of_covers, adjoint] if stride > 1 else [adjoint]
    found = []
    for taps, step in of_covers:
        offsets = [dilation * t for t in range(taps.shape[1])]
        terms = sorted({offset // step for offset in offsets})
        tensor = np.zeros((groups, len(terms), step, *taps.shape[2:]))
        for t, offset in enumerate(offsets):
            tensor[:, terms.index(offset // step), offset % step] = taps[:, t]
        found.append(tensor.reshape((groups, len(terms), -1, taps.shape[-1])))
    return found


def literal_lip_bound(tensor, oversampling: int) -> float:
    terms = tensor.shape[1]
    angles = 2 * np.pi * np.arange(oversampling * max(terms - 1, 1)) / (oversampling * max(terms - 1, 1))
    symbols = np.einsum("wt,gtio->wgio", np.exp(-1j * np.outer(angles, np.arange(terms))), tensor)
    return np.linalg.norm(symbols, axis=(2, 3)).max() / np.sqrt(1 - (terms - 1) / len(angles))


def literal_fantastic(tensor) -> float:
    groups, terms, rows, columns = tensor.shape
    tall, wide = tensor.reshape((groups, -1, columns)), tensor.swapaxes(1, 2).reshape((groups, rows, -1))
    return np.sqrt(terms) * min(np.linalg.norm(side, 2, axis=(1, 2)).max() for side in (tall, wide))


@pytest.mark.parametrize(("op", "shape"), BOUNDED, ids=str)
def test_coefficients_and_the_bounds_that_read_them(op, shape):
    kernel = 1e3 * gaussian(shape)
    expected = literal_tensors(kernel, op)
    found = coefficients.tensors(jnp.asarray(kernel), op)
    assert [coefficients.num_terms(tensor) for tensor in found] == [tensor.shape[1] for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(other, axis=None))
    bounds_of = {
        lambda k: entries._lip_bound.__wrapped__(k, op, 2): lambda tensor: literal_lip_bound(tensor, 2),
        lambda k: entries._lip_bound.__wrapped__(k, op, 8): lambda tensor: literal_lip_bound(tensor, 8),
        lambda k: entries._l1.__wrapped__(k, op): lambda tensor: np.abs(tensor).sum(),
        lambda k: entries._channel_l1.__wrapped__(k, op): lambda tensor: np.linalg.norm(
            np.abs(tensor).sum(axis=1), 2, axis=(1, 2)
        ).max(),
        lambda k: reshapings._fantastic_four.__wrapped__(k, op, None): literal_fantastic,
    }
    for function, literal in bounds_of.items():
        value, least = float(function(jnp.asarray(kernel))), min(map(literal, expected))
        # Never below, and above by the room for rounding alone.
        assert least <= value <= least * (1 + 1e-12)


def test_coefficients_and_lip_bound_on_two_axes_and_of_one_tap():
    kernel = gaussian((3, 2, 2, 3))
    [tensor] = coefficients.tensors(jnp.asarray(kernel), CircularConv((9, 9)))
    np.testing.assert_array_equal(tensor[0], kernel)
    assert coefficients.num_terms(tensor) == 6
    symbol = np.fft.fft2(kernel, (8, 4), axes=(0, 1))
    expected = np.linalg.norm(symbol, axis=(2, 3)).max() / np.sqrt((1 - 2 / 8) * (1 - 1 / 4))
    found = entries._lip_bound.__wrapped__(jnp.asarray(kernel), CircularConv((9, 9)), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    single = jnp.asarray(gaussian((1, 2, 3)))
    found = entries._lip_bound.__wrapped__(single, CircularConv((9,)), 4)
    np.testing.assert_allclose(found, np.linalg.norm(single), rtol=1e-12)


def test_matrix_norms_of_stacks():
    """Exact, with the derivative of the largest; power steps are from below, and have no second derivative."""
    stack = jnp.asarray(gaussian((3, 4, 5)))
    norms = np.linalg.norm(stack, 2, axis=(1, 2))
    np.testing.assert_allclose(coefficients.matrix_norm(stack), norms.max(), rtol=1e-12)
    few, many = (float(coefficients.matrix_norm(stack, steps)) for steps in (1, 300))
    assert few < norms.max() * (1 - 1e-6)
    np.testing.assert_allclose(many, norms.max(), rtol=1e-9)
    largest = norms.argmax()
    left, _, right = np.linalg.svd(stack[largest])
    expected = np.zeros(stack.shape)
    expected[largest] = np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(jax.grad(coefficients.matrix_norm)(stack), expected, atol=1e-9)
    with pytest.raises(ValueError, match="num_steps"):
        jax.jvp(jax.grad(lambda s: coefficients.matrix_norm(s, 2)), (stack,), (stack,))


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 3, 3, 2), (2, 2, 2, 2, 3)], ids=str)
def test_the_higher_order_power_method_written_out(shape):
    """From waves on the taps: two steps on the channels, then one on the taps of one axis or two on those of several.

    The vectors give the real value, that of the best start.
    """
    weights, terms = gaussian(shape), shape[:-2]
    num_starts, num_sweeps = 3, 2
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (num_starts, len(terms)))
    angles[0] = 0
    drawn = np.asarray(fixed_start((2, num_starts, shape[-1]), jnp.float32), np.float64)
    best = 0.0
    for angle, column in zip(angles, drawn[0] + 1j * drawn[1], strict=True):
        vectors = [np.exp(1j * a * np.arange(k)) for a, k in zip(angle, terms, strict=True)]
        vectors = [vector / np.linalg.norm(vector) for vector in (*vectors, np.ones(shape[-2]), column)]

        def step(axis, vectors=vectors):
            rest = weights.astype(complex)
            for other in reversed(range(len(shape))):
                rest = rest if other == axis else np.tensordot(rest, vectors[other], (other, 0))
            vectors[axis] = np.conj(rest) / np.linalg.norm(rest)
            return np.linalg.norm(rest)

        channels, axes = (len(terms), len(terms) + 1), range(len(terms))
        for _ in range(num_sweeps):
            for axis in (*channels, *channels, *axes, *(axes if len(terms) > 1 else ())):
                step(axis)
        value = [step(axis) for axis in (*channels, *channels)][-1]
        best = max(best, value)
    vectors = power_method._best_vectors(jnp.asarray(weights), num_starts, num_sweeps)
    np.testing.assert_allclose([np.linalg.norm(vector) for vector in vectors], 1, rtol=1e-12)
    value = functools.reduce(lambda rest, vector: np.tensordot(rest, vector, (0, 0)), vectors, weights)
    np.testing.assert_allclose(value, best, rtol=1e-10)
    np.testing.assert_allclose(power_method._value(jnp.asarray(weights), vectors), best, rtol=1e-10)


def test_the_power_method_stops_where_values_do_not_grow():
    """And at a zero tensor, whose value is 0."""
    weights = jnp.asarray(gaussian((3, 2, 4)))
    many, more = (power_method._best_vectors(weights, 2, steps) for steps in (1000, 2000))
    for a, b in zip(many, more, strict=True):
        np.testing.assert_array_equal(a, b)
    assert power_method._value(jnp.zeros((3, 2, 4)), power_method._best_vectors(jnp.zeros((3, 2, 4)), 2, 5)) == 0


@pytest.mark.parametrize(
    "op", [CircularConv((8,)), ZeroPaddedConv((8,)), CircularConv((8,), feature_group_count=2), Dense()], ids=str
)
def test_tensor_norm_is_the_root_of_the_number_of_taps_times_the_value(op):
    """That of the largest group."""
    shape = (3, 4) if op == Dense() else (3, 2, 4)
    weights = jnp.asarray(gaussian(shape))
    found = power_method.tensor_norm(weights, op, num_starts=5, num_steps=40)
    if op == Dense():
        expected = np.linalg.norm(weights, 2)
    else:
        groups = np.split(weights, getattr(op, "feature_group_count", 1), axis=-1)
        best = [
            power_method._value(group, power_method._best_vectors(group, 5, 40)) for group in map(jnp.asarray, groups)
        ]
        expected = np.sqrt(3) * max(best)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# The last one has as many frequencies as the coarse grid, and so needs no factor.
ITERATED = [*BOUNDED, (Dense(), (4, 3)), (CircularConv((16,)), (3, 2, 2))]


@pytest.mark.parametrize(("num_steps", "oversampling"), [(1, 2), (3, 8)])
@pytest.mark.parametrize(("op", "shape"), ITERATED, ids=str)
def test_gram_iteration_written_out(op, shape, num_steps, oversampling):
    """`||G^(2^t)||_F^(1/2^(t+1))` over the layer's frequencies, or over fewer with what they may miss."""
    kernel = 1e3 * gaussian(shape)
    tensors = [kernel[None, None]] if isinstance(op, Dense) else literal_tensors(kernel, op)
    found = []
    for k, tensor in enumerate(tensors):
        terms = tensor.shape[1]
        own, factor = 1, 1.0
        exponents = np.arange(terms)
        if not isinstance(op, Dense):
            _, cover = covers(jnp.asarray(kernel), op)[k]
            stride = cover.strides if isinstance(cover.strides, int) else cover.strides[0]
            dilation = 1 if isinstance(op, UnboundedConv) else op.kernel_dilation[0]
            exponents = np.unique(np.arange(shape[0]) * dilation // stride)
            own = 2**24 if isinstance(op, UnboundedConv) else cover.grid[0]
            degree = exponents[-1]
            if oversampling * degree < own:
                own, factor = oversampling * degree, 1 / np.cos(np.pi / (2 * oversampling))
        waves = np.exp(-2j * np.pi * np.outer(np.arange(own), exponents) / own)
        symbols = np.einsum("wt,gtio->wgio", waves, tensor)
        powers = np.linalg.matrix_power(symbols.conj().swapaxes(-1, -2) @ symbols, 2**num_steps)
        found.append(factor * np.linalg.norm(powers, axis=(-2, -1)).max() ** (1 / 2 ** (num_steps + 1)))
    value = float(gram._gram_iteration.__wrapped__(jnp.asarray(kernel), op, num_steps, oversampling))
    assert min(found) <= value <= min(found) * (1 + 1e-12)


@pytest.mark.parametrize("excess", [0.0, 0.25])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Dense(), (4, 3)),
        (CircularConv((6,)), (3, 2, 2)),
        (CircularConv((3,)), (5, 1, 2)),
        (ZeroPaddedConv((6,), strides=2), (3, 2, 2)),
        (ZeroPaddedConv((5,), padding=((2, 2),), input_dilation=3, strides=2), (5, 2, 1)),
    ],
    ids=str,
)
def test_intervals_by_pairs(op, shape, excess):
    """The lower end is the layer's norm; the upper one that of the smallest cover, with what may exceed it."""
    kernel = jnp.asarray(1e3 * gaussian(shape))
    covered = [] if isinstance(op, Dense) else covers(kernel, op)
    above = tuple((leading_pair(k, cover), excess) for k, cover in covered)
    below = leading_pair(kernel, op)
    longer = below._replace(input=1.1 * below.input, output=1.1 * below.output)
    norm = np.linalg.norm(dense(kernel, op), 2)
    highest = min([np.linalg.norm(dense(k, cover), 2) for k, cover in covered], default=norm)
    highest = highest * (1 + excess) if covered else highest
    for pair in (below, longer):
        found = interval._interval.__wrapped__(kernel, op, pair, above, None)
        assert norm * (1 - 1e-12) <= found.lower <= norm
        assert highest <= found.upper <= highest * (1 + 1e-12)


def test_the_upper_end_holds_frequencies_beyond_the_grid(monkeypatch):
    """Of layers without edges alone: a circular one has no other frequencies than those of its grid."""
    kernel = jnp.asarray(gaussian((3, 2, 2)))
    monkeypatch.setattr(interval, "overshoot", lambda *_: 1.5)
    for op, factor in ((CircularConv((6,)), 1), (UnboundedConv(), 1.5)):
        pair = leading_pair(kernel, op)
        low, high = interval._interval.__wrapped__(kernel, op, pair, ((pair, 0.0),), None)
        np.testing.assert_allclose(high, factor * low, rtol=1e-12)


def test_rounding_of_taps_that_cancel_is_that_of_the_taps():
    """Two large taps fall on each other with opposite signs. The room of other layers is that of the norm."""
    op, kernel = CircularConv((3,)), gaussian((5, 1, 1))
    kernel[0], kernel[3] = 1e9, -1e9
    pair = leading_pair(jnp.asarray(kernel), op)
    found = interval._interval.__wrapped__(jnp.asarray(kernel), op, pair, ((pair, 0.0),), None)
    room = 4 * np.sqrt(5) * np.finfo(np.float64).eps * np.linalg.norm(kernel)
    assert found.upper - found.lower >= 1.8 * room
    value = float(gram._gram_iteration.__wrapped__(jnp.asarray(kernel), op, 8, 8))
    assert value >= np.linalg.norm(dense(kernel, op), 2) + 0.9 * room
    identity = jnp.eye(64)
    found = interval._interval.__wrapped__(identity, Dense(), leading_pair(identity, Dense()), (), None)
    assert found.upper - 1 <= 2 * 4 * np.sqrt(64) * np.finfo(np.float64).eps


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Dense(), (4, 3)),
        (CircularConv((40,)), (3, 4, 5)),
        (UnboundedConv(), (3, 4, 5)),
        (ZeroPaddedConv((7,)), (3, 2, 3)),
    ],
    ids=str,
)
def test_certified_intervals_have_the_width_that_was_asked_for(op, shape):
    """Few frequencies are all looked at, and small matrices are explicit."""
    kernel = jnp.asarray(gaussian(shape))
    if isinstance(op, UnboundedConv):
        norm = np.linalg.norm(np.fft.fft(kernel, 4096, axis=0), 2, axis=(1, 2)).max()
    else:
        norm = np.linalg.norm(dense(kernel, op), 2)
    widths = []
    for resolution in (0.0, 1e-4, 0.01, 0.3):
        low, high = interval.certified(kernel, op, resolution=resolution)
        assert low <= norm * (1 + 1e-6)
        assert norm <= high
        widths.append(float(high / low - 1))
        assert widths[-1] <= max(resolution, 1.1e-6) * (1 + 1e-9)
    if isinstance(op, ZeroPaddedConv):
        assert widths[0] < 1e-12
    if isinstance(op, UnboundedConv):
        assert widths[-1] > 1e-5
    np.testing.assert_array_equal(interval.certified(kernel, op), interval.certified(kernel, op, resolution=0.01))
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="resolution: got"):
            interval.certified(kernel, op, resolution=wrong)


@pytest.mark.parametrize("op", [Dense(), CircularConv((9,)), ZeroPaddedConv((9,)), UnboundedConv()], ids=str)
def test_the_interval_of_a_proven_pair_holds_the_norm(op):
    """It is exact to rounding, but for frequencies without an end what the search leaves open."""
    kernel = jnp.asarray(gaussian((2, 3) if op == Dense() else (3, 2, 3)))
    low, high = interval.certified_by_pair(kernel, op, leading_pair(kernel, op))
    open_share = torus_excess(kernel.dtype) if isinstance(op, UnboundedConv) else 0.0
    if isinstance(op, UnboundedConv):
        norm = np.linalg.norm(np.fft.fft(kernel, 2**14, axis=0), 2, axis=(1, 2)).max()
        assert low >= norm * (1 - 1e-9)
    else:
        norm = np.linalg.norm(dense(kernel, op), 2)
        assert low <= norm
    assert low * (1 + open_share) < high <= low * (1 + 1.01 * open_share + 1e-13)
    assert norm <= high


def test_the_banded_proof_of_an_interval():
    """A norm above the limit is not proven, nor is one tried whose upper end is as low already."""
    op, kernel = ZeroPaddedConv((6,)), jnp.asarray(gaussian((3, 2, 2)), jnp.float32)
    norm = np.linalg.norm(dense(kernel, op), 2)
    for share, upper, expected in ((1.0, 2 * norm, True), (0.98, 2 * norm, False), (1.0, 1.009 * norm, False)):
        lower, upper = (jnp.asarray(end, jnp.float32) for end in (share * norm, upper))
        proven, limit = interval._banded_proof(kernel, op, lower, upper, 0.01)
        assert proven == expected
        room = banded.room(op, kernel.shape, kernel.dtype)
        np.testing.assert_allclose(limit, share * norm * 1.01 * (1 + room), rtol=2e-7)
    assert room > 1e-6


@pytest.mark.parametrize("affordable", [True, False])
def test_the_interval_of_layers_above_explicit_matrices(affordable, monkeypatch):
    """Both ends lie as far apart as was asked for where the banded proof is affordable, else as the cover has it."""
    monkeypatch.setattr(interval, "is_proven", lambda *_: False)
    monkeypatch.setattr(banded, "is_affordable", lambda *_: affordable)
    op, kernel = ZeroPaddedConv((6,)), jnp.asarray(gaussian((3, 2, 2), 3))
    norm, cover = (np.linalg.norm(dense(kernel, layer), 2) for layer in (op, CircularConv((8,))))
    assert cover > 1.02 * norm
    low, high = interval.certified(kernel, op, resolution=0.01)
    assert low <= norm <= high
    np.testing.assert_allclose(low, norm, rtol=1e-9)
    np.testing.assert_allclose(high, 1.01 * norm if affordable else cover, rtol=1e-9)
    # The room for rounding is a part of the width.
    low, high = (float(end) for end in interval.certified(kernel.astype(jnp.float32), op, resolution=0.01))
    assert low <= norm <= high
    if affordable:
        assert 1.01 * (1 - 2e-6) <= high / low <= 1.01 * (1 + 2e-7)
