"""# A recurrence that cannot blow up

A recurrent network for video applies the same layers to its own output, frame after frame. Where one of these layers
has a spectral norm above 1, something small can grow without end, long after the frames that were trained on (Tanay et
al. 2022). Norms whose product around the loop is below 1 rule that out, for every video and every length. At exactly 1
nothing grows exponentially, and a slow drift remains possible.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxsrn
import jaxsrn.nnx as jnnx

# ## The trouble
#
# A state of four channels, to which each frame is added: `h <- relu(conv(h)) + frame`. The convolution averages, as
# that of a denoiser does: its taps are positive. It is divided by the norm of its kernel flattened to a matrix of 36
# rows and 4 columns, which is what most libraries call its spectral norm. The norm of the layer is another number.

conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
kernel = jnp.abs(conv.kernel[...])
conv.kernel[...] = kernel / jnp.linalg.norm(kernel.reshape(-1, 4), 2)
print(f"norm of the flattened kernel {jnp.linalg.norm(conv.kernel[...].reshape(-1, 4), 2):.3f}")
print(f"norm of the layer on any image {jaxsrn.spectral_norm(conv.kernel[...], jaxsrn.UnboundedConv()):.3f}")


def unrolled(layer, frames):
    """The largest entry of the state after each frame."""

    def one_frame(h, frame):
        h = nnx.relu(layer(h)) + frame
        return h, jnp.abs(h).max()

    return jax.lax.scan(one_frame, jnp.zeros_like(frames[0]), frames)[1]


key = jax.random.key(0)
frames = 0.1 * jax.random.uniform(key, (300, 1, 16, 16, 4))
sizes = unrolled(conv, frames)
print("largest entry after 1, 10, 50 and 300 frames:", *(f"{sizes[t - 1]:.3g}" for t in (1, 10, 50, 300)))

# ## The cure
#
# `SpectralNorm` without an `input_shape` holds the norm of the convolution before anyone says how large the image is.
# So a network that was trained on crops is as stable on whole frames. `norm=0.9` leaves a margin: what has happened is
# forgotten by a factor of 0.9 a frame at least.

stable = jnnx.SpectralNorm(conv, norm=0.9)
bound = jaxsrn.bounds.certified(jnnx.fold(stable).kernel[...], jaxsrn.UnboundedConv(), resolution=1e-3).upper
print(f"the norm is proven to be at most {bound:.4f} at every image size")

# Fold once, and unroll the plain layer: the weights are computed once for all frames. `fold` is differentiable, so a
# loss may do the same, and the gradient reaches the raw kernel.

plain = jnnx.fold(stable)
sizes = unrolled(plain, frames)
print("largest entry after 1, 10, 50 and 300 frames:", *(f"{sizes[t - 1]:.3g}" for t in (1, 10, 50, 300)))
larger = unrolled(plain, 0.1 * jax.random.uniform(key, (300, 1, 40, 24, 4)))
print("the same on 40x24 images:", *(f"{larger[t - 1]:.3g}" for t in (1, 10, 50, 300)))

# ## What is proven
#
# ReLU does not increase distances. So two states that see the same frames come closer by the factor `bound` at least in
# every frame, whatever the frames are: in the limit the state does not remember how it started.


@jax.jit
def one_frame(h, frame):
    return nnx.relu(plain(h)) + frame


first, second = jax.random.normal(key, (2, 1, 16, 16, 4))
start = jnp.linalg.norm(first - second)
for count in range(1, 21):
    first, second = one_frame(first, frames[count]), one_frame(second, frames[count])
    if count in (1, 5, 20):
        share = jnp.linalg.norm(first - second) / start
        print(f"after {count:2} frames: {share:.2e} of the first distance, bound {bound**count:.2e}")

# ## In training
#
# The loss folds the model, then unrolls it. The raw kernel gets the gradient.


def loss_of(model, frames):
    return unrolled(jnnx.fold(model), frames)[-1]


grads = nnx.jit(nnx.grad(loss_of))(stable, frames[:10])
print("gradient of", *grads.flat_state().paths, "is finite:", bool(jnp.isfinite(grads.layer.kernel[...]).all()))
