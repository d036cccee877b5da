"""What every public function promises, over every kind of operator. A new function joins with one line of CONTRACTS."""

from __future__ import annotations

import contextlib
import inspect
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsrn
from jaxsrn import CircularConv, Dense, ZeroPaddedConv, bounds, optim, penalties, surrogate
from jaxsrn.spectra.pairs_by_kind import value_gradient

DENSE = (Dense(), (3, 2))
CIRCULAR = (CircularConv((4,)), (3, 2, 2))
ZERO_PADDED = (ZeroPaddedConv((5,)), (3, 2, 2))


class Contract(NamedTuple):
    """A public function of `(kernel, op)`, and the operators that it takes."""

    name: str
    function: object
    operators: tuple = (DENSE, CIRCULAR, ZERO_PADDED)
    returns_kernel: bool = False
    is_constant: bool = False


class Alone(NamedTuple):
    """A kernel that a function returns without any numbers, with one to look at: 0, or NaN if the kernel is."""

    kernel: jax.Array
    zero: jax.Array

    @classmethod
    def of(cls, kernel):
        wide = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32
        return cls(kernel, jnp.sum(0 * kernel.astype(wide)))


class Stepped(NamedTuple):
    """The kernel of a training step, and a number of its new state that no choice of signs changes."""

    kernel: jax.Array
    squared_norm: jax.Array


def stepped(kernel, op, gradient):
    normalized, state = jaxsrn.srnc_step(
        kernel, jaxsrn.srnc_state(kernel, op, TARGETS[op]), op, TARGETS[op], gradient=gradient
    )
    return Stepped(normalized, jnp.linalg.norm(state.normalized.pair.input) ** 2)


def functional_of_state(kernel, op):
    """`grad_K <u, T(K) v>` of the pair that the state starts with: the pair without its signs."""
    return value_gradient(jaxsrn.srnc_state(kernel, op, TARGETS[op]).normalized.pair, op, jnp.shape(kernel))


# A point of the sphere, and a short descent.
POINT = np.full(CIRCULAR[1], 12**-0.5)
DESCENT = {"key": jax.random.key(0), "num_steps": 20, "optimizer": optim.sphere_sgd(1e-2)}


def tracked_step(kernel, op):
    """Without the eigenvectors, whose sign (and more, of a repeated eigenvalue) is a choice."""
    pairs = penalties.init_pairs(OTHER[op], op)
    value, stepped = penalties.extreme_singular_values_step(kernel, pairs, op)
    return value, stepped.values


