"""The benchmark of norms, a file a part; `__main__.py` says what it measures and how it is run."""

import importlib.util
import os

if importlib.util.find_spec("torch") is None:
    raise SystemExit("The peers need PyTorch: pip install torch")
# JAX leaves PyTorch its part of the GPU, if there is one. It reads this when it first uses the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
