"""A thread in every process that says what it is doing, and finds out who keeps the others waiting."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from whet.errors import ClusterError

logger = logging.getLogger(__name__)

BEAT_S = 1.0
LISTEN_S = 3.5
"""How long to listen for a sign of life before a process counts as stopped or dead."""
GRACE_S = 10.0
"""Seconds beyond the limit in which the waiting itself may end with an error, before the process is ended."""
EXIT_CODE = 75
"""Of a process that was ended because another one kept it waiting."""


class Watch:
    """Tells the others, over a connection of its own, that this process is alive and what it does; ends it where it
    waits for longer than `timeout_s`, or another has failed: PyTorch itself may wait for ever.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        limit = timedelta(seconds=30)
        self._store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        self._doing: tuple[int, str, float] | None = None
        self._count = 0
        self._done = threading.Event()
        self._failed_since: float | None = None
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="whet-watch", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        self._done.set()

    def begin(self, what: str) -> None:
        """From here on this process is at something that all do together, which has a limit."""
        self._count += 1
        self._doing = (self._count, what, time.monotonic())
        self._tell()

    def end(self) -> None:
        """It is done."""
        self._doing = None

    def _tell(self) -> None:
        try:
            self._beat()
        except RuntimeError:  # the store is gone; what comes next says so
            logger.debug("nobody can be told what this process is at")

    def failed(self, reason: str) -> None:
        """Leave word for the others of why this process ends."""
        try:
            self._store.set(f"failed/{self.rank}", reason)
        except RuntimeError:  # whoever held the store is gone, and knows
            logger.debug("nobody is left to tell: %s", reason)

    def check_leader(self) -> None:
        """Raises ClusterError where the leader has given no sign for longer than the limit."""
        silent = self._silence(0)
        if silent is not None and silent > self.timeout_s:
            raise ClusterError(f"the leader, {self._name(0)}, has given no sign for {silent:.0f} s")

    def explain(self) -> str:
        """Who failed, who is silent, and who has not come to what this process waits for. Listens for a while."""
        try:
            return self._explain(listen_s=LISTEN_S)
        except RuntimeError as error:
            return f"rank 0 can no longer be asked who is missing ({error})"

    # --- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                self._beat()
                self._look()
            except RuntimeError:  # the store is gone with the process that held it
                if not self._done.is_set() and self._doing is not None:
                    self._exit("rank 0, which held what the processes know of each other, is gone")
                return

    def _beat(self) -> None:
        count, what, _ = self._doing or (self._count, "nothing that the others take part in", 0.0)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "count": count, "what": what, "at": time.time()}
        self._store.set(f"beat/{self.rank}", json.dumps({**about, "place": _place()}))

    def _look(self) -> None:
        for other in range(self.size):
            self._silence(other)
        doing = self._doing
        if doing is None:
            return
        if self._failed_since is None and any(self._store.check([f"failed/{other}"]) for other in range(self.size)):
            self._failed_since = time.monotonic()
        waited = time.monotonic() - doing[2]
        late = waited > self.timeout_s + GRACE_S
        if late or (self._failed_since is not None and time.monotonic() - self._failed_since > GRACE_S):
            self._exit(f"{doing[1]} took {waited:.0f} s (backend.timeout_s {self.timeout_s:g}): {self._explain()}")

    def _exit(self, why: str) -> None:
        sys.stderr.write(f"ClusterError: rank {self.rank}: {why}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # the main thread is in a call that nothing else ends

    # --- what is known of the others ----------------------------------------------------------------------

    def _about(self, rank: int) -> dict | None:
        key = f"beat/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _silence(self, rank: int) -> float | None:
        """Seconds since this rank's sign last changed, by our own clock; None before the first."""
        about = self._about(rank)
        if about is None:
            return None
        sign, now = str(about["at"]), time.monotonic()
        before = self._seen.get(rank)
        if before is None or before[0] != sign:
            self._seen[rank] = before = (sign, now)
        return now - before[1]

    def _name(self, rank: int) -> str:
        about = self._about(rank)
        return f"rank {rank}" if about is None else f"rank {rank} ({about['host']}, pid {about['pid']})"

    def _explain(self, listen_s: float = 0.0) -> str:
        before = {other: self._about(other) for other in range(self.size)}
        time.sleep(listen_s)
        found, alive = [], []
        ours = self._doing[0] if self._doing is not None else self._count
        for other in range(self.size):
            about, silent = self._about(other), self._silence(other) or 0.0
            if self._store.check([f"failed/{other}"]):
                found.append(f"{self._name(other)} failed: {self._store.get(f'failed/{other}').decode()}")
            elif other == self.rank or about is None:
                continue
            elif (listen_s and before[other] == about) or silent > LISTEN_S:
                found.append(f"{self._name(other)} is dead or stopped (no sign of life for {silent:.0f} s)")
            elif about["count"] < ours:
                found.append(f"{self._name(other)} has not come to it yet: it is at {about['what']}, {about['place']}")
            else:
                alive.append(f"{self._name(other)} is at {about['place']}")
        return "; ".join(found or ["all processes are alive", *alive[:8]])


def _place() -> str:
    """Where the main thread is, innermost first."""
    frame, places = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None and len(places) < 3:
        places.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places)
