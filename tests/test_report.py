"""Reports against SVDs in NumPy's float64, and the reading of checkpoints: every array is a layer or has a reason."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from cases import dense, gaussian
from flax import linen as nn
from flax import nnx

import jaxsrn
import jaxsrn.linen as jlinen
import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv
from jaxsrn.report import analyze
from jaxsrn.report.comparing import compare
from jaxsrn.report.files import BrokenFile, open_arrays
from jaxsrn.report.kernels import find_kernels
from jaxsrn.report.matrices import numbers_of_matrix
from jaxsrn.report.named_arrays import ArrayInfo
from jaxsrn.report.rewriting import normalize
from jaxsrn.report.table import digits

CONV, MATRIX = (3, 3, 2, 4), (4, 6)


def array(*shape, dtype=np.float32):
    return gaussian(shape).astype(dtype)


def supremum(kernel, groups: int = 1) -> float:
    """The norm of the unbounded layer: a coarse grid of frequencies, then finer ones around the best."""
    *taps, width, outputs = kernel.shape
    kernel, per_group = kernel.astype(np.float64), outputs // groups
    centre, radius = np.zeros(len(taps)), np.pi
    for _ in range(7):
        axes = [c + radius * np.linspace(-1, 1, 41) for c in centre]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape((-1, len(taps)))
        phases = np.exp(
            -1j * points @ np.stack(np.meshgrid(*map(np.arange, taps), indexing="ij")).reshape((len(taps), -1))
        )
        symbols = np.tensordot(phases, kernel.reshape((-1, width, outputs)), 1)
        values = [
            np.linalg.svd(symbols[..., g * per_group : (g + 1) * per_group], compute_uv=False) for g in range(groups)
        ]
        values = np.max(values, axis=(0, 2))
        centre, radius = points[np.argmax(values)], radius / 10
    return float(values.max())


def norm_of(kernel, op) -> float:
    if isinstance(op, UnboundedConv):
        return supremum(kernel, op.feature_group_count)
    return float(np.linalg.norm(dense(kernel, op), 2))


def squared_frobenius(kernel, op) -> float:
    """Per output sample where the layer is unbounded."""
    return float(np.sum(np.square(kernel if isinstance(op, UnboundedConv) else dense(kernel, op), dtype=np.float64)))


def check(layer, kernel, op):
    assert layer.operator == op
    assert layer.kernel_shape == kernel.shape
    kernel = np.asarray(kernel, np.float64)
    norm = norm_of(kernel, op)
    low, high = layer.norm_interval
    assert layer.spectral_norm == pytest.approx(norm, rel=1e-5)
    assert low <= norm * (1 + 1e-9)
    assert norm <= high * (1 + 1e-9)
    assert layer.stable_rank == pytest.approx(squared_frobenius(kernel, op) / norm**2, rel=2e-5)
    flat = kernel.reshape((-1, kernel.shape[-1]))
    assert layer.flattened_norm == pytest.approx(np.linalg.norm(flat, 2), rel=1e-5)
    least, most = layer.stable_rank_low, layer.stable_rank_high
    assert layer.share == pytest.approx((layer.stable_rank - least) / (most - least))


# Values


WEIGHTS = {
    "conv.weight": array(4, 2, 3, 3),
    "depthwise.weight": array(4, 1, 3, 3),
    "pointwise.weight": array(6, 4, 1, 1),
    "fc.weight": array(6, 4),
    "fc.bias": array(6),
}


def test_numbers_of_bare_weights_are_those_of_numpy():
    report = analyze(WEIGHTS)
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["conv.weight", "depthwise.weight", "fc.weight", "pointwise.weight"]
    for name in ("conv.weight", "pointwise.weight"):
        check(layers[name], WEIGHTS[name].transpose(2, 3, 1, 0), UnboundedConv())
    check(
        layers["depthwise.weight"],
        WEIGHTS["depthwise.weight"].transpose(2, 3, 1, 0),
        UnboundedConv(feature_group_count=4),
    )
    check(layers["fc.weight"], WEIGHTS["fc.weight"].T, Dense())
    assert [skipped.name for skipped in report.skipped] == ["fc.bias"]
    norms = [layer.spectral_norm for layer in report.layers]
    assert report.product_of_norms == pytest.approx(math.prod(norms))
    assert report.sum_of_stable_ranks == pytest.approx(sum(layer.stable_rank for layer in report.layers))


def test_numbers_at_an_image_size_and_of_all_singular_values():
    kernel = WEIGHTS["conv.weight"].transpose(2, 3, 1, 0)
    (layer,) = analyze({"conv.weight": WEIGHTS["conv.weight"]}, input_shape=(5, 4), spectra=True).layers
    op = ZeroPaddedConv((5, 4))
    check(layer, kernel, op)
    values = np.linalg.svd(dense(kernel, op), compute_uv=False)
    shares = values / values.sum()
    assert layer.condition_number == pytest.approx(values[0] / values[-1], rel=1e-3)
    assert layer.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)


@pytest.mark.parametrize("lapack", [True, False], ids=["lapack", "compiled"])
def test_matrices_of_every_shape_and_scale(lapack, monkeypatch):
    """Small ones compile nothing, large ones are searched; tall Gram matrices are sums over blocks of rows."""
    monkeypatch.setattr("jaxsrn.report.matrices._BLOCK", 8)
    if lapack:
        monkeypatch.setattr("jaxsrn.report.layers._compiled_numbers", lambda *_: pytest.fail("a program was compiled"))
    else:
        monkeypatch.setattr("jaxsrn.report.layers._LAPACK", 1)
    kernels = {
        f"layer{i}.kernel": scale * gaussian(shape, i)
        for i, (shape, scale) in enumerate([(MATRIX, 1.0), (MATRIX[::-1], 1e-100), ((9, 3), 1e100), (MATRIX, 1e-30)])
    }
    kernels["conv.kernel"] = array(1, 1, 3, 2)
    calls = []
    report = analyze(kernels, input_shape=(4, 5), progress=lambda *args: calls.append(args))
    for layer in report.layers:
        if layer.name == "conv.kernel":
            check(layer, kernels[layer.name], ZeroPaddedConv((4, 5)))
        else:
            check(layer, kernels[layer.name], Dense())
    assert calls == [*((i, 5, layer.name) for i, layer in enumerate(report.layers)), (5, 5, "")]


def test_intervals_of_matrices_hold_their_norms():
    """Of float64 matrices whose leading values are equal, with hundreds of rows."""
    for seed in range(20):
        left, right = (np.linalg.qr(gaussian((n, 60), seed))[0] for n in (700, 60))
        values = np.ones(60)
        values[30:] = 1e-9
        matrix = (left * values) @ right.T
        low, high = numbers_of_matrix(matrix).norm_interval
        assert low <= 1 <= high
        assert high - low < 1e-11


def test_all_singular_values_of_matrices():
    kernels = {
        "full.kernel": array(4, 6),
        "singular.kernel": np.outer(np.ones(4), np.ones(3)),
        "zero.kernel": np.zeros((3, 3)),
        "broken.kernel": np.full((3, 3), np.nan),
    }
    layers = {layer.name: layer for layer in analyze(kernels, spectra=True).layers}
    values = np.linalg.svd(kernels["full.kernel"].astype(np.float64), compute_uv=False)
    shares = values / values.sum()
    assert layers["full.kernel"].condition_number == pytest.approx(values[0] / values[-1])
    assert layers["full.kernel"].effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert layers["singular.kernel"].condition_number > 1e15
    assert layers["singular.kernel"].effective_rank == pytest.approx(1)
    assert layers["zero.kernel"].effective_rank == 0
    assert math.isnan(layers["broken.kernel"].effective_rank)


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
def test_weights_in_float64_are_taken_in_float64(as_users_have_it, scale):
    kernel = scale * np.asarray(gaussian((4, 2, 3)), np.float64)
    (layer,) = analyze({"conv.weight": kernel}, input_shape=(8,)).layers
    norm = np.linalg.norm(dense(kernel.transpose(2, 1, 0), ZeroPaddedConv((8,))), 2)
    assert layer.spectral_norm == pytest.approx(norm, rel=1e-12)
    assert layer.norm_interval.lower <= norm <= layer.norm_interval.upper


def test_zero_and_broken_kernels_stand_out():
    bad = array(*MATRIX)
    bad[0, 0] = np.nan
    plain, zero = array(*MATRIX), np.zeros(MATRIX, np.float32)
    weights = {"a.kernel": plain, "b.kernel": 10 * plain, "c.kernel": bad, "d.kernel": zero, "e.kernel": plain}
    report = analyze(weights)
    by_name = {layer.name: layer for layer in report.layers}
    assert math.isnan(by_name["c.kernel"].spectral_norm)
    assert by_name["d.kernel"].spectral_norm == by_name["d.kernel"].stable_rank == 0
    assert set(report.outliers) == {"b.kernel", "c.kernel", "d.kernel"}
    assert "not finite" in report.outliers["c.kernel"]
    assert json.loads(json.dumps(report.to_dict()))["layers"][2]["spectral_norm"] == "nan"
    # A product with a number that is not known is not known.
    assert math.isnan(report.product_of_norms)


# Models


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, epsilon=0.5, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 2, (3, 3), strides=2, rngs=rngs)
        self.heads = nnx.LinearGeneral(2, (2, 3), rngs=rngs)
        self.table = nnx.Embed(5, 3, rngs=rngs)
        self.extra = nnx.Param(jnp.ones((2, 2)))

    def __call__(self, x):
        return self.heads(self.up(self.norm(self.conv(x), use_running_average=True)))


def test_a_model_says_what_its_layers_are():
    model = Network(nnx.Rngs(0))
    report = analyze(model, jnp.zeros((1, 4, 4, 2), jnp.float32))
    assert [layer.name for layer in report.layers] == ["conv/kernel", "up/kernel", "heads/kernel", "table/embedding"]
    conv, up, heads, table = report.layers
    check(conv, np.asarray(model.conv.kernel[...]), ZeroPaddedConv((4, 4), strides=2))
    check(heads, np.asarray(model.heads.kernel[...]).reshape((2, 6)), Dense())
    check(table, np.asarray(model.table.embedding[...]), Dense())
    # The explicit matrix of the transposed layer, a basis vector at a time.
    basis = jnp.eye(2 * 2 * 4, dtype=jnp.float32).reshape((16, 2, 2, 4))
    matrix = np.asarray(model.up(basis)).reshape((16, -1)) - np.asarray(model.up(0 * basis)).reshape((16, -1))
    assert up.spectral_norm == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-5)
    assert up.stable_rank == pytest.approx(np.sum(matrix**2) / np.linalg.norm(matrix, 2) ** 2, rel=1e-5)
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert "of no layer in reach" in reasons["extra"]
    assert {"norm/scale", "norm/mean", "norm/var", "up/bias", "heads/bias"} <= set(reasons)


def test_batch_norms_of_a_model_are_folded_with_their_own_epsilon():
    model = Network(nnx.Rngs(0))
    model.norm.scale[...] = jnp.asarray([1.0, 2.0, 3.0, -4.0], jnp.float32)
    model.norm.var[...] = jnp.asarray([0.5, 1.0, 2.0, 3.0], jnp.float32)
    report = analyze(model, fold_batch_norm=True)
    factors = np.array([1.0, 2.0, 3.0, -4.0]) / np.sqrt(np.array([0.5, 1.0, 2.0, 3.0]) + 0.5)
    conv = report.layers[0]
    assert conv.batch_norm == "norm"
    # Strides on an image without edges: the taps of each phase are channels of their own.
    kernel = np.asarray(model.conv.kernel[...]) * factors
    phases = np.zeros((2, 2, 8, 4))
    for i, j in np.ndindex(3, 3):
        phase = 2 * (2 * (i % 2) + j % 2)
        phases[i // 2, j // 2, phase : phase + 2] = kernel[i, j]
    assert conv.spectral_norm == pytest.approx(supremum(phases), rel=1e-5)


class Enlarging(nnx.Module):
    def __init__(self, transpose_kernel, strides):
        rngs, options = nnx.Rngs(0), {"strides": strides, "transpose_kernel": transpose_kernel}
        self.conv = nnx.ConvTranspose(3, 4, (3, 3), use_bias=False, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.norm.scale[...] = jnp.asarray([0.1, 1.0, 3.0, 10.0], jnp.float32)
        self.norm.var[...] = jnp.asarray([0.5, 1.0, 2.0, 0.1], jnp.float32)

    def __call__(self, x):
        return self.norm(self.conv(x))


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_batch_norms_of_transposed_convolutions_scale_the_outputs(transpose_kernel, strides):
    """The operator may be that of the adjoint, whose kernel has the outputs of the layer on another axis."""
    model, images = Enlarging(transpose_kernel, strides), jnp.eye(75).reshape((75, 5, 5, 3))
    norm = np.linalg.norm(np.asarray(model(images)).reshape((75, -1)), 2)
    for inputs in ((images[:1],), ()):
        (layer,) = analyze(model, *inputs, fold_batch_norm=True).layers
        assert layer.batch_norm == "norm"
        assert norm <= layer.norm_interval.upper * (1 + 1e-6)
        if inputs:
            assert layer.spectral_norm == pytest.approx(norm, rel=1e-5)


def test_wrapped_layers_are_reported_as_they_compute():
    wrapped = nnx.Sequential(jnnx.SpectralNorm(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), norm=2.0))
    (layer,) = analyze(wrapped).layers
    assert layer.spectral_norm == pytest.approx(2.0, rel=1e-5)

    module = jlinen.SpectralNorm(nn.Dense(6), norm=2.0)
    x = jnp.ones((1, 4), jnp.float32)
    (layer,) = analyze(module, module.init(jax.random.key(0), x), x).layers
    assert layer.spectral_norm == pytest.approx(2.0, rel=1e-5)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(4))(x)


def test_recurrent_cells_are_reported_gate_by_gate_however_they_are_stored():
    cell = nnx.GRUCell(4, 6, rngs=nnx.Rngs(0))
    layers = {layer.name: layer for layer in analyze(cell).layers}
    assert list(layers) == [f"dense_{side}/kernel[{gate}]" for side in "hi" for gate in "rzn"]
    check(layers["dense_i/kernel[z]"], np.asarray(cell.dense_i.kernel[...])[:, 6:12], Dense())

    # The kernels of Linen's cell are parameters of no layer of their own.
    x = jnp.zeros((1, 2, 4), jnp.float32)
    variables = Recurrent().init(jax.random.key(0), x)
    report = analyze(Recurrent(), variables, x)
    scope = "params/OptimizedLSTMCell_0"
    assert {layer.name for layer in report.layers} == {
        f"{scope}/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"
    }


def test_a_convolutional_cell_is_reported_gate_by_gate_as_its_model_splits_them():
    cell, x = nn.ConvLSTMCell(3, (3, 3), padding="CIRCULAR"), jnp.zeros((1, 5, 4, 2), jnp.float32)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    variables = cell.init(jax.random.key(0), carry, x)
    report = analyze(cell, variables, carry, x)
    layers = {layer.name.removeprefix("params/"): layer for layer in report.layers}
    assert set(layers) == {f"{side}/kernel[{gate}]" for side in ("ih", "hh") for gate in "igfo"}
    # The third quarter of the outputs is the gate that forgets.
    kernel = np.asarray(variables["params"]["hh"]["kernel"])[..., 6:9]
    check(layers["hh/kernel[f]"], kernel, CircularConv((5, 4)))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(layer, carry, _):
            return layer(carry), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(4, name="layers"), x, None)[0]


def test_stacked_layers_are_reported_one_by_one():
    module, x = Scanned(), jnp.ones((1, 4), jnp.float32)
    variables = module.init(jax.random.key(0), x)
    kernels = np.asarray(variables["params"]["layers"]["kernel"])
    assert kernels.shape == (3, 4, 4)
    # By the model, by the stacked bias, and by being told.
    kernel_alone = {"layers": {"kernel": kernels}}
    for report in (analyze(module, variables, x), analyze(variables), analyze(kernel_alone, stacked=["layers"])):
        assert [layer.name.rsplit("/", 1)[-1] for layer in report.layers] == ["kernel[0]", "kernel[1]", "kernel[2]"]
        for layer, kernel in zip(report.layers, kernels, strict=True):
            check(layer, kernel, Dense())


def test_what_does_not_fit_together_is_an_error():
    model = Network(nnx.Rngs(0))
    with pytest.raises(ValueError, match="layout: got it beside a model"):
        analyze(model, layout="OIHW")
    with pytest.raises(ValueError, match="inputs: got it beside dict"):
        analyze(WEIGHTS, jnp.zeros(3))
    with pytest.raises(ValueError, match="layout: got 'HIWO', expected one of HWIO"):
        analyze(WEIGHTS, layout="HIWO")
    with pytest.raises(ValueError, match="groups: got 'other'"):
        analyze(WEIGHTS, groups={"other": 2})
    with pytest.raises(ValueError, match=r"groups, strides: got fc\.weight, expected names of convolutions"):
        analyze({"fc.weight": array(4, 4)}, strides={"fc.weight": 2})
    for source in (None, 5, object()):
        with pytest.raises(ValueError, match=r"source: got a .*, expected a model, a pytree of parameters or a path"):
            analyze(source)
    with pytest.raises(ValueError, match="inputs: got none for Scanned"):
        analyze(Scanned(), {"params": {}})


# Reading names and shapes


def found(shapes, dtype=np.float32, **options):
    """`{name: (operator, kernel shape)}` and `{name: reason}` of arrays of these shapes."""
    infos = {name: ArrayInfo(shape, np.dtype(dtype)) for name, shape in shapes.items()}
    kernels, skipped = find_kernels(infos, **options)
    named = {kernel.array for kernel in kernels} | {entry.name for entry in skipped}
    assert named == set(shapes), "every array is in one of the lists"
    return {kernel.name: (kernel.op, kernel.shape) for kernel in kernels}, {s.name: s.reason for s in skipped}


UNBOUNDED = UnboundedConv()
READINGS = {
    "PyTorch audio": ({"conv.weight": (8, 2, 5), "conv.bias": (8,)}, {"conv.weight": (UNBOUNDED, (5, 2, 8))}),
    "PyTorch video": ({"conv.weight": (8, 2, 3, 4, 5)}, {"conv.weight": (UNBOUNDED, (3, 4, 5, 2, 8))}),
    "Keras": (
        {"a/kernel:0": (3, 3, 2, 8), "b/depthwise_kernel:0": (3, 3, 8, 2), "c/kernel:0": (8, 5)},
        {
            "a/kernel:0": (UNBOUNDED, (3, 3, 2, 8)),
            "b/depthwise_kernel:0": (UnboundedConv(feature_group_count=8), (3, 3, 1, 16)),
            "c/kernel:0": (Dense(), (8, 5)),
        },
    ),
    "one channel in": (
        {"conv1.weight": (8, 1, 3, 3), "conv2.weight": (8, 8, 3, 3)},
        {"conv1.weight": (UNBOUNDED, (3, 3, 1, 8)), "conv2.weight": (UNBOUNDED, (3, 3, 8, 8))},
    ),
    "depthwise by shape": (
        {"a.weight": (8, 3, 1, 1), "b.weight": (8, 1, 3, 3), "c.weight": (8, 1, 3, 3)},
        {
            "a.weight": (UNBOUNDED, (1, 1, 3, 8)),
            "b.weight": (UnboundedConv(feature_group_count=8), (3, 3, 1, 8)),
            "c.weight": (UnboundedConv(feature_group_count=8), (3, 3, 1, 8)),
        },
    ),
    "names that say nothing": (
        {"w1": (3, 3, 4, 8), "w2": (8, 4, 5, 5), "w3": (7, 9)},
        {"w1": (UNBOUNDED, (3, 3, 4, 8)), "w2": (UNBOUNDED, (5, 5, 4, 8)), "w3": (Dense(), (7, 9))},
    ),
    "an undecided one beside others": (
        {"w1": (3, 3, 4, 8), "w2": (3, 3, 3, 3)},
        {"w1": (UNBOUNDED, (3, 3, 4, 8)), "w2": (UNBOUNDED, (3, 3, 3, 3))},
    ),
    "a stored transposition": (
        {"weight": (64, 3, 3, 3), "mlx.weight": (3, 3, 48, 64)},
        {"weight": (UNBOUNDED, (3, 3, 3, 64)), "mlx.weight": (UNBOUNDED, (3, 3, 48, 64))},
    ),
    "PyTorch LSTM": (
        {"r.weight_ih_l0": (8, 3), "r.weight_hh_l0": (8, 2), "r.bias_ih_l0": (8,)},
        {f"r.weight_{side}_l0[{gate}]": (Dense(), (n, 2)) for side, n in (("ih", 3), ("hh", 2)) for gate in "ifgo"},
    ),
    "IndRNN of Keras": (
        {"r/kernel": (3, 4), "r/recurrent_kernel": (4,), "r/bias": (4,)},
        {"r/kernel": (Dense(), (3, 4))},
    ),
    "IndRNN by PyTorch's names": (
        {"r.weight_ih_l0": (16, 3), "r.weight_hh_l0": (4,)},
        {"r.weight_ih_l0": (Dense(), (3, 16))},
    ),
    "projections of three axes": (
        {"attn.in_proj_weight": (2, 12, 4)},
        {"attn.in_proj_weight": (UNBOUNDED, (4, 12, 2))},
    ),
    "PyTorch GRU, reversed": (
        {"r.weight_ih_l1_reverse": (6, 3), "r.weight_hh_l1_reverse": (6, 2)},
        {
            f"r.weight_{side}_l1_reverse[{gate}]": (Dense(), (size, 2))
            for side, size in (("ih", 3), ("hh", 2))
            for gate in "rzn"
        },
    ),
    "Flax LSTM": (
        {"c/ii/kernel": (3, 2), "c/hi/kernel": (2, 2), "c/hi/bias": (2,)},
        {"c/ii/kernel": (Dense(), (3, 2)), "c/hi/kernel": (Dense(), (2, 2))},
    ),
    "Flax's optimized GRU": (
        {"c/dense_i/kernel": (4, 6), "c/dense_h/kernel": (2, 6)},
        {f"c/dense_{side}/kernel[{gate}]": (Dense(), (n, 2)) for side, n in (("i", 4), ("h", 2)) for gate in "rzn"},
    ),
    "Flax's convolutional LSTM": (
        {"c/ih/kernel": (3, 3, 2, 12), "c/hh/kernel": (3, 3, 3, 12), "c/hh/bias": (12,)},
        {
            f"c/{side}/kernel[{gate}]": (UNBOUNDED, (3, 3, n, 3))
            for side, n in (("ih", 2), ("hh", 3))
            for gate in "igfo"
        },
    ),
    "Keras convolutional LSTM": (
        {"c/kernel": (3, 3, 2, 12), "c/recurrent_kernel": (3, 3, 3, 12), "c/bias": (12,)},
        {
            f"c/{name}[{gate}]": (UNBOUNDED, (3, 3, n, 3))
            for name, n in (("kernel", 2), ("recurrent_kernel", 3))
            for gate in "ifco"
        },
    ),
    "PyTorch LSTM with a projection": (
        {"weight_ih_l0": (12, 4), "weight_hh_l0": (12, 2), "weight_hr_l0": (2, 3)},
        {
            **{f"weight_{side}_l0[{gate}]": (Dense(), (n, 3)) for side, n in (("ih", 4), ("hh", 2)) for gate in "ifgo"},
            "weight_hr_l0": (Dense(), (3, 2)),
        },
    ),
    "Keras LSTM": (
        {"l/kernel": (3, 8), "l/recurrent_kernel": (2, 8), "l/bias": (8,)},
        {
            f"l/{name}[{gate}]": (Dense(), (n, 2))
            for name, n in (("kernel", 3), ("recurrent_kernel", 2))
            for gate in "ifco"
        },
    ),
    "Flax attention": (
        {
            "b/attn/query/kernel": (6, 2, 3),
            "b/attn/query/bias": (2, 3),
            "b/attn/out/kernel": (2, 3, 6),
            "b/attn/out/bias": (6,),
            "b/LayerNorm_0/scale": (6,),
            "b/mlp/kernel": (6, 24),
        },
        {
            "b/attn/query/kernel": (Dense(), (6, 6)),
            "b/attn/out/kernel": (Dense(), (6, 6)),
            "b/mlp/kernel": (Dense(), (6, 24)),
        },
    ),
    "scanned attention and convolution": (
        {
            "l/query/kernel": (2, 4, 2, 3),
            "l/query/bias": (2, 2, 3),
            "l/conv/kernel": (2, 3, 3, 4, 5),
            "l/n/scale": (2, 4),
        },
        {
            **{f"l/query/kernel[{i}]": (Dense(), (4, 6)) for i in range(2)},
            **{f"l/conv/kernel[{i}]": (UNBOUNDED, (3, 3, 4, 5)) for i in range(2)},
        },
    ),
    "PyTorch attention": (
        {
            "attn.in_proj_weight": (12, 4),
            "attn.in_proj_bias": (12,),
            "attn.out_proj.weight": (4, 4),
            "emb.weight": (9, 4),
        },
        {
            **{f"attn.in_proj_weight[{name}]": (Dense(), (4, 4)) for name in "qkv"},
            "attn.out_proj.weight": (Dense(), (4, 4)),
            "emb.weight": (Dense(), (4, 9)),
        },
    ),
    # A transposed convolution of PyTorch is stored as the convolution that it is the adjoint of: the same values.
    "PyTorch U-Net": (
        {"down.weight": (8, 3, 3, 3), "up.weight": (8, 4, 2, 2), "out.weight": (3, 4, 1, 1), "out.bias": (3,)},
        {
            "down.weight": (UNBOUNDED, (3, 3, 3, 8)),
            "up.weight": (UNBOUNDED, (2, 2, 4, 8)),
            "out.weight": (UNBOUNDED, (1, 1, 4, 3)),
        },
    ),
    "Flax transposed": (
        {"ConvTranspose_0/kernel": (2, 2, 8, 4), "ConvTranspose_0/bias": (4,)},
        {"ConvTranspose_0/kernel": (UNBOUNDED, (2, 2, 8, 4))},
    ),
    "Flax volumes": (
        {"Conv_0/kernel": (3, 3, 3, 2, 4), "Conv_1/kernel": (1, 1, 1, 4, 4)},
        {"Conv_0/kernel": (UNBOUNDED, (3, 3, 3, 2, 4)), "Conv_1/kernel": (UNBOUNDED, (1, 1, 1, 4, 4))},
    ),
    "Flax embedding": (
        {"params/Embed_0/embedding": (30, 8), "params/Dense_0/kernel": (8, 5)},
        {"params/Embed_0/embedding": (Dense(), (30, 8)), "params/Dense_0/kernel": (Dense(), (8, 5))},
    ),
    "PyTorch vision transformer": (
        {
            "patch_embed.proj.weight": (8, 3, 4, 4),
            "cls_token": (1, 1, 8),
            "pos_embed": (1, 5, 8),
            "blocks.0.attn.qkv.weight": (24, 8),
            "blocks.0.norm1.weight": (8,),
            "head.weight": (5, 8),
        },
        {
            "patch_embed.proj.weight": (UNBOUNDED, (4, 4, 3, 8)),
            "blocks.0.attn.qkv.weight": (Dense(), (8, 24)),
            "head.weight": (Dense(), (8, 5)),
        },
    ),
    "Llama": (
        {
            "model.embed_tokens.weight": (9, 4),
            "model.layers.0.self_attn.q_proj.weight": (4, 4),
            "model.layers.0.mlp.gate_proj.weight": (8, 4),
            "model.layers.0.input_layernorm.weight": (4,),
            "lm_head.weight": (9, 4),
        },
        {
            "model.embed_tokens.weight": (Dense(), (4, 9)),
            "model.layers.0.self_attn.q_proj.weight": (Dense(), (4, 4)),
            "model.layers.0.mlp.gate_proj.weight": (Dense(), (4, 8)),
            "lm_head.weight": (Dense(), (4, 9)),
        },
    ),
    "weight normalization": (
        {"conv.weight_g": (8, 1, 1), "conv.weight_v": (8, 4, 3), "fc.weight": (3, 8)},
        {"fc.weight": (Dense(), (8, 3))},
    ),
    "ConvNeXt": (
        {"stem.weight": (8, 3, 4, 4), "dwconv.weight": (8, 1, 7, 7), "pwconv1.weight": (32, 8), "gamma": (8,)},
        {
            "stem.weight": (UNBOUNDED, (4, 4, 3, 8)),
            "dwconv.weight": (UnboundedConv(feature_group_count=8), (7, 7, 1, 8)),
            "pwconv1.weight": (Dense(), (8, 32)),
        },
    ),
    "Keras audio": (
        {"conv1d/kernel:0": (5, 2, 8), "batch_normalization/moving_mean:0": (8,)},
        {"conv1d/kernel:0": (UNBOUNDED, (5, 2, 8))},
    ),
    "Keras separable": (
        {"s/depthwise_kernel:0": (3, 3, 4, 1), "s/pointwise_kernel:0": (1, 1, 4, 6)},
        {
            "s/depthwise_kernel:0": (UnboundedConv(feature_group_count=4), (3, 3, 1, 4)),
            "s/pointwise_kernel:0": (UNBOUNDED, (1, 1, 4, 6)),
        },
    ),
    "Keras GRU": (
        {"g/kernel": (3, 6), "g/recurrent_kernel": (2, 6), "g/bias": (2, 6)},
        {
            f"g/{name}[{gate}]": (Dense(), (n, 2))
            for name, n in (("kernel", 3), ("recurrent_kernel", 2))
            for gate in "zrh"
        },
    ),
    "NNX LSTM": (
        {"cell/dense_i/kernel": (3, 8), "cell/dense_h/kernel": (2, 8), "cell/dense_h/bias": (8,)},
        {f"cell/dense_{side}/kernel[{gate}]": (Dense(), (n, 2)) for side, n in (("i", 3), ("h", 2)) for gate in "ifgo"},
    ),
    "PyTorch recurrence of one gate": (
        {"r.weight_ih_l0": (2, 3), "r.weight_hh_l0": (2, 2)},
        {"r.weight_ih_l0": (Dense(), (3, 2)), "r.weight_hh_l0": (Dense(), (2, 2))},
    ),
    "a training state": (
        {"params/Conv_0/kernel": (3, 3, 2, 4), "opt_state/0/mu/Conv_0/kernel": (3, 3, 2, 4), "step": ()},
        {"params/Conv_0/kernel": (UNBOUNDED, (3, 3, 2, 4))},
    ),
    # Each of these arrays was a convolution, or tore one into layers.
    "scales of every kind": (
        {
            "block.conv.weight": (8, 4, 3, 3),
            "block.norm.weight": (8, 5, 5),
            "block.norm.bias": (8, 5, 5),
            "block.actnorm.scale": (1, 8, 1, 1),
            "block.rows.weight": (9, 8),
            "block.rows.bias": (9, 8),
            "block.layer_scale": (8, 1, 1),
            "block.attn.logit_scale": (2, 1, 1),
            "block.mask": (1, 1, 9, 9),
            "block.conv.weight_mask": (8, 4, 3, 3),
            "block.alpha": (8, 1, 1),
            "haiku/bn/offset": (1, 8),
            "haiku/bn/~/mean_ema/average": (1, 8),
            "haiku/bn/~/mean_ema/hidden": (1, 8),
            "hidden": (3, 4),
            "narrow.weight": (8, 1, 1, 1),
        },
        {
            "block.conv.weight": (UNBOUNDED, (3, 3, 4, 8)),
            "hidden": (Dense(), (3, 4)),
            "narrow.weight": (UNBOUNDED, (1, 1, 1, 8)),
        },
    ),
    "a scanned layer without a bias beside a stacked norm": (
        {"l/dense/kernel": (2, 4, 5), "l/norm/scale": (2, 4), "l/norm/bias": (2, 4)},
        {f"l/dense/kernel[{i}]": (Dense(), (4, 5)) for i in range(2)},
    ),
    "a convolution beside a scale of each of its outputs": (
        {"weight": (8, 4, 3, 3), "scale": (8, 1, 1)},
        {"weight": (UNBOUNDED, (3, 3, 4, 8))},
    ),
    "empty arrays": ({"a.weight": (0, 4), "b.weight": (3, 4), "c": (0,)}, {"b.weight": (Dense(), (4, 3))}),
    "no arrays": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "expected"), READINGS.values(), ids=READINGS)
def test_checkpoints_are_read_by_names_and_shapes(tmp_path, shapes, expected):
    assert found(shapes)[0] == expected
    # The same from a file in half precision, whose kernels have these shapes too.
    path = tmp_path / "weights.safetensors"
    arrays = {name: np.asarray(array(*shape, dtype=np.float16)) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, path)
    opened = open_arrays(path)
    kernels, skipped = find_kernels(opened.infos)
    assert {kernel.name: kernel.view(opened.read(kernel.array)).shape for kernel in kernels} == {
        name: shape for name, (_, shape) in expected.items()
    }
    assert {kernel.array for kernel in kernels} | {entry.name for entry in skipped} == set(shapes)


def test_moments_of_an_optimizer_are_no_layers():
    params = {"Dense_0": {"kernel": array(3, 4), "bias": array(4)}}
    for make in (optax.adam, optax.lion, functools.partial(optax.sgd, momentum=0.9)):
        report = analyze({"params": params, "updates": make(1e-3).init(params)})
        assert [layer.name for layer in report.layers] == ["params/Dense_0/kernel"]


@pytest.mark.parametrize("name", ["opt_state", "optim", "state_of_steps"])
def test_momenta_of_jaxsrn_are_no_layers(name):
    params = {"c": {"kernel": array(3, 3, 2, 4)}}
    state = jaxsrn.optim.spectral_descent(0.1, {("c", "kernel"): UNBOUNDED}).init(params)
    assert [layer.name for layer in analyze({"params": params, name: state}).layers] == ["params/c/kernel"]


def test_a_model_says_what_its_layers_are_by_any_name():
    model = nnx.List([nnx.Dict(mu=nnx.Linear(3, 4, rngs=nnx.Rngs(0)), opt=nnx.Linear(3, 2, rngs=nnx.Rngs(1)))])
    assert [layer.name for layer in analyze(model).layers] == ["0/mu/kernel", "0/opt/kernel"]


def test_options_say_what_names_and_shapes_do_not():
    shapes = {"a.weight": (8, 4, 3, 3), "b.weight": (8, 4, 3)}
    kernels, _ = found(shapes, groups={"a": 2}, strides={"a.weight": 2}, input_shape=(6, 5))
    assert kernels["a.weight"] == (ZeroPaddedConv((6, 5), strides=2, feature_group_count=2), (3, 3, 4, 8))
    assert kernels["b.weight"] == (UNBOUNDED, (3, 4, 8))
    assert found({"x": (4, 3, 3, 2)}, layout="OHWI")[0] == {"x": (UNBOUNDED, (3, 3, 2, 4))}


def test_what_weights_do_not_say_is_said():
    """Strides and groups of a file are assumed, those of a model are known, and matrices have none."""
    assumed, weights = "stride 1 and one group", {"a.weight": gaussian((4, 2, 3, 3)), "b.weight": gaussian((3, 4))}
    assert assumed in str(analyze(weights))
    assert assumed not in str(analyze({"b.weight": weights["b.weight"]}))
    assert assumed not in str(analyze(nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"strides: got 'c', expected names of arrays or layers, such as 'a\.weight'"):
        analyze(weights, strides={"c": 2})


def test_thin_kernels_of_several_networks_are_not_taken_for_depthwise():
    """The first layers of networks that see grey images: as depthwise ones they would have smaller norms."""
    shapes = {"conv1.weight": (8, 1, 3, 3), "conv2.weight": (8, 8, 3, 3)}
    weights = {f"{net}.{name}": gaussian(shape) for net in ("actor", "critic") for name, shape in shapes.items()}
    report = analyze(weights)
    first = report.layers[0]
    assert first.operator == UnboundedConv()
    kernel = weights["actor.conv1.weight"].transpose((2, 3, 1, 0))
    assert first.spectral_norm == pytest.approx(supremum(kernel), rel=1e-5)
    assert "depthwise by shapes" not in str(report)
    depthwise = {"0.weight": (8, 3, 3, 3), "1.weight": (8, 1, 3, 3), "2.weight": (8, 8, 1, 1), "3.weight": (8, 1, 3, 3)}
    guessed = analyze({name: gaussian(shape) for name, shape in depthwise.items()})
    assert "Taken for depthwise by shapes alone: 1.weight, 3.weight." in str(guessed)


def test_two_arrays_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="a/b/kernel: two arrays have this name"):
        analyze({"a": {"b/kernel": array(3, 3)}, "a/b": {"kernel": array(3, 3)}})


def test_digits_that_are_no_numbers_sort_as_letters():
    assert {layer.name for layer in analyze({"u1²": array(3, 3), "2": array(3, 3)}).layers} == {"u1²", "2"}


class Tensor:
    """An array of another library, as PyTorch's are: a type of its own, and NumPy can read it."""

    dtype, shape = "a type of its own", (3, 4)

    def __init__(self, readable: bool):
        self.readable = readable

    def __array__(self, dtype=None, copy=None):
        if not self.readable:
            raise TypeError("it requires a gradient")
        return array(3, 4)


