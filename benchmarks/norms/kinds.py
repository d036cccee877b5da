"""Kinds of random kernels, easy and hard: each function draws one of a shape `(*taps, c_in, c_out)`."""

from __future__ import annotations

import functools

import numpy as np

from norms.cases import trained


def orthogonal(rng, size: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def gaussian_kernel(rng, shape):
    """Independent normal entries."""
    return rng.standard_normal(shape)


def one_tap(rng, shape, matrix=None):
    """A matrix, Gaussian unless it is given, at a random tap: every frequency has its singular values."""
    kernel = np.zeros(shape)
    kernel[tuple(rng.integers(k) for k in shape[:-2])] = rng.standard_normal(shape[-2:]) if matrix is None else matrix
    return kernel


def orthogonal_tap(rng, shape):
    """Orthonormal rows or columns at a random tap: all singular values are 1."""
    return one_tap(rng, shape, orthogonal(rng, max(shape[-2:]))[: shape[-2], : shape[-1]])


def orthogonal_taps(rng, shape):
    """A product of orthogonal matrices and of shifts of part of the channels: all singular values 1, on all taps."""
    size = max(shape[-2:])
    kernel = orthogonal(rng, size).reshape((*(1,) * (len(shape) - 2), size, size))
    for axis, k in enumerate(shape[:-2]):
        for _ in range(k - 1):
            basis = orthogonal(rng, size)[:, : size // 2]
            stays = kernel @ (basis @ basis.T)
            before, after = ([(0, 0) if a != axis else pad for a in range(kernel.ndim)] for pad in ((1, 0), (0, 1)))
            kernel = np.pad(stays, after) + np.pad(kernel - stays, before)
    return kernel[..., : shape[-2], : shape[-1]]


def equal_taps(rng, shape):
    """Ones: a matrix of rank 1 at every frequency, the largest at frequency 0."""
    return np.ones(shape)


def peaked(rng, shape):
    """Smooth taps times a matrix of rank 1, and a little noise: nearly all energy is at frequency 0."""
    taps = functools.reduce(np.multiply.outer, [np.hanning(k + 2)[1:-1] for k in shape[:-2]])
    matrix = np.outer(rng.standard_normal(shape[-2]), rng.standard_normal(shape[-1]))
    return taps[..., None, None] * matrix + 0.02 * rng.standard_normal(shape)


def waves(rng, shape):
    """Three waves with a matrix of rank 1 each, and a little noise: far apart, norms nearly the same."""
    places = np.meshgrid(*map(np.arange, shape[:-2]), indexing="ij")
    kernel = 0.02 * rng.standard_normal(shape)
    for _ in range(3):
        angle = sum(w * place for w, place in zip(rng.uniform(0, np.pi, len(places)), places, strict=True))
        left, right = (vector / np.linalg.norm(vector) for vector in map(rng.standard_normal, shape[-2:]))
        kernel += np.multiply.outer(np.cos(angle + rng.uniform(0, 2 * np.pi)), np.outer(left, right))
    return kernel


def trained_block(rng, shape):
    """A random block of channels of a trained kernel with these taps, or `None` where there is none."""
    if shape[:2] not in ((3, 3), (7, 7)) or len(shape) != 4 or (shape[0] == 7 and shape[2] > 3):
        return None
    pool = [case.kernel for cases in trained().values() for case in cases if case.kernel.shape[0] == shape[0]]
    kernel = pool[rng.integers(len(pool))]
    first = [rng.integers(have - want + 1) for have, want in zip(kernel.shape[2:], shape[2:], strict=True)]
    return kernel[:, :, first[0] : first[0] + shape[2], first[1] : first[1] + shape[3]].astype(np.float64)


KINDS = {
    "Gaussian": gaussian_kernel,
    "one tap": one_tap,
    "orthogonal, one tap": orthogonal_tap,
    "orthogonal, all taps": orthogonal_taps,
    "equal positive taps": equal_taps,
    "peaked": peaked,
    "trained": trained_block,
}
