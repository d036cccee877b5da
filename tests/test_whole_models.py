"""Stacks of layers, attention, recurrent cells, and what no constraint reaches: against NumPy on the plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian, gaussian32
from flax import linen as nn
from flax import nnx

import jaxsrn
import jaxsrn.linen as jlinen
import jaxsrn.nnx as jnnx
from jaxsrn import Dense, UnboundedConv, bounds, lipschitz, optim, penalties
from jaxsrn.report import analyze

NUMBER = 3


pytestmark = pytest.mark.usefixtures("as_users_have_it")


def matrix_norm(kernel, rows):
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(rows, -1), 2)


# Stacks


def conv(rngs):
    return nnx.Conv(2, 3, (3,), padding="CIRCULAR", rngs=rngs)


def wrapped_layers(rngs):
    return nnx.List(
        [
            jnnx.SpectralNorm(conv(rngs), input_shape=(6,)),
            jnnx.StableRankNorm(nnx.Linear(4, 5, rngs=rngs), 0.4, norm=nnx.Param(jnp.asarray(2.0))),
        ]
    )


KEYS = jax.random.split(jax.random.key(0), NUMBER)


def part(model, i):
    """One of the models of a stack."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))


def assert_same(stack, singles):
    for i, single in enumerate(singles):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), nnx.state(part(stack, i)), nnx.state(single)
        )


def test_a_stack_of_wrappers_is_a_batch_of_them():
    """`refresh`, `restart` and `fold` do to a stack what they do to each of its layers; gains are stacked too."""
    stack = nnx.vmap(lambda key: wrapped_layers(nnx.Rngs(key)))(KEYS)
    for wrapper in stack:
        wrapper.layer.kernel[...] = gaussian32(wrapper.layer.kernel.shape)
    stack[1].norm[...] = jnp.asarray([0.5, -1.0, 2.0])
    singles = [part(stack, i) for i in range(NUMBER)]
    jnnx.refresh(stack)
    for single in singles:
        jnnx.refresh(single)
    assert_same(stack, singles)
    jnnx.restart(stack)
    plain = jnnx.fold(stack)
    assert [type(layer) for layer in plain] == [nnx.Conv, nnx.Linear]
    waves = np.exp(-2j * np.pi * np.outer(np.arange(6) / 6, np.arange(3)))
    symbols = np.einsum("wt,ltio->lwio", waves, np.asarray(plain[0].kernel[...]))
    np.testing.assert_allclose(np.linalg.norm(symbols, 2, axis=(2, 3)).max(axis=1), 1, rtol=1e-5)
    norms = [matrix_norm(kernel, 4) for kernel in plain[1].kernel[...]]
    np.testing.assert_allclose(norms, [0.5, 1, 2], rtol=1e-5)
    assert jnnx.layer_operators(stack) == {
        (0, "layer", "kernel"): jaxsrn.CircularConv((6,)),
        (1, "layer", "kernel"): Dense(),
    }


class Deep(nnx.Module):
    """A stack of layers that are applied one after the other."""

    def __init__(self):
        self.layers = nnx.vmap(lambda key: nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(key)))(KEYS)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_a_stack_in_a_model():
    """Wrapped, traced and reported; as a batch it is no kernel of another operator."""
    model, x = Deep(), gaussian32((2, 4))
    for inputs in ((), (x,)):
        assert jnnx.layer_operators(model, *inputs) == {("layers", "kernel"): Dense()}
    constrained = jnnx.constrain(model, lambda path, layer: jnnx.SpectralNorm(layer))
    assert jnnx.layer_operators(constrained, x) == {("layers", "layer", "kernel"): Dense()}
    plain = jnnx.fold(constrained)
    norms = [matrix_norm(kernel, 4) for kernel in plain.layers.kernel[...]]
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    np.testing.assert_allclose(constrained(x), plain(x), rtol=1e-5, atol=1e-6)
    reported = {layer.name: layer.spectral_norm for layer in analyze(model).layers}
    expected = {f"layers/kernel[{i}]": matrix_norm(kernel, 4) for i, kernel in enumerate(model.layers.kernel[...])}
    assert reported == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [conv, lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs)], ids=["conv", "general"])
