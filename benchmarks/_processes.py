"""One measurement in a process of its own, whose memory, threads and compiled programs no other has touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_process(script: Path, *arguments: str, **settings: str) -> Any:
    """Runs a benchmark with `arguments` and environment variables `settings`; returns what it prints last, as JSON.

    Raises:
      subprocess.CalledProcessError: the process failed; its errors are printed.
    """
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(done.stdout.splitlines()[-1])
