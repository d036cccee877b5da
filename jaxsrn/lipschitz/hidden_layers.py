"""The generalization measure of hidden layers, Jac-Norm.

It is the third measure of Sanyal, Torr, Dokania 2020 (in the version of ICLR), after Wei, Ma 2019, "Data-dependent
sample complexity of deep neural networks via Lipschitz augmentation".
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import ensure, ensure_same_on_devices, float_dtype
from jaxsrn._tools.programs import program
from jaxsrn.lipschitz.class_margins import logits_and_labels, margin_array, margins_of, over_margin
from jaxsrn.lipschitz.samples import check_network, full_precision, norms_of_samples

__all__ = ["jac_norm"]


def jac_norm(f: Callable, params, x, labels, *, margin=None) -> Float[Array, "..."]:
    """Jac-Norm, `sum_i ||h_i||_2 ||J_i||_2 / margin` of each sample, with its hidden layers `h_i`.

    `J_i` is the gradient of the margin of the sample in `h_i`, a vector. The measure depends on data, where the
    products of norms do not. The network says what its hidden layers are: it is a function `f(params, x, tap)` that
    passes each of them through `tap`, which returns it as it is,

        def f(params, x, tap):
            h = tap(jax.nn.relu(x @ params["w1"]))
            return h @ params["w2"]

    Calls of `tap` must stand outside of `jax.jit`, `scan` and other control flow within `f`.

    Args:
      f: the network, from a batch of inputs to logits `(samples, classes)`; the samples must not depend on each other.
      params: any tree of arrays.
      x: `(samples, ...)`.
      labels: integers `(samples,)`.
      margin: one number, such as a low percentile of the training margins, or one for each sample; by default the
        sample's own.

    Returns:
      An array `(samples,)` in float32 or wider: infinity where the margin is not positive, NaN where the margin, a
      hidden layer or a logit is, or where a label names no class. It is differentiable in `params` and `x`.

    Raises:
      ValueError: a network without hidden layers, hidden layers or logits without the axis of samples, labels that
        do not fit, or a margin that is not real, or neither one number nor one for each sample.
    """
    check_network(f)
    x = jnp.asarray(x)
    ensure_same_on_devices((params, x, margin), "params, x, margin")
    return _jac_norm(f, params, x, jnp.asarray(labels), margin)


@functools.partial(program, static_argnums=0)
def _jac_norm(f, params, x, labels, margin):
    def total_margin(shifts):
        hidden = []

        def tap(h):
            hidden.append(h)
            return h if shifts is None else h + shifts[len(hidden) - 1]

        with full_precision():
            logits, numbers = logits_and_labels(f(params, x, tap), labels)
        found = margins_of(logits, numbers)
        return jnp.sum(found), (found, hidden)

    shapes = jax.eval_shape(lambda: total_margin(None)[1][1])
    got = [getattr(leaf, "shape", type(leaf).__name__) for leaf in shapes]
    ensure(
        len(shapes) > 0 and all(_is_hidden_layer(leaf, x) for leaf in shapes),
        f"f: got hidden layers of shapes {got} for an input of shape {x.shape}, expected at least one floating-point "
        "array with the samples along its first axis; pass every hidden layer through tap, one at a time.",
    )
    shifts = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]
    # Samples do not depend on each other, so that the gradient of the sum holds that of each margin.
    slopes, (own, hidden) = jax.grad(total_margin, has_aux=True)(shifts)
    wide = [
        (h.astype(float_dtype(h.dtype)), j.astype(float_dtype(h.dtype))) for h, j in zip(hidden, slopes, strict=True)
    ]
    terms = [(norms_of_samples(h) * norms_of_samples(j)).astype(own.dtype) for h, j in wide]
    margin = own if margin is None else margin_array(margin, own.dtype)
    ensure(
        margin.shape in ((), own.shape),
        f"margin: got shape {margin.shape}, expected one number, or one for each of {len(x)} samples.",
    )
    # The margin of a label that names no class is NaN, and so is what belongs to it.
    return over_margin(jnp.where(jnp.isnan(own), jnp.nan, sum(terms)), margin, 1)


def _is_hidden_layer(leaf, x) -> bool:
    """Whether what went through `tap` is one floating-point array with the samples along its first axis."""
    is_array = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_array and leaf.shape[:1] == x.shape[:1]