def test_a_stack_is_not_taken_for_a_kernel_of_more_axes(make):
    """Three convolutions of one axis are no convolution of two, and three matrices no wider one."""
    stack = nnx.List([nnx.vmap(lambda key: make(nnx.Rngs(key)))(KEYS)])
    layers, params = jnnx.layer_operators(stack), nnx.state(stack, nnx.Param)
    assert list(layers) == [(0, "kernel")]
    total = sum(jaxsrn.spectral_norm(kernel, layers[0, "kernel"]) for kernel in params[0]["kernel"][...])
    np.testing.assert_allclose(penalties.total(jaxsrn.spectral_norm, layers, params), total, rtol=1e-5)


def along(axis, make):
    """Layers stacked along an axis of their kernels."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)), in_axes=0, out_axes=axis)(KEYS)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(4, 5, use_bias=False, rngs=rngs),
        lambda rngs: nnx.Conv(4, 6, (4, 4), feature_group_count=2, use_bias=False, rngs=rngs),
        lambda rngs: nnx.ConvTranspose(4, 5, (2,), transpose_kernel=True, use_bias=False, rngs=rngs),
        lambda rngs: nnx.LinearGeneral(4, (2, 5), use_bias=False, rngs=rngs),
    ],
    ids=["dense", "conv", "transpose", "general"],
)
def test_a_stack_along_another_axis_is_not_taken_for_other_layers(make, axis):
    """The last axes of its kernel are no layer: those of `(4, 3, 5)` were four of `3 x 5`, and are three of `4 x 5`."""
    first, other = (nnx.List([along(number, make)]) for number in (0, axis))
    assert jnnx.layer_operators(first).keys() == {(0, "kernel")}
    found = jnnx.layer_operators(other)
    assert found == {}
    assert "stacked along another axis than the first ones" in found.left_out[0, "kernel"]
    with pytest.raises(ValueError, match=r"got kernels of shape .*, stacked along axis 0"):
        jnnx.constrain(other, lambda path, layer: jnnx.SpectralNorm(layer))


class Rectangular(nn.Module):
    wrapped: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        layer = nn.Dense(x.shape[-1], use_bias=False)
        return (jlinen.SpectralNorm(layer) if self.wrapped else layer)(x), None


@pytest.mark.parametrize("axis", [1, -1])
def test_a_scan_along_another_axis_is_left_out(axis):
    x = jnp.ones((2, 4))
    model = nn.scan(Rectangular, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()
    variables = model.init(jax.random.key(0), x, None)
    found = jlinen.layer_operators(model, variables, x, None)
    assert found == {}
    assert "the layer has a kernel of (4, 4)" in found.left_out["Dense_0", "kernel"]


def test_a_state_that_is_stacked_along_another_axis_than_the_kernels():
    """Three maps from 3 to 2 channels along axis 1: the kernels' shape `(3, 3, 2)` alone would do, the states' not."""
    lift = {"variable_axes": {"params": 1, "stable_rank": 1}, "split_rngs": {"params": True}, "in_axes": None}

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jlinen.SpectralNorm(nn.Dense(2, use_bias=False))(x)

    model = nn.vmap(Narrow, **lift, axis_size=3)()
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, 3, 2)
    with pytest.raises(ValueError, match="a state that is not stacked along axis 0"):
        jlinen.fold(model, variables)


# Matrices of several axes


HEADS = {("query",): (1, 2), ("key",): (1, 2), ("value",): (1, 2), ("out",): (2, 1)}


def assert_kept(path, kernel, raw):
    """A norm of at most 0.5, a stable rank of at most half of the largest, by NumPy on the reshaped projection."""
    rows = int(np.prod(kernel.shape[: HEADS[path][0]]))
    values = np.linalg.svd(np.asarray(kernel, np.float64).reshape(rows, -1), compute_uv=False)
    assert kernel.shape == raw.shape
    assert values[0] <= 0.5 * (1 + 1e-5)
    assert np.sum(values**2) / values[0] ** 2 <= 0.5 * len(values) * (1 + 1e-4)


def test_the_projections_of_attention_in_nnx():
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=nnx.Rngs(0))
    x = gaussian32((1, 3, 6))
    expected = {(*path, "kernel"): Dense(input_axes=a, output_axes=b) for path, (a, b) in HEADS.items()}
    layers = jnnx.layer_operators(attention, x)
    assert layers == jnnx.layer_operators(attention) == expected
    assert layers.left_out == {}
    params = nnx.state(attention, nnx.Param)
    optimizer = optax.chain(optax.sgd(0.1), optim.keep_spectral_norm(layers, 0.5), optim.keep_stable_rank(layers, 0.5))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kept = optax.apply_updates(params, updates)
    for path in HEADS:
        assert_kept(path, kept[path[0]]["kernel"][...], params[path[0]]["kernel"][...])
    total = sum(matrix_norm(params[path[0]]["kernel"][...], {1: 6, 2: 6}[axes[0]]) for path, axes in HEADS.items())
    np.testing.assert_allclose(penalties.total(jaxsrn.spectral_norm, layers, params), total, rtol=1e-5)
    constrained = jnnx.constrain(attention, lambda path, layer: jnnx.StableRankNorm(layer, 0.5, norm=0.5))
    plain = jnnx.fold(constrained)
    for path in HEADS:
        assert getattr(constrained, path[0]).operator == expected[(*path, "kernel")]
        assert_kept(path, getattr(plain, path[0]).kernel[...], getattr(attention, path[0]).kernel[...])
    np.testing.assert_allclose(plain(x), constrained(x, deterministic=True), rtol=1e-5, atol=1e-6)
    reported = {layer.name: layer.spectral_norm for layer in analyze(constrained).layers}
    assert reported == pytest.approx({f"{path[0]}/kernel": 0.5 for path in HEADS}, rel=1e-4)


def test_the_projections_of_attention_in_linen():
    attention, x = nn.MultiHeadDotProductAttention(num_heads=2), gaussian32((1, 3, 6))
    variables = attention.init(jax.random.key(0), x)
    layers = jlinen.layer_operators(attention, variables, x)
    assert layers == {(*path, "kernel"): Dense(input_axes=a, output_axes=b) for path, (a, b) in HEADS.items()}
    assert layers.left_out == {}
    constrained = jlinen.constrain(attention, lambda path, layer: jlinen.StableRankNorm(layer, 0.5, norm=0.5))
    start = constrained.init(jax.random.key(0), x)
    folded = jlinen.fold(constrained, start)
    for path in HEADS:
        assert_kept(path, folded["params"][path[0]]["kernel"], variables["params"][path[0]]["kernel"])
    np.testing.assert_allclose(attention.apply(folded, x), constrained.apply(start, x), rtol=1e-5, atol=1e-6)
    reported = {layer.name: layer.spectral_norm for layer in analyze(constrained, start, x).layers}
    assert reported == pytest.approx({f"params/{path[0]}/kernel": 0.5 for path in HEADS}, rel=1e-4)


def stepped(kernel, op):
    return jaxsrn.srnc_step(kernel, jaxsrn.srnc_state(kernel, op, 1.5), op, 1.5)[0]


# Each gives numbers, vectors and kernels for a matrix, however many axes it is stored with.
FUNCTIONS = {
    "spectral_norm": jaxsrn.spectral_norm,
    "stable_rank": jaxsrn.stable_rank,
    "singular_values": jaxsrn.singular_values,
    "top_singular_values": lambda kernel, op: jaxsrn.top_singular_values(kernel, op, 2),
    "leading_triplet": jaxsrn.leading_triplet,
    "srnc": lambda kernel, op: jaxsrn.srnc(kernel, op, 1.5),
    "srnc_tanay": lambda kernel, op: jaxsrn.srnc_tanay(kernel, op, 1.5),
    "srnc_step": stepped,
    "clip_singular_values": lambda kernel, op: jaxsrn.clip_singular_values(kernel, op, 1.0),
    "project_spectral_ball": lambda kernel, op: jaxsrn.project_spectral_ball(kernel, op, 1.0),
    **{
        name: getattr(bounds, name)
        for name in (
            "certified",
            "tensor_norm",
            "fantastic_four",
            "lip_bound",
            "gram_iteration",
            "l1",
            "channel_l1",
        )
    },
    "extreme_singular_values": penalties.extreme_singular_values,
    "init_pairs": penalties.init_pairs,
    "norm_2_1": lipschitz.norm_2_1,
    "transpose": lambda kernel, op: op.transpose(kernel, jnp.arange(6.0)),
    "frobenius": lambda kernel, op: jnp.sum(op.frobenius_weights(kernel.shape) * kernel**2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_matrix_of_several_axes_is_the_reshaped_one(name):
    kernel, op = gaussian32((2, 2, 3, 2)), Dense(input_axes=2, output_axes=2)
    matrix = kernel.reshape(4, 6)
    got, expected = FUNCTIONS[name](kernel, op), FUNCTIONS[name](matrix, Dense())
    shapes = [leaf.shape for leaf in jax.tree.leaves(got)]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-6)
    is_kernel = name in ("srnc", "srnc_tanay", "srnc_step", "clip_singular_values", "project_spectral_ball")
    assert (kernel.shape in shapes) == is_kernel
    assert op.in_shape(kernel.shape) == (4,)
    assert op.out_shape(kernel.shape) == (6,)


def test_axes_of_matrices():
    assert Dense(input_axes=1, output_axes=1) == Dense()
    assert repr(Dense(output_axes=2)) == "Dense(input_axes=1, output_axes=2)"
    with pytest.raises(ValueError, match=r"kernel: got shape \(2, 3, 4\), expected \(c_in, c_out\) for Dense\(\)"):
        jaxsrn.spectral_norm(jnp.ones((2, 3, 4)), Dense())
    with pytest.raises(ValueError, match=r"kernel: got shape \(2, 3\), expected 3 axes for Dense\(input_axes=2, out"):
        jaxsrn.spectral_norm(jnp.ones((2, 3)), Dense(input_axes=2))
    with pytest.raises(ValueError, match="output_axes: got 0, expected a static integer >= 1"):
        Dense(output_axes=0)


# What no constraint reaches


def everything():
    return nnx.Dict(
        head=nnx.Linear(8, 2, rngs=nnx.Rngs(0)),
        words=nnx.Embed(5, 3, rngs=nnx.Rngs(0)),
        up=nnx.ConvTranspose(2, 3, (3,), strides=(2,), rngs=nnx.Rngs(0)),
        norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    )


def test_a_sibling_of_a_kernel_is_listed():
    """What stands beside a kernel may be part of the map, as the two factors of LoRA are; a bias is not."""

    class WithFactors(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.DenseGeneral((2, 3), name="layer")
            a = self.param("a", nn.initializers.ones, (4, 1))
            return layer(x) + (x @ a)[..., None]

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = WithFactors()
            nn.share_scope(self, layer)
            return layer(x)

    x = jnp.ones((2, 4))
    model = Shared()
    variables = model.init(jax.random.key(0), x)
    assert jlinen.layer_operators(model, variables, x).left_out.keys() == {("a",)}


def test_what_is_left_out_is_listed():
    layers = jnnx.layer_operators(everything())
    assert layers == {("head", "kernel"): Dense()}
    reasons = layers.left_out
    assert reasons.keys() == {("words", "embedding"), ("up", "kernel")}
    assert "rows are looked up" in reasons["words", "embedding"]
    assert "the wrappers take it" in reasons["up", "kernel"]
    assert jax.tree.map(lambda leaf: leaf, layers) == layers

    class Words(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Embed(5, 3)(x))

    words = jnp.zeros((1,), jnp.int32)
    found = jlinen.layer_operators(Words(), Words().init(jax.random.key(0), words), words)
    assert found == {("Dense_0", "kernel"): Dense()}
    assert found.left_out.keys() == {("Embed_0", "embedding")}


@pytest.mark.parametrize(
    "make",
    [
        lambda layers, params: optim.keep_spectral_norm(layers, 1.0),
        lambda layers, params: optim.keep_stable_rank(layers, 0.5),
        lambda layers, params: penalties.total(jaxsrn.spectral_norm, layers, params),
        lambda layers, params: lipschitz.upper_bound(layers, params),
    ],
    ids=["keep_spectral_norm", "keep_stable_rank", "total", "upper_bound"],
)
def test_a_constraint_of_no_layers_is_an_error(make):
    model = nnx.Dict(words=nnx.Embed(5, 3, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=r"layers: got none, expected \{path: operator\}"):
        make({}, params)
    with pytest.raises(ValueError, match=r"It left out:\n  \('words', 'embedding'\): a table whose rows"):
        make(jnnx.layer_operators(model), params)


# Messages


def test_a_complex_kernel_is_a_real_one():
    """What the message says, against NumPy's complex singular values."""
    kernel = np.asarray(gaussian32((4, 3)) + 1j * gaussian32((4, 3), 1))
    with pytest.raises(ValueError, match=r"kernel: got dtype complex64.*both parts, jnp.block") as raised:
        jaxsrn.spectral_norm(kernel, Dense())
    assert "astype" not in str(raised.value)
    advice = str(raised.value).split("both parts, ")[1].split(", which")[0]
    real = eval(advice, {"jnp": jnp, "kernel": kernel})
    expected = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(jaxsrn.singular_values(real, Dense()), np.repeat(expected, 2), rtol=1e-5)
    taps = np.asarray(gaussian32((3, 2, 2)) + 1j * gaussian32((3, 2, 2), 1))
    real = jnp.block([[taps.real, taps.imag], [-taps.imag, taps.real]])
    symbols = np.fft.fft(taps, 4096, axis=0)
    norm = np.linalg.norm(symbols, 2, axis=(1, 2)).max()
    np.testing.assert_allclose(jaxsrn.spectral_norm(real, UnboundedConv()), norm, rtol=1e-5)
    with pytest.raises(ValueError, match=r"x: got dtype complex64.*stack x.real and x.imag"):
        jaxsrn.sphere.retract(kernel, kernel)


