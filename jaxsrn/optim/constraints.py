"""Optax transformations that keep layers at a bounded spectral norm, or a bounded stable rank, under any optimizer."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsrn._tools.checks import positive_scalar, static_share
from jaxsrn.operators.layers import Layers
from jaxsrn.optim.keeping import in_the_ball, keep, of_least_stable_rank, of_stable_rank

__all__ = [
    "keep_spectral_norm",
    "keep_stable_rank",
]


def keep_spectral_norm(layers: Layers, max_norm, *, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keeps the spectral norm of layers at or below `max_norm` while any optimizer trains them.

    It works in the manner of `optax.keep_params_nonnegative`: it comes last in a chain and changes the updates, so that
    `optax.apply_updates` lands on `project_spectral_ball` of the kernels that the optimizer would have reached. This is
    projected descent on `{||T(K)||_2 <= max_norm}`, with the norm of the whole layer, padding and strides included.

        optimizer = optax.chain(optax.adam(1e-3), keep_spectral_norm(layer_operators(model, x), 1.0))

    After every projection `||T(K)||_2 <= max_norm` holds up to rounding, as far as `spectral_norm` is proven for the
    layer. It is the rounding of the kernels before the step, because updates are differences: kernels far above the
    limit land beside it, until the next projection. Kernels in the ball, and all other parameters, are not touched.
    With `every > 1` the updates in between pass unchanged, at no cost; a norm then exceeds `max_norm` by at most the
    sum of `||T(step)||_2` since the last projection. The cost and this drift are measured by `python
    benchmarks/training.py --only keeping`.

    Layers of equal operator and shape are projected in one call. Zero-padded layers too large for an explicit matrix
    take several convex problems and are an inner approximation (see `project_spectral_ball`): use a large `every`.
    Inside `optax.MultiSteps` every accumulated step computes a projection, and the last of them counts. Outside it,
    `chain(MultiSteps(adam, k).gradient_transformation(), keep_spectral_norm(..., every=k))` computes only that one.
    Under `vmap` every step computes a projection, because all branches run.

    Args:
      layers: `{path: operator}`, as `jaxsrn.nnx.layer_operators` gives it; a path is the tuple of plain keys to the
        kernel, `("conv1", "kernel")`. It may name a stack of layers, whose array has axes before those of a kernel, as
        `nn.scan` and `nnx.vmap` make it; each layer of it is projected by itself.
      max_norm: positive. For a schedule of it: `optax.inject_hyperparams(keep_spectral_norm, static_args=("layers",
        "every"))(layers, schedule)`.
      every: static; steps from one projection to the next. The first projection is in step `every`.

    Returns:
      The transformation; its state is a `KeepState`. `update` needs `params`. A missing update (`None`) stays missing.
      An update that is narrower than its kernel becomes as wide. Narrow kernels meet the constraint to their rounding.

    Raises:
      ValueError: no layers, a `max_norm` that is not positive, a bad `every`; in `init` and `update`, naming the layer:
        a path that names no leaf of `params` or several, a kernel that does not fit its operator, aliased taps; in
        `update`, missing `params` or updates of other shapes.
    """
    limit = positive_scalar(max_norm, "max_norm", jnp.result_type(float))
    return keep(layers, every, in_the_ball(), limit)


def keep_stable_rank(
    layers: Layers, fraction: float, *, every: int = 1, upward: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keeps the stable rank of layers at or below a fraction of the largest, or above it, under any optimizer.

    It works as `keep_spectral_norm` does, with the closest kernels of stable rank `target_of_fraction(fraction, ...)`
    that keep each layer's own norm: `srnc` (Zheng et al. 2025, eq. 7), and for matrices `srn` with one value preserved
    (Sanyal, Torr, Dokania 2020). Layers whose stable rank is below the target are not touched.

        optimizer = optax.chain(optax.adam(1e-3), keep_stable_rank(layer_operators(model, x), 0.3, every=10))

    After every projection two things are guaranteed up to the tolerance of `srnc`: the stable rank of a layer is at
    most the target (equal to it where it was above), and its norm is that of the kernel to which the optimizer's own
    updates lead. (The norm may grow with training; put `keep_spectral_norm` before this one to bound it too.) In
    between the stable rank drifts with the updates: with `t = ||T(step)||_F / ||T||_2` summed since the last projection
    and `r` the target, its square root is at most `(sqrt(r) + t) / (1 - t)`.

    Problem (7) is not convex. Circular layers are scanned anew in every projection. Zero-padded ones start from the
    pair of images with which the last projection ended, and from several starts where that misses the constraints.

    With `upward` the layers whose stable rank is below the target are raised to it, each at its own norm, and those
    above are not touched: `srnc(..., raise_rank=True)`, the projection of a multiple of the kernel on the ball. Large
    multiples lead towards the matrix sign of a dense layer, and towards the kernel of steepest descent of a
    convolution (with zero padding, of the kernel times its Frobenius weights). A target beyond the limit of that path
    is met as nearly as the path goes. A projection of this kind solves several convex problems: use a large `every`.

    Args:
      layers, every: as `keep_spectral_norm`.
      fraction: static, in (0, 1] (Sanyal's `c`, Zheng's `beta`), as in `jaxsrn.nnx.StableRankNorm`.
      upward: static; whether the target is the least stable rank and not the largest.

    Returns:
      The transformation, as `keep_spectral_norm` returns it.

    Raises:
      ValueError: what `keep_spectral_norm` raises it for; also a fraction outside (0, 1], and in `init`, naming the
        layer, a fraction below the least that its taps allow.
    """
    of_fraction = of_least_stable_rank if upward else of_stable_rank
    return keep(layers, every, of_fraction(static_share(fraction, "fraction")))
