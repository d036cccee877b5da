"""Batches of searches are computed one after another on a CPU, with the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsrn
from jaxsrn import CircularConv, ZeroPaddedConv
from jaxsrn._tools.loops import one_by_one

LARGE, SMALL = 2**13, 2**4


@functools.partial(one_by_one, static_argnums=(1,))
def powers(x, exponent, y):
    """Two arrays in a tree, from an array, a static number and a tree."""
    return {"power": x**exponent + y[0], "sum": jnp.sum(x) + y[1]}


def expected(x, y):
    return {"power": x**3 + y[0], "sum": np.sum(x, axis=-1) + y[1]}


def num_scans(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count(" scan[")


def cube(x, y):
    return powers(x, 3, y)


def of_size(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("in_axes", [(0, None), (1, (None, 0)), (None, (0, 0)), (0, (0, None))])
def test_batches_have_the_numbers_of_their_elements(size, in_axes):
    x, (a, b) = of_size(size), (2.0, 3.0)
    axes = (in_axes[0], in_axes[1] if isinstance(in_axes[1], tuple) else (None, None))

    def batch(leaf, axis):
        return leaf if axis is None else np.stack([leaf, 2 * np.asarray(leaf)], axis=axis)

    found = jax.vmap(cube, in_axes=axes)(batch(x, axes[0]), (batch(a, axes[1][0]), batch(b, axes[1][1])))
    for i in range(2):
        factors = [1 if axis is None else 1 + i for axis in (axes[0], *axes[1])]
        one = expected(factors[0] * x, (factors[1] * a, factors[2] * b))
        for name, value in one.items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-10)


def test_nested_batches():
    x, y = of_size(2, 3, LARGE), (1.0, 2.0)
    found = jax.vmap(jax.vmap(cube, in_axes=(0, None)), in_axes=(0, None))(x, y)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), found, expected(x, y))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="side by side on an accelerator")
@pytest.mark.parametrize(("size", "count"), [(SMALL, 0), (LARGE, 1)])
def test_only_large_elements_follow_one_another(size, count):
    assert num_scans(jax.vmap(cube, in_axes=(0, None)), of_size(2, size), (1.0, 2.0)) == count


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="side by side on an accelerator")
@pytest.mark.parametrize("op", [jaxsrn.CircularConv((64, 64)), jaxsrn.UnboundedConv(), jaxsrn.ZeroPaddedConv((64, 64))])
def test_searches_of_large_kernels_follow_one_another(op):
    """Climbing, and the search from its peaks, are each a loop over the kernels, which one kernel does not have."""
    shape, count = (3, 3, 64, 64), 11

    def loops_over_kernels(function, kernels) -> int:
        return str(jax.make_jaxpr(function)(kernels)).count(f" length={count}\n")

    def norm(kernel):
        return jaxsrn.spectral_norm(kernel, op)

    assert loops_over_kernels(jax.vmap(norm), jnp.zeros((count, *shape))) == 2
    assert loops_over_kernels(norm, jnp.zeros(shape)) == 0


def test_no_tracer_outlives_its_call():
    """The rule for batches does: JAX keeps it in the traced program."""
    op, kernel = ZeroPaddedConv((40, 40)), jnp.ones((3, 3, 2, 2))
    with jax.checking_leaks():
        norms = (jaxsrn.spectral_norm, jaxsrn.bounds.certified)
        lowered = [jax.jit(functools.partial(function, op=op)).lower(kernel) for function in norms]
        srnc = jax.jit(lambda kernel: jaxsrn.srnc(kernel, CircularConv((8,)), 5.0))
        lowered.append(srnc.lower(jnp.ones((3, 2, 2))))
    # A leak raises above. The programs have the loops of searches, whose rules could leak.
    assert all("while" in one.as_text() for one in lowered)
