"""The products with a zero-padded layer that its norm takes, counted as they run, beside those of power iteration."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
import torch

import jaxsrn
from jaxsrn import ZeroPaddedConv, bounds
from norms.in_jax import ends, jax_call, relative_width
from norms.parts import TOLERANCE
from norms.peers import torch_maps


class Counting(ZeroPaddedConv):
    """A layer that counts, when it runs, the multiplications that it and its adjoints take, up to one factor."""

    count = 0

    @property
    def silent(self) -> ZeroPaddedConv:
        """The same layer, which does not count."""
        return ZeroPaddedConv(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def apply(self, kernel, x, *, precision=None):
        self._count(kernel.shape, x)
        return self.silent.apply(kernel, x, precision=precision)

    def transpose(self, kernel, y, *, precision=None):
        self._count(kernel.shape, y)
        return self.silent.transpose(kernel, y, precision=precision)

    def _kernel_gradient(self, kernel_shape, x, y, **options):
        self._count(kernel_shape, x)
        return self.silent._kernel_gradient(kernel_shape, x, y, **options)

    def _count(self, kernel_shape, images):
        # The factor is that of the image, and the same throughout.
        jax.debug.callback(self._add, math.prod(images.shape[: -self.num_axes - 1]) * math.prod(kernel_shape))

    @staticmethod
    def _add(number):
        Counting.count += int(number)


jax.tree_util.register_static(Counting)


def own_products(kernel: np.ndarray, op: ZeroPaddedConv, tolerance: float | None = None) -> tuple[float, float]:
    """The norm, and the products with the layer that it took, without the two that only a triplet's residual needs."""
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
    """The products with the largest `tolerance` at which the norm is within 1e-5; one has to know it to choose that."""
    for exponent in range(1, 17):
        value, products = own_products(kernel, op, 0.5**exponent)
        if abs(value / norm - 1) <= TOLERANCE:
            return products
    return own_products(kernel, op)[1]


@functools.partial(jax.jit, static_argnums=1)
def power_step(kernel, op, v):
    """One step of power iteration: `||T v||`, and the next unit vector."""
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


def arpack_norm(kernel: np.ndarray, op: ZeroPaddedConv) -> float:
    """The norm with SAME padding and an odd number of taps, by ARPACK and PyTorch's convolution in float64."""
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), dtype=torch.float64)

    def product(convolution, channels):
        def apply(x):
            return convolution(torch.from_numpy(x.reshape((1, channels, *op.input_shape)))).numpy().reshape(-1)

        return apply

    sizes = [c * math.prod(op.input_shape) for c in weight.shape[:2]]
    forward, adjoint = map(product, torch_maps(weight, circular=False), weight.shape[1::-1])
    operator = scipy.sparse.linalg.LinearOperator(sizes, forward, adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(sizes))
    return float(scipy.sparse.linalg.svds(operator, k=1, tol=1e-9, v0=start, return_singular_vectors=False)[0])


def probabilistic(kernel, op):
    """`bounds.probabilistic` as it is by default, from one start."""
    return bounds.probabilistic(kernel, op, key=jax.random.key(0))


class Search(NamedTuple):
    """What the norm of one kernel took, how far it is off, and its intervals."""

    power: int  # products of power iteration to 1e-3
    fewest: float  # products of Lanczos to 1e-5
    own: float  # products of `spectral_norm`
    error: float  # of `spectral_norm`, relative
    widths: tuple[float, float]  # of the certified and the probabilistic interval, relative
    inside: bool  # whether both intervals hold ARPACK's norm

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of power iteration's products that Lanczos and `spectral_norm` take."""
        return (self.fewest / self.power, self.own / self.power) if self.fewest else (math.inf, math.inf)


def search(kernel: np.ndarray, op: ZeroPaddedConv) -> Search:
    """Everything about the norm of one kernel with SAME padding, except for times."""
    exact = arpack_norm(kernel, op)
    value, own = own_products(kernel, op)
    fewest = fewest_products(kernel, op, exact)
    power = power_products(kernel, op, exact)
    intervals = [jax_call(function, kernel, op)() for function in (bounds.certified, probabilistic)]
    widths = tuple(map(relative_width, intervals))
    inside = all(lower <= exact <= upper for lower, upper in map(ends, intervals))
    return Search(power, fewest, own, abs(value / exact - 1), widths, inside)