CONTRACTS = [
    Contract("symbol", jaxsrn.symbol, (CIRCULAR,)),
    Contract("singular_values", jaxsrn.singular_values),
    Contract("top_singular_values", lambda k, op: jaxsrn.top_singular_values(k, op, 1)),
    Contract("leading_triplet", jaxsrn.leading_triplet),
    Contract("spectral_norm", jaxsrn.spectral_norm),
    Contract("bounds.certified", bounds.certified),
    Contract("bounds.certified at any size", lambda k, op: bounds.certified(k, op, any_size=True)),
    Contract("bounds.gram_iteration", bounds.gram_iteration),
    Contract("bounds.tensor_norm", bounds.tensor_norm),
    Contract("bounds.fantastic_four", bounds.fantastic_four),
    Contract("bounds.fantastic_four by power steps", lambda k, op: bounds.fantastic_four(k, op, num_steps=5)),
    Contract("bounds.lip_bound", bounds.lip_bound),
    Contract("bounds.l1", bounds.l1),
    Contract("bounds.channel_l1", bounds.channel_l1),
    Contract("stable_rank", jaxsrn.stable_rank),
    Contract("srn", lambda k, op: jaxsrn.srn(k, 1.2, num_preserved=0), (DENSE,), True),
    Contract("srn raising", lambda k, op: jaxsrn.srn(k, 1.9, raise_rank=True), (DENSE,), True),
    Contract("srnc", lambda k, op: jaxsrn.srnc(k, op, TARGETS[op]), returns_kernel=True),
    Contract("srnc norm-free", lambda k, op: jaxsrn.srnc(k, op, TARGETS[op], keep_norm=False), (CIRCULAR,), True),
    Contract(
        "srnc raising",
        lambda k, op: jaxsrn.srnc(k, op, RAISED[op], raise_rank=True),
        (CIRCULAR,),
        returns_kernel=True,
    ),
    Contract(
        "clip_singular_values", lambda k, op: Alone.of(jaxsrn.clip_singular_values(k, op, 0.8)), returns_kernel=True
    ),
    Contract(
        "project_spectral_ball", lambda k, op: jaxsrn.project_spectral_ball(k, op, 0.8, **EXACT), returns_kernel=True
    ),
    Contract("surrogate.log_sum_exp", lambda k, op: surrogate.log_sum_exp(k, op, alpha=2.0), (CIRCULAR,)),
    Contract(
        "surrogate.log_sum_exp smooth", lambda k, op: surrogate.log_sum_exp(k, op, alpha=2.0, smooth=True), (CIRCULAR,)
    ),
    Contract(
        "surrogate.objective", lambda k, op: surrogate.objective(POINT, k, op, 2.0, alpha=2.0, penalty=0.1), (CIRCULAR,)
    ),
    Contract("surrogate.solve", lambda k, op: surrogate.solve(k, op, 2.0, **DESCENT), (CIRCULAR,), True),
    Contract(
        "surrogate.trajectory", lambda k, op: surrogate.trajectory(k, op, 2.0, **DESCENT), (CIRCULAR,), is_constant=True
    ),
    Contract("penalties.extreme_singular_values", penalties.extreme_singular_values),
    Contract(
        "penalties.extreme_singular_values of the lower end",
        lambda k, op: penalties.extreme_singular_values(k, op, alpha=90.0),
        (DENSE, CIRCULAR),
    ),
    Contract("penalties.extreme_singular_values_step", tracked_step),
    Contract("penalties.init_pairs", lambda k, op: penalties.init_pairs(k, op).values, is_constant=True),
    Contract(
        "penalties.fold_batch_norm",
        lambda k, op: jaxsrn.spectral_norm(penalties.fold_batch_norm(k, np.array([2.0, -1.0]), np.ones(2)), op),
    ),
    Contract("penalties.total", lambda k, op: penalties.total(jaxsrn.spectral_norm, {("a", "b"): op}, {"a": {"b": k}})),
    Contract("srnc_state", functional_of_state, is_constant=True),
    Contract("srnc_step", lambda k, op: stepped(k, op, "frozen"), returns_kernel=True),
    Contract("srnc_step implicit", lambda k, op: stepped(k, op, "implicit"), returns_kernel=True),
    Contract("srnc_tanay", lambda k, op: jaxsrn.srnc_tanay(k, op, TARGETS[op]), (CIRCULAR,), True),
]
# Kernels that pairs are tracked from.
OTHER = {op: np.random.default_rng(9).standard_normal(shape) for op, shape in (DENSE, CIRCULAR, ZERO_PADDED)}
# Between the smallest stable rank and that of the Gaussian kernels below.
TARGETS = {DENSE[0]: 1.2, CIRCULAR[0]: 2.0, ZERO_PADDED[0]: 2.6}
RAISED = {CIRCULAR[0]: 4.5}
EXACT = {"tolerance": 1e-12}
PAIRS = [
    pytest.param(contract, *operator, id=f"{contract.name}-{type(operator[0]).__name__}")
    for contract in CONTRACTS
    for operator in contract.operators
]


