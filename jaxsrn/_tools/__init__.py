"""What every folder uses: checks of arguments, tolerances, products in full precision, subspaces, Lanczos, proofs."""
