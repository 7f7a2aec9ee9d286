"""Python processes of their own for tests of what an import does, without waiting for torch in each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_END = "\x1e"
_FORKS = f"""
import os, sys, traceback
import torch, torchvision

failed = False
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            exec(script, {{"__name__": "__main__"}})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    failed |= os.waitpid(child, 0)[1] != 0
    print(end={_END!r}, flush=True)
sys.exit(failed)
"""


def printed(*scripts: str) -> list[str]:
    """What scripts print, each in a process that has imported torch and torchvision, and nothing else."""
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", _FORKS, *scripts]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(_END)[:-1]
