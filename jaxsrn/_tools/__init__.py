"""What every folder uses: checks of arguments, limits, products in full precision, subspaces, proofs by Cholesky."""
