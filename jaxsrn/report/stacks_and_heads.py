"""Axes beyond those of a kernel: layers stacked by `nn.scan` or `nn.vmap`, and the heads of attention.

What stands beside an array shows what its axes are: the bias of a scanned dense layer has an axis of layers too, and
that of an attention layer one of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxsrn.report.layouts import parts_of
from jaxsrn.report.named_arrays import ArrayInfo

__all__ = ["Scopes", "heads_of"]

_VECTORS = ("bias", "scale", "gamma", "beta")
_INTO_HEADS = ("query", "key", "value", "q", "k", "v")


class Scopes:
    """What arrays stand in which scope: the arrays whose names begin with the same parts.

    Args:
      infos: the arrays.
      stacked: the beginnings of the names of layers that are said to be stacked.
    """

    def __init__(self, infos: Mapping[str, ArrayInfo], stacked: Sequence[str]):
        self._stacked = tuple(stacked)
        self._vectors: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        self.bias: dict[tuple[str, ...], tuple[int, ...]] = {}
        vectors, others = [], {}
        for name, info in infos.items():
            *scope, leaf = parts_of(name)
            if leaf.lower() == "bias":
                self.bias[tuple(scope)] = info.shape
            if leaf.lower() in _VECTORS:
                vectors.append((tuple(scope), leaf.lower(), info.shape))
            else:
                others.setdefault(tuple(scope), []).append(info.shape)
        for scope, leaf, shape in vectors:
            # Scales of three axes or more are of elements, as that of an image, and show nothing of layers.
            of_heads = leaf == "bias" and any(_is_bias_of_stack(shape, other) for other in others.get(scope, ()))
            if len(shape) < 3 or of_heads:
                for depth in range(len(scope) + 1):
                    self._vectors.setdefault(scope[:depth], []).append(shape)

    def is_stack(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the first axis is one of layers.

        The bias decides where there is one, else the vectors of the smallest scope around the array that has some: all
        of them are stacks of as many.
        """
        if any(name.startswith(start) for start in self._stacked):
            return True
        scope = tuple(parts_of(name)[:-1])
        bias = self.bias.get(scope)
        if bias is not None:
            return _is_bias_of_stack(bias, shape)
        for depth in range(len(scope), -1, -1):
            vectors = self._vectors.get(scope[:depth])
            if vectors:
                return all(len(vector) >= 2 and vector[0] == shape[0] for vector in vectors)
        return False


def _is_bias_of_stack(bias: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a bias is that of a stack of kernels of this shape: `(layers, outputs)` or `(layers, heads, size)`."""
    is_bias = len(bias) == 2 or (len(bias) == 3 and len(shape) == 4)
    return is_bias and bias[0] == shape[0] and bias[1:] == shape[len(shape) - len(bias) + 1 :]


def heads_of(name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[int, int] | None:
    """The shape of the matrix that an attention kernel of three axes is, or `None` where it is no such kernel.

    Queries, keys and values are maps from `d` to `heads * size`, the output is one from there to `d`.
    """
    *_, scope, _ = ["", *parts_of(name)]
    into = bias == shape[1:] if bias is not None else scope.lower() in _INTO_HEADS
    if into:
        return shape[0], shape[1] * shape[2]
    is_output = scope.lower() in ("out", "attention_output") and (bias is None or bias == shape[2:])
    return (shape[0] * shape[1], shape[2]) if is_output else None
