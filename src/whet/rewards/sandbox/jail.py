"""Walls around the sandbox's server and what it starts: namespaces, Landlock, limits. Standard library only."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable, Sequence

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_MOUNT_READ_ONLY, _MOUNT_NOSUID, _MOUNT_NODEV = 1, 2, 4
_LANDLOCK_READ, _LANDLOCK_HANDLED, _LANDLOCK_PATH_BENEATH = 0b1100, (1 << 13) - 1, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION_3 = 0x20080522
# Calls without a function in the C library; but for the last they have the same number on every machine.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_NOBODY = 65534


def readable_folders() -> list[str]:
    """The interpreter's own folders: its library, its packages, and the shared libraries that these load."""
    paths = sysconfig.get_paths()
    candidates = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    candidates += [os.path.join(prefix, lib) for prefix in (sys.base_prefix, sys.prefix) for lib in ("lib", "lib64")]
    candidates += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    present = sorted({os.path.abspath(path) for path in candidates if os.path.isdir(path)})
    return [path for path in present if not any(path.startswith(f"{other}/") for other in present)]


def enter_namespaces(folders: Sequence[str]) -> None:
    """Move this process behind a root that holds `folders` alone, read-only, and where there is no network.

    What it starts from now on is in a process table of its own, whose first process takes all others with it.
    Raises OSError where the kernel, or the container, does not allow it.
    """
    libc, user, group = _libc(), os.getuid(), os.getgid()
    kinds = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    if libc.unshare(_CLONE_NEWUSER | kinds) == 0:
        ids = {"setgroups": "deny", "uid_map": f"{_NOBODY} {user} 1", "gid_map": f"{_NOBODY} {group} 1"}
        for name, line in ids.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    else:  # root may do it without a table of users of its own
        _check(libc.unshare(kinds), "unshare")
    _change_root(folders)
    _check(libc.unshare(_CLONE_NEWPID), "unshare of process ids")


def _change_root(folders: Sequence[str]) -> None:
    libc = _libc()
    places = ("/mnt", "/sys", "/proc", "/tmp")
    root = next((at for at in places if os.path.isdir(at) and not any(f.startswith(at) for f in folders)), None)
    if root is None:
        raise OSError(f"one of {', '.join(places)} must be there to put a new root over")
    _check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount private")
    flags = _MS_NOSUID | _MS_NODEV
    _check(libc.mount(b"sandbox", root.encode(), b"tmpfs", flags, b"size=64k,mode=755"), "mount of a new root")
    for folder in folders:
        os.makedirs(root + folder)
        _check(libc.mount(folder.encode(), (root + folder).encode(), None, _MS_BIND | _MS_REC, None), f"mount {folder}")
    os.chdir(root)
    _check(libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")
    attributes = struct.pack("=QQQQ", _MOUNT_READ_ONLY | _MOUNT_NOSUID | _MOUNT_NODEV, 0, 0, 0)
    arguments = (_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    _check(libc.syscall(*arguments), "mount read-only")


def enter_landlock(folders: Sequence[str]) -> None:
    """Let this process, and what it starts, read what is in `folders` and open nothing else.

    Raises OSError where the kernel has no Landlock.
    """
    libc = _libc()
    handled = struct.pack("=Q", _LANDLOCK_HANDLED)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), 0)
    _check(rules, "landlock_create_ruleset")
    for folder in folders:
        at = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _LANDLOCK_READ, at)
        _check(libc.syscall(_LANDLOCK_ADD, rules, _LANDLOCK_PATH_BENEATH, rule, 0), f"landlock_add_rule {folder}")
        os.close(at)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


def stay_sealed(folders: Sequence[str]) -> None:
    """Nothing to enter: the filter of system calls refuses to open any file at all."""


ISOLATIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "namespaces": enter_namespaces,
    "landlock": enter_landlock,
    "sealed": stay_sealed,
}
"""What keeps files out of sight, the strongest first. Under all of them system calls are filtered as well."""


def drop_capabilities() -> None:
    """Give up whatever root may do that others may not. Raises OSError if that is refused."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc().capset(header, bytes(24)), "capset")


def die_with_parent() -> None:
    """Have this process killed when the one that started it is gone."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def limit(*, memory_bytes: int, cpu_s: int, files: int, processes: int | None) -> None:
    """Limit what this process may use: address space, seconds of work, open files, threads; it writes no file."""
    limits = (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_NPROC, processes),
    )
    for kind, most in ((kind, most) for kind, most in limits if most is not None):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):
            if sys.platform == "linux":  # other systems have not all of these, and no sandbox either
                raise


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
