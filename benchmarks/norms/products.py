"""How many products with a zero-padded layer a norm takes, counted as they run; beside those of power iteration."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxsrn
from jaxsrn import ZeroPaddedConv
from norms.parts import TOLERANCE


class Counting(ZeroPaddedConv):
    """Counts, when it runs, the multiplications by which it or an adjoint is applied to images, up to a factor."""

    count = 0

    @property
    def silent(self) -> ZeroPaddedConv:
        return ZeroPaddedConv(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def apply(self, kernel, x, *, precision=None):
        self._count(kernel.shape, x)
        return self.silent.apply(kernel, x, precision=precision)

    def transpose(self, kernel, y, *, precision=None):
        self._count(kernel.shape, y)
        return self.silent.transpose(kernel, y, precision=precision)

    def kernel_gradient(self, kernel_shape, x, y, **options):
        self._count(kernel_shape, x)
        return self.silent.kernel_gradient(kernel_shape, x, y, **options)

    def _count(self, kernel_shape, images):
        # The same image and taps: products with a layer of fewer channels take as much less as its kernel is smaller.
        jax.debug.callback(self._add, math.prod(images.shape[: -self.num_axes - 1]) * math.prod(kernel_shape))

    @staticmethod
    def _add(number):
        Counting.count += int(number)


jax.tree_util.register_static(Counting)


def own_products(kernel: np.ndarray, op: ZeroPaddedConv, tolerance: float | None = None) -> tuple[float, float]:
    """The norm, and the products with the operator that it took; those of the residual are none of it."""
    counting = Counting(op.input_shape, padding=op.padding)
    jax.effects_barrier()
    before = Counting.count
    if tolerance is None:
        value, beside = jaxsrn.spectral_norm(jnp.asarray(kernel), counting), 0
    else:
        triplet = jaxsrn.leading_triplet(jnp.asarray(kernel), counting, tolerance=tolerance, proven=False)
        value, beside = triplet.value, 2
    jax.effects_barrier()
    return float(value), (Counting.count - before) / kernel.size - beside


def fewest_products(kernel: np.ndarray, op: ZeroPaddedConv, norm: float) -> float:
    """With the largest `tolerance` at which the norm is within 1e-5, which takes the norm to know."""
    for exponent in range(1, 17):
        value, products = own_products(kernel, op, 0.5**exponent)
        if abs(value / norm - 1) <= TOLERANCE:
            return products
    return own_products(kernel, op)[1]


@functools.partial(jax.jit, static_argnums=1)
def power_step(kernel, op, v):
    """`(||T v||, the next unit vector)`."""
    image = op.apply(kernel, v, precision="highest")
    back = op.transpose(kernel, image, precision="highest")
    return jnp.linalg.norm(image), back / jnp.linalg.norm(back)


def power_products(kernel: np.ndarray, op: ZeroPaddedConv, norm: float, error: float = 1e-3, limit: int = 2_000) -> int:
    """Products that power iteration from a random image needs to come that close to the norm, or `2 * limit`."""
    v = jax.random.normal(jax.random.key(0), op.in_shape(kernel.shape))
    v = v / jnp.linalg.norm(v)
    for step in range(limit):
        value, v = power_step(kernel, op, v)
        if value >= (1 - error) * norm:
            return 2 * step + 1
    return 2 * limit
