"""The report of a trained ResNet-50: its time beside NumPy's two lines and weightwatcher, and what each of them says.

    pip install -e ".[bench,cli,examples]" torch weightwatcher
    python benchmarks/report_time.py             # a few minutes, recorded; the weights by npm (resnet50.py)
    python benchmarks/report_time.py --fast      # without weightwatcher; nothing is recorded

Every way runs in a process of its own, and its time is that of the whole process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import resnet50
import scipy.optimize
import scipy.sparse.linalg
from _processes import in_process
from _report import publish, table
from safetensors.numpy import save_file
from tqdm import tqdm

REPORT, SIZED = "`python -m jaxsrn report`, at every image size", "`jaxsrn.report.analyze`, at true sizes"
WEIGHTS = "resnet50.safetensors"
TWO_LINES, WATCHER = "NumPy's two lines, at true sizes", "weightwatcher"
MOST_SECONDS, MOST_DIFFERENCE = {REPORT: 20.0, SIZED: 45.0}, 1e-5
ABOUT = """\
The trained ResNet-50: 53 convolutions and the dense layer, imports and compilation included; medians of three runs for
jaxsrn, one run of the others. `norm / exact`: over the layers, the number that is given for the norm over the norm of
the layer at every image size, from singular values in float64. NumPy's two lines, `fft2` and `svd`, take every tap at
all frequencies of the layer's image, without strides; layers of one tap take one SVD. weightwatcher gives an eigenvalue
of W^T W, whose root is taken here: with several taps the largest over the matrices of single taps
(`analyze(min_evals=1, conv2d_norm=False)`)."""


def layers() -> dict[str, resnet50.Layer]:
    """Every layer by name; the dense one has an image without axes."""
    return resnet50.load() | {"fc1000": resnet50.Layer(resnet50.load_dense(), (), (), "SAME")}


# Exact norms


def exact_norm(layer: resnet50.Layer) -> float:
    """The norm at every image size in float64: of an SVD, or the highest peak of the symbol's norm over all angles."""
    kernel = layer.kernel.astype(np.float64)
    if max(kernel.shape[:-2], default=1) == 1:
        return float(np.linalg.norm(kernel.reshape(kernel.shape[-2:]), 2))
    places = np.stack(np.meshgrid(*map(np.arange, kernel.shape[:2]), indexing="ij"), -1).reshape((-1, 2))
    # With strides each residue of a tap's place is an input channel of its own.
    phases = places % layer.strides @ (layer.strides[1], 1)
    taps = kernel.reshape((-1, *kernel.shape[2:]))

    def symbol(angles, weights=1.0):
        weighted = (weights * np.exp(-1j * (places // layer.strides) @ angles))[:, None, None] * taps
        return np.concatenate([weighted[phases == phase].sum(0) for phase in range(np.prod(layer.strides))])

    def triplet(angles, tolerance):
        matrix = symbol(angles)
        return scipy.sparse.linalg.svds(matrix, k=1, tol=tolerance, v0=np.ones(min(matrix.shape)))

    def value_and_slope(angles):
        left, value, right = triplet(angles, 1e-10)
        slopes = [symbol(angles, -1j * (places // layer.strides)[:, axis]) for axis in range(2)]
        return -value[0], [-np.vdot(left[:, 0], slope @ right[0].conj()).real for slope in slopes]

    # Kernels are real: half of the angles have all values. A coarse grid finds the highest peaks.
    angles = np.pi * np.stack(np.meshgrid(np.arange(16) / 8, np.arange(9) / 8, indexing="ij"), -1).reshape((-1, 2))
    best = sorted(angles, key=lambda a: triplet(a, 1e-2)[1][0])[-3:]
    return max(-scipy.optimize.minimize(value_and_slope, start, jac=True, method="BFGS").fun for start in best)


# The ways, each in a process of its own


def by_the_command_line(folder: Path) -> dict[str, float]:
    """The norms that the report of the weights in a file gives, told the strides."""
    output, found = folder / "report.json", layers()
    strides = [f"--strides={name}.kernel={layer.strides[0]}" for name, layer in found.items() if layer.strides]
    command = [sys.executable, "-m", "jaxsrn", "report", folder / WEIGHTS, "--json", output, *strides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = json.loads(output.read_text())["layers"]
    return {record["name"].removesuffix(".kernel"): record["spectral_norm"] for record in records}


def by_the_model() -> dict[str, float]:
    """The norms at the sizes that an image of 224x224 samples has in the network."""
    import jax
    from _trained import trained_resnet50

    from jaxsrn.report import analyze

    image = jax.ShapeDtypeStruct((1, *resnet50.IMAGE, 3), np.float32)
    records = analyze(trained_resnet50(), image, progress=False).layers
    # Both lists are in the order of the network.
    pairs = zip(layers().items(), records, strict=True)
    assert all(layer.kernel.shape == record.kernel_shape for (_, layer), record in pairs)
    return dict(zip(layers(), (record.spectral_norm for record in records), strict=True))


def by_two_lines() -> dict[str, float]:
    norms = {}
    for name, layer in layers().items():
        symbol = layer.kernel
        if max(symbol.shape[:-2], default=1) > 1:
            symbol = np.fft.fft2(symbol, layer.input_shape, axes=(0, 1))
        norms[name] = float(np.max(np.linalg.svd(symbol, compute_uv=False)))
    return norms


def by_weightwatcher() -> dict[str, float]:
    import torch
    import weightwatcher

    modules = {}
    for name, layer in layers().items():
        *taps, inputs, outputs = layer.kernel.shape
        module = torch.nn.Conv2d(inputs, outputs, taps) if taps else torch.nn.Linear(inputs, outputs)
        module.weight.data = torch.from_numpy(np.moveaxis(layer.kernel, (-1, -2), (0, 1)).copy())
        modules[name] = module
    with contextlib.redirect_stdout(io.StringIO()):
        model = torch.nn.ModuleDict(modules)
        details = weightwatcher.WeightWatcher(model=model).analyze(min_evals=1, conv2d_norm=False)
    return dict(zip(details["name"], np.sqrt(details["spectral_norm"]).tolist(), strict=True))


WAYS = {SIZED: by_the_model, TWO_LINES: by_two_lines, WATCHER: by_weightwatcher}


def timed(way: str, folder: Path) -> tuple[float, dict[str, float]]:
    """The seconds of a whole process, and the norms by the names of the layers."""
    seconds = []
    for _ in range(3 if way in MOST_SECONDS else 1):
        start = time.perf_counter()
        norms = by_the_command_line(folder) if way == REPORT else in_process(Path(__file__), "--way", way)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="without weightwatcher; nothing is recorded")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way]()))
        return
    ways = [REPORT, SIZED, TWO_LINES, *([] if args.fast else [WATCHER])]
    with tempfile.TemporaryDirectory() as folder:
        kernels = {f"{name}.kernel": np.ascontiguousarray(layer.kernel) for name, layer in layers().items()}
        save_file(kernels, Path(folder) / WEIGHTS)
        found = {way: timed(way, Path(folder)) for way in tqdm(ways, desc="ways")}
    exact = {name: exact_norm(layer) for name, layer in tqdm(layers().items(), desc="exact norms")}
    rows, checks = [], []
    for way, (seconds, norms) in found.items():
        ratios = np.array([norm / exact[name] for name, norm in norms.items()])
        ends = [f"{end:.5f}" for end in (ratios.min(), np.median(ratios), ratios.max())]
        rows.append([way, f"{seconds:.1f} s", len(norms), *ends])
        if way in MOST_SECONDS:
            checks.append((seconds <= MOST_SECONDS[way], f"{way}: {seconds:.1f} s, at most {MOST_SECONDS[way]:g} s"))
    off = max(abs(norm / exact[name] - 1) for name, norm in found[REPORT][1].items())
    checks.append((off <= MOST_DIFFERENCE, f"norms of the report off by {off:.1e}, at most {MOST_DIFFERENCE:g}"))
    body = f"{ABOUT}\n\n{table(('way', 'time', 'layers', 'norm / exact: least', 'median', 'most'), rows)}"
    sections = [("Time and norms", body)]
    if not publish("report_time", "A report of a ResNet-50", sections, checks, keep=not args.fast):
        sys.exit(1)


if __name__ == "__main__":
    main()
