"""The benchmark of cold starts, a file a part; `__main__.py` says what it measures and how it is run."""
