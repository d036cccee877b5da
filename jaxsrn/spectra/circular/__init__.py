"""Circular convolutions: the torus of frequencies, its grids, and where the symbol is largest."""
