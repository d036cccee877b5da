"""Which batch normalization follows which kernel, by their names.

A normalization belongs to the kernel whose name is the same without the words for a convolution and a normalization:
`Conv_0` and `BatchNorm_0`, `layer1/conv2` and `layer1/bn2`, `convs/0` and `norms/0`, `res2a_branch2a` and
`bn2a_branch2a`. In one list of numbered layers it is the one after the kernel: `0` and `1`. Names do not say whether a
normalization comes before or after its convolution; after it is assumed, where the number of channels is right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsrn.penalties import fold_batch_norm
from jaxsrn.report.kernels import NamedKernel
from jaxsrn.report.layouts import leaf_of, parts_of, split_name
from jaxsrn.report.named_arrays import ArrayInfo, NamedArrays

__all__ = ["BatchNorm", "folded", "pair_batch_norms"]

_VARIANCES = ("running_var", "moving_variance", "var")
_SCALES = ("weight", "gamma", "scale")
_WORDS = re.compile(r"batch_?norm(alization)?|norm|bn|conv(olution)?(2d)?|res")
# The defaults of the libraries that use these names.
_EPSILON = {"running_var": 1e-5, "moving_variance": 1e-3, "var": 1e-5}


class BatchNorm(NamedTuple):
    """The arrays of a batch normalization by their names; one without a scale has `None`."""

    scope: str
    scale: str | None
    variance: str
    epsilon: float


def pair_batch_norms(
    kernels: Sequence[NamedKernel], infos: Mapping[str, ArrayInfo], epsilons: Mapping[str, float] | float | None = None
) -> tuple[dict[str, BatchNorm], list[BatchNorm]]:
    """`({name of a kernel: what follows it}, the normalizations that follow none)`.

    Args:
      kernels: the kernels.
      infos: all arrays.
      epsilons: that of all normalizations, or `{scope: epsilon}`; by default 1e-5, and 1e-3 for Keras's names.
    """
    norms = [_norm_of(name, infos, epsilons) for name in infos if leaf_of(name) in _VARIANCES]
    candidates: dict[str, list[str]] = {}
    for norm in norms:
        for kernel in kernels:
            fits = infos[norm.variance].shape == (kernel.num_outputs,)
            if kernel.name == kernel.array and fits and _belongs(kernel.array, norm.scope):
                candidates.setdefault(norm.scope, []).append(kernel.name)
    pairs: dict[str, BatchNorm] = {}
    alone = []
    taken = [names[0] for names in candidates.values() if len(names) == 1]
    for norm in norms:
        names = candidates.get(norm.scope, [])
        if len(names) == 1 and taken.count(names[0]) == 1:
            pairs[names[0]] = norm
        else:
            alone.append(norm)
    return pairs, alone


def folded(kernel: np.ndarray, norm: BatchNorm, arrays: NamedArrays) -> np.ndarray:
    """The kernel of a layer and the batch normalization after it, in Flax's layout."""
    variance = arrays.read(norm.variance)
    scale = np.ones_like(variance) if norm.scale is None else arrays.read(norm.scale)
    return np.asarray(fold_batch_norm(kernel, scale, variance, epsilon=norm.epsilon))


def _norm_of(variance: str, infos: Mapping[str, ArrayInfo], epsilons) -> BatchNorm:
    stem, leaf, suffix = split_name(variance)
    scope = stem.rstrip("./")
    # Flax has the statistics in another collection than the scales, of the same scope.
    stems = [stem, *(re.sub("(^|/)batch_stats/", rf"\1{name}", stem, count=1) for name in ("params/", ""))]
    scale = next((found for s in stems for leaf in _SCALES if (found := f"{s}{leaf}{suffix}") in infos), None)
    given = epsilons.get(scope) if isinstance(epsilons, Mapping) else epsilons
    return BatchNorm(scope, scale, variance, _EPSILON[leaf] if given is None else given)


def _belongs(array: str, scope: str) -> bool:
    kernel, norm = (_without_collection(parts) for parts in (parts_of(array)[:-1], parts_of(scope)))
    if kernel == norm or len(kernel) != len(norm) or not kernel:
        return False
    if kernel[:-1] == norm[:-1] and kernel[-1].isdigit() and norm[-1].isdigit():
        return int(norm[-1]) == int(kernel[-1]) + 1
    return [_stem(part) for part in kernel] == [_stem(part) for part in norm]


def _without_collection(parts: list[str]) -> list[str]:
    return parts[1:] if parts and parts[0] in ("params", "batch_stats") else parts


def _stem(part: str) -> str:
    """A name without the words for a convolution and a normalization, and without what separates them."""
    return re.sub(r"[^a-z0-9]", "", _WORDS.sub("", part.lower()))