def test_arrays_of_other_libraries():
    (layer,) = analyze({"fc.weight": Tensor(readable=True)}).layers
    assert layer.spectral_norm == pytest.approx(np.linalg.norm(array(3, 4), 2), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"fc\.weight: got a Tensor that is no array of NumPy \(it requires a gradient"
    ):
        analyze({"fc.weight": Tensor(readable=False)})


def test_what_is_skipped_has_its_reason():
    cases = {
        "sn.parametrizations.weight.original": ((4, 4), "before a normalization or a mask of PyTorch"),
        "pruned.weight_orig": ((4, 4), "before a normalization or a mask of PyTorch"),
        "model/stable_rank/constrained/conv/watch": ((2, 4), "state of a wrapper"),
        "conv/state/value/normalized/watch": ((2, 4), "state of a wrapper"),
        "empty.weight": ((0, 3), "no entries"),
        "bias": ((4,), "a bias"),
        "step": ((), "a number"),
        "norm.running_var": ((4,), "statistic"),
        "attn/relative_bias": ((4, 4), "several axes"),
        "opt_state/0/mu/conv/kernel": ((3, 3, 2, 4), "optimizer"),
        "opt/1/trace/conv/kernel": ((3, 3, 2, 4), "optimizer"),
        "updates/0/nu/conv/kernel": ((3, 3, 2, 4), "optimizer"),
        "norm.image.weight": ((4, 5, 5), "whose bias has as many"),
        "norm.image.bias": ((4, 5, 5), "several axes"),
        "layer_scale": ((8, 1, 1), "several axes"),
        "alpha": ((8, 1, 1), "a vector along one of its axes"),
        "var_ema/average": ((1, 1, 1, 8), "statistic"),
        "batch_stats/sn/kernel/u": ((1, 4), "statistic"),
        "conv.weight_v": ((4, 2, 3), "weight normalization"),
        "pos_embedding": ((1, 9, 4), "added to the input"),
        "many": ((2,) * 6, "6 axes"),
        "undecided": ((3,) * 4, "name its layout"),
        "experts.weight": ((8, 4096, 14336), "taps on an axis"),
    }
    kernels, reasons = found({name: shape for name, (shape, _) in cases.items()})
    assert kernels == {}
    for name, (_, text) in cases.items():
        assert text in reasons[name], (name, reasons[name])
    assert "int32" in found({"ids.weight": (3, 3)}, np.int32)[1]["ids.weight"]


