"""What runs in the sandbox can compute and do nothing else, whichever way it is closed in."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from whet.errors import ConfigError
from whet.rewards.sandbox import jail, server, syscalls
from whet.rewards.sandbox.pool import Limits, ProgramError, Run, Sandbox
from whet.rewards.sandbox.values import Other, decode, encode

if syscalls.supported() is not None:
    pytest.skip(f"no sandbox here: {syscalls.supported()}", allow_module_level=True)

SYSTEM_PYTHON = "/usr/bin/python3"
SHORT = Limits(timeout_s=5.0, memory_bytes=256 << 20, output_bytes=1 << 20)


@functools.cache
def sandbox(isolation: str) -> Sandbox:
    return Sandbox(isolation, num_servers=1)  # type: ignore[arg-type]


@pytest.fixture(params=["namespaces", "landlock", "sealed"])
def closed(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox of each kind that this machine allows."""
    return available(request.param)


def available(isolation: str) -> Sandbox:
    """The sandbox, unless this machine has not what it needs; one that does not hold is an error."""
    try:
        return sandbox(isolation)
    except ConfigError as error:
        if "there is no sandbox" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    for isolation in ("auto", "namespaces", "landlock", "sealed", "none"):
        with_one = sandbox.cache_info().currsize
        if with_one:
            try:
                sandbox(isolation).close()
            except ConfigError:
                continue
    sandbox.cache_clear()


def server_of(box: Sandbox) -> int:
    return box._pool._workers[0].start().pid


# What programs do.


async def test_a_program_reads_its_input_and_writes_its_output(closed: Sandbox):
    run = await closed.run("print(sum(map(int, input().split())))", "1 2 3\n")
    assert (run.ended, run.output, run.error) == ("exit 0", "6\n", None)


async def test_input_and_output_may_be_megabytes(closed: Sandbox):
    text = "ü" * 500_000
    run = await closed.run("import sys; sys.stdout.write(sys.stdin.read())", text)
    assert run.output == text


async def test_functions_methods_expressions_and_statements_are_called(closed: Sandbox):
    program = "class Solution:\n    def twice(self, x):\n        return x * 2\ndef f(x):\n    return {x: (1, [2])}"
    calls = [
        {"function": "twice", "arguments": [21]},
        {"function": "f", "arguments": ["a"]},
        {"expression": "f(2 ** 80)"},
        {"statements": "assert f(1) == {1: (1, [2])}"},
        {"statements": "assert f(1) == {}"},
        {"function": "g", "arguments": []},
    ]
    run = await closed.call(program, calls)
    assert run.results[:4] == (42, {"a": (1, [2])}, {2**80: (1, [2])}, True)
    assert [str(error) for error in run.results[4:]] == [
        "AssertionError: ",
        "AttributeError: 'Solution' object has no attribute 'g'",
    ]
    assert all(isinstance(error, ProgramError) for error in run.results[4:])


async def test_threads_deep_recursion_and_event_loops_work(closed: Sandbox):
    program = (
        "import asyncio, sys, threading\n"
        "sys.setrecursionlimit(10 ** 6)\n"
        "threading.stack_size(1 << 26)\n"
        "def depth(n): return 0 if n == 0 else 1 + depth(n - 1)\n"
        "async def later():\n    await asyncio.sleep(0.001)\n    print('later')\n"
        "def main():\n    print(depth(20_000))\n    asyncio.run(later())\n"
        "thread = threading.Thread(target=main)\n"
        "thread.start()\n"
    )
    run = await closed.run(program)
    assert run.output == "20000\nlater\n", run.error


async def test_exit_codes_and_exceptions_are_told(closed: Sandbox):
    assert (await closed.run("import sys; print(1); sys.exit(3)")).ended == "exit 3"
    assert (await closed.run("raise SystemExit('enough')")).ended == "exit 1"
    failed = await closed.run("print(1); 1 / 0")
    assert (failed.ended, failed.error) == ("exit 1", "ZeroDivisionError: division by zero")
    assert failed.output == "1\n"
    assert "SyntaxError" in (await closed.run("def")).error


