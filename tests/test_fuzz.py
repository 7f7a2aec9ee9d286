"""Damaged and hostile files: a smoke of seconds, minutes as `slow`; `python tests/fuzz.py --minutes 60` for longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux for the limit on memory")
@pytest.mark.parametrize(
    ("minutes", "examples"), [(2 / 60, 10), pytest.param(2.0, 100, marks=pytest.mark.slow)], ids=["smoke", "long"]
)
def test_no_file_does_harm(minutes: float, examples: int) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--minutes", str(minutes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120 + 120 * minutes,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(counts) == 9
    assert all(sum(count.values()) >= examples for count in counts.values()), counts
    assert all(count.get("refused", 0) > 0 for count in counts.values()), counts
