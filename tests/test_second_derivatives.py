"""Second derivatives of every public function: the derivative of the first one, or a refusal, never another number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contracts import CONTRACTS, EXACT, TARGETS, Contract, gaussian
from test_transformations import OTHERS

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds, lipschitz, penalties
from jaxsrn._tools.minres import minres

# Numbers that are constants for derivatives, or that have a kink where the constraints are met.
WITHOUT_DERIVATIVES = (".gap", ".residual", ".left", ".right")
# Those whose first derivative does not depend on the kernel.
LINEAR = ("symbol", "bounds.l1")
REFUSED = (
    "bounds.fantastic_four by power steps",
    "project_spectral_ball",
    "srnc raising",
    "surrogate.solve",
)


def tracked(kernel, op):
    """The penalty of pairs that have converged; those of `CONTRACTS` have not."""
    return penalties.extreme_singular_values_step(kernel, penalties.init_pairs(kernel, op), op)[0]


def pairs(wanted):
    """`(function, operator, kernel shape)` of the contracts that are wanted, one for each operator."""
    contracts = [contract for contract in CONTRACTS if contract.name != "penalties.extreme_singular_values_step"]
    contracts.append(Contract("penalties.extreme_singular_values_step", tracked))
    return [
        pytest.param(contract.function, *operator, id=f"{contract.name}-{type(operator[0]).__name__}")
        for contract in contracts
        for operator in contract.operators
        if not contract.is_constant and wanted(contract.name, operator[0])
    ]


def is_refused(name, op):
    """A dense layer is projected by clipping its singular values."""
    return name in REFUSED and (name, type(op)) != ("project_spectral_ball", Dense)


def summed(function, op):
    """A sum of all numbers of a result, with fixed weights."""

    def value(kernel):
        rng, total = np.random.default_rng(5), 0.0
        for path, leaf in jax.tree.leaves_with_path(function(kernel, op)):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and jax.tree_util.keystr(path) not in WITHOUT_DERIVATIVES:
                total += jnp.sum(jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)) * (leaf.real + leaf.imag))
        return total

    return value


def along(value, point, direction):
    """The derivative of the gradient along a direction, by forward over reverse mode."""
    return jax.jit(lambda point: jax.jvp(jax.grad(value), (point,), (direction,))[1])(point)


def differences(value, point, direction, width=1e-4):
    """The same by central differences of the gradient."""
    gradient = jax.jit(jax.grad(value))
    return (gradient(point + width * direction) - gradient(point - width * direction)) / (2 * width)


def assert_close(found, expected, share=1e-4):
    assert np.max(np.abs(expected)) > 1e-3
    np.testing.assert_allclose(found, expected, atol=share * np.max(np.abs(expected)))


@pytest.mark.parametrize(
    ("function", "op", "shape"), pairs(lambda name, op: not is_refused(name, op) and name not in LINEAR)
)
def test_they_are_derivatives_of_the_first(function, op, shape):
    value, kernel, direction = summed(function, op), gaussian(shape), gaussian(shape, 4)
    assert_close(along(value, kernel, direction), differences(value, kernel, direction))


@pytest.mark.parametrize(("function", "op", "shape"), pairs(lambda name, op: name in LINEAR))
def test_what_is_linear_has_none(function, op, shape):
    assert np.all(along(summed(function, op), gaussian(shape), gaussian(shape, 4)) == 0)


@pytest.mark.parametrize(("function", "op", "shape"), pairs(is_refused))
def test_refusals(function, op, shape):
    """At trace time, with what to do instead."""
    value, kernel = summed(function, op), gaussian(shape)
    with pytest.raises(ValueError, match=r"second derivative.*take"):
        jax.eval_shape(lambda kernel: jax.jvp(jax.grad(value), (kernel,), (kernel,)), kernel)


def test_a_norm_by_every_composition_of_modes():
    """Against JAX's norm of the matrix, by the whole Hessian."""
    kernel = gaussian((3, 2))
    expected = jax.hessian(lambda kernel: jnp.linalg.norm(kernel, 2))(kernel)
    modes = (jax.jacfwd, jax.jacrev)

    def norm(kernel):
        return jaxsrn.spectral_norm(kernel, Dense())

    found = jax.jit(lambda kernel: [outer(inner(norm))(kernel) for outer in modes for inner in modes])(kernel)
    for hessian in found:
        np.testing.assert_allclose(hessian, expected, atol=1e-10)


