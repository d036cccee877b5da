"""What every folder uses.

Checks of arguments and tolerances; compiled programs and loops; products in full precision, subspaces, the Lanczos
method and MINRES; proofs by Cholesky factorization; what derivatives hold constant.
"""