def test_views_are_the_kernels_and_write_through():
    shapes = {
        "r.weight_ih_l0": (8, 3),
        "r.weight_hh_l0": (8, 2),
        "conv.weight": (4, 2, 3, 3),
        "d/depthwise_kernel": (3, 3, 4, 2),
    }
    kernels, _ = find_kernels({name: ArrayInfo(shape, np.dtype("f4")) for name, shape in shapes.items()})
    arrays = {name: array(*shape) for name, shape in shapes.items()}
    for kernel in kernels:
        assert kernel.view(arrays[kernel.array]).shape == kernel.shape
        kernel.view(arrays[kernel.array])[...] = 1
    assert all(np.all(values == 1) for values in arrays.values())


# Batch normalizations of bare weights


def test_batch_norms_are_paired_by_name():
    shapes = {
        "layer1/conv/kernel": (1, 1, 2, 4), "layer1/bn/gamma": (4,), "layer1/bn/moving_variance": (4,),
        "seq.0.weight": (4, 2, 1, 1), "seq.1.running_var": (4,), "lonely_bn/moving_variance": (7,),
        "params/Conv_0/kernel": (1, 1, 2, 4), "params/BatchNorm_0/scale": (4,), "batch_stats/BatchNorm_0/var": (4,),
    }  # fmt: skip
    weights = {name: np.abs(array(*shape)) + 0.5 for name, shape in shapes.items()}
    report = analyze(weights, fold_batch_norm=True)
    layers = {layer.name: layer for layer in report.layers}
    stats = "batch_stats"
    cases = [
        ("layer1/conv/kernel", "layer1/bn", "layer1/bn/gamma", "layer1/bn/moving_variance", 1e-3),
        ("seq.0.weight", "seq.1", None, "seq.1.running_var", 1e-5),
        ("params/Conv_0/kernel", f"{stats}/BatchNorm_0", "params/BatchNorm_0/scale", f"{stats}/BatchNorm_0/var", 1e-5),
    ]
    for name, norm, scale, variance, epsilon in cases:
        factors = (1.0 if scale is None else weights[scale]) / np.sqrt(weights[variance] + epsilon)
        stored = weights[name]
        kernel = (stored.T if name == "seq.0.weight" else stored).reshape((2, 4)) * factors
        assert layers[name].batch_norm == norm
        assert layers[name].spectral_norm == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert reasons["layer1/bn/gamma"] == "folded into layer1/conv/kernel"
    assert "pairs with no kernel" in reasons["lonely_bn/moving_variance"]


