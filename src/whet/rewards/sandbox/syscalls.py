"""What a sandboxed process may ask of Linux, as a seccomp filter: what is not listed here is refused.

Standard library only: the sandbox's server runs without the rest of whet.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> its column in the tables below, and its name in the kernel (AUDIT_ARCH_…)."""

FREE = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
mremap 25 216, madvise 28 233, msync 26 227, mincore 27 232, membarrier 324 283,
pread64 17 67, readv 19 65, writev 20 66, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133,
rt_sigtimedwait 128 137, sigaltstack 131 132, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd2 290 19, recvfrom 45 207, shutdown 48 210,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, sysinfo 99 179, uname 63 160, getrandom 318 278,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getpgrp 111 -, getpgid 121 155, getsid 124 156, getcwd 79 17, sched_yield 24 124, sched_getaffinity 204 123,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293,
arch_prctl 158 -, restart_syscall 219 128, exit 60 93, exit_group 231 94
"""
"""Calls that are harmless with any arguments: name, number on x86_64, number on aarch64."""

PATHS = "stat 4 -, lstat 6 -, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -, getdents64 217 61"
"""Calls that tell something of files, allowed where a process sees the interpreter's own files only."""

_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020080  # the second: a new namespace of any kind
_OPEN_TO_CHANGE = 0o3 | 0o100 | 0o1000 | 0o20000000  # to write, create, truncate, or an unnamed file
_AT_EMPTY_PATH = 0x1000
_AF_UNIX = 1
_FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicates and flags; not owners and leases, by which others can be signalled
_IOCTL = (0x5421, 0x5450, 0x5451)  # blocking or not, inherited or not; nothing of terminals and devices

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


@dataclass(frozen=True)
class Rule:
    """A call by its numbers, and what must hold of its arguments: (position, kind, value) each.

    Kinds: `in` (one of these numbers), `lacks` (none of these bits), `has` (this bit), `null` (no pointer).
    """

    numbers: str
    conditions: tuple[tuple[int, str, object], ...]


GUARDED = (
    Rule("fcntl 72 25", ((1, "in", _FCNTL),)),
    Rule("clone 56 220", ((0, "has", _CLONE_THREAD), (0, "lacks", _CLONE_NEW))),  # threads, not processes
    Rule("prlimit64 302 261", ((0, "in", (0,)), (2, "null", None))),  # reads limits, its own
    Rule("socketpair 53 199", ((0, "in", (_AF_UNIX,)),)),  # what asyncio wakes itself with
    Rule("ioctl 16 29", ((1, "in", _IOCTL),)),
    Rule("sendto 44 206", ((4, "null", None),)),  # to its own pair, never to an address
)
READING = (
    Rule("open 2 -", ((1, "lacks", _OPEN_TO_CHANGE),)),
    Rule("openat 257 56", ((2, "lacks", _OPEN_TO_CHANGE),)),
    Rule("newfstatat 262 79", ()),
)
NOT_READING = (Rule("newfstatat 262 79", ((3, "has", _AT_EMPTY_PATH),)),)
"""Without files only open descriptors can be looked at."""
ANSWERED = (("clone3 435 435", errno.ENOSYS),)
"""Calls refused in the way that makes the C library try another, whose arguments a filter can see."""
LINKS, OPENING = "readlink 89 -, readlinkat 267 78", "open 2 -, openat 257 56"
"""Calls refused as by the permissions of a file, the second where no file may be opened."""


def supported() -> str | None:
    """Why there is no filter for this machine, or None."""
    if sys.platform != "linux":
        return f"it filters system calls, which this system ({sys.platform}) cannot; Linux can"
    if platform.machine() not in ARCHITECTURES or struct.calcsize("P") != 8:
        return f"it knows the system calls of {' and '.join(ARCHITECTURES)}, and this is {platform.machine()}"
    return None


def program(*, files: bool) -> bytes:
    """The filter of this machine as BPF instructions. With `files`, files may be opened for reading."""
    column, architecture = ARCHITECTURES[platform.machine()]
    code = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_JUMP_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    for number in _numbers(FREE, column) + (_numbers(PATHS, column) if files else []):
        code += [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    for rule in (*GUARDED, *(READING if files else NOT_READING)):
        for number in _numbers(rule.numbers, column):
            body = _body(rule)
            code += [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]
    refused = [*ANSWERED, (LINKS if files else f"{LINKS}, {OPENING}", errno.EACCES)]
    for numbers, error in refused:
        for number in _numbers(numbers, column):
            code += [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _ERRNO | error)]
    code.append(_instruction(_RETURN, _ERRNO | errno.EPERM))
    return b"".join(code)


def install(code: bytes) -> None:
    """Put this process and all its threads to come under a filter, for good. Raises OSError if it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    written = Program(len(code) // 8, code)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(written), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "this kernel or container does not let a process filter its system calls")


def _numbers(table: str, column: int) -> list[int]:
    """The numbers of a table's calls that this machine has."""
    found = (entry.split()[1 + column] for entry in table.split(","))
    return [int(number) for number in found if number != "-"]


def _body(rule: Rule) -> list[bytes]:
    """Instructions that allow a call if every condition holds, and refuse it otherwise."""
    checks: list[bytes] = []
    for position, kind, value in rule.conditions:
        low = _ARGUMENTS_AT + 8 * position
        if kind == "null":
            for word in (low, low + 4):
                checks += [_instruction(_LOAD, word), _instruction(_JUMP_EQUAL, 0, 1, 0), _refusal()]
            continue
        checks.append(_instruction(_LOAD, low))
        if kind == "in":
            values: Sequence[int] = value  # type: ignore[assignment]
            for at, one in enumerate(values):
                checks.append(_instruction(_JUMP_EQUAL, one, len(values) - at, 0))
        else:
            assert isinstance(value, int) and kind in ("has", "lacks"), f"there is no condition {kind}"
            checks.append(_instruction(_JUMP_SET, value, *((1, 0) if kind == "has" else (0, 1))))
        checks.append(_refusal())  # which the jumps go over when the condition holds
    return [*checks, _instruction(_RETURN, _ALLOW)]


def _refusal() -> bytes:
    return _instruction(_RETURN, _ERRNO | errno.EPERM)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
