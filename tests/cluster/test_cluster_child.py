"""Processes on a machine of a cluster: read, sent signals, and ended with whoever started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whet.cluster import machine
from whet.cluster.child import Child

TALKS = (
    "import os, signal, sys, time; print('ready', os.environ['NAME'], os.getcwd(), flush=True); "
    "signal.signal(signal.SIGINT, lambda *_: sys.exit('interrupted')); time.sleep(60)"
)


def all_of(child: Child, seconds: float = 20.0) -> tuple[bytes, bytes, int]:
    said: dict[str, bytes] = {"out": b"", "err": b""}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pieces, code = child.listen(0.5)
        for stream, piece in pieces:
            said[stream] += piece
        if code is not None:
            return said["out"], said["err"], code
    raise AssertionError(f"it did not end within {seconds} s: {said}")


def test_a_child_is_heard_to_its_last_word_and_hears_signals(tmp_path: Path):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as threads of Ray have it
    try:
        child = Child([sys.executable, "-c", TALKS], {"NAME": "Ada"}, str(tmp_path))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    while not (said := child.listen(1.0)[0]):
        pass
    assert said == [("out", f"ready Ada {tmp_path}\n".encode())] and child.listen(0.1) == ([], None)
    child.signal(signal.SIGINT)
    assert all_of(child) == (b"", b"interrupted\n", 1)
    long = "import sys; sys.stdout.write('x' * 300_000); sys.stderr.write('y' * 200_000); sys.exit(7)"
    out, err, code = all_of(Child([sys.executable, "-c", long], dict(os.environ), "/"))
    assert (len(out), len(err), code) == (300_000, 200_000, 7)


def test_a_child_that_leaves_something_behind_is_not_waited_for():
    holds = "import subprocess; subprocess.Popen(['sleep', '20']); print('done')"
    began = time.monotonic()
    assert all_of(Child([sys.executable, "-c", holds], dict(os.environ), "/"))[::2] == (b"done\n", 0)
    assert time.monotonic() - began < 10


def test_a_child_that_is_killed_or_cannot_start_says_so(tmp_path: Path):
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), "/")
    child.end()
    assert all_of(child)[2] == -signal.SIGKILL
    with pytest.raises(OSError, match="nowhere"):
        Child([sys.executable, "-c", ""], {}, str(tmp_path / "nowhere"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_child_does_not_outlive_the_process_that_started_it():
    code = (
        "import os, sys, time; from whet.cluster.child import Child; "
        "print(Child([sys.executable, '-c', 'import time; time.sleep(60)'], dict(os.environ), '/').pid, flush=True); "
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_describes_a_machine_stays_on_it():
    given = {
        "HF_HOME": "/models",
        "PATH": "/bin",
        "RANK": "3",
        "RAY_JOB_ID": "01",
        "SLURM_PROCID": "1",
        "NCCL_DEBUG": "1",
    }
    assert machine.portable(given) == {"HF_HOME": "/models", "NCCL_DEBUG": "1"}
    actor = {"PATH": "/bin", "RAY_JOB_ID": "01", "RAY_AUTH_TOKEN": "t", "PYTHONBREAKPOINT": "ray.set_trace"}
    assert machine.inherited(actor) == {"PATH": "/bin", "RAY_AUTH_TOKEN": "t"}


def test_a_probe_is_seen_and_leaves_nothing(tmp_path: Path):
    probe = str(tmp_path / "new" / "run" / ".probe")
    assert not machine.sees(probe, 0.0)
    made = machine.leave(probe)
    assert machine.sees(probe, 0.0) and made == [str(tmp_path / "new" / "run"), str(tmp_path / "new")]
    machine.clear(probe, made)
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    machine.clear(str(kept / ".probe"), machine.leave(str(kept / ".probe")))
    assert kept.is_dir() and not any(kept.iterdir())


def test_an_address_has_an_interface():
    assert machine.interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert machine.interface_of("203.0.113.9") is None