# Files


ARRAYS = {
    "conv.weight": array(4, 2, 3, 3).astype(ml_dtypes.bfloat16),
    "fc.weight": array(6, 4, dtype=np.float16),
    "fc.bias": array(6, dtype=np.float64),
    "empty": np.zeros((0, 3), np.float32),
    "count": np.arange(3),
}


def saved(folder, kind):
    path = folder / f"weights{kind}"
    if kind == ".safetensors":
        safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    elif kind == ".npz":
        np.savez_compressed(path, **ARRAYS)
    elif kind == "shards":
        parts = {"a.safetensors": ["conv.weight", "empty"], "b.safetensors": ["fc.weight", "fc.bias", "count"]}
        path.mkdir()
        for part, names in parts.items():
            safetensors.numpy.save_file({name: ARRAYS[name] for name in names}, path / part)
        places = {name: part for part, names in parts.items() for name in names}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": {name: value for name, value in ARRAYS.items() if value.size}})
    return path


@pytest.mark.parametrize("kind", [".safetensors", "shards", ".npz", ""])
def test_files_are_read_one_array_at_a_time_and_copied_bit_by_bit(tmp_path, kind):
    path = saved(tmp_path, kind)
    prefix = "" if kind else "params/"
    expected = {f"{prefix}{name}": value for name, value in ARRAYS.items() if kind or value.size}
    opened = open_arrays(path)
    assert {name: tuple(info) for name, info in opened.infos.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    copy = tmp_path / f"copy{kind}"
    changed = f"{prefix}conv.weight"
    opened.copy(copy, lambda name: opened.read(name) * 2 if name == changed else None)
    again = open_arrays(copy)
    for name, value in expected.items():
        assert opened.read(name).tobytes() == value.tobytes()
        assert again.read(name).dtype == value.dtype
        assert again.read(name).tobytes() == ((value * 2) if name == changed else value).tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, copy.name])
    kernels, skipped = find_kernels(opened.infos)
    assert {kernel.array for kernel in kernels} == {changed, f"{prefix}fc.weight"}
    assert len(skipped) == len(expected) - 2


