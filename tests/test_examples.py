"""The training script: a run that is killed and resumed is the run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "train_cifar10.py"
NUM_STEPS, SAVE_EVERY = 12, 2
SMALL = ["--fast", "--stand-in", "--widths", "8", "--images", "48", "--batch", "8", "--epochs", "2", "--rate", "0.05"]


def start(output: Path, cache: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *SMALL, "--save-every", str(SAVE_EVERY), "--output", output, *options]
    # Three runs of one program: compiled once.
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **cached, "MPLBACKEND": "Agg"}, **pipes)


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole, broken, cache = tmp_path / "whole", tmp_path / "broken", tmp_path / "cache"
    assert "SYNTHETIC STAND-IN" in finish(start(whole, cache))

    process = start(broken, cache)
    first = broken / "checkpoints" / str(SAVE_EVERY)
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert first.exists()
    assert not (broken / "curve.json").exists()

    resumed = finish(start(broken, cache, "--resume"))
    step = int(resumed.split("Resumed after step ")[1].split(".")[0])
    assert SAVE_EVERY <= step < NUM_STEPS
    curve = json.loads((whole / "curve.json").read_text())
    assert len(set(curve["loss"])) == NUM_STEPS
    assert len(curve["epochs"]) == 2
    assert (broken / "curve.json").read_bytes() == (whole / "curve.json").read_bytes()
    assert (broken / "curves.png").exists()
