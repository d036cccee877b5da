"""Tutorials: Python files whose text is in comments, executed paragraph by paragraph, and shown with what they print.

A tutorial opens with a docstring, its title and what it is about. After that, a block of comment lines between two
blank lines is text in Markdown, and everything else is code. Each tutorial runs in a process of its own, in an empty
folder; pictures that it saves there are shown below the code that saved them.

    python docs/_tools/tutorials.py docs/tutorials/many_kernels.py     # runs one, and prints what its page will show

What a tutorial printed is kept in `.cache/tutorials` until its text or the library changes, so that building the pages
after the tests runs nothing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "tutorials"
TUTORIALS = ROOT / "docs" / "tutorials"


class Block(NamedTuple):
    """A paragraph of text, or some lines of code with the number of the first."""

    is_text: bool
    source: str
    line: int


def blocks(source: str) -> list[Block]:
    """The docstring as text, then comments between blank lines as text, and code."""
    _, title, rest = source.split('"""', 2)
    line = source[: len(source) - len(rest)].count("\n")
    found = [Block(True, title.strip(), 1)]
    for paragraph in rest.split("\n\n"):
        lines = [piece for piece in paragraph.split("\n") if piece.strip()]
        is_text = bool(lines) and all(piece.startswith("#") for piece in lines)
        text = "\n".join(piece.removeprefix("#").removeprefix(" ") for piece in lines) if is_text else paragraph
        if found[-1].is_text or is_text:
            found.append(Block(is_text, text, line + 1))
        else:
            found[-1] = found[-1]._replace(source=f"{found[-1].source}\n\n{text}")
        line += paragraph.count("\n") + 2
    return [block for block in found if block.source.strip()]


def executed(path: Path) -> list[list]:
    """For each block what it printed, and the pictures that it saved in the current folder."""
    namespace, outputs = {"__name__": "__main__", "__file__": str(path)}, []
    for block in blocks(path.read_text()):
        printed, before = io.StringIO(), set(Path().glob("*.png"))
        if not block.is_text:
            code = "\n" * (block.line - 1) + block.source
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(path), "exec"), namespace)
        outputs.append([printed.getvalue(), sorted(map(str, set(Path().glob("*.png")) - before))])
    return outputs


def _key(path: Path) -> str:
    """A digest of all that the output depends on, but for the installed packages."""
    files = [path, Path(__file__), *sorted((ROOT / "jaxsrn").rglob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def run(path: Path) -> list[list]:
    """`executed`, in a process of its own and remembered.

    Raises:
      RuntimeError: the tutorial failed; the message has what it wrote.
    """
    folder, key = CACHE / path.stem, _key(path)
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads((folder / "outputs.json").read_text())
        if known["key"] == key:
            return known["outputs"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # See docs/troubleshooting.md for both.
    threads = {"NPROC": "8", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**threads, **os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg"}
    command = [sys.executable, __file__, str(path), "--record"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path.name} failed:\n{done.stdout}\n{done.stderr}")
    outputs = json.loads((folder / "recorded.json").read_text())
    (folder / "outputs.json").write_text(json.dumps({"key": key, "outputs": outputs}))
    return outputs


def page(path: Path) -> str:
    """The tutorial as Markdown, with its output."""
    parts = []
    for block, (printed, pictures) in zip(blocks(path.read_text()), run(path), strict=True):
        if block.is_text:
            parts.append(block.source)
            continue
        parts.append(f"```python\n{block.source.strip(chr(10))}\n```")
        if printed.strip():
            parts.append(f'```text title="Output"\n{printed.rstrip()}\n```')
        parts += [f"![What the code above draws]({path.stem}/{picture})" for picture in pictures]
    parts.append(f"[The whole file: `docs/tutorials/{path.name}`]({path.name})")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[2:] == ["--record"]:
        outputs = executed(Path(sys.argv[1]))
        Path("recorded.json").write_text(json.dumps(outputs))
    else:
        print(page(Path(sys.argv[1]).resolve()))
