"""Several servers as one engine: who gets what, and what becomes of requests when a server dies or stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server_engines import Trainer, engine_of
from whet.config.engine import EngineConfig
from whet.engines.servers.fleet import Fleet
from whet.engines.servers.process import Process
from whet.engines.servers.request import Request
from whet.errors import EngineError
from whet.types import Sampling, VersionSpan

PROMPT = list(b"What is it?")


async def until(holds, limit_s: float = 60.0) -> float:
    """Seconds until something holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, "it does not come to hold"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def asked(engine, count: int, tokens: int):
    """So many requests in flight, four to a group."""
    return [
        asyncio.create_task(
            engine.generate(PROMPT, Sampling(max_tokens=tokens, seed=i, ignore_eos=True), prefix_key=f"g{i // 4}")
        )
        for i in range(count)
    ]


async def test_what_becomes_of_requests_when_servers_die(sglang_python, tiny_qwen: Path, tmp_path: Path):
    trainer = Trainer(tiny_qwen)
    engine = engine_of(
        "sglang",
        trainer,
        tmp_path,
        python=sglang_python,
        num_engines=2,
        max_restarts=1,
        max_concurrent=8,
        publish={"verify": "always"},
        options={"stream_interval": 4},
    )
    try:
        trainer.change(seed=1)
        await engine.update_weights(trainer.snapshot(1))
        one, other = engine._fleet.servers
        assert {Path(path).name for path in (tmp_path / "engines").iterdir()} == {"sglang-0.log", "sglang-1.log"}

        # The members of a group are together, and the groups spread out.
        tasks = asked(engine, 8, 600)
        await until(lambda: engine.health()["active"] == 8)
        assert {frozenset(r.key for r in server.active.values()) for server in (one, other)} == {
            frozenset({"g0"}),
            frozenset({"g1"}),
        }
        # Killed in the middle: everything is answered in full, with what had come and the logprobs that belong to it.
        await until(lambda: all(len(r.output) > 8 for r in one.active.values()))
        os.kill(one.process.pid, signal.SIGKILL)
        took = await until(lambda: one.state != "ready")
        assert took < 3
        for completion in await asyncio.gather(*tasks):
            assert len(completion.tokens) == 600
            assert completion.versions == (VersionSpan(1, 0, 600),)
            expected = trainer.expected((*PROMPT, *completion.tokens), 600)
            assert max(abs(a - b) for a, b in zip(expected, completion.logprobs, strict=True)) < 1e-3
        assert engine.stats()["num_moved"] == 4
        assert engine.stats()["tokens_kept"] >= 32

        # It comes back with the current weights, not those of the folder.
        await until(lambda: one.state == "ready")
        assert one.version == 1
        await engine.verify()
        assert engine.stats()["num_restarts"] == 1
        assert engine.stats()["down_s"] > 0

        # Stopped, it neither ends nor answers.
        tasks = asked(engine, 8, 200)
        await until(lambda: engine.health()["active"] == 8 and all(server.active for server in (one, other)))
        os.killpg(other.process.pid, signal.SIGSTOP)
        assert await until(lambda: other.state != "ready") < 10
        assert all(len(completion.tokens) == 200 for completion in await asyncio.gather(*tasks))

        # Started once again at the most: the next deaths are for good, and the last is told by name.
        await until(lambda: other.state == "ready")
        tasks = asked(engine, 4, 1000)
        await until(lambda: engine.health()["active"] == 4)
        names = [server.name for server in (one, other)]
        for server in (one, other):
            os.kill(server.process.pid, signal.SIGKILL)
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30):
            assert isinstance(result, EngineError)
            assert "no engine is left" in str(result)
            assert all(name in str(result) for name in names)
            assert "SIGKILL" in str(result)
        with pytest.raises(EngineError, match="no engine is left"):
            await engine.generate(PROMPT, Sampling(max_tokens=1))
    finally:
        await engine.close()