def test_arrays_of_another_order_or_type(tmp_path):
    """Columns first, the other order of bytes, and a type that JAX does not have."""
    kernel = array(6, 4)
    stored = {
        "columns": np.asfortranarray(kernel),
        "swapped": kernel.astype(">f8"),
        "long": kernel.astype(np.longdouble),
    }
    path, out = tmp_path / "weights.npz", tmp_path / "out.npz"
    np.savez(path, **{f"{name}.weight": value for name, value in stored.items()})
    report = analyze(path)
    expected = np.linalg.norm(kernel, 2)
    np.testing.assert_allclose([layer.spectral_norm for layer in report.layers], expected, rtol=1e-6)
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "long.weight": "of type float128, which JAX does not have"
    }
    changes, _ = normalize(path, out, 0.3)
    assert {change.name for change in changes} == {"columns.weight", "swapped.weight"}
    np.testing.assert_allclose([layer.spectral_norm for layer in analyze(out).layers], expected, rtol=1e-5)


def test_what_is_no_array_is_copied_as_it_is(tmp_path):
    """Strings and numbers of Python in a checkpoint of Orbax."""
    import orbax.checkpoint as ocp

    path, out = tmp_path / "step", tmp_path / "out"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"kernel": array(8, 16), "name": "hello", "step": 7, "rate": 0.5})
    changes, _ = normalize(path, out, 0.1)
    assert [change.name for change in changes] == ["kernel"]
    with ocp.PyTreeCheckpointer() as checkpointer:
        again = checkpointer.restore(out)
    assert {name: value for name, value in again.items() if name != "kernel"} == {
        "name": "hello",
        "step": 7,
        "rate": 0.5,
    }


