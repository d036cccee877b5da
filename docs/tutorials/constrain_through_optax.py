"""# Constrain through optax

The wrappers change what a layer computes with. The transformations of `jaxsrn.optim` change the parameters themselves:
they stand at the end of an optax chain, and lead each step of the optimizer back to the nearest kernels that meet the
constraint. They work with any layer library, and with parameters in plain dictionaries.
"""

import jax
import jax.numpy as jnp
import optax

import jaxsrn

# ## Which map is it
#
# The constraint is one of the linear map, so you say which map each kernel stands for: `{path: operator}`, the path
# being the keys that lead to the kernel. For Flax models `jaxsrn.nnx.layer_operators(model, x)` writes this dictionary.

keys = jax.random.split(jax.random.key(0), 4)
params = {
    "conv": {"kernel": 0.3 * jax.random.normal(keys[0], (3, 3, 1, 8)), "bias": jnp.zeros(8)},
    "dense": {"kernel": 0.1 * jax.random.normal(keys[1], (8 * 8 * 8, 1))},
}
layers = {("conv", "kernel"): jaxsrn.CircularConv((8, 8)), ("dense", "kernel"): jaxsrn.Dense()}


def predict(params, x):
    x = layers["conv", "kernel"].apply(params["conv"]["kernel"], x) + params["conv"]["bias"]
    return jax.nn.relu(x).reshape(len(x), -1) @ params["dense"]["kernel"]


# ## A norm that is never exceeded
#
# `keep_spectral_norm(layers, 1.0, every=5)` projects every fifth step on the kernels of norm at most 1. It comes last
# in the chain. The projection is the true one, the nearest kernel of the same support, and not a rescaling.

optimizer = optax.chain(optax.adam(3e-2), jaxsrn.optim.keep_spectral_norm(layers, 1.0, every=5))
x = jax.random.normal(keys[2], (32, 8, 8, 1))
y = jnp.sin(x.sum(axis=(1, 2)))


@jax.jit
def step(params, state):
    loss, grads = jax.value_and_grad(lambda params: jnp.mean((predict(params, x) - y) ** 2))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state = optimizer.init(params)
for count in range(1, 11):
    params, state, loss = step(params, state)
    norms = [float(jaxsrn.spectral_norm(params[layer][name], op)) for (layer, name), op in layers.items()]
    print(
        f"step {count:2}: loss {loss:.3f}, norms {norms[0]:.6f} and {norms[1]:.6f}", "<- projected" * (count % 5 == 0)
    )

# The norms are met at steps 5 and 10, and drift in between, where the updates of Adam pass unchanged. A smaller `every`
# allows less drift and costs more: [the table](../../benchmarks/results/training_keeping.md) has both.
#
# ## A stable rank
#
# `keep_stable_rank` works in the same way: each projection lands on the closest kernel with that share of the largest
# stable rank that keeps the norm to which the optimizer led. Layers below the target are left alone.

conv, op = ("conv", "kernel"), jaxsrn.CircularConv((8, 8))
optimizer = optax.chain(optax.sgd(1e-2), jaxsrn.optim.keep_stable_rank({conv: op}, 0.3))
print(f"stable rank before {jaxsrn.stable_rank(params['conv']['kernel'], op):.3f}; 30% of the largest, 64, is 19.2")
params, _, _ = step(params, optimizer.init(params))
print(f"stable rank after one step {jaxsrn.stable_rank(params['conv']['kernel'], op):.3f}")

# ## Steps of a given norm
#
# `spectral_descent` chooses each step by the norm of the layer that the step changes: Muon, with convolutions as the
# linear maps that they are. A step along a momentum is the kernel of norm 1 that goes farthest along it, times the
# learning rate and a scale of the layer's shape, which for eight outputs and one input is the root of eight.

optimizer = jaxsrn.optim.spectral_descent(0.02, layers)
gradient = jax.grad(lambda params: jnp.mean((predict(params, x) - y) ** 2))(params)
updates, _ = optimizer.update(gradient, optimizer.init(params), params)
print(f"norm of the step of the convolution {jaxsrn.spectral_norm(updates['conv']['kernel'], op):.4f}")
print(f"0.02 * sqrt(8) = {0.02 * 8**0.5:.4f}")

# ## The unit sphere
#
# `on_sphere` makes any transformation Riemannian: the parameters are unit vectors and stay so, to rounding.

point = {"direction": jnp.array([1.0, 0.0, 0.0])}
wanted = jnp.array([0.6, 0.0, 0.8])
optimizer = jaxsrn.optim.on_sphere(optax.sgd(0.5))
state = optimizer.init(point)
for _ in range(20):
    grads = jax.grad(lambda point: -jnp.vdot(point["direction"], wanted))(point)
    updates, state = optimizer.update(grads, state, point)
    point = optax.apply_updates(point, updates)
print("direction", point["direction"], "norm", float(jnp.linalg.norm(point["direction"])))
