"""The process of a server: what it started ends with it, however the run ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from whet.engines.servers.process import GRACE_S


def test_nothing_of_a_server_outlives_a_run_that_is_killed(tmp_path: Path):
    # The server is stopped and has a child of its own: neither hears the signal that the kernel sends to the server.
    server = "import os, signal, subprocess, sys; c = subprocess.Popen(['sleep', '600']); print(os.getpid(), c.pid, "
    server += "flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    code = (
        "import sys, time; from pathlib import Path; from whet.engines.servers.process import Process; "
        f"process = Process(sys.executable, ['-c', {server!r}], {{}}, Path({str(tmp_path / 'log')!r}), 'server'); "
        "time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    try:
        pids = _eventually(lambda: [int(pid) for pid in (tmp_path / "log").read_text().splitlines()[-1].split()])
        time.sleep(0.5)  # until it is stopped
    finally:
        run.kill()
        run.wait()
    limit = time.monotonic() + GRACE_S + 10
    while any(map(_lives, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(_lives, pids))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _eventually(read: Callable[[], list[int]], limit_s: float = 30.0) -> list[int]:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return read()
        except (OSError, ValueError, IndexError):
            assert time.monotonic() < deadline
            time.sleep(0.1)
