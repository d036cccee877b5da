"""Operators: which linear map `T(K)` a layer is, apart from its kernel `K`, in which the map is linear too.

An operator says how a kernel acts, `y = op.apply(kernel, x)`. It is a frozen, hashable dataclass of static shapes,
registered as a pytree node without leaves, so that it passes through `jit`, `vmap` and `grad` without annotations.
Kernels have Flax's layout `(*taps, c_in // groups, c_out)`, and channels are the last axis of images.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from jaxsrn._tools.checks import Kernel, ensure, ensure_same_on_devices, kernel_array, static_int
from jaxsrn.operators.layouts import PLAIN, TO_TRANSPOSE_IN_IMAGES, TO_TRANSPOSE_IN_KERNELS, Layout

__all__ = [
    "Contacts",
    "Dense",
    "Operator",
]

# Inputs or outputs of a layer, with any number of batch axes first.
Images = Shaped[Array | np.ndarray, "..."]
# The spellings of full precision.
_FULL = (lax.Precision.HIGHEST, "highest", "float32")


class Contacts(NamedTuple):
    """The output positions along one axis at which a tap meets a real input sample (no padding), and those samples.

    Both are arithmetic progressions, with the same steps for all taps of an axis. With zero padding they are in the
    same order. With circular padding both are sets, since what an output reads may lie around the image.
    """

    outputs: range
    inputs: range


class Operator(abc.ABC):
    """The base of all operators: the adjoints and the explicit matrix."""

    # Only the explicit matrix of such a layer has all singular values: it is no matrix itself, and has no symbol.
    _needs_explicit_matrix = False
    # A matrix keeps its leading pair when its stable rank is lowered; the kernel of a convolution does not.
    _normalization_keeps_pairs = False

    @property
    @abc.abstractmethod
    def _kernel_axes(self) -> int | None:
        """How many axes a kernel has; `None` where kernels of several numbers of axes fit."""

    @abc.abstractmethod
    def _check_kernel_shape(self, kernel_shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where a kernel of this shape does not fit the operator."""

    def in_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one input: `(c_in,)`, or `(*input_shape, c_in)`.

        Raises:
          ValueError: the shape of a kernel that does not fit, or an operator whose image has no size.
        """
        self._check_kernel_shape(kernel_shape)
        return self._in_shape(kernel_shape)

    def out_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one output: `(c_out,)`, or `(*output_shape, c_out)`.

        Raises:
          ValueError: as `in_shape`.
        """
        self._check_kernel_shape(kernel_shape)
        return self._out_shape(kernel_shape)

    @abc.abstractmethod
    def _in_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`in_shape` of a shape that is checked."""

    @abc.abstractmethod
    def _out_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`out_shape` of a shape that is checked."""

    @abc.abstractmethod
    def _channels(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """The numbers of input and of output channels (static)."""

    def _sizes(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """How many numbers the layer reads and writes; of a layer without edges, for one output sample (static)."""
        return math.prod(self.in_shape(kernel_shape)), math.prod(self.out_shape(kernel_shape))

    @property
    def _groups(self) -> int:
        """The number of groups of channels."""
        return 1

    @abc.abstractmethod
    def _axis_strides(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stride on each spatial axis (static)."""

    def _axis_input_dilations(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The input dilation on each spatial axis (static)."""
        return (1,) * len(self._axis_strides(kernel_shape))

    @abc.abstractmethod
    def _axis_contacts(self, kernel_shape: tuple[int, ...]) -> list[list[Contacts]]:
        """Where each tap of each spatial axis meets real input samples (static)."""

    @abc.abstractmethod
    def _apply_batch(self, kernel, x, precision, layout: Layout, by_fft: bool) -> Shaped[Array, "..."]:
        """`apply` for exactly one batch axis and checked arguments, in full precision if it is by FFT."""

    def _is_cheaper_by_fft(self, kernel_shape: tuple[int, ...]) -> bool:
        """Whether products by FFT take a small part of the time of direct ones (static)."""
        return False

    def _flattened(self, kernel: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], Operator]:
        """The kernel and the operator of the same map in the form in which it is computed: matrices have two axes."""
        return kernel, self

    def apply(self, kernel: Kernel, x: Images, *, precision=None) -> Shaped[Array, "..."]:
        """`T(kernel) x`: what the Flax layer computes, without its bias.

        Args:
          kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
          x: `(*batch, *in_shape)`, any number of batch axes.
          precision: that of the products, as in `jax.lax.conv_general_dilated`; `None` is Flax's default. With
            `jax.lax.Precision.HIGHEST`, kernels of many taps may be applied by FFT, whose rounding errors are small
            beside the largest outputs, not beside each of them.

        Returns:
          `(*batch, *out_shape)`.

        Raises:
          ValueError: a kernel or an input whose shape does not fit.
        """
        kernel, x = kernel_array(kernel, self), jnp.asarray(x)
        in_shape = self.in_shape(kernel.shape)
        ensure(
            x.ndim >= len(in_shape) and x.shape[x.ndim - len(in_shape) :] == in_shape,
            f"x: got shape {x.shape}, expected (*batch, {', '.join(map(str, in_shape))}) for {self}.",
        )
        return self._apply(kernel, x, precision, PLAIN)

    def _apply(self, kernel, x, precision, layout: Layout) -> Shaped[Array, "..."]:
        """`apply` for checked arguments."""
        in_shape, dtype = self.in_shape(kernel.shape), jnp.promote_types(kernel.dtype, x.dtype)
        batch = x.shape[: x.ndim - len(in_shape)]
        # Lower precisions are those of the Flax layer, which knows no FFT, and XLA has FFTs of these two types only.
        may_use_fft = precision in _FULL and dtype in (jnp.float32, jnp.float64)
        by_fft = may_use_fft and self._is_cheaper_by_fft(kernel.shape)
        x = x.astype(dtype).reshape((-1, *in_shape))
        y = self._apply_batch(kernel.astype(dtype), x, precision, layout, by_fft)
        return y.reshape((*batch, *y.shape[1:]))

    def transpose(self, kernel: Kernel, y: Images, *, precision=None):
        """`T(kernel)^T y`: the adjoint in the input, from `(*batch, *out_shape)` to `(*batch, *in_shape)`.

        Raises:
          ValueError: a kernel or an output whose shape does not fit.
        """
        kernel, y = kernel_array(kernel, self), jnp.asarray(y)
        ensure_same_on_devices(y, "y")
        out_shape = self.out_shape(kernel.shape)
        ensure(
            y.ndim >= len(out_shape) and y.shape[y.ndim - len(out_shape) :] == out_shape,
            f"y: got shape {y.shape}, expected (*batch, {', '.join(map(str, out_shape))}) for {self}.",
        )
        dtype = jnp.promote_types(kernel.dtype, y.dtype)
        x_shape = y.shape[: y.ndim - len(out_shape)] + self.in_shape(kernel.shape)
        apply = functools.partial(self._apply, kernel.astype(dtype), precision=precision, layout=TO_TRANSPOSE_IN_IMAGES)
        return jax.linear_transpose(apply, jax.ShapeDtypeStruct(x_shape, dtype))(y.astype(dtype))[0]

    def _kernel_gradient(self, kernel_shape: tuple[int, ...], x, y, *, precision=None):
        """`grad_K <y, T(K) x>`: the adjoint in the kernel.

        Args:
          kernel_shape: the shape of the kernel.
          x, y: `(*batch, *in_shape)` and `(*batch, *out_shape)`, of one dtype; the gradients of a batch are summed.
          precision: as in `apply`.

        Returns:
          An array of `kernel_shape`.
        """
        apply = functools.partial(self._apply, x=x, precision=precision, layout=TO_TRANSPOSE_IN_KERNELS)
        return jax.linear_transpose(apply, jax.ShapeDtypeStruct(kernel_shape, x.dtype))(y)[0]

    def frobenius_weights(self, kernel_shape: tuple[int, ...], dtype=None) -> Shaped[Array, "..."]:
        """How often each tap meets a real input sample: `||T(K)||_F^2 = sum(weights * K**2)`.

        Returns:
          The array `(*taps, 1, 1)`, of dense layers ones, in `dtype`, which is JAX's default float if it is `None`. The
          weights broadcast against the kernel. A zero marks a tap that never meets the image.

        Raises:
          ValueError: taps of a circular convolution that fall on each other (the weights are not diagonal then).
        """
        self._check_kernel_shape(kernel_shape)
        self._check_not_aliased(kernel_shape)
        return jnp.asarray(self._tap_counts(kernel_shape), dtype=float if dtype is None else dtype)

    def _tap_counts(self, kernel_shape: tuple[int, ...]) -> np.ndarray:
        """How often each tap meets a real input sample, `(*taps, 1, 1)`; 0 for taps without effect (static)."""
        counts = [[len(tap.outputs) for tap in axis] for axis in self._axis_contacts(kernel_shape)]
        return functools.reduce(np.multiply.outer, counts, np.ones(()))[..., None, None]

    def _distinct_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`kernel_shape` without taps that fall on others, where a circular convolution reaches around its image."""
        return tuple(kernel_shape)

    def _check_not_aliased(self, kernel_shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where two taps act on the same sample everywhere."""
        ensure(
            self._distinct_shape(kernel_shape) == tuple(kernel_shape),
            f"kernel: taps of shape {tuple(kernel_shape)} reach around the image of {self} and fall on each other, "
            f"expected at most {self._distinct_shape(kernel_shape)}; sum them first (op.wrap(kernel)) or use a larger "
            "image.",
        )

    def wrap(self, kernel: Kernel) -> Shaped[Array, "..."]:
        """The kernel in which taps that fall on each other are summed: the same map, up to a translation.

        Raises:
          ValueError: a kernel whose shape does not fit.
        """
        kernel = kernel_array(kernel, self)
        for axis, (k, period) in enumerate(zip(kernel.shape, self._distinct_shape(kernel.shape), strict=True)):
            if k > period:
                taps = jnp.moveaxis(kernel, axis, 0)
                wrapped = jnp.zeros((period, *taps.shape[1:]), kernel.dtype).at[np.arange(k) % period].add(taps)
                kernel = jnp.moveaxis(wrapped, 0, axis)
        return kernel

    def to_dense(self, kernel: Kernel) -> Shaped[Array, "out in"]:
        """The explicit matrix, for tests and small shapes: `to_dense(K) @ x.ravel() == apply(K, x).ravel()`.

        Raises:
          ValueError: a kernel whose shape does not fit, or an operator whose image has no size.
        """
        kernel = kernel_array(kernel, self)
        in_shape, out_shape = self.in_shape(kernel.shape), self.out_shape(kernel.shape)
        # The basis of the larger side alone could be many times the matrix.
        by_rows = math.prod(out_shape) < math.prod(in_shape)
        shape, layout = (out_shape, TO_TRANSPOSE_IN_IMAGES) if by_rows else (in_shape, PLAIN)
        size = math.prod(shape)
        basis = jnp.eye(size, dtype=kernel.dtype).reshape((size, *shape))

        def apply(x):
            # Direct products with basis vectors are exact.
            return self._apply_batch(kernel, x, lax.Precision.HIGHEST, layout, by_fft=False)

        if not by_rows:
            return apply(basis).reshape((size, -1)).T
        images = jax.ShapeDtypeStruct((size, *in_shape), kernel.dtype)
        return jax.linear_transpose(apply, images)(basis)[0].reshape((size, -1))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dense(Operator):
    """A dense layer `y = x @ kernel` with a kernel `(c_in, c_out)`, as Flax stores it.

    A matrix may be stored with several axes for its inputs or its outputs, as the projections of attention are, into
    heads `(features, heads, size)` and out of them `(heads, size, features)`. It is then the kernel reshaped to
    `(prod(inputs), prod(outputs))`, and inputs and outputs are vectors of these sizes.

    Args:
      input_axes, output_axes: how many axes of the kernel are those of the inputs, and then those of the outputs.

    Raises:
      ValueError: numbers that are not positive integers.
    """

    _: dataclasses.KW_ONLY
    input_axes: int = 1
    output_axes: int = 1

    _normalization_keeps_pairs = True

    def __post_init__(self):
        for name in ("input_axes", "output_axes"):
            object.__setattr__(self, name, static_int(getattr(self, name), name))

    def __repr__(self) -> str:
        """The operator as a call, without arguments where both have their default value."""
        axes = self.input_axes, self.output_axes
        return "Dense()" if axes == (1, 1) else f"Dense(input_axes={axes[0]}, output_axes={axes[1]})"

    @property
    def _kernel_axes(self) -> int:
        return self.input_axes + self.output_axes

    def _check_kernel_shape(self, kernel_shape):
        expected = "(c_in, c_out)" if self._kernel_axes == 2 else f"{self._kernel_axes} axes"
        ensure(
            len(kernel_shape) == self._kernel_axes and min(kernel_shape) > 0,
            f"kernel: got shape {tuple(kernel_shape)}, expected {expected} for {self}; reshape it, or say by "
            "Dense(input_axes=..., output_axes=...) which of its axes are inputs and which outputs.",
        )

    def _channels(self, kernel_shape):
        return math.prod(kernel_shape[: self.input_axes]), math.prod(kernel_shape[self.input_axes :])

    def _axis_strides(self, kernel_shape):
        return ()

    def _in_shape(self, kernel_shape):
        return self._channels(kernel_shape)[:1]

    def _out_shape(self, kernel_shape):
        return self._channels(kernel_shape)[1:]

    def _axis_contacts(self, kernel_shape):
        return []

    def _tap_counts(self, kernel_shape):
        return np.ones((1,) * len(kernel_shape))

    def _flattened(self, kernel):
        return (kernel, self) if kernel.ndim == 2 else (kernel.reshape(self._channels(kernel.shape)), Dense())

    def _apply_batch(self, kernel, x, precision, layout, by_fft):
        return jnp.matmul(x, kernel.reshape(self._channels(kernel.shape)), precision=precision)

    def to_dense(self, kernel):
        return self._flattened(kernel_array(kernel, self))[0].T
