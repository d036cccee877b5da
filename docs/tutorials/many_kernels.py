"""# Many kernels at once

Every function of `jaxsrn` is a pure JAX function of one kernel, so `jax.vmap` makes it one of many. Operators are
static: they pass through `jit`, `vmap` and `grad` without annotation.
"""

import functools

import jax
import jax.numpy as jnp

import jaxsrn

# ## A stack of kernels
#
# Two hundred filters of five taps on 32 samples. Each is to have 60% of its own stable rank.

op = jaxsrn.CircularConv((32,))
kernels = jax.random.normal(jax.random.key(0), (200, 5, 1, 1))


def lowered(kernel, target):
    return jaxsrn.srnc(kernel, op, target)


own = jax.vmap(lambda kernel: jaxsrn.stable_rank(kernel, op))(kernels)
all_lowered = jax.jit(jax.vmap(lowered))
results = all_lowered(kernels, 0.6 * own)
print("kernels", results.kernel.shape, "and one number of each kind per kernel:", results.distance.shape)

# ## Failure is data
#
# A function under `vmap` cannot raise an error for one kernel of many. So what went wrong is in the result: `feasible`
# says whether the constraints can hold together, `residual` how far they are missed, and `gap` how much closer than the
# result any other kernel could be.

good, least = results.feasible, jaxsrn.stable_rank_range((5, 1, 1), op).low
print(f"{int(good.sum())} of {len(good)} targets can be met; no five taps have a stable rank below {least:g}")
print(
    f"of these the worst residual is {results.residual[good].max():.1e}, the largest gap {results.gap[good].max():.1e}"
)

# ## Targets are traced
#
# The target may be another one for each kernel. Here one kernel follows the path from the least stable rank to its own,
# by the same compiled program.

path = all_lowered(jnp.broadcast_to(kernels[0], kernels.shape), jnp.linspace(least, own[0], len(kernels)))
for rank, distance in zip(path.stable_rank[::40], path.distance[::40], strict=True):
    print(f"stable rank {rank:6.3f} is {distance:.4f} away")

# ## Memory that does not grow
#
# `vmap` holds the intermediate arrays of all kernels at once. `jax.lax.map` with a `batch_size` takes so many at a
# time, at nearly the same speed ([the table](../../benchmarks/results/batch.md)):
#
# ```python
# jax.jit(lambda kernels, targets: jax.lax.map(lambda x: lowered(*x), (kernels, targets), batch_size=256))
# ```

# ## The layers of a network
#
# `penalties.total` sums a function over layers. Kernels of one shape are stacked and mapped together, so that each
# shape is compiled once. The sum is differentiable.

keys = jax.random.split(jax.random.key(1), 3)
params = {
    "a": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 4))},
    "b": {"kernel": jax.random.normal(keys[1], (3, 3, 4, 4))},
    "head": {"kernel": jax.random.normal(keys[2], (16, 10))},
}
layers = {
    ("a", "kernel"): jaxsrn.CircularConv((8, 8)),
    ("b", "kernel"): jaxsrn.CircularConv((8, 8)),
    ("head", "kernel"): jaxsrn.Dense(),
}
sum_of_norms = functools.partial(jaxsrn.penalties.total, jaxsrn.spectral_norm, layers)
value, gradient = jax.jit(jax.value_and_grad(sum_of_norms))(params)
print(f"sum of the norms {value:.4f}; gradient of", *(f"{name}: {g['kernel'].shape}" for name, g in gradient.items()))

# ## Do not
#
# Do not call these functions from several Python threads at once: batches of jaxlib's SVDs can wait for each other for
# ever ([troubleshooting](../troubleshooting.md)). `vmap` is the way to many kernels.
