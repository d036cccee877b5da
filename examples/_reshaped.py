"""The constraint of Sanyal, Torr, Dokania 2020: a convolution's kernel is held as a matrix, which is not its map."""

from flax import nnx

__all__ = ["Reshaped"]


class Reshaped(nnx.Module):
    """A convolution that stores its kernel as the matrix `(taps * c_in, c_out)`.

    A wrapper of jaxsrn that takes it for a dense layer (`computes=nnx.Linear`) holds the norm and the stable rank of
    that matrix.
    """

    def __init__(self, conv: nnx.Conv):
        self.conv, self.shape = nnx.clone(conv), conv.kernel.shape
        self.kernel = nnx.Param(conv.kernel[...].reshape(-1, self.shape[-1]))
        del self.conv.kernel

    def plain(self) -> nnx.Conv:
        """The convolution as Flax stores it."""
        conv = nnx.clone(self.conv)
        conv.kernel = nnx.Param(self.kernel[...].reshape(self.shape))
        return conv

    def __call__(self, x):
        return self.plain()(x)
