"""One measurement in a process of its own, whose memory and threads no other measurement has touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_process(*arguments: str, **settings: str) -> Any:
    """Runs this benchmark with `arguments` and environment variables `settings`; returns what it prints as JSON."""
    command = [sys.executable, str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(done.stdout)
