"""Many devices: training with sharded kernels and stacks of kernels over devices, on eight virtual CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsrn
from jaxsrn import CircularConv, Dense, ZeroPaddedConv

ONES = jnp.ones((2, 3))
SCRIPT = Path(__file__).parent / "sharded.py"


def output_of(*checks: str) -> str:
    """What `sharded.py` says of checks, in a process that sees eight devices: `fine` after the last of them."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, SCRIPT, *checks], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    "check", ["step,circular,stable", "step,circular-grouped,stable", "step,same,stable", "step,dense,implicit"]
)
def test_training_gathers_no_kernel(check):
    """Forward, backward and Adam with kernels over four devices and batches over two: the numbers of one device."""
    assert output_of(check) == "fine"


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda kernel: jaxsrn.spectral_norm(kernel, Dense()), (4, 3)),
        (lambda kernel: jaxsrn.bounds.certified(kernel, CircularConv((4,))).upper, (3, 2, 2)),
        (lambda y: ZeroPaddedConv((4,)).transpose(jnp.ones((3, 2, 2)), y), (4, 2)),
        (lambda x: jaxsrn.lipschitz.local(lambda p, x: jnp.tanh(x), None, x).value, (4, 3)),
        (lambda p: jaxsrn.lipschitz.local(lambda p, x: x @ p, p, ONES).value, (3, 4)),
        (lambda x: jaxsrn.lipschitz.jac_norm(lambda p, x, tap: tap(x), None, x, np.zeros(4, int)), (4, 3)),
        (
            lambda params: jaxsrn.lipschitz.jac_norm(lambda p, x, tap: tap(x @ p), params, ONES, np.zeros(2, int)),
            (3, 4),
        ),
        (lambda limit: jaxsrn.project_spectral_ball(jnp.ones((3, 2)), Dense(), limit[0]).kernel, (1,)),
    ],
    ids=["dense", "circular", "transpose", "local", "parameters", "jac_norm", "its parameters", "limit"],
)
def test_results_are_never_summed_over_devices(function, shape):
    """What goes back to a constant is summed where `shard_map` keeps track of what varies: it was 20% too large."""
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))
    stack = jnp.asarray(gaussian((1, *shape)))
    options = {"mesh": mesh, "in_specs": P("devices"), "out_specs": P("devices")}
    with pytest.raises(ValueError, match=r"varies over the mesh axes .*, expected jax\.shard_map.*check_vma=False"):
        jax.jit(jax.shard_map(lambda part: function(part[0])[None], **options))(stack)
    jax.jit(jax.shard_map(lambda part: function(part[0])[None], check_vma=False, **options)).lower(stack)


def test_stacks_of_kernels_stay_where_they_are():
    checks = [f"stack,{name},spectral_norm" for name in ("dense", "circular", "circular-large", "same")]
    assert output_of(*checks) == "fine"


def test_explicit_mesh_axes_are_refused():
    """Those of `jax.make_mesh` by default: JAX raises an error of its own for most operations of a norm."""
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(jnp.asarray(gaussian((3, 2, 4))), NamedSharding(mesh, P(None, None, "devices")))
        for function in (jaxsrn.spectral_norm, jax.jit(jaxsrn.spectral_norm)):
            with pytest.raises(ValueError, match=r"explicit mesh axes \['devices'\], expected .*AxisType\.Auto"):
                function(kernel, CircularConv((4,)))
        everywhere = jax.sharding.reshard(kernel, P())
        expected = jaxsrn.spectral_norm(np.asarray(kernel), CircularConv((4,)))
        np.testing.assert_allclose(jaxsrn.spectral_norm(everywhere, CircularConv((4,))), expected, rtol=1e-12)
