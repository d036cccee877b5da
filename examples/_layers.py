"""What the studies measure of a layer, and its name."""

import jax.numpy as jnp

import jaxsrn

__all__ = ["name_of", "norm_and_rank"]


def name_of(path: tuple) -> str:
    """The name of the layer that a parameter is of."""
    return ".".join(map(str, path[:-1]))


def norm_and_rank(kernel, op) -> tuple[float, float]:
    """The spectral norm and the stable rank of the whole layer."""
    norm, squared = jaxsrn.spectral_norm(kernel, op), jnp.sum(op.frobenius_weights(kernel.shape) * kernel**2)
    # As jaxsrn.stable_rank, which would compute the norm again.
    return float(norm), float(squared / norm**2)
