"""`whet serve` as a user starts it: a process, a client, and an orderly end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading

import openai
import pytest

from whet.cli import main


def test_the_command_serves_until_it_is_told_to_stop(tiny_qwen):
    line = [sys.executable, "-m", "whet.cli", "serve", str(tiny_qwen), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen([*line, "--max-concurrent", "4"], stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        said = []
        for told in process.stdout:
            said.append(told)
            if found := re.search(r"http://127\.0\.0\.1:\d+/v1", told):
                break
        else:
            pytest.fail(f"it ended: {''.join(said)}")
        with openai.OpenAI(base_url=found[0], api_key="none", max_retries=0, timeout=20) as client:
            got = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, seed=1
            )
            assert got.usage.completion_tokens <= 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model"),
        (["FOLDER", "--host", "0.0.0.0"], "give an API key"),
        (["FOLDER", "--max-concurrent", "0"], "must be at least 1"),
        (["FOLDER", "--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(tiny_qwen, arguments, message, capsys):
    given = [str(tiny_qwen) if argument == "FOLDER" else argument for argument in arguments]
    assert main(["serve", *given]) == 2
    assert message in capsys.readouterr().err
