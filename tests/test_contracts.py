"""What every public function promises, over every kind of operator. A new function joins with one line of CONTRACTS."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from events import TRACES, counted

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds, lipschitz, optim, penalties, surrogate
from jaxsrn.spectra.pairs_by_kind import pair_of_floats, value_gradient

DENSE = (Dense(), (3, 2))
CIRCULAR = (CircularConv((4,)), (3, 2, 2))
ZERO_PADDED = (ZeroPaddedConv((5,)), (3, 2, 2))


def all_of_it(result, entry):
    return result


class Contract(NamedTuple):
    """A public function of `(kernel, op)`, and the operators that it takes.

    `whole` is the whole result, where `function` leaves out or changes a part. `reached(whole, entry)` is the part of
    it that depends on the kernel's entry of this index: all of it but for a few functions.
    """

    name: str
    function: object
    operators: tuple = (DENSE, CIRCULAR, ZERO_PADDED)
    returns_kernel: bool = False
    is_constant: bool = False
    whole: object = None
    reached: object = all_of_it


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


def steps_of_training(kernel, op):
    """Whole steps from states of another kernel: to norm 1, to the kernel's own, below a cap, and without a target."""
    results = []
    for target in (TARGETS[op], None):
        for options in ({}, {"norm": None}, {"norm": 2.0, "cap": True}):
            state = jaxsrn.srnc_state(OTHER[op], op, target, **options)
            results.append(jaxsrn.srnc_step(kernel, state, op, target, **options))
    return results


def states_of_training(kernel, op):
    targets, norms = (TARGETS[op], None), (1.0, None)
    return [jaxsrn.srnc_state(kernel, op, target, norm=norm) for target in targets for norm in norms]


def functional_of_state(kernel, op):
    """`grad_K <u, T(K) v>` of the pair that the state starts with: the pair without its signs."""
    state, shape = jaxsrn.srnc_state(kernel, op, TARGETS[op]), jnp.shape(kernel)
    pair = state.normalized.pair
    return value_gradient(pair_of_floats(pair, op, shape, pair.input.dtype), op, shape)


# A point of the sphere, and a short descent.
POINT = np.full(CIRCULAR[1], 12**-0.5)
DESCENT = {"key": jax.random.key(0), "num_steps": 20, "optimizer": optim.sphere_sgd(1e-2)}


def whole_tracked_step(kernel, op):
    # Without float64 an array of it has no place.
    other = OTHER[op].astype(jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32)
    return penalties.extreme_singular_values_step(kernel, penalties.init_pairs(other, op), op)


def tracked_step(kernel, op):
    """Without the eigenvectors, whose sign (and more, of a repeated eigenvalue) is a choice."""
    value, pairs = whole_tracked_step(kernel, op)
    return value, pairs.values


def folded(kernel, op):
    return penalties.fold_batch_norm(kernel, np.array([2.0, -1.0]), np.ones(2))


