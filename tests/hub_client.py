"""A process whose huggingface_hub talks to the Hub of `hub_server`, or to the real one if there is a token for it.

`HF_ENDPOINT` is read when huggingface_hub is imported, so whatever uses it runs in a process of its own: one for all
tests, which executes what they send it. Nothing of the client is patched.

With `HF_TOKEN` and `TIMM_GHN_TEST_ORG` (an organization or user that the token may write to) in the environment, tests
that take the fixture `remote` run against the real Hub as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

DIGEST = """
import hashlib
def digest(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()
"""
"""Code for `Client.run`: a hash of a model's state."""

_WORKER = """
import contextlib, io, json, os, sys, traceback, warnings
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import timm, torch, timm_ghn, huggingface_hub
modules = {"timm": timm, "torch": torch, "timm_ghn": timm_ghn, "huggingface_hub": huggingface_hub, "json": json}
for line in sys.stdin:
    request = json.loads(line)
    before = dict(os.environ)
    os.environ.update(request["environment"])
    space = dict(modules, **request["values"], result=None)
    out, err = io.StringIO(), io.StringIO()
    reply = {}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(compile(request["code"], "<test>", "exec"), space)
        reply["result"] = space["result"]
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reply["error"] = {"kinds": kinds, "message": str(error), "trace": traceback.format_exc()}
    finally:
        os.environ.clear()
        os.environ.update(before)
    print(json.dumps({**reply, "out": out.getvalue(), "err": err.getvalue()}), file=replies, flush=True)
"""


class Failed(Exception):  # noqa: N818
    """What the process raised; `str` is the message."""

    def __init__(self, kinds: list[str], message: str, trace: str) -> None:
        super().__init__(message)
        self.kinds, self.trace = kinds, trace


@dataclass(frozen=True)
class Done:
    """What code left in `result`, and what it printed."""

    result: Any
    out: str
    err: str


class Client:
    """The process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, code: str, environment: dict[str, str | None] | None = None, **values: Any) -> Done:
        """Execute code that leaves something JSON-compatible in `result`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        changed = environment or {}
        removed = [name for name, value in changed.items() if value is None]
        request = {
            "code": f"import os\nfor name in {removed!r}: os.environ.pop(name, None)\n{textwrap.dedent(code)}",
            "values": values,
            "environment": {name: value for name, value in changed.items() if value is not None},
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process died"
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(**reply["error"])
        return Done(reply["result"], reply["out"], reply["err"])

    def command(self, *arguments: str, environment: dict[str, str | None] | None = None) -> Done:
        """Run the command line; `result` is its exit status."""
        return self.run(
            "from timm_ghn.cli import main\nresult = main(arguments)", environment, arguments=list(arguments)
        )

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait(30)


def client_environment(home: Path, endpoint: str | None, token: str | None) -> dict[str, str]:
    """Environment of a process that talks to this endpoint, with a home of its own."""
    dropped = {
        "HF_HUB_OFFLINE",
        "TIMM_GHN",
        "TIMM_GHN_HUB_ORG",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    }
    if endpoint is not None:
        dropped |= {"HF_TOKEN"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    given = {
        "HF_HOME": str(home / "hf"),
        "TIMM_GHN_CACHE": str(home / "cache"),
        "TIMM_GHN_GHN_URL": "http://127.0.0.1:9/nowhere",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    if endpoint is not None:
        given |= {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",  # an endpoint without xet
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }
        given |= {"HF_TOKEN": token} if token else {}
    return {**kept, **given}
