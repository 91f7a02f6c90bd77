"""What one machine of a cluster finds out for the others: a port, an interface, whether it sees their files. Standard
library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

OF_MACHINE = (
    *(
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "PWD",
        "OLDPWD",
        "TMPDIR",
        "HOSTNAME",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
    ),
    *("VIRTUAL_ENV", "TERM", "DISPLAY", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)
"""Variables that describe a machine, or a process on it, and mean nothing elsewhere."""
OF_RAY = ("RAY_AUTH_", "RAY_TLS_", "RAY_USE_TLS")
"""What a process needs to speak with the cluster; other variables of Ray are about the actor that it comes from."""
OF_MACHINE_PREFIXES = ("RAY_", "SSH_", "XDG_", "SLURM_", "DBUS_", "CONDA_", "PYTEST_")
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


def portable(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a command's environment that its processes on other machines are to have as well."""
    return {
        name: value
        for name, value in environment.items()
        if name not in OF_MACHINE and not name.startswith(OF_MACHINE_PREFIXES)
    }


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an actor that a process which it starts is to have."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(OF_RAY) or not (name.startswith("RAY_") or name == "PYTHONBREAKPOINT")
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address; None where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # one without an address
                found = fcntl.ioctl(any_socket.fileno(), _ADDRESS_OF_INTERFACE, request)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def leave(probe: str) -> list[str]:
    """Write a file that others look for, and return the folders that had to be made for it, innermost first."""
    path = Path(probe)
    made = [str(folder) for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name, encoding="utf-8")
    return made


def sees(probe: str, seconds: float) -> bool:
    """Whether a file that another machine has written is here too, after so long at most."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(probe):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def clear(probe: str, made: list[str]) -> None:
    """Remove the file and the folders that were made for it, as far as nobody else uses them."""
    with contextlib.suppress(OSError):
        os.remove(probe)
    with contextlib.suppress(OSError):
        for folder in made:
            os.rmdir(folder)
