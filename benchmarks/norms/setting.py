"""The setting in which the clock runs."""

from __future__ import annotations

import os

import torch

from norms.peers import DEVICE


def describe_setting() -> str:
    """The version and threads of PyTorch, the threads that the environment asks for, and the load."""
    threads = {name: os.environ[name] for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ}
    threads = ", ".join(f"{name}={value}" for name, value in threads.items()) or "default thread settings"
    # Threads of PyTorch wait for each other: another busy process slows it down a hundred times and more.
    load = f"load average {os.getloadavg()[0]:.1f} before the run"
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads on {DEVICE}; {threads}; {load}."
