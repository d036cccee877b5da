"""Margins of a classifier, and what the generalization measures divide by them."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import ensure, float_dtype

__all__ = ["logits_and_labels", "margin_array", "margins", "margins_of", "over_margin"]


def margins(logits, labels) -> Float[Array, "..."]:
    """The margin of each sample: the logit of its own class less the largest logit of another class.

    It is positive where the sample is classified correctly. Generalization measures take the margin of each sample, or
    a low percentile of all training margins, `numpy.percentile(margins, 10)`.

    Args:
      logits: `(..., classes)`, of at least two classes.
      labels: integers `(...)` from 0 to `classes - 1`.

    Returns:
      An array `(...)` in float32 or wider; NaN where a logit is, or where a traced label names no class.

    Raises:
      ValueError: logits that are not real floating-point numbers of two classes or more, labels that are not integers
        of the same shape without the last axis, or a concrete label that names no class.
    """
    return margins_of(*logits_and_labels(logits, labels))


def logits_and_labels(logits, labels):
    """The two as arrays, checked, the logits in float32 and the labels in 32 bits, or wider."""
    logits, labels = jnp.asarray(logits), labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    ensure(
        logits.ndim > 0 and logits.shape[-1] > 1 and jnp.issubdtype(logits.dtype, jnp.floating),
        f"logits: got {logits.dtype}{list(logits.shape)}, expected real floating-point numbers (..., classes) of at "
        "least two classes.",
    )
    ensure(
        labels.shape == logits.shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels: got {labels.dtype}{list(labels.shape)}, expected integers of shape {logits.shape[:-1]}; turn one-hot "
        "rows into numbers by .argmax(-1).",
    )
    if isinstance(labels, np.ndarray):
        ensure(
            bool(labels.min(initial=0) >= 0 and labels.max(initial=0) < logits.shape[-1]),
            f"labels: got numbers from {labels.min(initial=0)} to {labels.max(initial=0)}, expected 0 to "
            f"{logits.shape[-1] - 1} for {logits.shape[-1]} classes.",
        )
    labels = jnp.asarray(labels)
    # In a narrow dtype the numbers of the classes would wrap around.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    return logits.astype(float_dtype(logits.dtype)), labels


def margins_of(logits: Float[Array, "... classes"], labels) -> Float[Array, "..."]:
    """`margins` of arrays that are already checked."""
    own = labels[..., None] == lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    others = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    # A label without a class owns no logit, and its margin is no number.
    value = jnp.where(jnp.any(own, axis=-1), jnp.sum(jnp.where(own, logits, 0), axis=-1), jnp.nan)
    return value - others


def margin_array(margin, dtype) -> Float[Array, "..."]:
    """The margin of a measure as an array of the dtype; raises `ValueError` unless it is real."""
    margin = jnp.asarray(margin)
    ensure(
        jnp.issubdtype(margin.dtype, jnp.floating) or jnp.issubdtype(margin.dtype, jnp.integer),
        f"margin: got dtype {margin.dtype}, expected real numbers, one or one for each sample.",
    )
    return margin.astype(dtype)


def over_margin(measure, margin, power: int):
    """`measure / margin**power`, and infinity where the margin is not positive and the bounds behind it say nothing.

    A measure that is NaN stays NaN.
    """
    void = margin <= 0
    return jnp.where(void & ~jnp.isnan(measure), jnp.inf, measure / jnp.where(void, 1, margin) ** power)
