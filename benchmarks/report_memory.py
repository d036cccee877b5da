"""The memory that a report of a large file takes: 2 GB of `.safetensors` in a process of its own.

    python benchmarks/report_memory.py [--gigabytes 2]

The file has matrices of 131072 x 128 float32 numbers, 64 MiB each. It is written to a temporary folder and deleted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE, MOST_MEMORY = (131072, 128), 1.0


def write(path: Path, count: int) -> None:
    """A `.safetensors` file of so many matrices, one written after the other."""
    matrix = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    size = matrix.nbytes
    header = {
        f"layers.{i}.weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(count):
            file.write((matrix * np.float32(1 + i)).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="the size of the file (default: %(default)s)")
    args = parser.parse_args()
    count = max(1, round(args.gigabytes * 1e9 / (4 * SHAPE[0] * SHAPE[1])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        write(path, count)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jaxsrn", "report", path], check=True, stdout=subprocess.DEVNULL)
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e9
    # Linux counts in kilobytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{count} layers in {size:.2f} GB: a peak of {peak:.2f} GB of memory, {seconds:.0f} s.")
    if peak > MOST_MEMORY:
        sys.exit(f"expected at most {MOST_MEMORY:g} GB.")


if __name__ == "__main__":
    main()
