"""Generalization measures of the weights: Spec-Fro and Spec-L1, the parts of two margin bounds that depend on them.

Sanyal, Torr, Dokania 2020 (in the version of ICLR) compare networks by three measures of sample complexity. Two are
here, without the factors and logarithms of the bounds that they come from:

- Spec-Fro: Neyshabur, Bhojanapalli, Srebro 2018, "A PAC-Bayesian approach to spectrally-normalized margin bounds for
  neural networks", Theorem 1.
- Spec-L1: Bartlett, Foster, Telgarsky 2017, "Spectrally-normalized margin bounds for neural networks", (1.2), with
  reference matrices 0. Their `||A||_{p,q}` is the `q`-norm of the `p`-norms of the columns of `A`.

The third is `jac_norm` (`hidden_layers.py`).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form
from jaxsrn._tools.linalg import ratio, safe_sqrt
from jaxsrn._tools.programs import program
from jaxsrn.lipschitz.class_margins import margin_array, over_margin
from jaxsrn.lipschitz.products import log_of, of_layers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.layers import Layers
from jaxsrn.spectra.norms import spectral_norm
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.ranks import norm_and_rank
from jaxsrn.spectra.singular_pair import rescaled

__all__ = ["norm_2_1", "spec_fro", "spec_l1"]


def norm_2_1(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`||T^T||_{2,1}`: the sum of the Euclidean norms of the rows of the explicit matrix `T` of a layer.

    A row belongs to an output: a unit of a dense layer, a channel at a position of a convolution. Of a circular layer
    the rows of a channel are alike. With zero padding the rows at the borders hold fewer taps. The norm is exact, and
    comes from the kernel: positions that the same taps reach are counted, not listed. Strides, dilation and groups are
    those of the matrix. For the norm of the kernel as a matrix `(taps * c_in, c_out)` take `Dense()` of that matrix.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator, with an image size.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. Its derivative is 0 where a row is.

    Raises:
      ValueError: a kernel that does not fit, or an `UnboundedConv`, whose matrix has infinitely many rows.
    """
    kernel, op = computed_form(kernel, op)
    op.in_shape(kernel.shape)
    return _norm_2_1(kernel, op)


@program
def _norm_2_1(kernel, op):
    kernel, scale = rescaled(kernel, op)
    # Taps that fall on each other are one entry of the matrix.
    kernel = op.wrap(kernel)
    squares, counts = jnp.sum(kernel**2, axis=-2), np.ones(())
    for axis, (reached, count) in enumerate(map(_reached, op._axis_contacts(kernel.shape), kernel.shape)):
        squares = jnp.moveaxis(
            jnp.tensordot(jnp.asarray(reached, squares.dtype), squares, (1, axis), precision=lax.Precision.HIGHEST),
            0,
            axis,
        )
        counts = np.multiply.outer(counts, count)
    # NaN times the 0 of a tap that a position does not reach is NaN, which is as it should be.
    return scale * jnp.sum(jnp.asarray(counts, squares.dtype)[..., None] * safe_sqrt(squares))


def _reached(contacts, num_taps: int) -> tuple[np.ndarray, np.ndarray]:
    """The sets of taps that positions along an axis reach, `(sets, taps)` of 0 and 1, and how many positions each."""
    places = np.concatenate([tap.outputs for tap in contacts])
    reached = np.zeros((int(places.max(initial=-1)) + 1, num_taps))
    for tap, met in enumerate(contacts):
        reached[met.outputs, tap] = 1
    # Positions beyond the last one that is met reach no tap, and add nothing.
    return np.unique(reached, axis=0, return_counts=True)


def spec_fro(layers: Layers, params, margin, *, log: bool = False) -> Float[Array, "..."]:
    """Spec-Fro, `prod ||W_i||_2^2 * sum srank(W_i) / margin^2` over the layers of a network.

    Neyshabur, Bhojanapalli, Srebro 2018, Theorem 1, whose `||W||_F^2 / ||W||_2^2` is the stable rank. It assumes of the
    network what `upper_bound` does, and that all layers are named.

    Args:
      layers: `{path: operator}` with image sizes, as `upper_bound` takes it.
      params: nested dicts, an `nnx.State`, or any pytree; other leaves are not read.
      margin: one number, such as a low percentile of the training margins, or an array of margins of samples.
      log: static; with `True` the logarithm, which stays within the range of float32 for deep networks.

    Returns:
      An array of the shape of `margin`, in float32 or wider; infinity where the margin is not positive, NaN where a
      kernel or the margin is. It is differentiable in `params` and `margin`, and finite in gradient.

    Raises:
      ValueError: what `upper_bound` refuses, an `UnboundedConv`, or a margin that is no real number.
    """
    norms, ranks = of_layers(_norm_and_rank, layers, params)
    return _measure(norms, jnp.sum(ranks), margin, log)


def _norm_and_rank(kernel, op):
    kernel, op = op._flattened(kernel)
    # Stable ranks per output sample cannot be added to those of whole layers.
    op.in_shape(kernel.shape)
    return norm_and_rank(kernel, op, leading_pair(kernel, op))


def spec_l1(layers: Layers, params, margin, *, log: bool = False) -> Float[Array, "..."]:
    """Spec-L1, `prod ||W_i||_2^2 * (sum (||W_i^T||_{2,1} / ||W_i||_2)^(2/3))^3 / margin^2` over layers.

    It is the square of the spectral complexity of Bartlett, Foster, Telgarsky 2017, (1.2), with reference matrices 0
    and 1-Lipschitz activations, over that of the margin. `W_i` is the explicit matrix of the layer, and
    `||W_i^T||_{2,1}` sums over its outputs (`norm_2_1`). It assumes of the network what `upper_bound` does.

    Args:
      layers, params, margin, log: as in `spec_fro`.

    Returns:
      An array of the shape of `margin`, as `spec_fro` returns it.

    Raises:
      ValueError: what `spec_fro` refuses.
    """
    sums, norms = of_layers(lambda kernel, op: (norm_2_1(kernel, op), spectral_norm(kernel, op)), layers, params)
    shares = ratio(sums, norms)
    zero = shares == 0
    # The derivative of the power is infinite at 0, where a layer is the zero map.
    powers = jnp.where(zero, 0, jnp.where(zero, 1, shares) ** (2 / 3))
    return _measure(norms, jnp.sum(powers) ** 3, margin, log)


def _measure(norms: Float[Array, " layers"], factor: Float[Array, ""], margin, log: bool) -> Float[Array, "..."]:
    """`prod(norms)^2 * factor / margin^2`, or its logarithm."""
    margin = margin_array(margin, norms.dtype)
    if not log:
        return over_margin(jnp.prod(norms) ** 2 * factor, margin, 2)
    void = margin <= 0
    value = 2 * jnp.sum(log_of(norms)) + log_of(factor) - 2 * jnp.log(jnp.where(void, 1, margin))
    return jnp.where(void & ~jnp.isnan(value), jnp.inf, value)