@pytest.mark.usefixtures("as_users_have_it")
def test_states_of_models_in_checkpoints(tmp_path):
    """Orbax names the attribute in which a variable holds its array; the rules by name see the name before it."""
    import orbax.checkpoint as ocp

    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.cell = nnx.OptimizedLSTMCell(4, 5, rngs=rngs)
            self.conv = jnnx.SpectralNorm(nnx.Conv(3, 3, (3, 3), rngs=rngs), input_shape=(5, 5))

    state = nnx.state(Mixed(nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
    report = analyze(tmp_path / "saved")
    assert [layer.kernel_shape for layer in report.layers] == [layer.kernel_shape for layer in analyze(state).layers]
    assert {layer.name for layer in report.layers} == {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
        *(f"cell/dense_{side}/kernel[{gate}]" for side in "ih" for gate in "igfo"),
        "conv/layer/kernel",
    }
    assert {s.reason for s in report.skipped if "normalized" in s.name} == {"the state of a wrapper"}
    assert "reported by their raw kernels" in str(report)
    arrays = open_arrays(tmp_path / "saved")
    arrays.copy(tmp_path / "copy", lambda name: 2 * arrays.read(name) if name == "conv/layer/kernel" else None)
    copied = open_arrays(tmp_path / "copy")
    assert copied.infos == arrays.infos
    np.testing.assert_array_equal(copied.read("conv/layer/kernel"), 2 * arrays.read("conv/layer/kernel"))


def test_shapes_alone_are_skipped():
    report = analyze({"a.weight": array(6, 4), "b.weight": jax.ShapeDtypeStruct((3, 4), jnp.float32)})
    assert [layer.name for layer in report.layers] == ["a.weight"]
    assert "ShapeDtypeStruct" in report.skipped[0].reason


def test_bad_files_say_what_they_are(tmp_path):
    for name in ("bad.safetensors", "bad.npz"):
        (tmp_path / name).write_bytes(b"no weights" * 20)
        with pytest.raises(BrokenFile, match=name):
            open_arrays(tmp_path / name)
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(ValueError, match=r"got a file named \*.txt"):
        open_arrays(tmp_path / "weights.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_arrays(tmp_path / "missing.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BrokenFile, match="without an Orbax checkpoint"):
        open_arrays(tmp_path / "folder")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    for text in ("no index", "[]", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(BrokenFile, match="no index of"):
            open_arrays(index)
    for place in ("../other.safetensors", ""):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(BrokenFile, match="expected the names of files beside it"):
            open_arrays(index)
    index.write_text('{"weight_map": {"a": "missing.safetensors"}}')
    with pytest.raises(BrokenFile, match=r"missing.safetensors: there is no such file, which an index names"):
        open_arrays(index.parent)


def test_damaged_arrays_and_checkpoints_say_what_they_are(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"fc.weight": np.zeros((200, 200))})
    opened, bytes_of = open_arrays(path), path.read_bytes()
    path.write_bytes(bytes_of[:1000] + b"x" * 1000 + bytes_of[2000:])
    with pytest.raises(BrokenFile, match=r"weights.npz: fc.weight cannot be read"):
        opened.read("fc.weight")
    np.savez_compressed(path, **{"fc.weight": np.random.default_rng(0).standard_normal((200, 200))})
    opened, bytes_of = open_arrays(path), path.read_bytes()
    path.write_bytes(bytes_of[:1000] + bytes(1000) + bytes_of[2000:])
    with pytest.raises(BrokenFile, match=r"weights.npz: fc.weight cannot be read"):
        opened.read("fc.weight")

    checkpoint = saved(tmp_path, "")
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    for text in ("[]", '{"tree_metadata": {"a": 3}}'):
        (damaged / "_METADATA").write_text(text)
        with pytest.raises(BrokenFile, match="no Orbax checkpoint that can be read"):
            open_arrays(damaged)
    folders = tmp_path / "several"
    for name in ("1", "2"):
        shutil.copytree(checkpoint, folders / name)
    with pytest.raises(ValueError, match="it has several checkpoints, expected one"):
        open_arrays(folders)
    shutil.rmtree(folders / "2")
    assert open_arrays(folders).infos == open_arrays(checkpoint).infos
    with pytest.raises(ValueError, match="it exists, expected a new folder"):
        open_arrays(checkpoint).copy(folders, lambda name: None)
    (folders / "1" / "_METADATA").write_text("{}")
    with pytest.raises(BrokenFile, match="no Orbax checkpoint that can be read"):
        open_arrays(folders)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        open_arrays(checkpoint)


def test_leaves_that_are_no_arrays_are_skipped_by_their_type():
    report = analyze({"fc.weight": array(4, 4), "step": 3, "name": "a network"})
    assert {skipped.name for skipped in report.skipped} == {"step", "name"}


def test_checkpoints_are_compared_without_progress(tmp_path):
    for name, outputs in (("a", 6), ("b", 5)):
        np.savez(tmp_path / f"{name}.npz", **{"fc.weight": array(outputs, 4), "same.weight": array(3, 4)})
    found = compare(tmp_path / "a.npz", tmp_path / "b.npz")
    distances = {pair.first.name: pair.distance for pair in found.layers}
    assert math.isnan(distances["fc.weight"])
    assert distances["same.weight"] == 0


def test_shards_are_not_written_over_themselves(tmp_path):
    folder = saved(tmp_path, "shards")
    with pytest.raises(ValueError, match="expected another one"):
        open_arrays(folder).copy(folder / "new.safetensors.index.json", lambda name: None)


# Forms


def test_forms_of_a_report():
    report = analyze({"fc.weight": array(6, 4), "a<b>|c.weight": array(6, 4), "fc.bias": array(6)})
    text = str(report)
    rows = [line for line in text.splitlines() if "Dense()" in line]
    assert len(rows) == 2
    assert len({line.index("Dense()") for line in rows}) == 1
    assert "Skipped 1: a bias, a scale or another vector (fc.bias)." in text
    lines = list(csv.DictReader(report.to_csv().splitlines()))
    assert [line["name"] for line in lines] == ["a<b>|c.weight", "fc.weight"]
    assert float(lines[1]["spectral_norm"]) == report.layers[1].spectral_norm
    assert "&lt;b&gt;" in report._repr_html_()
    assert r"a<b>\|c.weight" in report.to_markdown()
    assert "| two lines |" in analyze({"two\nlines": array(6, 4)}).to_markdown()
    assert analyze({}).to_csv().splitlines() == report.to_csv().splitlines()[:1]
    assert "0 layers" in str(analyze({}))
    assert CircularConv((4,)) not in {layer.operator for layer in report.layers}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (1.23456789, "1.2346"), (1.5e9, "1.5000e+09"), (-2e-7, "-2.0000e-07"), (math.inf, "inf")],
)
def test_numbers_of_a_table_have_five_digits(number, text):
    assert digits(number) == text


