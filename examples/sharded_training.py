"""Train a constrained CNN on several devices: batches over one axis of the mesh, kernels over the other.

The same script for one device, for all that a machine has, and for several machines:

    python examples/sharded_training.py                    # all devices of this machine, whatever they are
    python examples/sharded_training.py --virtual 8        # eight virtual CPU devices
    python examples/sharded_training.py --fast --virtual 8 # a few steps

On several hosts, start it on each; on clusters that JAX knows (Slurm, Cloud TPU) `--distributed` is enough, elsewhere

    python examples/sharded_training.py --coordinator HOST:PORT --num-processes 2 --process-id 0   # and 1 on the other

Two convolutions are a `jaxsrn.nnx.StableRankNorm`. All kernels, and Adam's moments of them, are split over output
channels; the state of a wrapper, some small vectors, is on every device. The step is one jitted function with
`NamedSharding`s: XLA splits the normalization as it splits the convolution, and never gathers a kernel. (With groups
it gathers kernels for the convolutions themselves, with or without a normalization.)
"""

import argparse
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxsrn.nnx as jnnx

FRACTION = 0.2


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps of a small network")
    parser.add_argument("--virtual", type=int, help="so many virtual CPU devices in this process")
    parser.add_argument(
        "--model-parallel", type=int, default=2, help="devices that share a kernel (default: %(default)s)"
    )
    parser.add_argument("--distributed", action="store_true", help="several hosts, found by jax.distributed")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where the cluster is not one that JAX knows")
    parser.add_argument("--num-processes", type=int, help="with --coordinator")
    parser.add_argument("--process-id", type=int, help="with --coordinator")
    return parser.parse_args()


def start(args):
    """Everything that must come before the first use of a device."""
    if args.virtual:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.virtual)
    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


class CNN(nnx.Module):
    """Three convolutions, two of them constrained, and a dense layer on 8x8 images."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        def constrained(layer, size):
            return jnnx.StableRankNorm(layer, FRACTION, input_shape=(size, size), norm=3.0, rngs=rngs)

        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv2 = constrained(nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs), 8)
        self.conv3 = constrained(nnx.Conv(2 * width, 2 * width, (3, 3), padding="CIRCULAR", rngs=rngs), 4)
        self.dense = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.dense(x.mean(axis=(1, 2)))


def shardings(state, mesh):
    """Kernels that can be split over output channels are, and so are their moments; all else is on every device."""

    def one(path, leaf):
        keys = {getattr(key, "key", None) for key in path}
        splits = "kernel" in keys and leaf.shape[-1] % mesh.shape["model"] == 0
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "model") if splits else P())

    return jax.tree_util.tree_map_with_path(one, state)


def compiled_step(graphdef, state, where, mesh, batch_size):
    """One step of training for a global batch: `(state, x, y) -> (loss, state)`."""

    def step(state, x, y):
        model, optimizer = nnx.merge(graphdef, state)

        def loss_of(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss, nnx.state((model, optimizer))

    batches, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    jitted = jax.jit(step, in_shardings=(where, batches, batches), out_shardings=(everywhere, where))
    x = jax.ShapeDtypeStruct((batch_size, 8, 8, 1), jnp.float32)
    return jitted.lower(state, x, jax.ShapeDtypeStruct((batch_size,), jnp.int32)).compile()


def gathered(program: str) -> set[int]:
    """Sizes of the arrays that the all-gathers of a compiled program make."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", program)
    return {int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes}


def main():
    args = arguments()
    start(args)
    talks = jax.process_index() == 0
    model_parallel = np.gcd(args.model_parallel, jax.device_count())
    # Automatic axes: XLA decides how what is between the given shardings is split.
    mesh = jax.make_mesh(
        (jax.device_count() // model_parallel, model_parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    width, batch_size, steps = (8, 64, 20) if args.fast else (32, 256, 300)

    # The same numbers on every host, then each keeps its parts.
    model = CNN(width, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    where = shardings(state, mesh)
    state = jax.device_put(state, where)
    step = compiled_step(graphdef, state, where, mesh, batch_size)
    kernels = {layer.layer.kernel[...].size for layer in (model.conv2, model.conv3)}
    if talks:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, mesh {dict(mesh.shape)}")
        found = len(kernels & gathered(step.as_text()))
        print(f"kernels of {sorted(kernels)} numbers; the step gathers {found} arrays of such a size")

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    batches, rng = NamedSharding(mesh, P("data")), np.random.default_rng(0)
    losses, seconds = [], []
    for _ in tqdm(range(steps), disable=not talks):
        # All hosts draw the same batch, and each hands over the part that its devices need.
        rows = rng.choice(len(images), batch_size, replace=False)
        x, y = (
            jax.make_array_from_callback(array.shape, batches, lambda index, array=array: array[index])
            for array in (images[rows], labels[rows].astype(np.int32))
        )
        began = time.perf_counter()
        loss, state = step(state, x, y)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    if talks:
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {1e3 * np.median(seconds):.0f} ms a step")


if __name__ == "__main__":
    main()