CONTRACTS = [
    Contract("symbol", jaxsrn.symbol, (CIRCULAR,), reached=lambda symbol, entry: symbol[:, entry[-2], entry[-1]]),
    Contract("singular_values", jaxsrn.singular_values),
    Contract("top_singular_values", lambda k, op: jaxsrn.top_singular_values(k, op, 1)),
    Contract("leading_triplet", jaxsrn.leading_triplet),
    Contract("spectral_norm", jaxsrn.spectral_norm),
    Contract("bounds.certified", bounds.certified),
    Contract(
        "bounds.probabilistic",
        lambda k, op: bounds.probabilistic(k, op, key=jax.random.key(0)),
        is_constant=True,
    ),
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
    Contract("srnc", lambda k, op: jaxsrn.srnc(k, op, TARGETS[op], **EXACT), returns_kernel=True),
    Contract(
        "srnc norm-free", lambda k, op: jaxsrn.srnc(k, op, TARGETS[op], keep_norm=False, **EXACT), (CIRCULAR,), True
    ),
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
        "surrogate.trajectory",
        lambda k, op: surrogate.trajectory(k, op, 2.0, **DESCENT),
        (CIRCULAR,),
        is_constant=True,
        # The start is a random point of the sphere.
        reached=lambda found, entry: (found.objective, found.points[1:], found.stable_rank[1:]),
    ),
    Contract("penalties.extreme_singular_values", penalties.extreme_singular_values),
    Contract(
        "penalties.extreme_singular_values of the lower end",
        lambda k, op: penalties.extreme_singular_values(k, op, alpha=90.0),
        (DENSE, CIRCULAR),
    ),
    Contract("penalties.extreme_singular_values_step", tracked_step, whole=whole_tracked_step),
    Contract(
        "penalties.init_pairs",
        lambda k, op: penalties.init_pairs(k, op).values,
        is_constant=True,
        whole=penalties.init_pairs,
    ),
    Contract(
        "penalties.fold_batch_norm",
        lambda k, op: jaxsrn.spectral_norm(folded(k, op), op),
        whole=folded,
        reached=lambda kernel, entry: kernel[entry],
    ),
    Contract("penalties.total", lambda k, op: penalties.total(jaxsrn.spectral_norm, {("a", "b"): op}, {"a": {"b": k}})),
    Contract("lipschitz.norm_2_1", lipschitz.norm_2_1),
    Contract("srnc_state", functional_of_state, is_constant=True, whole=states_of_training),
    Contract("srnc_step", lambda k, op: stepped(k, op, "frozen"), returns_kernel=True, whole=steps_of_training),
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


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_results_have_types_of_their_own(contract, op, shape):
    """A weak type is lost where a result is stored and read again, and a jitted function would be traced anew."""
    found = jax.eval_shape(lambda kernel: contract.function(kernel, op), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_values(contract, op, shape):
    """Under jit over kernels as eagerly one by one, finite at zero and where values meet, and traced once."""
    function = contract.function
    kernels = jnp.stack([gaussian(shape, seed) for seed in range(3)])
    mapped = jax.jit(jax.vmap(function, (0, None)))(kernels, op)
    for i, kernel in enumerate(kernels):
        one = function(kernel, op)
        # Signs of singular vectors are a choice, and steps may differ by rounding.
        mapped_one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (mapped_one, one)), strict=True):
            if jax.tree_util.keystr(path) not in (".left", ".right", ".num_steps"):
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)

    degenerate = jnp.zeros(shape), repeated(shape)
    with counted(TRACES) as events:
        results = [function(kernel, op) for kernel in degenerate]
    assert not events
    for tree in results:
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("contract", "op", "shape"), PAIRS)
def test_nan_in_every_field(contract, op, shape):
    """One NaN in the kernel: every floating number of the result is NaN, and nothing is called feasible.

    Counts of steps and the sites of pairs say nothing then.
    """
    for entry in ((0,) * len(shape), tuple(n - 1 for n in shape)):
        whole = (contract.whole or contract.function)(gaussian(shape).at[entry].set(jnp.nan), op)
        reached = jax.tree.leaves_with_path(contract.reached(whole, entry))
        floating = [(path, leaf) for path, leaf in reached if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        assert floating
        for path, leaf in floating:
            assert leaf.size > 0
            assert np.all(np.isnan(leaf)), jax.tree_util.keystr(path)
        if hasattr(whole, "feasible"):
            assert not whole.feasible


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (UnboundedConv(), (3, 3, 4, 4)),
        (UnboundedConv(), (1, 3, 3)),
        (CircularConv((64, 64)), (3, 3, 2, 2)),
        (ZeroPaddedConv((24, 24)), (3, 3, 1, 1)),
        (ZeroPaddedConv((4, 4)), (3, 3, 2, 2)),
        (Dense(), (3, 3)),
        (Dense(), (5, 7)),
    ],
    ids=str,
)
def test_infinite_entries_come_to_an_end(op, shape):
    """LAPACK's SVDs, and searches that go on until a bound is low enough, would never end with an infinite entry."""
    for place, value in ((0, jnp.inf), (1, -jnp.inf)):
        kernel = gaussian(shape).reshape(-1).at[place].set(value).reshape(shape)
        clipped = jaxsrn.projections.clip_singular_values
        numbers = (
            jaxsrn.spectral_norm(kernel, op),
            jaxsrn.stable_rank(kernel, op),
            *jaxsrn.bounds.certified(kernel, op),
            jaxsrn.srnc(kernel, op, jaxsrn.target_of_fraction(0.9, shape, op)).distance,
            *([] if isinstance(op, UnboundedConv) or op == ZeroPaddedConv((24, 24)) else [clipped(kernel, op, 1.0)]),
        )
        assert all(np.all(np.isnan(number)) for number in numbers)


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
        # Signs of singular vectors are a choice, and steps differ by tolerance.
        if name in (".num_steps", ".left", ".right"):
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


