"""JAX's transformations and modes on every public function, one line of a table each."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from events import TRACES, counted
from jax import lax
from test_contracts import CIRCULAR, CONTRACTS, DENSE, HELD_ELSEWHERE, TARGETS, ZERO_PADDED, gaussian

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, bounds, lipschitz, optim, sphere

# Results that are a choice, such as the sign of a vector, or that count steps.
CHOSEN = (".left", ".right", ".num_steps")


def network(params, x):
    return jnp.tanh(x @ params)


def tapped(params, x, tap):
    return tap(jnp.tanh(x)) @ params


def moved_by(transformation):
    """One update of an optax transformation of a model with one layer, by half its kernel."""

    def moved(kernel):
        params = {"layer": kernel}
        return transformation.update({"layer": kernel / 2}, transformation.init(params), params)[0]["layer"]

    return moved


def points(w):
    """Four points in the dtype of a matrix of weights."""
    return gaussian((4, 3), 1, w.dtype)


# Of functions that are not of `(kernel, op)`: a name, a function of one array, and the shape of that.
OTHERS = [
    ("sphere.retract", lambda v: sphere.retract(v, v[::-1]), (3,)),
    ("sphere.exp", lambda v: sphere.exp(sphere.retract(v, 0 * v), v), (3,)),
    ("sphere.log", lambda v: sphere.log(sphere.retract(v, 0 * v), sphere.retract(v[::-1], 0 * v)), (3,)),
    ("sphere.transport", lambda v: sphere.transport(sphere.retract(v, v), sphere.retract(v[::-1], v * v), v), (3,)),
    ("sphere.tangent", lambda v: sphere.tangent(sphere.retract(v, 0 * v), v[::-1]), (3,)),
    ("sphere.distance", lambda v: sphere.distance(v, v[::-1]), (3,)),
    ("lipschitz.local", lambda w: lipschitz.local(network, w, points(w)).value, (3, 2)),
    ("lipschitz.local_frobenius", lambda w: lipschitz.local_frobenius(network, w, points(w)).value, (3, 2)),
    ("lipschitz.pairwise", lambda w: lipschitz.pairwise(network, w, points(w), 2 * points(w)), (3, 2)),
    ("lipschitz.ascent", lambda w: lipschitz.ascent(network, w, points(w), 2 * points(w), num_steps=2).ratio, (3, 2)),
    ("lipschitz.margins", lambda w: lipschitz.margins(points(w) @ w, np.array([0, 1, 0, 1])), (3, 2)),
    (
        "lipschitz.jac_norm",
        lambda w: lipschitz.jac_norm(tapped, w, points(w), np.array([0, 1, 0, 1]), margin=1.0),
        (3, 2),
    ),
    ("lipschitz.upper_bound", lambda w: lipschitz.upper_bound({("a",): Dense()}, {"a": w}), (3, 2)),
    ("lipschitz.certified_upper_bound", lambda w: lipschitz.certified_upper_bound({("a",): Dense()}, {"a": w}), (3, 2)),
    ("lipschitz.spec_fro", lambda w: lipschitz.spec_fro({("a",): Dense()}, {"a": w}, 1.0), (3, 2)),
    ("lipschitz.spec_l1", lambda w: lipschitz.spec_l1({("a",): Dense()}, {"a": w}, 1.0), (3, 2)),
    ("optim.keep_spectral_norm", moved_by(optim.keep_spectral_norm({("layer",): Dense()}, 1.0)), (3, 2)),
    ("optim.keep_stable_rank", moved_by(optim.keep_stable_rank({("layer",): Dense()}, 0.51)), (3, 2)),
    ("optim.on_sphere", moved_by(optim.on_sphere(optax.sgd(0.1))), (3, 2)),
    ("optim.sphere_sgd", moved_by(optim.sphere_sgd(0.1, 0.9)), (3, 2)),
]


def of(function, op):
    return lambda kernel: function(kernel, op)


# One operator a contract, each kind in turn: `test_contracts.py` takes all of them under `jit`, `vmap` and both modes.
CHOSEN_OPERATORS = [contract.operators[i % len(contract.operators)] for i, contract in enumerate(CONTRACTS)]
TABLE = [
    pytest.param(of(contract.function, op), shape, id=f"{contract.name}-{type(op).__name__}")
    for contract, (op, shape) in zip(CONTRACTS, CHOSEN_OPERATORS, strict=True)
]
TABLE += [pytest.param(of(jaxsrn.spectral_norm, UnboundedConv()), (3, 2, 2), id="spectral_norm-UnboundedConv")]
TABLE += [pytest.param(function, shape, id=name) for name, function, shape in OTHERS]
# One of each way to compute: without compilation every operation takes its time.
UNCOMPILED = re.compile(
    "spectral_norm-[^U]|stable_rank-|certified|lip_bound|srn-|clip_|penalties.total|local|sphere.log|keep_spectral|on_sphere"
)
every_function = pytest.mark.parametrize(("function", "shape"), TABLE)


def floats(tree):
    """The floating arrays of a result that are no choice."""
    return [
        leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and jax.tree_util.keystr(path) not in CHOSEN
    ]


def assert_same(found, expected, tolerance=1e-7):
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@every_function
def test_loops_batches_and_checkpoints(function, shape):
    """A scan over batches of batches of a checkpointed function, as one call after the other.

    These calls trace once, and their programs give no NaN.
    """
    kernels = [gaussian(shape, seed) for seed in range(2)]

    def step(count, batch):
        return count + 1, jax.vmap(jax.vmap(jax.checkpoint(function)))(batch)

    stack = jnp.stack(kernels).reshape((1, 2, 1, *shape))
    count, found = jax.jit(lambda stack: lax.scan(step, 0, stack))(stack)
    assert count == 1
    with jax.debug_nans(True):
        first = function(kernels[0])
        with counted(TRACES) as events:
            second = function(kernels[1])
    assert not events
    for i, one in enumerate((first, second)):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[0, i, 0], found), one, 1e-6)


@every_function
def test_export(function, shape):
    """Of the program and of that of its derivative: all their primitives allow it, and no host is called back."""

    def numbers(kernel):
        return floats(function(kernel))

    exported = jax.export.export(jax.jit(numbers))(jax.ShapeDtypeStruct(shape, jnp.float64))
    for program in (exported, exported.vjp()):
        assert "callback" not in program.mlir_module()


SERIALISED = {
    "norm": jaxsrn.spectral_norm,
    "rank": jaxsrn.stable_rank,
    "certified": bounds.certified,
    "srnc": lambda kernel, op: jaxsrn.srnc(kernel, op, TARGETS[op]),
}


@pytest.mark.parametrize("name", SERIALISED)
@pytest.mark.parametrize(("op", "shape"), [DENSE, CIRCULAR, ZERO_PADDED], ids=["dense", "circular", "same"])
def test_exported_programs_are_stored(name, op, shape):
    """Serialised, read again and called, with all checks of custom calls: the same numbers to the bit."""
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialise")

    def numbers(kernel):
        return floats(SERIALISED[name](kernel, op))

    kernel, program = gaussian(shape), jax.jit(numbers)
    stored = jax.export.export(program)(jax.ShapeDtypeStruct(shape, jnp.float64)).serialize()
    found = jax.export.deserialize(stored).call(kernel)
    jax.tree.map(np.testing.assert_array_equal, found, program(kernel))


@every_function
def test_single_precision_with_all_checks(function, shape):
    """Values and gradients without float64, under `jax_enable_checks` and `jax_debug_nans`."""
    kernel = gaussian(shape).astype(jnp.float32)
    expected = function(kernel.astype(jnp.float64))

    def total(kernel):
        found = function(kernel)
        return sum(jnp.sum(leaf.real) for leaf in floats(found)), found

    with jax.enable_x64(False), jax.enable_checks(True), jax.debug_nans(True):
        gradient, found = jax.jit(jax.grad(total, has_aux=True))(kernel)
    assert {leaf.dtype for leaf in floats(found)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.complex64)}
    assert gradient.dtype == jnp.float32
    assert_same(found, expected, 1e-2)


@pytest.mark.parametrize(("function", "shape"), [row for row in TABLE if UNCOMPILED.search(row.id)])
def test_operation_by_operation(function, shape, no_type_checks):
    """Without compilation, in Python loops, where numbers of Python are not made arrays."""
    kernel = gaussian(shape)
    expected = function(kernel)
    with jax.disable_jit():
        assert_same(function(kernel), expected, 1e-6)


@pytest.mark.parametrize(("function", "shape"), [pytest.param(*row[1:], id=row[0]) for row in OTHERS])
def test_both_modes_of_other_functions(function, shape):
    """Those of `CONTRACTS` have it there."""

    def numbers(point):
        return floats(function(point))

    forward, reverse = jax.jit(lambda point: (jax.jacfwd(numbers)(point), jax.jacrev(numbers)(point)))(gaussian(shape))
    assert any(np.any(leaf != 0) for leaf in forward)
    for a, b in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_every_function_of_arrays_is_in_the_table():
    """What has no contract and is missing here takes no arrays to transform, or is a class of Flax."""
    missing = set(HELD_ELSEWHERE) - {name for name, *_ in OTHERS}
    static = {"stable_rank_range", "target_of_fraction", "surrogate.forms", "surrogate.form_eigenvalues"}
    on_the_host = {"lipschitz.histogram", "lipschitz.over_batches", "report.analyze"}
    # An optimizer's steps have no derivative.
    constant = {"projections.steepest", "optim.spectral_descent"}
    assert {
        name for name in missing if name.split(".")[0] not in ("plots", "nnx", "linen")
    } == static | on_the_host | constant | {"sphere.random"}


def test_donated_buffers():
    """A training step whose kernel and state take the places of the old ones."""
    op, shape = CircularConv((4,)), (3, 2, 2)
    kernel, state = gaussian(shape), jaxsrn.srnc_state(gaussian(shape), op, TARGETS[op])
    expected = jaxsrn.srnc_step(kernel, state, op, TARGETS[op])
    step = jax.jit(lambda kernel, state: jaxsrn.srnc_step(kernel, state, op, TARGETS[op]), donate_argnums=(0, 1))
    assert_same(step(kernel, state), expected, 1e-12)
    assert kernel.is_deleted()
