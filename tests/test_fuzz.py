"""Damaged and hostile files, for seconds; `python tests/fuzz.py --minutes 10` goes on for longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 15


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux for the limit on memory")
def test_no_file_does_harm() -> None:
    program = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, str(program), "--minutes", str(SECONDS / 60)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(counts) == 10
    assert all(count.get("refused", 0) >= 25 for count in counts.values()), counts