def test_products_beyond_floats_and_of_zero():
    huge = {f"{i}.weight": np.full((1, 1), 1e30, np.float32) for i in range(20)}
    assert "Product of norms: 1.00e+600," in str(analyze(huge))
    nearly = {f"{i}.weight": np.full((1, 1), 10**3.99999999) for i in range(2)}
    assert "Product of norms: 1.00e+8," in str(analyze(nearly))
    with_infinity = {"a.weight": np.full((1, 1), np.inf), "b.weight": np.zeros((1, 1))}
    assert math.isnan(analyze(with_infinity).product_of_norms)
    assert "Product of norms: 0," in str(analyze(huge | {"fc.weight": np.zeros((2, 2), np.float32)}))


def test_spectra_are_columns_and_small_norms_stand_out():
    kernels = {f"{i}.weight": array(4, 4) for i in range(4)}
    kernels["small.weight"] = 1e-3 * array(4, 4)
    report = analyze(kernels, spectra=True)
    assert report.cells()[0][-2:] == ["condition", "effective rank"]
    values = np.linalg.svd(np.asarray(kernels["0.weight"], np.float64), compute_uv=False)
    assert report.cells()[1][0][-2] == digits(values[0] / values[-1])
    assert "the median is" in report.outliers["small.weight"]
    assert isinstance(report.plot(), matplotlib.figure.Figure)


# Progress


def test_without_a_library_for_bars_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert len(analyze({"fc.weight": array(4, 4)}).layers) == 1
    with pytest.raises(ValueError, match="progress: got True, which needs rich"):
        analyze({"fc.weight": array(4, 4)}, progress=True)


def test_progress_is_shown_where_it_is_asked_for(tmp_path, capsys, no_type_checks):
    np.savez(tmp_path / "a.npz", **{"fc.weight": array(6, 4)})
    compare(tmp_path / "a.npz", tmp_path / "a.npz", progress=False)
    assert not capsys.readouterr().err
    compare(tmp_path / "a.npz", tmp_path / "a.npz", progress=True)
    assert "2/2 layers" in capsys.readouterr().err
    calls = []
    compare(tmp_path / "a.npz", tmp_path / "a.npz", progress=lambda *args: calls.append(args))
    assert calls == [(0, 2, "fc.weight"), (1, 2, ""), (1, 2, "fc.weight"), (2, 2, "")]
    with pytest.raises(ValueError, match="progress: got 'no', expected True, False, None or a function"):
        analyze({"fc.weight": array(4, 4)}, progress="no")
