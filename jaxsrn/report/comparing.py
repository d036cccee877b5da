"""Two checkpoints beside each other, layer by layer."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from jaxsrn.report.analysis import layer_reports
from jaxsrn.report.files import open_arrays
from jaxsrn.report.kernels import find_kernels
from jaxsrn.report.layers import LayerReport
from jaxsrn.report.matrices import relative_distance
from jaxsrn.report.terminal import Progress, progress_bar

__all__ = ["Comparison", "Pairing", "compare"]


class Pairing(NamedTuple):
    """A layer that both checkpoints have.

    Attributes:
      first, second: the records.
      distance: `||B - A||_F / ||A||_F` of the kernels, or NaN where their shapes differ.
    """

    first: LayerReport
    second: LayerReport
    distance: float


class Comparison(NamedTuple):
    """The layers of two checkpoints: those of both, and the names of those that only one of them has."""

    layers: list[Pairing]
    only_first: list[str]
    only_second: list[str]


def compare(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    progress: Progress = None,
    **options,
) -> Comparison:
    """The layers of two files by their names.

    Args:
      first, second: paths, as for `analyze`.
      progress: as for `analyze`; it counts the layers of both files.
      **options: `layout`, `input_shape`, `groups`, `strides` and `stacked`, as for `analyze`.

    Raises:
      ValueError, FileNotFoundError, ImportError: as for `analyze`.
    """
    files = [open_arrays(path) for path in (first, second)]
    kernels = [{kernel.name: kernel for kernel in find_kernels(file.infos, **options)[0]} for file in files]
    total, records = sum(map(len, kernels)), []
    with progress_bar(progress) as show:
        for found, file in zip(kernels, files, strict=True):
            done = sum(map(len, records))

            def counted(count: int, _: int, name: str, done: int = done) -> None:
                show(done + count, total, name)

            layers = layer_reports(list(found.values()), {}, file, False, counted)
            records.append({layer.name: layer for layer in layers})
    common = [name for name in kernels[0] if name in kernels[1]]

    # Several kernels of one array follow each other.
    read = [functools.lru_cache(maxsize=1)(file.read) for file in files]

    def distance(name: str) -> float:
        return relative_distance(*(k[name].view(of(k[name].array)) for k, of in zip(kernels, read, strict=True)))

    return Comparison(
        [Pairing(records[0][name], records[1][name], distance(name)) for name in common],
        [name for name in kernels[0] if name not in kernels[1]],
        [name for name in kernels[1] if name not in kernels[0]],
    )
