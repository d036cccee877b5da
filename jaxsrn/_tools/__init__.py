"""What every room uses: checks of arguments, products in full precision, subspaces."""