def gaussian(shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def repeated(shape):
    """A kernel with all singular values equal (circular), or nearly so: one tap, orthonormal columns."""
    kernel = np.zeros(shape)
    kernel[(0,) * (len(shape) - 2)] = np.eye(*shape[-2:])
    return jnp.asarray(kernel)


def real_parts(tree):
    """Every floating leaf as real vectors: what derivatives are taken of."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return [jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf for leaf in leaves]


@contextlib.contextmanager
def count_traces():
    """Counts what JAX traces in the block."""
    events = []

    def listen(event, duration, **kwargs):
        if "trace" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_values(contract, op, shape):
    """Under jit as eagerly, over kernels as one by one, finite at zero, NaN from NaN, and traced once."""
    function = contract.function
    eager = function(gaussian(shape), op)
    chex.assert_trees_all_close(jax.jit(function)(gaussian(shape), op), eager, rtol=1e-9, atol=1e-9)

    kernels = jnp.stack([gaussian(shape, seed) for seed in range(3)])
    mapped = jax.vmap(function, (0, None))(kernels, op)
    for i, kernel in enumerate(kernels):
        one = function(kernel, op)
        # Signs of singular vectors are a choice, and steps may differ by rounding.
        mapped_one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (mapped_one, one)), strict=True):
            if jax.tree_util.keystr(path) not in (".left", ".right", ".num_steps", ".residual"):
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)

    poisoned = gaussian(shape).at[(0,) * len(shape)].set(jnp.nan)
    inputs = jnp.zeros(shape), repeated(shape), poisoned
    with count_traces() as events:
        at_zero, at_repeated, at_nan = (function(kernel, op) for kernel in inputs)
    assert not events
    for tree in (at_zero, at_repeated):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))
    value = jax.tree.leaves(at_nan)[0]
    assert np.any(np.isnan(value))
    for name in ("stable_rank", "spectral_norm", "distance", "residual", "value"):
        if hasattr(at_nan, name):
            assert np.any(np.isnan(getattr(at_nan, name))), name


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_derivatives(contract, op, shape):
    """Both modes agree, and are finite also at zero and where singular values coincide."""

    @jax.jit
    def both(kernel):
        def function(kernel):
            return real_parts(contract.function(kernel, op))

        return jax.jacfwd(function)(kernel), jax.jacrev(function)(kernel)

    forward, reverse = both(gaussian(shape))
    chex.assert_trees_all_close(forward, reverse, rtol=1e-9, atol=1e-9)
    assert any(np.any(leaf != 0) for leaf in forward) != contract.is_constant
    for kernel in (jnp.zeros(shape), repeated(shape)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(both(kernel)))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_dtypes(contract, op, shape, dtype):
    """Kernels come back in the input's dtype, numbers in float32 or wider."""
    wide = {jnp.float64: (jnp.float64, jnp.complex128)}.get(dtype, (jnp.float32, jnp.complex64))
    out = jax.eval_shape(lambda k: contract.function(k, op), jax.ShapeDtypeStruct(shape, dtype))
    leaves = jax.tree.leaves(out)
    if contract.returns_kernel:
        assert out.kernel.dtype == dtype
        leaves = jax.tree.leaves(out[1:])
    inexact = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert inexact
    assert all(found in wide for found in inexact)


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_narrow_dtypes_have_the_accuracy_of_float32(contract, op, shape):
    """bfloat16 in: the numbers of the same kernel in float64, to float32 accuracy."""
    narrow = gaussian(shape).astype(jnp.bfloat16)
    # The iteration's own tolerance is coarser in float32: passes differ, results agree.
    got = contract.function(narrow, op)
    expected = contract.function(narrow.astype(jnp.float64), op)
    for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (got, expected)), strict=True):
        name = jax.tree_util.keystr(path)
        if name in (".num_steps", ".residual", ".gap", ".left", ".right"):
            continue
        tolerance = 1e-2 if name == ".kernel" else 1e-4
        np.testing.assert_allclose(a.astype(b.dtype), b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_bad_kernels(contract, op, shape):
    """Integer, complex and misshapen kernels: a ValueError, also under jit."""
    with pytest.raises(ValueError, match="expected a real floating-point array"):
        contract.function(jnp.ones(shape, jnp.int32), op)
    with pytest.raises(ValueError, match="expected a real floating-point array"):
        contract.function(jnp.ones(shape, jnp.complex64), op)
    with pytest.raises(ValueError, match=r"kernel: got shape \(3,\), expected"):
        jax.jit(contract.function)(jnp.ones(3), op)


def test_every_public_function_has_a_contract():
    static = {"stable_rank_range", "surrogate.forms", "surrogate.form_eigenvalues"}  # of shapes, not of kernels
    public = {name for name in jaxsrn.__all__ if inspect.isfunction(getattr(jaxsrn, name))}
    for module in (bounds, penalties, surrogate):
        short = module.__name__.removeprefix("jaxsrn.")
        public |= {f"{short}.{name}" for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert public - static == {contract.name.split()[0] for contract in CONTRACTS}