async def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(tmp_path: Path, tiny_qwen: Path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho nothing of that name here\nexit 3\n")
    script.chmod(0o755)
    engine = engine_of("vllm", Trainer(tiny_qwen), tmp_path, python=str(script))
    try:
        with pytest.raises(
            EngineError, match=r"ended with exit status 3 before it answered; (?s:.*)nothing of that name"
        ) as error:
            await engine.generate(PROMPT, Sampling(max_tokens=1))
        assert str(tmp_path / "engines" / "vllm-0.log") in str(error.value)
    finally:
        await engine.close()


async def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path, tiny_qwen: Path):
    engine = engine_of("sglang", Trainer(tiny_qwen), tmp_path, address="http://127.0.0.1:9")
    try:
        with pytest.raises(EngineError, match=r"127.0.0.1:9\) cannot be reached .* engine\.address"):
            await engine.generate(PROMPT, Sampling(max_tokens=1))
    finally:
        await engine.close()


def test_a_server_dies_with_whoever_started_it(tmp_path: Path):
    code = (
        "import os, sys, time; from pathlib import Path; from whet.engines.servers.process import Process; "
        "sleep = ['-c', 'import time; time.sleep(600)']; "
        "p = Process(sys.executable, sleep, dict(os.environ), Path(sys.argv[1]), 'it'); "
        "print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    limit = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < limit, "the server outlives its parent"
        time.sleep(0.05)


def test_a_process_ends_with_all_that_it_started(tmp_path: Path):
    deaf = "trap '' TERM; while :; do sleep 1; done"
    code = f"import subprocess, time; print(subprocess.Popen(['sh', '-c', {deaf!r}]).pid, flush=True); time.sleep(600)"
    process = Process(sys.executable, ["-c", code], dict(os.environ), tmp_path / "log", "it")
    limit = time.monotonic() + 10
    while len((tmp_path / "log").read_text().splitlines()) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    child = int((tmp_path / "log").read_text().splitlines()[1])
    process.end()
    time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]


class Standing:
    """As much of a server as the choice of one looks at."""

    def __init__(self, index: int, load: int, state: str = "ready"):
        self.index, self.active, self.state, self.name, self.why = (
            index,
            dict.fromkeys(range(load)),
            state,
            str(index),
            "",
        )


def test_a_group_stays_where_it_is_unless_another_server_has_much_less_to_do():
    servers = [Standing(0, 0), Standing(1, 0)]
    fleet = Fleet(servers, EngineConfig(use="vllm", max_concurrent=32), frozenset(), lambda server: None)  # type: ignore
    assert fleet._best("a").index == 0
    servers[0].active = dict.fromkeys(range(8))
    assert fleet._best("a").index == 0, "a little more to do is less than a prompt computed twice"
    assert fleet._best("b").index == 1
    assert fleet._best(None).index == 1
    servers[0].active = dict.fromkeys(range(20))
    assert fleet._best("a").index == 1
    assert fleet._best("a").index == 1
    servers[1].state = "down"
    assert fleet._best("a").index == 0
    servers[0].active = dict.fromkeys(range(40))
    assert fleet._best("a") is None, "there is no room"


def test_a_continuation_has_noise_of_its_own_and_fewer_tokens():
    request = Request((1, 2), Sampling(max_tokens=10, seed=5), None)
    request.begin(3)
    assert request.remaining == Sampling(max_tokens=10, seed=5)
    request.output += [7, 8, 9]
    request.logprobs += [0.0] * 3
    request.mark(4)
    request.output.append(7)
    request.logprobs.append(0.0)
    request.leave()
    request.begin(4)
    assert request.remaining.max_tokens == 6
    assert request.remaining.seed != 5
    request.output.append(1)
    request.logprobs.append(0.0)
    request.leave((VersionSpan(4, 0, 1),))
    assert request.completion("length").versions == (VersionSpan(3, 0, 3), VersionSpan(4, 3, 5))
