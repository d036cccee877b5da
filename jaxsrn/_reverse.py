"""The derivatives of an operator's products as products of the same operator, for reverse mode alone.

JAX transposes convolutions, and what it makes of those that are adjoints already is out of the layout in which XLA is
fast (`_convolution`). Apply, transpose and kernel gradient are three sides of one trilinear form `<y, T(K) x>`, so that
each has the other two as its derivatives. JAX has no such rule for both modes: these have no forward mode.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax import lax

from jaxsrn.operators import Operator, ZeroPaddedConv

__all__ = ["in_reverse"]


def in_reverse(op: Operator) -> Operator:
    """The same operator, in reverse mode as fast as itself; only zero padding works on images, all others stay."""
    if not isinstance(op, ZeroPaddedConv):
        return op
    return _InReverse(**_arguments(op))


@jax.tree_util.register_static
class _InReverse(ZeroPaddedConv):
    def apply(self, kernel, x, *, precision=None):
        return _apply(_plain(self), precision, kernel, x)

    def transpose(self, kernel, y, *, precision=None):
        return _transpose(_plain(self), precision, kernel, y)

    def kernel_gradient(self, kernel_shape, x, y, *, precision=lax.Precision.HIGHEST):
        return _kernel_gradient(_plain(self), precision, kernel_shape, x, y)


def _plain(op: _InReverse) -> ZeroPaddedConv:
    return ZeroPaddedConv(**_arguments(op))


def _arguments(op: ZeroPaddedConv) -> dict:
    return {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(op: ZeroPaddedConv, precision, kernel, x):
    return op.apply(kernel, x, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _transpose(op: ZeroPaddedConv, precision, kernel, y):
    return op.transpose(kernel, y, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel_gradient(op: ZeroPaddedConv, precision, kernel_shape, x, y):
    return op.kernel_gradient(kernel_shape, x, y, precision=precision)


def _with_arguments(function):
    """The forward pass of `custom_vjp` that keeps the two arguments."""
    return lambda *args: (function(*args), args[-2:])


def _pull_back_apply(op, precision, arguments, y):
    kernel, x = arguments
    return op.kernel_gradient(kernel.shape, x, y, precision=precision), op.transpose(kernel, y, precision=precision)


def _pull_back_transpose(op, precision, arguments, x):
    kernel, y = arguments
    return op.kernel_gradient(kernel.shape, x, y, precision=precision), op.apply(kernel, x, precision=precision)


def _pull_back_kernel_gradient(op, precision, kernel_shape, arguments, kernel):
    x, y = arguments
    return op.transpose(kernel, y, precision=precision), op.apply(kernel, x, precision=precision)


_apply.defvjp(_with_arguments(_apply), _pull_back_apply)
_transpose.defvjp(_with_arguments(_transpose), _pull_back_transpose)
_kernel_gradient.defvjp(_with_arguments(_kernel_gradient), _pull_back_kernel_gradient)
