"""Circular convolutions: the torus of frequencies, the symbol on it, and the frequency where the symbol is largest."""