async def test_what_is_registered_to_run_at_the_end_is_run(closed: Sandbox):
    run = await closed.run("import atexit; atexit.register(print, 'last'); print('first')")
    assert run.output == "first\nlast\n"


async def test_the_same_program_gives_the_same_sets_every_time(closed: Sandbox):
    outputs = {(await closed.run("print(set('whetstone'))")).output for _ in range(3)}
    assert len(outputs) == 1


async def test_nothing_is_left_behind_for_the_next_program(closed: Sandbox):
    await closed.run("import builtins, math; builtins.print = None; math.pi = 3")
    run = await closed.run("import math; print(math.pi > 3)")
    assert run.output == "True\n"


async def test_a_run_takes_little_time(closed: Sandbox):
    times = [(await closed.run("print(1)")).wall_s for _ in range(20)]
    assert sorted(times)[5] < 0.05


# What programs must not do.

ATTACKS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "process": "import subprocess; subprocess.run(['/bin/true'])",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
    "exec": "import os, sys; os.execv(sys.executable, ['python', '-c', 'print(\"done\")'])",
    "raw fork": "import ctypes; c = ctypes.CDLL(None); assert c.fork() >= 0",
    "new namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "password file": "print(open('/etc/passwd').read())",
    "own file": "print(open({secret!r}).read())",
    "own folder": "import os; print(os.listdir({folder!r}))",
    "way up": "import heapq as h, os; print(open(os.path.dirname(h.__file__) + '/..' * 9 + '/etc/passwd').read())",
    "environment in proc": "print(open('/proc/self/environ').read())",
    "environment of others": "import os; print(open(f'/proc/{{os.getppid()}}/environ').read())",
    "root in proc": "print(open('/proc/self/root/etc/passwd').read())",
    "link in proc": "import os; print(os.readlink('/proc/self/cwd'))",
    "symbolic link": "import os; os.symlink('/etc/passwd', '/tmp/passwd-of-whet')",
    "write": "open('/tmp/written-by-whet', 'w').write('x')",
    "write beside": "open({secret!r}, 'a').write('x')",
    "truncate": "import os; os.truncate({secret!r}, 0)",
    "delete": "import os; os.unlink({secret!r})",
    "rename": "import os; os.rename({secret!r}, {secret!r} + '2')",
    "permissions": "import os; os.chmod({secret!r}, 0)",
    "folder": "import os; os.mkdir('/tmp/folder-of-whet')",
    "temporary file": "import tempfile; tempfile.TemporaryFile().write(b'x')",
    "file without name": "import os; os.memfd_create('x')",
    "connection": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "connection by name": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
    "local socket": "import socket; socket.socket(socket.AF_UNIX).connect('/run/systemd/notify')",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "kill the group": "import os; os.killpg(0, 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "kill by owner": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "raise limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "limit the parent": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (9, 9))",
    "new root": "import os; os.chroot('/')",
    "trace the parent": "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "become another": "import os; os.setuid(1)",
}


