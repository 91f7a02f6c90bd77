"""Starts the processes of a run on this machine, watches them, and leaves none behind. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLL_S = 0.1
GRACE_S = 15.0
"""Seconds in which the others may end by themselves after one has failed: the leader says why."""


def launch(arguments: Sequence[str], size: int) -> int:
    """Run `python -m whet ARGUMENTS` as `size` ranks until all have ended. Returns the exit code of rank 0, or of the
    first that failed without it.

    The first SIGINT or SIGTERM is passed on to rank 0, which ends the run in order; a second one ends all at once.
    Where this process dies, the others do.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # we say who is missing
        # Several processes with a thread for every core each would wait for one another.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size))),
    }
    command = [sys.executable, "-m", "whet", *arguments]
    # Ranks find `whet` where this process did, installed or not.
    source = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks: list[subprocess.Popen[bytes]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    asked = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        for rank in ranks if asked > 1 else ranks[:1]:
            if rank.poll() is None:
                rank.send_signal(number if asked < 3 else signal.SIGKILL)

    try:
        for number in before:
            signal.signal(number, pass_on)
        for rank in range(size):
            about = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command, env={**environment, **about}, start_new_session=True, preexec_fn=_die_with(os.getpid())
                )
            )
        return _watch(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in ranks:
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or one has failed and the others have had their time."""
    failed: tuple[int, int] | None = None
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed is None:
            failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE_S
        if codes[0] is not None and failed is None:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if failed is None:
        return codes[0] or 0
    rank, code = failed
    if rank or code < 0:  # else rank 0 says itself what went wrong
        print(
            f"ClusterError: rank {rank} (pid {ranks[rank].pid}) {how_it_ended(code)}; the run has ended",
            file=sys.stderr,
        )
    code = codes[0] or code
    return code if code > 0 else 128 - code


def how_it_ended(code: int) -> str:
    """What the exit code of a process says, after its name."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    memory = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def _die_with(parent: int):
    """What a child does before it begins: ask to be killed when its parent dies (Linux; elsewhere nothing)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