# Public functions that are not of `(kernel, op)`, with the test that holds each.
HELD_ELSEWHERE = {
    "stable_rank_range": "test_ranks.test_known_circular_ranges",
    "target_of_fraction": "test_ranks.test_targets_are_shares_of_the_largest_stable_rank",
    "surrogate.forms": "test_surrogate.test_forms_of_one_axis",
    "surrogate.form_eigenvalues": "test_surrogate.test_forms_of_one_axis",
    "projections.steepest": "test_steepest.test_exact_is_the_dual_norm_of_an_independent_solver",
    "sphere.distance": "test_sphere.test_distance_is_accurate_at_every_angle",
    "sphere.exp": "test_sphere.test_exponential_and_logarithm_are_inverse",
    "sphere.log": "test_sphere.test_logarithm_keeps_the_digits_of_close_and_of_opposite_points",
    "sphere.random": "test_sphere.test_random_points_are_uniform",
    "sphere.retract": "test_sphere.test_tangent_and_retraction_are_literal",
    "sphere.tangent": "test_sphere.test_tangent_and_retraction_are_literal",
    "sphere.transport": "test_sphere.test_transport_by_the_textbook",
    "lipschitz.ascent": "test_lipschitz.test_pairs_climb",
    "lipschitz.certified_upper_bound": "test_lipschitz.test_lower_bounds_never_exceed_upper_ones",
    "lipschitz.histogram": "test_lipschitz.test_histograms",
    "lipschitz.jac_norm": "test_lipschitz.test_jac_norm_is_literal",
    "lipschitz.local": "test_lipschitz.test_local_is_the_norm_of_the_explicit_jacobian",
    "lipschitz.local_frobenius": "test_lipschitz.test_local_frobenius_norms",
    "lipschitz.margins": "test_lipschitz.test_margins",
    "lipschitz.over_batches": "test_lipschitz.test_over_batches",
    "lipschitz.pairwise": "test_lipschitz.test_pairs_by_the_definition",
    "lipschitz.spec_fro": "test_lipschitz.test_spectral_measures_are_literal",
    "lipschitz.spec_l1": "test_lipschitz.test_spectral_measures_are_literal",
    "lipschitz.upper_bound": "test_lipschitz.test_products_of_norms",
    "optim.keep_spectral_norm": "test_keeping.test_every_projection_ends_where_it_was_asked",
    "optim.keep_stable_rank": "test_keeping.test_every_projection_ends_where_it_was_asked",
    "optim.on_sphere": "test_optim.test_by_hand_with_an_inner_transformation",
    "optim.spectral_descent": "test_steepest.test_dense_layers_are_optax_muon",
    "optim.sphere_sgd": "test_optim.test_momentum_by_hand",
    "plots.camera": "test_plots.test_sphere",
    "plots.lipschitz_bounds": "test_plots.test_lipschitz_bounds",
    "plots.lipschitz_histogram": "test_plots.test_lipschitz_histogram",
    "plots.norms_over_steps": "test_plots.test_norms_over_steps",
    "plots.singular_values": "test_plots.test_singular_values",
    "plots.sphere": "test_plots.test_sphere",
    "plots.stable_ranks": "test_plots.test_stable_ranks",
    "plots.symbol_norms": "test_plots.test_symbol_norms_on_a_plane",
    "report.analyze": "test_report.test_a_model_says_what_its_layers_are",
    "nnx.constrain": "test_nnx.test_constrain_and_layer_operators",
    "linen.restart": "test_states.test_restart_is_a_new_wrapper",
    "nnx.restart": "test_states.test_restart_is_a_new_wrapper",
    "nnx.fold": "test_nnx.test_constrain_and_layer_operators",
    "nnx.layer_operators": "test_nnx.test_constrain_and_layer_operators",
    "nnx.refresh": "test_nnx.test_forwards_read_and_training_forwards_step",
    "linen.constrain": "test_linen.test_linen_and_nnx_are_constrained_alike",
    "linen.fold": "test_linen.test_a_folded_model_is_the_plain_architecture",
    "linen.layer_operators": "test_linen.test_layer_operators",
    "linen.refresh": "test_linen.test_refresh_steps_as_a_forward_does",
}


def public_functions() -> set[str]:
    """Every function that a public module lists, by the shortest name that users have for it."""
    found = {name: getattr(jaxsrn, name) for name in jaxsrn.__all__}
    short = set(map(id, found.values()))
    for module in pkgutil.iter_modules(jaxsrn.__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"jaxsrn.{module.name}")
            names = {f"{module.name}.{name}": getattr(loaded, name) for name in loaded.__all__}
            found |= {name: value for name, value in names.items() if id(value) not in short}
    # Some are jitted.
    return {name for name, value in found.items() if inspect.isfunction(inspect.unwrap(value))}


def test_every_public_function_has_a_contract():
    with_contract = {contract.name.split()[0] for contract in CONTRACTS}
    assert not with_contract & set(HELD_ELSEWHERE)
    assert public_functions() == with_contract | set(HELD_ELSEWHERE)


@pytest.mark.parametrize("name", HELD_ELSEWHERE)
def test_what_has_no_contract_has_the_test_that_is_named(name):
    file, test = HELD_ELSEWHERE[name].split(".")
    source = Path(__file__).with_name(f"{file}.py").read_text()
    assert re.search(rf"^def {test}\(", source, re.MULTILINE)
    assert re.search(rf"\b{name.split('.')[-1]}\b", source)
