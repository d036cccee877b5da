"""The benchmark of norms, a file a part; `__main__.py` says what it measures and how it is run."""

import os

# JAX leaves PyTorch its part of the GPU, if there is one. It reads this when it first uses the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