HARMLESS = """
process, exec, raw fork, password file, own file, own folder, way up, environment in proc, environment of others,
root in proc, link in proc, truncate, rename, permissions, file without name, connection, kill by owner
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_nothing_is_reached_or_changed(closed: Sandbox, attack: str, tmp_path: Path, listener: socket.socket):
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    program = attack.format(secret=str(secret), folder=str(tmp_path), port=listener.getsockname()[1])
    before = server_of(closed)
    run = await closed.run(f"{program}\nprint('done')", limits=SHORT)
    assert run.ended != "exit 0" and "done" not in run.output, run
    assert secret.read_text() == "the answer" and [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert not list(Path("/tmp").glob("*of-whet")) and not Path("/tmp/written-by-whet").exists()
    assert (await closed.run("print(1)")).output == "1\n"
    assert server_of(closed) == before  # it did not even have to be started again


@pytest.mark.parametrize("name", [name.strip() for name in HARMLESS.split(",")])
async def test_the_same_would_work_without_a_sandbox(name: str, tmp_path: Path, listener: socket.socket):
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    program = ATTACKS[name].format(secret=str(secret), folder=str(tmp_path), port=listener.getsockname()[1])
    run = await sandbox("none").run(f"{program}\nprint('done')", limits=SHORT)
    assert "done" in run.output, run


async def test_nothing_of_the_environment_is_seen(closed: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "42")
    run = await closed.run("import os, posix; print(sorted(os.environ), b'SECRET_KEY' in posix.environ)")
    assert run.output == f"{sorted(server.ONE_THREAD)} False\n"


async def test_endless_loops_end_even_if_they_hold_on_to_everything(closed: Sandbox):
    stubborn = (
        "import signal\n"
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass\n"
    )
    for program in (
        "while True: pass",
        stubborn,
        "import time; time.sleep(100)",
        "import os; os.close(1); os.close(3)\nwhile 1: pass",
    ):
        start = time.monotonic()
        assert (await closed.run(program, limits=Limits(timeout_s=0.5))).ended == "timeout"
        assert time.monotonic() - start < 4.0


async def test_memory_is_limited(closed: Sandbox):
    run = await closed.run("hoard = bytearray(300 << 20); print('done')", limits=SHORT)
    assert run.error is not None and "MemoryError" in run.error
    grown = await closed.run("hoard = []\nwhile True: hoard.append('x' * 10 ** 6)", limits=SHORT)
    assert grown.ended != "exit 0"


async def test_threads_are_limited_by_memory_and_time(closed: Sandbox):
    program = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()"
    assert (await closed.run(program, limits=replace(SHORT, timeout_s=1.0))).ended != "exit 0"
    assert (await closed.run("print(1)")).output == "1\n"


@pytest.mark.parametrize("descriptor", [1, 3])
async def test_floods_of_output_end(closed: Sandbox, descriptor: int):
    run = await closed.run(f"import os\nwhile True: os.write({descriptor}, b'x' * 60000)", limits=SHORT)
    assert run.ended == "output"
    assert len(run.output) < 2 << 20


async def test_crashes_of_the_interpreter_end_one_program_only(closed: Sandbox):
    before = server_of(closed)
    run = await closed.run("import ctypes; ctypes.string_at(0)")
    assert run.ended == "signal 11"
    assert (await closed.run("print(1)")).output == "1\n" and server_of(closed) == before


@pytest.mark.parametrize(
    "leave",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit(0)", "import os; os.close(3)"],
)
async def test_leaving_before_the_calls_gives_no_results(closed: Sandbox, leave: str):
    for program in (leave, f"def f():\n    {leave}"):
        run = await closed.call(program, [{"expression": "f()"}, {"statements": "assert f() is None"}])
        assert not any(value is True for value in run.results)


async def test_reports_that_a_program_writes_itself_do_not_count(closed: Sandbox):
    forged = "import os\nos.write(3, b'{\"value\": true}\\n' * 9)\nos._exit(0)"
    assert (await closed.call(forged, [{"statements": "assert False"}])).results == ()


async def test_only_the_descriptors_that_are_meant_for_it_are_open(closed: Sandbox):
    program = (
        "import os\n"
        "def is_open(n):\n"
        "    try:\n        os.fstat(n)\n        return True\n"
        "    except OSError:\n        return False\n"
        "print([n for n in range(2000) if is_open(n)])"
    )
    assert (await closed.run(program)).output == "[0, 1, 2, 3]\n"


# How it is set up.


async def test_a_server_that_is_killed_is_replaced():
    box = Sandbox(num_servers=1)
    assert (await box.run("print(1)")).output == "1\n"
    os.kill(server_of(box), signal.SIGKILL)
    box._pool._workers[0]._process.wait()
    assert (await box.run("print(2)")).output == "2\n"
    box.close()


async def test_what_a_killed_server_was_running_ends_at_once():
    box = Sandbox("namespaces", num_servers=1) if available("namespaces") else None
    assert box is not None
    running = asyncio.ensure_future(box.run("while True: pass", limits=Limits(timeout_s=20.0)))
    await asyncio.sleep(0.3)
    pids = [server_of(box)]
    while children := Path(f"/proc/{pids[-1]}/task/{pids[-1]}/children").read_text().split():
        pids.append(int(children[0]))
    assert len(pids) == 3  # the one that waits, the first of the process table, the program
    os.kill(pids[0], signal.SIGKILL)
    assert (await running).ended == "lost"
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
    box.close()


async def test_programs_of_many_callers_run_side_by_side():
    box = Sandbox(num_servers=3)
    runs = await asyncio.gather(*(box.run(f"print({i} ** 2)") for i in range(30)))
    assert [run.output for run in runs] == [f"{i * i}\n" for i in range(30)]
    box.close()


def test_servers_end_when_the_process_that_asked_is_gone():
    code = (
        "import asyncio, os\n"
        "from whet.rewards.sandbox.pool import Limits, Sandbox\n"
        "async def main():\n"
        "    box = Sandbox(num_servers=1)\n"
        "    asyncio.ensure_future(box.run('while True: pass', limits=Limits(timeout_s=1.0)))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(box._pool._workers[0]._process.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_auto_takes_the_strongest_isolation_there_is():
    assert sandbox("auto").isolation in jail.ISOLATIONS


def test_without_isolation_the_refusal_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch):
    start = "import sys; sys.path.insert(0, {root!r}); from whet.rewards.sandbox import jail, server; "
    broken = "jail._MOUNT_SETATTR = jail._LANDLOCK_CREATE = 100_000; server.main({isolation!r})"
    monkeypatch.setattr("whet.rewards.sandbox.pool.START", start + broken)
    for isolation in ("namespaces", "landlock"):
        with pytest.raises(
            ConfigError, match=rf"no sandbox .* '{isolation}' \({isolation}: .*not implemented.*\); .*none"
        ):
            Sandbox(isolation, num_servers=1)
    fallen_back = Sandbox("auto", num_servers=1)
    assert fallen_back.isolation == "sealed"
    fallen_back.close()


def test_a_machine_whose_system_calls_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch):
    start = "import platform, sys; platform.machine = lambda: 'vax'; sys.path.insert(0, {root!r}); "
    monkeypatch.setattr(
        "whet.rewards.sandbox.pool.START", start + "from whet.rewards.sandbox import server; server.main({isolation!r})"
    )
    with pytest.raises(ConfigError, match=r"seccomp: it knows the system calls of .*, and this is vax"):
        Sandbox(num_servers=1)


def test_the_filter_alone_lets_files_be_read_and_nothing_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("as it was")
    code = (
        "import os, sys\n"
        "from whet.rewards.sandbox import syscalls\n"
        "syscalls.install(syscalls.program(files=True))\n"
        "path = sys.argv[1]\n"
        "assert os.read(os.open(path, os.O_RDONLY), 99) == b'as it was'\n"
        "for flag in [os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_CREAT, os.O_TMPFILE]:\n"
        "    try:\n        os.open(path, flag)\n"
        "    except PermissionError:\n        print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file"], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stdout == "refused\n" * 5
    assert (tmp_path / "file").read_text() == "as it was"


def test_a_container_that_forbids_filters_is_refused(monkeypatch: pytest.MonkeyPatch):
    start = "import sys; sys.path.insert(0, {root!r}); from whet.rewards.sandbox import server, syscalls; "
    broken = "syscalls._SECCOMP_MODE_FILTER = 99; server.main({isolation!r})"
    monkeypatch.setattr("whet.rewards.sandbox.pool.START", start + broken)
    with pytest.raises(ConfigError, match=r"seccomp: .*does not let a process filter.*only if you trust"):
        Sandbox(num_servers=1)


@pytest.mark.parametrize(
    "hole",
    [
        "syscalls.FREE += ', socket 41 198'",
        "syscalls.FREE += ', kill 62 129'",
        "syscalls.GUARDED += (syscalls.Rule('clone 56 220', ()),); syscalls.FREE += ', fork 57 -, clone 56 220'",
        "jail.stay_sealed = jail.ISOLATIONS['sealed']; syscalls.NOT_READING = syscalls.READING",
        "server.os.environ.clear = lambda: None",
    ],
)
def test_a_sandbox_with_a_hole_is_refused(monkeypatch: pytest.MonkeyPatch, hole: str):
    start = "import sys; sys.path.insert(0, {root!r}); from whet.rewards.sandbox import jail, server, syscalls; "
    monkeypatch.setattr("whet.rewards.sandbox.pool.START", start + hole + "; server.main({isolation!r})")
    with pytest.raises(ConfigError, match="does not hold"):
        Sandbox("sealed", num_servers=1)


async def test_isolation_none_limits_and_separates_but_does_not_close_in():
    box = sandbox("none")
    assert box.isolation == "none"
    assert (await box.run("print(len(open('/etc/passwd').read()) > 0)")).output == "True\n"
    assert (await box.run("while True: pass", limits=Limits(timeout_s=0.3))).ended == "timeout"
    # What a program started goes with it.
    orphan = "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\nprint(pid)"
    pid = int((await box.run(orphan)).output)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


AS_NOBODY = (
    "import os, sys; os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); "
    "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0); "  # as any process is that began as this user
    "sys.path.insert(0, {root!r}); from whet.rewards.sandbox.server import main; sys.path.pop(0); main({isolation!r})"
)


@pytest.mark.skipif(os.getuid() != 0, reason="every other test runs without privileges already")
@pytest.mark.skipif(not Path(SYSTEM_PYTHON).exists(), reason=f"needs {SYSTEM_PYTHON}, which any user may read")
@pytest.mark.parametrize("isolation", ["namespaces", "landlock", "sealed"])
async def test_it_holds_without_privileges_too(isolation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("whet.rewards.sandbox.pool.START", AS_NOBODY)
    try:
        box = Sandbox(isolation, num_servers=1, python=SYSTEM_PYTHON)  # type: ignore[arg-type]
    except ConfigError as error:
        if "there is no sandbox" not in str(error):
            raise
        pytest.skip(str(error))
    (tmp_path / "secret").write_text("the answer")
    for name in (
        "fork bomb",
        "password file",
        "own file",
        "write",
        "connection",
        "kill the parent",
        "trace the parent",
    ):
        program = ATTACKS[name].format(secret=str(tmp_path / "secret"), folder=str(tmp_path), port=1)
        run = await box.run(f"{program}\nprint('done')", limits=SHORT)
        assert run.ended != "exit 0" and "done" not in run.output, (name, run)
    if isolation == "namespaces":  # where its threads are the only ones of this user
        bomb = (
            "import threading, time\nthreading.stack_size(1 << 16)\n"
            "for count in range(500):\n"
            "    try:\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
            "    except RuntimeError:\n        break\n"
            "print(count)"
        )
        assert 30 < int((await box.run(bomb, limits=SHORT)).output) < 64
    assert (await box.run("print(input())", "still here")).output == "still here\n"
    box.close()


# Values.


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**70), 1.5, "ü\ud800", b"\x00", 1 + 2j, [1, [2]], (1, (2,)), {1: {"a": ()}}, {1, (2, 3)}, set()],
)
def test_plain_values_come_out_as_they_are(value: object):
    assert decode(encode(value)) == value and type(decode(encode(value))) is type(value)


def test_other_values_equal_only_what_is_written_the_same():
    one, other = decode(encode(1j.conjugate)), decode(encode(object()))
    assert isinstance(one, Other) and one != other and one != "x"


@pytest.mark.parametrize("text", [{"pickle": "x"}, {"int": "zz"}, {"tuple": 3}, {"a": 1, "b": 2}, {"set": [[1]]}])
def test_what_is_no_encoded_value_is_refused(text: object):
    with pytest.raises(ValueError, match="no encoded value"):
        decode(text)


def test_every_module_that_is_loaded_beforehand_exists():
    for name in (server.EVERYDAY + server.SEALED_IN).split():
        __import__(name)


def test_a_lost_server_is_told():
    assert Run("lost").results == ()
