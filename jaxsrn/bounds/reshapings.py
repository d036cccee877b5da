"""The bound by the kernel's reshapings to matrices, the fantastic four (Singla, Feizi 2021).

The symbol is `S(w) = sum_t exp(-i <w, t>) C_t` (`coefficients.py`), and `exp(-i <w, t>)` is a product of one vector of
unimodular entries per axis. The tensor norm (`tensor.py`) lets any vector of the same length take the place of each. A
reshaping lets the vectors of several axes merge into one of any form, so its bound is never smaller than the tensor
norm's. It is the norm of a matrix, which can be computed to rounding.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, static_int
from jaxsrn._tools.programs import program
from jaxsrn.bounds.coefficients import matrix_norm, num_terms, smallest_over_covers
from jaxsrn.operators.base import Operator

__all__ = [
    "fantastic_four",
]


def fantastic_four(kernel: Kernel, op: Operator, *, num_steps: int | None = None) -> Float[Array, ""]:
    """F4, `sqrt(q)` times the smallest spectral norm of the kernel's reshapings to a matrix: an upper bound.

    Singla, Feizi 2021. Two axes have four matrices, `c_in x c_out h w`, `c_in h x c_out w`, `c_in w x c_out h` and
    `c_in h w x c_out`; in general there are `2^axes`, and `q` is the number of taps. The bound holds at every image
    size, with circular and with zero padding, and is never below the exact tensor norm. A strided layer is bounded by
    its polyphase kernel, a grouped one by its largest group. Dense layers and 1x1 kernels give the norm itself.

    By default the norms are computed to rounding, by SVDs or by Lanczos with a proof, and the bound is **guaranteed**
    up to that rounding. With `num_steps` they come from that number of power steps, as published: the result is then an
    **estimate from below** of the bound, and can be below the spectral norm.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      num_steps: static; power steps, or `None` for converged norms.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient is the outer product of the singular
      vectors of the smallest matrix norm, held constant: finite always. The second derivative is exact for a simple
      value.

    Raises:
      ValueError: a kernel that does not fit, fewer than one step, or a second derivative with `num_steps`.
    """
    kernel, op = computed_form(kernel, op)
    return _fantastic_four(kernel, op, num_steps if num_steps is None else static_int(num_steps, "num_steps"))


@functools.partial(program, static_argnums=(1, 2), brief=True)
def _fantastic_four(kernel, op, num_steps):
    def bound(tensor):
        norms = [matrix_norm(matrix, num_steps) for matrix in _reshapings(tensor)]
        return math.sqrt(num_terms(tensor)) * functools.reduce(jnp.minimum, norms)

    return smallest_over_covers(bound, kernel, op, guaranteed=num_steps is None)


def _reshapings(tensor: Float[Array, "..."]) -> list[Float[Array, "groups rows columns"]]:
    """Every matrix that has the rows and some tap axes on one side, and the columns and the other axes on the other."""
    *taps, rows, columns = range(1, tensor.ndim)
    # An axis of one tap gives the same matrix on either side.
    axes = [axis for axis in taps if tensor.shape[axis] > 1]
    single = [axis for axis in taps if tensor.shape[axis] == 1]
    matrices = []
    for chosen in itertools.product((True, False), repeat=len(axes)):
        with_rows = [axis for axis, is_chosen in zip(axes, chosen, strict=True) if is_chosen]
        others = [axis for axis in axes if axis not in with_rows]
        order = (0, *single, *with_rows, rows, *others, columns)
        height = math.prod(tensor.shape[axis] for axis in [*with_rows, rows])
        matrices.append(tensor.transpose(order).reshape((tensor.shape[0], height, -1)))
    return matrices
