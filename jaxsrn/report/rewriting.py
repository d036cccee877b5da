"""Stable rank normalization of whole files of weights: every kernel by `srnc`, all other arrays as they are."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsrn._tools.checks import computing_in, ensure, float_dtype, static_share
from jaxsrn.normalization import srnc
from jaxsrn.report.files import open_arrays
from jaxsrn.report.kernels import NamedKernel, Skipped, find_kernels
from jaxsrn.report.matrices import relative_distance
from jaxsrn.report.terminal import Progress, progress_bar
from jaxsrn.spectra import spectral_norm, stable_rank, stable_rank_range, target_of_fraction

__all__ = ["Change", "NoKernels", "normalize"]


class NoKernels(ValueError):
    """No array of a file is a kernel."""


class Change(NamedTuple):
    """What became of a kernel.

    Attributes:
      name: the kernel's name.
      target: the stable rank that it was brought to, if it was above.
      norm_before, norm, stable_rank_before, stable_rank: the numbers of the kernels as they are stored, rounded to the
        dtype of the file.
      distance: `||K - A||_F / ||A||_F` of the kernels as they are stored; 0 where the kernel is the same bit by bit.
      is_lowest: whether the fraction is below what the kernel's shape allows, so that the target is the lowest stable
        rank that it does allow.
    """

    name: str
    target: float
    norm_before: float
    norm: float
    stable_rank_before: float
    stable_rank: float
    distance: float
    is_lowest: bool


def normalize(
    path: str | os.PathLike,
    out: str | os.PathLike,
    fraction: float,
    *,
    norm: float | None = None,
    only: Sequence[str] = ("*",),
    layout: str | None = None,
    input_shape: Sequence[int] | None = None,
    groups: Mapping[str, int] = MappingProxyType({}),
    strides: Mapping[str, int] = MappingProxyType({}),
    stacked: Sequence[str] = (),
    progress: Progress = None,
) -> tuple[list[Change], list[Skipped]]:
    """Writes the weights with every kernel brought to a share of its largest stable rank, norms kept.

    It is `srnc` with the target of `target_of_fraction`, for unbounded convolutions or those of `input_shape`. Where a
    kernel's taps do not allow so low a stable rank, the target is the lowest that they allow. Kernels below their
    target keep every bit, and so do all other arrays.

    Args:
      path, out: the file that is read, and the one that is written, of the same format.
      fraction: in (0, 1].
      norm: the largest norm; kernels above it are scaled down to it after the rest.
      only: the names of the kernels to be changed, or patterns of them as in a shell.
      layout, input_shape, groups, strides, stacked: as for `analyze`.
      progress: as for `analyze`.

    Returns:
      The changes in the order of the names, and the arrays that are no kernels.

    Raises:
      NoKernels: there are none, or one of the patterns matches none.
      ValueError, FileNotFoundError, ImportError: as for `analyze`; a fraction outside (0, 1], a norm that is not
        positive, a folder to write that exists.
    """
    fraction = static_share(fraction, "fraction")
    ensure(norm is None or 0 < norm < float("inf"), f"norm: got {norm}, expected a positive number.")
    path, out = Path(path), Path(out)
    arrays = open_arrays(path)
    ensure(
        path.is_dir() or out.suffix == path.suffix,
        f"out: got {out}, expected a name that ends in {path.suffix}, as the format that is read is written.",
    )
    found, skipped = find_kernels(
        arrays.infos, layout=layout, input_shape=input_shape, groups=groups, strides=strides, stacked=stacked
    )
    idle = [pattern for pattern in only if not any(_is_named(kernel.name, pattern) for kernel in found)]
    if idle or not found:
        raise NoKernels(f"{path}: no kernels found{f' named {chr(32).join(idle)}' if found else ''}.")
    kernels = [kernel for kernel in found if any(_is_named(kernel.name, pattern) for pattern in only)]
    changes: dict[str, Change] = {}

    def changed(name: str) -> np.ndarray | None:
        mine = [kernel for kernel in kernels if kernel.array == name]
        if not mine:
            return None
        # Files may hold an array column by column.
        old = np.ascontiguousarray(arrays.read(name))
        new = old.copy()
        for kernel in mine:
            show(len(changes), len(kernels), kernel.name)
            with computing_in(new.dtype):
                changes[kernel.name] = _normalized_in(new, kernel, fraction, norm)
        return None if np.array_equal(old.view(np.uint8), new.view(np.uint8)) else new

    with progress_bar(progress) as show:
        arrays.copy(out, changed)
    return [changes[kernel.name] for kernel in kernels], skipped


def _is_named(name: str, pattern: str) -> bool:
    """Whether a kernel has this name, in which brackets stand for themselves, or fits the pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _normalized_in(array: np.ndarray, kernel: NamedKernel, fraction: float, most: float | None) -> Change:
    """Normalizes a kernel within its array, in place."""
    view, op = kernel.view(array), kernel.op
    old = view.copy()
    wide = jnp.asarray(old.astype(float_dtype(old.dtype)))
    asked, low = fraction * target_of_fraction(1.0, kernel.shape, op), stable_rank_range(kernel.shape, op).low
    target, is_lowest = max(asked, low), asked < low
    norm, rank = float(spectral_norm(wide, op)), float(stable_rank(wide, op))
    new = wide if not rank > target else srnc(wide, op, target).kernel
    if most is not None and norm > most:
        new = new * (most / norm)
    if new is wide:
        return Change(kernel.name, target, norm, norm, rank, rank, 0.0, is_lowest)
    view[...] = np.asarray(new).astype(old.dtype)
    again = jnp.asarray(view.astype(float_dtype(old.dtype)))
    after = float(spectral_norm(again, op)), float(stable_rank(again, op))
    return Change(kernel.name, target, norm, after[0], rank, after[1], relative_distance(old, view), is_lowest)