def test_third_derivatives_of_a_norm():
    kernel, direction = gaussian((3, 2)), gaussian((3, 2), 4)

    def third(norm):
        def second(t):
            return jax.jvp(jax.grad(lambda t: norm(kernel + t * direction)), (t,), (1.0,))[1]

        return jax.jit(jax.grad(second))(0.0)

    expected = third(lambda kernel: jnp.linalg.norm(kernel, 2))
    np.testing.assert_allclose(third(lambda kernel: jaxsrn.spectral_norm(kernel, Dense())), expected, rtol=1e-8)


def test_without_edges():
    """The frequency moves too. Its grid of 2**24 angles limits differences."""
    for function in (jaxsrn.spectral_norm, bounds.tensor_norm):
        value, kernel = summed(function, UnboundedConv()), gaussian((3, 2, 2))
        direction = gaussian((3, 2, 2), 4)
        expected = differences(value, kernel, direction, width=1e-2)
        assert_close(along(value, kernel, direction), expected, share=3e-3)


def test_without_edges_in_a_batch():
    value = summed(jaxsrn.spectral_norm, UnboundedConv())
    kernels, directions = gaussian((2, 3, 2, 2)), gaussian((2, 3, 2, 2), 4)
    together = jax.vmap(lambda kernel, direction: along(value, kernel, direction))(kernels, directions)
    for each, kernel, direction in zip(together, kernels, directions, strict=True):
        assert_close(each, along(value, kernel, direction))


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


PARAMS = {"first": gaussian((4, 5), 1), "second": gaussian((5, 3), 2)}


def test_local_constants_in_parameters_and_points_at_once():
    x, direction = gaussian((2, 4), 3), gaussian((4, 5), 6)

    def value(point):
        params = {**PARAMS, "first": point}
        return jnp.sum(lipschitz.local(network, params, x + point[:, :2].T, tolerance=1e-12).value ** 2)

    assert_close(along(value, PARAMS["first"], direction), differences(value, PARAMS["first"], direction))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(*row[1:], id=row[0])
        for row in OTHERS
        if row[0] not in ("lipschitz.ascent", "lipschitz.margins", "lipschitz.local")
    ],
)
def test_functions_of_other_arguments(function, shape):
    value, point, direction = summed(lambda point, _: function(point), None), gaussian(shape), gaussian(shape, 4)
    assert_close(along(value, point, direction), differences(value, point, direction))


def test_points_that_have_climbed_refuse():
    def value(first):
        x = gaussian((2, 4), 3)
        return jnp.sum(lipschitz.ascent(network, {**PARAMS, "first": first}, x, x + 1, num_steps=2).ratio)

    with pytest.raises(ValueError, match=r"second derivative.*take"):
        jax.eval_shape(jax.jacfwd(jax.grad(value)), PARAMS["first"])


@pytest.mark.parametrize("op", [Dense(), CircularConv((4,)), ZeroPaddedConv((5,))], ids=lambda op: type(op).__name__)
def test_a_surrogate_gradient_has_a_derivative_that_is_not_symmetric(op):
    """Forward mode over it and reverse mode over it are transposes: no mode takes the pair for a constant."""
    shape = (3, 2) if isinstance(op, Dense) else (3, 2, 2)
    kernel, direction, weights = gaussian(shape), gaussian(shape, 4), gaussian(shape, 5)
    state = jaxsrn.srnc_state(kernel, op, TARGETS[op])

    def value(kernel):
        return jnp.sum(weights * jaxsrn.srnc_step(kernel, state, op, TARGETS[op])[0])

    def both(kernel):
        forward = jax.jvp(jax.grad(value), (kernel,), (direction,))[1]
        return forward, jax.grad(lambda kernel: jnp.vdot(jax.grad(value)(kernel), weights))(kernel)

    forward, reverse = jax.jit(both)(kernel)
    np.testing.assert_allclose(jnp.vdot(forward, weights), jnp.vdot(reverse, direction), rtol=1e-7)


