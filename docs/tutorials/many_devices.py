"""# Many devices

A stack of kernels is a batch, and a batch is split over devices without any exchange between them. A whole training run
with sharded kernels is `examples/sharded_training.py`; this page shows the two ways to spread a stack.

The devices here are two virtual ones of one CPU, which share its cores: they show that the code works, and nothing
about speed. What real devices gain is in [the table](../../benchmarks/results/devices.md).
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsrn

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
print(mesh.devices.size, "devices")

# ## With `jax.shard_map`
#
# Each device runs the mapped function on its part of the stack, as a program of its own. That is the fastest way,
# because loops on one device never wait for those on another. `check_vma=False` is needed, as for all functions with
# loops whose state starts as a constant; without it a kernel that differs over the devices is a `ValueError`. The axes
# of the mesh are `Auto`, as sharding in types (`Explicit`) would have to be told at every step of these functions.

op = jaxsrn.CircularConv((8, 8))
kernels = jax.random.normal(jax.random.key(0), (6, 3, 3, 2, 2))
norms = jax.vmap(lambda kernel: jaxsrn.spectral_norm(kernel, op))
split = jax.jit(jax.shard_map(norms, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False))
stack = jax.device_put(kernels, NamedSharding(mesh, P("devices")))
found = split(stack)
print("norms", found, "on", len(found.devices()), "devices")

# ## With `jax.jit` alone
#
# XLA splits the mapped function by the sharding of its input. The numbers are the same. Loops of different devices stop
# together, so that all wait for the slowest at every step.

also = jax.jit(norms)(stack)
print("the same:", bool(jnp.allclose(found, also)), "on", len(also.devices()), "devices")

# ## In training
#
# Kernels that are sharded over their output channels are normalized without being gathered: the step of the wrappers
# multiplies, and multiplications are split as those of the layer itself. Small vectors, the state of a wrapper, are on
# every device.

kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 8))
unbounded = jaxsrn.UnboundedConv()
target = jaxsrn.target_of_fraction(0.2, kernel.shape, unbounded)
state = jaxsrn.srnc_state(kernel, unbounded, target)
sharded = jax.device_put(kernel, NamedSharding(mesh, P(None, None, None, "devices")))
everywhere = NamedSharding(mesh, P())
step = jax.jit(lambda kernel, state: jaxsrn.srnc_step(kernel, state, unbounded, target))
normalized, state = step(sharded, jax.device_put(state, everywhere))
norm, rank = jaxsrn.spectral_norm(normalized, unbounded), jaxsrn.stable_rank(normalized, unbounded)
print(f"norm {norm:.4f}, stable rank {rank:.4f}, asked for {target:g}")

# The program of that step has no array of the whole kernel in any exchange:

text = step.lower(sharded, jax.device_put(state, everywhere)).compile().as_text()
gathered = [line for line in text.splitlines() if " all-gather" in line and "f32[3,3,4,8]" in line]
print("gathers of the kernel:", len(gathered))
