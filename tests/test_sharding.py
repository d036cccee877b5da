"""Many devices: training with sharded kernels and stacks of kernels over devices, on eight virtual CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_stacks_of_kernels_stay_where_they_are():
    checks = [f"stack,{name},spectral_norm" for name in ("dense", "circular", "circular-large", "same")]
    assert output_of(*checks) == "fine"