class Twice(nnx.Module):
    """A head that sees two sizes, as those of feature pyramids do."""

    def __init__(self):
        self.conv = nnx.Conv(2, 2, (3,), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x).sum() + self.conv(x[:, ::2]).sum()


MESSAGES = {
    "embed": (
        lambda: jnnx.SpectralNorm(nnx.Embed(5, 3, rngs=nnx.Rngs(0))),
        r"Embed\(.*rows are looked up is no linear map of its input. Leave it out, by the option where=",
    ),
    "embed in linen": (
        lambda: jlinen.SpectralNorm(nn.Embed(5, 3)).init(jax.random.key(0), jnp.zeros((1,), jnp.int32)),
        r"Embed\(.*rows are looked up is no linear map of its input. Leave it out",
    ),
    "nothing inside": (
        lambda: jnnx.SpectralNorm(nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
        r"BatchNorm\(.*it has no kernel.*There is nothing to hold",
    ),
    "layers inside": (
        lambda: jnnx.SpectralNorm(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
        "Sequential.*it has no kernel.*Wrap the layers inside",
    ),
    "stride": (
        lambda: jnnx.SpectralNorm(
            nnx.Conv(2, 3, (3,), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0)), input_shape=(7,)
        ),
        r"strides: got \(2,\) on an image of \(7,\).*give the layer another padding.*or leave it out",
    ),
    "head": (
        lambda: jnnx.constrain(
            nnx.Dict(head=nnx.Linear(8, 2, rngs=nnx.Rngs(0))), lambda path, layer: jnnx.StableRankNorm(layer, 0.3)
        ),
        r"head: Linear\(.*fraction: got 0.3, expected at least 0.5.*wrap it in SpectralNorm, or .*where= of constrain",
    ),
    "head and optimizer": (
        lambda: optim.keep_stable_rank({("head", "kernel"): Dense()}, 0.3).init({"head": {"kernel": jnp.ones((8, 2))}}),
        r"layers: at \('head', 'kernel'\): fraction: got 0.3.*To exempt this layer, leave its path out of layers",
    ),
    "two image sizes": (
        lambda: jnnx.layer_operators(Twice(), jnp.ones((1, 6, 2))),
        r"conv: called as .*one image size.*are those of jaxsrn.nnx.layer_operators\(model\) without inputs, .*"
        r"To leave the layer out, .*class Other\(Conv\)",
    ),
    "a subclass of Flax's": (
        lambda: jnnx.layer_operators(nnx.List([nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))])),
        r"To leave all layers of this class out, say computes={LoRALinear: None}\.",
    ),
    "recurrence in linen": (
        lambda: nn.RNN(Cell()).init(jax.random.key(0), jnp.ones((2, 5, 3))),
        r"Dense\(features=4\): it has no state.*nn.RNN\(cell, variable_broadcast=\('params', 'stable_rank'\)\)",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_lead_on(name):
    make, message = MESSAGES[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_what_the_messages_say_is_so():
    assert jnnx.layer_operators(Twice()) == {("conv", "kernel"): UnboundedConv()}
    lora = nnx.List([nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0))])
    assert jnnx.layer_operators(lora, computes={nnx.LoRALinear: None}) == {(1, "kernel"): Dense()}


