"""Part `network`: every layer of a ResNet-50 from a cold start: norm, stable rank and certified interval of each."""

from __future__ import annotations

import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import resnet50
from _report import table
from tqdm import tqdm

from compilation.parts import ABSENT, Effort, Part, at_most, count, in_fresh_processes, memory_maps, seconds

ABOUT = """\
{kernels}, {number} layers at their true sizes: norm, stable rank and certified interval of each, by
three calls one after the other, or all at once by `jaxsrn.report.analyze`, which searches once for the three. The time
is that of a whole process, its start, the imports and all compilation included (medians of {repeats}). NumPy's two
lines, `fft2` to the size of the image and `svd`, give the norms of the 3x3 kernels alone, in a process too.
`difference`: of the norms of the 3x3 layers, the circular ones to NumPy's and those of the report to those of calls,
the largest, relative."""
NUMPY, CIRCULAR, UNBOUNDED, REPORT = "NumPy, 3x3 alone", "circular", "unbounded", "unbounded, by a report"
MOST = {"zero padding": 40.0, REPORT: 15.0}
MOST_DIFFERENCE = 1e-5
# What the norms of a way are compared with.
REFERENCE = {CIRCULAR: NUMPY, REPORT: UNBOUNDED}
WAYS = (NUMPY, CIRCULAR, "zero padding", UNBOUNDED, REPORT)


def kernels(effort: Effort) -> tuple[str, list[resnet50.Layer]]:
    """What the kernels are, and the layers; the last one, which is dense, has an image without axes."""
    name, convolutions, dense = "A ResNet-50's shapes, Gaussian kernels", *resnet50.gaussian(4 if effort.fast else 64)
    if not effort.fast:
        try:
            name, convolutions, dense = "The trained ResNet-50", resnet50.load(), resnet50.load_dense()
        except SystemExit as error:
            tqdm.write(f"{error}\nGaussian kernels of the same shapes are taken instead.")
    layers = [*convolutions.values(), resnet50.Layer(dense, (), (), "SAME")]
    return name, layers[:4] + layers[-1:] if effort.fast else layers


def operator(layer: resnet50.Layer, way: str):
    """The operator of a layer."""
    from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv

    if not layer.input_shape:
        return Dense()
    if way == UNBOUNDED:
        return UnboundedConv(strides=layer.strides)
    if way == CIRCULAR:
        return CircularConv(layer.input_shape, strides=layer.strides)
    return ZeroPaddedConv(layer.input_shape, padding=layer.padding, strides=layer.strides)


def square(layer: resnet50.Layer) -> bool:
    """Whether it is one of the sixteen 3x3 layers."""
    return layer.kernel.shape[:2] == (3, 3)


def numpy_norms(layers: list[resnet50.Layer]) -> list[float]:
    """The norms of the 3x3 kernels by the two lines of Sedghi, Gupta, Long 2019."""
    norms = []
    for layer in filter(square, layers):
        symbol = np.fft.fft2(layer.kernel, layer.input_shape, axes=(0, 1))
        norms.append(float(np.max(np.linalg.svd(symbol, compute_uv=False))))
    return norms


def own_norms(layers: list[resnet50.Layer], way: str) -> tuple[list[float], int]:
    """The norms of the 3x3 layers; and the most memory maps that there are, after the last of all numbers."""
    import jaxsrn
    from jaxsrn import bounds

    norms, maps = [], memory_maps()
    for layer in layers:
        op = operator(layer, way)
        found = [float(function(layer.kernel, op)) for function in (jaxsrn.spectral_norm, jaxsrn.stable_rank)]
        np.asarray(bounds.certified(layer.kernel, op))
        maps = max(maps, memory_maps())
        norms += found[:1] if square(layer) else []
    return norms, maps


def reported_norms(layers: list[resnet50.Layer]) -> tuple[list[float], int]:
    """What `own_norms` gives for unbounded layers, by the report of all kernels."""
    from jaxsrn.report import analyze

    named = {f"layer{i:02d}": layer for i, layer in enumerate(layers)}
    kernels = {name: layer.kernel for name, layer in named.items()}
    strides = {name: layer.strides[0] for name, layer in named.items() if max(layer.strides, default=1) > 1}
    found = {layer.name: layer.spectral_norm for layer in analyze(kernels, layout="HWIO", strides=strides).layers}
    return [found[name] for name, layer in named.items() if square(layer)], memory_maps()


def measure(effort: Effort, way: str, path: str) -> dict:
    """The norms of the 3x3 layers, the seconds that they and the rest took, and the most memory maps."""
    layers = pickle.loads(Path(path).read_bytes())
    start = time.perf_counter()
    if way == NUMPY:
        norms, maps = numpy_norms(layers), 0
    else:
        norms, maps = reported_norms(layers) if way == REPORT else own_norms(layers, way)
    return {"norms": norms, "maps": maps, "computing": time.perf_counter() - start}


def difference(found: dict | None, reference: dict | None) -> float | None:
    """The largest relative difference of two ways' norms; `None` where one of them failed."""
    return float(np.max(np.abs(found["norms"] / reference["norms"] - 1))) if found and reference else None


def measured(effort: Effort) -> Part:
    """The part: a row is one way to take the whole network."""
    name, layers = kernels(effort)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.pickle"
        path.write_bytes(pickle.dumps(layers))
        found = {way: in_fresh_processes(effort, "network", way, str(path)) for way in tqdm(WAYS, leave=False)}
    differences = {way: difference(found[way], found[reference]) for way, reference in REFERENCE.items()}
    rows = []
    for way, run in found.items():
        maps = "" if way == NUMPY else count(run, "maps")
        other = differences.get(way)
        shown = f"{other:.1e}" if other is not None else ABSENT if way in REFERENCE else ""
        rows.append([way, seconds(run, "process"), seconds(run, "computing"), maps, shown])
    about = ABOUT.format(kernels=name, number=len(layers), repeats=effort.repeats)
    body = table(("way", "process", "without its start", "maps", "difference"), rows)
    checks = [
        at_most(found[way] and found[way]["process"], limit, f"{name}, {way}", " s") for way, limit in MOST.items()
    ]
    same = [
        at_most(differences[way], MOST_DIFFERENCE, f"norms of the 3x3 layers, {way}, differ from those of {reference}")
        for way, reference in REFERENCE.items()
    ]
    return Part([("A whole network", f"{about}\n\n{body}")], same if effort.fast else checks + same)
