"""# The original SRN-C, beside the exact one

Tanay et al. 2022 carried stable rank normalization from matrices to convolutions, and called it SRN-C. Zheng et al.
2025 observed that it misses both of its constraints, posed the right problem (their eq. 7), and approximated its
solution. This page repeats their smallest example, where one can see everything.
"""

import jax.numpy as jnp
import numpy as np

import jaxsrn

# ## The example
#
# Three taps `(1, 0, 0)` on 64 samples, with circular padding. The layer only moves the signal by one sample: all of its
# 64 singular values are 1, its norm is 1 and its stable rank 64. It is to have stable rank 24 and the same norm.

op, target = jaxsrn.CircularConv((64,)), 24.0
kernel = jnp.array([1.0, 0.0, 0.0]).reshape(3, 1, 1)
result = jaxsrn.srnc(kernel, op, target)
print("exact: taps", result.kernel.ravel(), f"stable rank {result.stable_rank:.4f}, norm {result.spectral_norm:.4f}")
print(f"distance {result.distance:.4f}; no kernel that meets both constraints is closer by more than {result.gap:.0e}")

# ## The original
#
# It takes the leading singular pair `u, v` of the layer, forms the kernel `a1` of the same three taps that is nearest
# in direction to the rank-one map `v u^T`, and shrinks what is left of the kernel. For a matrix that is the exact
# solution. For a convolution the direction of `a1` is right and its length is wrong.

original = jaxsrn.srnc_tanay(kernel, op, target)
print("original: taps", original.kernel.ravel())
print(f"stable rank {original.stable_rank:.4f}, norm {original.spectral_norm:.4f}")

# ## Which leading vector?
#
# All singular values are equal here, so **every** unit vector is a leading one, and the original's result depends on
# which is taken. `srnc_tanay` takes a wave. A power method, as in the papers, takes whatever its random start is. The
# following repeats the original in NumPy for 2,000 random unit vectors `v`, of which the layer's own image is the other
# side of the pair.

rng = np.random.default_rng(3)
ranks, norms = [], []
for _ in range(2000):
    v = rng.standard_normal(64)
    v /= np.linalg.norm(v)
    u = v  # the image of v, moved back by the sample that the layer moves it by
    a1 = np.array([u @ np.roll(v, shift) for shift in (0, 1, 2)])
    rest = np.array([1.0, 0.0, 0.0]) - a1
    gamma = np.sqrt(target - 1) / (np.sqrt(64) * np.linalg.norm(rest))
    taps = a1 + gamma * rest
    gains = np.abs(np.fft.fft(taps, 64))
    ranks.append(np.sum(gains**2) / gains.max() ** 2)
    norms.append(gains.max())
print("over 2,000 random vectors:")
print(f"stable rank {min(ranks):.1f} to {max(ranks):.1f}, norm {min(norms):.2f} to {max(norms):.2f}")

# Neither constraint is met by any of them. The exact solution does not depend on such a choice: every frequency and
# every phase is compared, and with one channel the best of them is the global solution
# ([why](../mathematics/normalization.md)).