# Recurrences


class Cell(nn.RNNCellBase):
    """A plain recurrent cell, whose step back to itself has norm 0.9."""

    wrapped: bool = True
    num_feature_axes = 1

    @nn.compact
    def __call__(self, carry, x):
        layer = nn.Dense(4, use_bias=False)
        back = jlinen.SpectralNorm(layer, norm=0.9) if self.wrapped else layer
        new = jnp.tanh(back(carry) + nn.Dense(4)(x))
        return new, new

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4))


def test_a_wrapper_in_a_recurrence_of_linen():
    """`nn.RNN` shares the state over time where it is named; its steps see the same weights, and `refresh` steps it."""
    x = gaussian32((2, 5, 3))
    rnn = nn.RNN(Cell(), variable_broadcast=("params", "stable_rank"))
    variables = rnn.init(jax.random.key(0), x)
    folded = jlinen.fold(rnn, variables)
    np.testing.assert_allclose(matrix_norm(folded["params"]["cell"]["Dense_0"]["kernel"], 4), 0.9, rtol=1e-5)
    np.testing.assert_allclose(rnn.apply(variables, x), nn.RNN(Cell(wrapped=False)).apply(folded, x), rtol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * gaussian32(leaf.shape), variables["params"])
    variables = jlinen.refresh(rnn, {**variables, "params": moved})
    kernel = jlinen.fold(rnn, variables)["params"]["cell"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(matrix_norm(kernel, 4), 0.9, rtol=1e-3)


def test_either_field_says_how_many_axes_an_unbounded_layer_has():
    """A stack of layers is told from a kernel of one axis more."""
    stack = jnp.asarray(gaussian((4, 3, 3, 2, 2)))
    for op in (UnboundedConv(kernel_dilation=(2, 2)), UnboundedConv(strides=(1, 1))):
        total = penalties.total(jaxsrn.spectral_norm, {("k",): op}, {"k": stack})
        expected = sum(float(jaxsrn.spectral_norm(kernel, op)) for kernel in stack)
        np.testing.assert_allclose(total, expected, rtol=1e-6)
