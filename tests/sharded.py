"""What `test_sharding.py` runs in a process of its own, on eight virtual devices: `python tests/sharded.py CHECK...`,
with `step,LAYER,WRAPPER` or `stack,LAYER,FUNCTION`.

The rest of the suite sees one device; how many there are is settled when JAX starts.
"""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsrn
import jaxsrn.nnx as jnnx

LAYERS = {
    "circular": (lambda rngs: nnx.Conv(8, 16, (3, 3), padding="CIRCULAR", rngs=rngs), (6, 6)),
    "circular-stride": (lambda rngs: nnx.Conv(8, 16, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs), (6, 6)),
    # Its kernel has more entries than its state, which is gathered, as it is to be on every device.
    "circular-grouped": (
        lambda rngs: nnx.Conv(32, 32, (3, 3), padding="CIRCULAR", feature_group_count=4, rngs=rngs),
        (6, 6),
    ),
    "same": (lambda rngs: nnx.Conv(8, 16, (3, 3), rngs=rngs), (6, 6)),
    "same-stride": (lambda rngs: nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs), (6, 6)),
    "dense": (lambda rngs: nnx.Linear(24, 16, rngs=rngs), ()),
}
FRACTION = 0.2
STEPS = 3


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def sizes_of(program: str, *kinds: str) -> list[int]:
    """The numbers of elements that the collectives of a compiled program end with."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) (?:{'|'.join(kinds)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append(max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes))
    return found


def gathers(program: str, smallest: int) -> list[int]:
    """The sizes of all-gathers (or all-to-alls) of `smallest` elements or more."""
    return sorted(size for size in sizes_of(program, "all-gather", "all-to-all") if size >= smallest)


def is_kernel(path) -> bool:
    """Whether a leaf of the state is a kernel, or one of the optimizer's moments of it."""
    return any(getattr(key, "key", None) == "kernel" for key in path)


def shardings(state, mesh: Mesh):
    """Kernels and their moments over output channels; all else on every device."""

    def one(path, leaf):
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "model") if is_kernel(path) else P())

    return jax.tree_util.tree_map_with_path(one, state)


def training(name: str, wrap):
    """A pure step of Adam: `(step, state, batch)`."""
    make, shape = LAYERS[name]
    rngs = nnx.Rngs(0)
    layer = make(rngs)
    model = wrap(layer, shape)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    x = jax.random.normal(jax.random.key(0), (8, *shape, layer.in_features))

    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss, nnx.state((model, optimizer))

    return step, state, x


def stable(layer, shape, **options):
    return jnnx.StableRankNorm(layer, FRACTION, input_shape=shape or None, **options)


WRAPPERS = {
    "stable": stable,
    "implicit": functools.partial(stable, gradient="implicit"),
    "own norm": functools.partial(stable, norm=None),
    "spectral": lambda layer, shape: jnnx.SpectralNorm(layer, input_shape=shape or None),
    "plain": lambda layer, shape: layer,
}


def compiled(name: str, wrapper: str):
    """A training step with sharded kernels and batches: `(step, (state, batch) on one device, spread, program)`."""
    step, state, x = training(name, WRAPPERS[wrapper])
    where = shardings(state, mesh()), NamedSharding(mesh(), P("data"))
    spread = jax.device_put((state, x), where)
    program = jax.jit(step, in_shardings=where, out_shardings=(None, where[0])).lower(*spread).compile()
    return step, (state, x), spread, program


def check_step(name: str, wrapper: str) -> None:
    """Training with sharded kernels and batches: no kernel is gathered, and the numbers are those of one device."""
    step, (state, x), (placed, batch), sharded = compiled(name, wrapper)
    kernel_size = max(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state) if is_kernel(path))
    program = sharded.as_text()
    assert sizes_of(program, "all-reduce"), "the program is not partitioned"
    # With groups XLA gathers the kernel for the layer's own convolution. The wrapper adds nothing to that.
    own = gathers(compiled(name, "plain")[-1].as_text(), kernel_size) if "grouped" in name else []
    assert gathers(program, kernel_size) == own
    one = jax.jit(step)
    for _ in range(STEPS):
        loss, state = one(state, x)
        sharded_loss, placed = sharded(placed, batch)
        np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(state), strict=True):
        if is_kernel(path):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))


STACKED = {
    "spectral_norm": jaxsrn.spectral_norm,
    "srnc": lambda kernel, op: jaxsrn.srnc(kernel, op, 0.7 * jaxsrn.stable_rank(kernel, op)).kernel,
    "project_spectral_ball": lambda kernel, op: jaxsrn.project_spectral_ball(kernel, op, 2.0).kernel,
}
STACKS = {
    "dense": (jaxsrn.Dense(), (6, 5)),
    "circular": (jaxsrn.CircularConv((6, 6)), (3, 3, 4, 4)),
    "circular-large": (jaxsrn.CircularConv((32, 32)), (3, 3, 4, 4)),
    "same": (jaxsrn.ZeroPaddedConv((6, 6)), (3, 3, 2, 4)),
}


def check_stack(name: str, function: str) -> None:
    """A stack of kernels over the devices: each works on its own, and nothing is gathered."""
    op, shape = STACKS[name]
    kernels = jax.random.normal(jax.random.key(0), (16, *shape))
    mapped = jax.vmap(lambda kernel: STACKED[function](kernel, op))
    line = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    where = NamedSharding(line, P("devices"))
    spread = mapped
    if name == "same":
        # XLA gathers the images of convolutions with a kernel each; told that every device works alone, it does not.
        spread = jax.shard_map(mapped, mesh=line, in_specs=P("devices"), out_specs=P("devices"), check_vma=False)
    placed = jax.device_put(kernels, where)
    program = jax.jit(spread).lower(placed).compile()
    assert not gathers(program.as_text(), 1)
    assert program.output_shardings.is_equivalent_to(where, 1)
    np.testing.assert_allclose(program(placed), jax.jit(mapped)(kernels), rtol=1e-4, atol=1e-4)


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    for check in sys.argv[1:]:
        kind, *arguments = check.split(",")
        {"step": check_step, "stack": check_stack}[kind](*arguments)
    print("fine")


if __name__ == "__main__":
    main()