def test_a_kernel_that_does_not_determine_its_pair():
    """One of the lowest stable rank: the second derivative is NaN, not another number; the first one is finite."""
    op, kernel = CircularConv((4,)), gaussian((3, 2, 2))

    def value(kernel):
        return jnp.sum(jaxsrn.srnc(kernel, op, 1.0, **EXACT).kernel)

    def both(kernel):
        return jax.jvp(jax.grad(value), (kernel,), (kernel,))

    gradient, second = jax.jit(both)(kernel)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isnan(second))


@pytest.mark.parametrize("op", [CircularConv((4,)), ZeroPaddedConv((4,), strides=2)], ids=["circular", "same"])
def test_where_values_coincide_they_are_finite(op):
    """Orthonormal columns in one tap, and zero."""
    repeated = jnp.zeros((3, 2, 2)).at[1].set(jnp.eye(2))
    hessian = jax.jit(jax.hessian(functools.partial(jaxsrn.spectral_norm, op=op)))
    for kernel in (repeated, jnp.zeros((3, 2, 2))):
        assert np.all(np.isfinite(hessian(kernel)))


def third_value(kernel, op):
    """The system of a value that is not the largest has eigenvalues of both signs."""
    return jaxsrn.top_singular_values(kernel, op, 3)[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("share", [0.5, 4.0])
def test_values_closer_than_documented_count_as_coinciding(dtype, share):
    """Two values that differ by half and by four times the limit; the second derivative grows like one over that."""
    rng = np.random.default_rng(1)
    limit = 2 * float(jnp.finfo(dtype).eps) ** (2 / 3)
    left, right, direction = (rng.standard_normal((4, 4)) for _ in range(3))
    left, right = np.linalg.qr(left)[0], np.linalg.qr(right)[0]
    values = np.array([1.0, 1 - share * limit, 0.4, 0.1])
    kernel, direction = (jnp.asarray(array, dtype) for array in (left * values @ right.T, direction))

    gradient = jax.grad(lambda kernel: jaxsrn.spectral_norm(kernel, Dense()))
    size = float(jnp.linalg.norm(jax.jvp(gradient, (kernel,), (direction,))[1]))

    # The part of the two leading pairs, by first order perturbation: both of its vectors turn by this over the gap.
    inner = left.T @ np.asarray(direction, np.float64) @ right
    expected = abs(inner[0, 1] + inner[1, 0]) / 2 / (share * limit) * 2**0.5
    if share > 1:
        np.testing.assert_allclose(size, expected, rtol=0.05)
    else:
        assert size < 1e-3 * expected


@pytest.mark.parametrize("function", [jaxsrn.spectral_norm, third_value])
def test_large_systems_are_solved_by_minres(function, monkeypatch):
    """The same numbers as by eigenvectors, also where values coincide and the system is singular."""
    op, direction = ZeroPaddedConv((8,)), gaussian((3, 2, 2), 4)
    repeated = jnp.zeros((3, 2, 2)).at[1].set(jnp.eye(2)) + jnp.zeros((3, 2, 2)).at[0, 0, 0].set(0.5)
    value = functools.partial(function, op=op)
    kernels = gaussian((3, 2, 2)), repeated
    expected = [along(value, kernel, direction) for kernel in kernels]
    monkeypatch.setattr("jaxsrn._tools.held._FEW_UNKNOWNS", 0)
    jax.clear_caches()
    for kernel, second in zip(kernels, expected, strict=True):
        assert_close(along(value, kernel, direction), second, share=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_minres_is_the_pseudo_inverse(dtype):
    """Of symmetric matrices: of one sign, of both, singular ones of high and of low rank, and zero; by NumPy."""
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    # Where a part of the right-hand side is out of reach, the rest is known to the root of rounding.
    singular = 1e-6 if dtype == np.float64 else 1e-2

    @jax.jit
    def solved(matrix, rhs):
        return minres(lambda x: matrix @ x, rhs, tolerance=tolerance, most_steps=500)

    for seed in range(20):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
        sizes, signs = rng.uniform(0.1, 1, 60), rng.choice([-1, 1], 60)
        index = np.arange(60)
        for values in (-sizes, signs * sizes, signs * sizes * (index > 4), signs * (index < 3), 0 * sizes):
            matrix, rhs = (basis * values) @ basis.T, rng.standard_normal(60)
            x, outside = map(np.float64, solved(jnp.asarray(matrix, dtype), jnp.asarray(rhs, dtype)))
            inverse = np.linalg.pinv(matrix, rcond=1e-9)
            error = singular if np.any(values == 0) else 1e3 * tolerance
            assert np.linalg.norm(x - inverse @ rhs) <= error * np.linalg.norm(rhs)
            assert np.linalg.norm(outside - (rhs - matrix @ inverse @ rhs)) <= error * np.linalg.norm(rhs)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("function", [jaxsrn.spectral_norm, third_value])
def test_large_systems_know_no_scale(function, scale):
    """Squares of numbers of these sizes are none of float32. The derivative falls as the kernel grows."""
    op, kernel = ZeroPaddedConv((16, 16)), jnp.asarray(gaussian((3, 3, 2, 2)), jnp.float32)
    direction = jnp.asarray(gaussian((3, 3, 2, 2), 4), jnp.float32)
    slope = jax.grad(functools.partial(function, op=op))
    expected, found = (jax.jvp(slope, (s * kernel,), (s * direction,))[1] for s in (1.0, scale))
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("op", [CircularConv((6,)), ZeroPaddedConv((6,)), UnboundedConv()], ids=str)
def test_a_kernel_that_stays_as_it_is_needs_no_pair(op):
    """The second derivative of the sum of its squares is that of the identity, also at zero, where no pair leads."""
    weights, direction = gaussian((3, 2, 2), 1), gaussian((3, 2, 2), 2)
    target = 2.0 * float(jaxsrn.stable_rank(weights, op))

    def exact(kernel):
        return jnp.sum(weights * jaxsrn.srnc(kernel, op, target).kernel ** 2)

    def step(kernel):
        state = jaxsrn.srnc_state(kernel, op, target, norm=None)
        return jnp.sum(weights * jaxsrn.srnc_step(kernel, state, op, target, norm=None)[0] ** 2)

    for value in (exact, step):
        for kernel in (jnp.zeros((3, 2, 2)), weights):
            second = jax.jvp(jax.grad(value), (kernel,), (direction,))[1]
            np.testing.assert_allclose(second, 2 * weights * direction, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2, 3)])
def test_the_lower_end_without_edges_is_at_a_fixed_frequency(shape):
    """The smallest value is taken on a grid, at whose frequencies it is not stationary."""
    kernel, direction, step = gaussian(shape), gaussian(shape, 4), 1e-5
    slope = jax.grad(lambda k: penalties.extreme_singular_values(k, UnboundedConv(), alpha=50.0))
    expected = (slope(kernel + step * direction) - slope(kernel - step * direction)) / (2 * step)
    np.testing.assert_allclose(jax.jvp(slope, (kernel,), (direction,))[1], expected, rtol=1e-6, atol=1e-8)


def test_first_derivatives_do_not_pay():
    """No linear system is in their program."""

    def text(function):
        return jax.jit(function).lower(gaussian((3, 2))).as_text()

    norm = functools.partial(jaxsrn.spectral_norm, op=Dense())
    # That of the Hessian is solved by the SVD of all unknowns, of which there are more than rows or columns.
    assert "tensor<5x5xf64>" not in text(jax.value_and_grad(norm))
    assert "tensor<5x5xf64>" in text(jax.hessian(norm))
