"""Batch normalization folded into the kernel before it, so that norms and bounds are those of the composition."""

from __future__ import annotations

import jax.numpy as jnp

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, positive_scalar, real_floating

__all__ = [
    "fold_batch_norm",
]


def fold_batch_norm(kernel: Kernel, scale, var, *, epsilon: float = 1e-5) -> Kernel:
    """The kernel of a layer followed by batch normalization in evaluation: `kernel * scale / sqrt(var + epsilon)`.

    The composition has the norms and bounds of this kernel, `spectral_norm(fold_batch_norm(kernel, scale, var), op)`.
    Grishina et al. 2024 follow its spectral norm in training (Figure 4).

    Args:
      kernel: `(..., c_out)`.
      scale: `(c_out,)`, Flax's `scale`, the gamma of the literature; ones where the layer has none.
      var: `(c_out,)`, the running variance.
      epsilon: positive; the `epsilon` of the layer.

    Returns:
      A kernel of the same shape, in float32 or wider, because rounding to a narrow dtype would move its norm. It is
      differentiable in all three arrays.

    Raises:
      ValueError: a kernel that is not real floating, channels that do not fit, or a bad epsilon.
    """
    kernel, scale, var = (jnp.asarray(array) for array in (kernel, scale, var))
    for name, array in (("kernel", kernel), ("scale", scale), ("var", var)):
        real_floating(array.dtype, name)
    ensure(kernel.ndim >= 2, f"kernel: got shape {kernel.shape}, expected (..., c_in, c_out).")
    for name, array in (("scale", scale), ("var", var)):
        ensure(
            array.shape == kernel.shape[-1:],
            f"{name}: got shape {array.shape}, expected {kernel.shape[-1:]}, one per output channel of the kernel.",
        )
    dtype = float_dtype(kernel.dtype)
    factors = scale.astype(dtype) / jnp.sqrt(var.astype(dtype) + positive_scalar(epsilon, "epsilon", dtype))
    factors = factors.reshape((1,) * (kernel.ndim - 1) + (-1,))
    return kernel.astype(dtype) * factors
