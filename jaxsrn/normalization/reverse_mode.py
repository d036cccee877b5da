"""Reverse mode for an operator's products in which the derivatives are products of the same operator.

JAX differentiates a convolution by transposing it. The transpose of a convolution that is an adjoint already is not in
the layout in which XLA is fast (`operators/layouts.py`). The products `apply`, `transpose` and `_kernel_gradient` are
the three derivatives of one trilinear form `<y, T(K) x>`, so each has the other two as its derivatives, and the rules
here use those. With JAX's own the implicit gradient of a zero-padded layer of 32 channels takes 10.7 times as long
(`python benchmarks/ablations.py`). `jax.custom_vjp` gives the rules no forward mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv

__all__ = [
    "in_reverse",
]


def in_reverse(op: Operator) -> Operator:
    """The same operator with these rules. Operators without zero padding stay: their pairs are not images."""
    if not isinstance(op, ZeroPaddedConv):
        return op
    return _InReverse(**_arguments(op))


def _arguments(op: ZeroPaddedConv) -> dict:
    return {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}


def _with_pull_back(product: Callable, pull_back: Callable, num_static: int) -> Callable:
    """A product of two arrays, which follow `num_static` static arguments, with its rule for reverse mode.

    Its forward pass is the bare product, which has a forward mode, as second derivatives need.
    """
    rule = jax.custom_vjp(product, nondiff_argnums=tuple(range(num_static)))
    rule.defvjp(lambda *args: (product(*args), args[-2:]), pull_back)
    return rule


def _pull_back_apply(op, precision, arguments, y):
    kernel, x = arguments
    return op._kernel_gradient(kernel.shape, x, y, precision=precision), op.transpose(kernel, y, precision=precision)


def _pull_back_transpose(op, precision, arguments, x):
    kernel, y = arguments
    return op._kernel_gradient(kernel.shape, x, y, precision=precision), op.apply(kernel, x, precision=precision)


def _pull_back_kernel_gradient(op, precision, kernel_shape, arguments, kernel):
    x, y = arguments
    return op.transpose(kernel, y, precision=precision), op.apply(kernel, x, precision=precision)


_apply = _with_pull_back(
    lambda op, precision, kernel, x: op.apply(kernel, x, precision=precision), _pull_back_apply, num_static=2
)
_transpose = _with_pull_back(
    lambda op, precision, kernel, y: op.transpose(kernel, y, precision=precision), _pull_back_transpose, num_static=2
)
_kernel_gradient = _with_pull_back(
    lambda op, precision, kernel_shape, x, y: op._kernel_gradient(kernel_shape, x, y, precision=precision),
    _pull_back_kernel_gradient,
    num_static=3,
)


@jax.tree_util.register_static
class _InReverse(ZeroPaddedConv):
    """The operator whose products have the rules of this file."""

    def apply(self, kernel, x, *, precision=None):
        return _apply(self._plain(), precision, kernel, x)

    def transpose(self, kernel, y, *, precision=None):
        return _transpose(self._plain(), precision, kernel, y)

    def _kernel_gradient(self, kernel_shape, x, y, *, precision=None):
        return _kernel_gradient(self._plain(), precision, kernel_shape, x, y)

    def _plain(self) -> ZeroPaddedConv:
        return ZeroPaddedConv(**_arguments(self))
