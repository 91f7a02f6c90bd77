"""The reward `judge` against a real server: what it asks, what it reads, when it tries again, when it gives up."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from servers import Answer, Server

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError, DataError, RewardError
from whet.rewards.judge import JudgeReward, filled
from whet.rewards.registry import build_scorer
from whet.types import Episode, Prompt


def episode(response: str = "It is 4.", prompt: Any = "2+2?", label: Any = 4, index: int = 0) -> Episode:
    made = Episode(Prompt("p0", (1,), prompt, label), "g0", index)
    made.response, made.status = response, "completed"
    return made


async def score(server: Server, **options: Any) -> float:
    return await JudgeReward(base_url=server.url, model="j", **options)(episode())


async def test_a_verdict_becomes_a_reward(server: Server):
    assert await score(server) == pytest.approx(0.7)  # from 0 to 10, a tenth of it
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "j" and body["temperature"] == 0
    (message,) = body["messages"]
    assert message["role"] == "user" and "2+2?" in message["content"] and "It is 4." in message["content"]


async def test_the_template_is_filled_once_and_never_twice(server: Server):
    reward = JudgeReward(
        base_url=server.url + "/", model="j", template="{prompt}|{response}|{label}|{x}", system="Judge.", max_tokens=9
    )
    asked = [{"role": "system", "content": "Be {label}."}, {"role": "user", "content": "2+2?"}]
    assert await reward(episode("{label} {prompt}", asked)) == 7  # its own template: the number as it is
    body = server.requests[0][2]
    assert [message["content"] for message in body["messages"]] == [
        "Judge.",
        "system: Be {label}.\n\nuser: 2+2?|{label} {prompt}|4|{x}",
    ]
    assert body["max_tokens"] == 9
    assert filled("{response}", {"prompt": "", "response": r"\1{x}", "label": ""}) == r"\1{x}"


async def test_the_key_comes_from_the_environment(server: Server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    await score(server, api_key_env="JUDGE_KEY")
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "said,options,expected",
    [
        ("Score: 3 at first.\nBut no:\nScore: 8", {}, 0.8),  # the last one counts
        ('{"score": 7.5}', {}, 0.75),
        ("**Score:** 10", {}, 1.0),
        ("I give 5 of 5", {"parse": r"(\d+) of 5", "scale": 0.2}, 1.0),
        ("Verdict: YES", {"parse": r"verdict: (\w+)", "words": {"yes": 1, "no": 0}}, 1.0),
        ("Verdict: -2", {"parse": r"verdict: (\S+)", "words": {"no": 0}}, -2.0),
    ],
)
async def test_verdicts_are_read_by_rule(server: Server, said: str, options: dict, expected: float):
    server.answers = [said]
    assert await score(server, **options) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer,options,why",
    [
        ("I cannot say.", {}, "holds no verdict"),
        ("Score: 70", {}, "outside of 0 to 10"),
        (
            "Verdict: maybe",
            {"parse": r"verdict: (\w+)", "words": {"yes": 1}},
            "'maybe', expected .* one of yes",
        ),
        ((200, {}, "<html>"), {}, "not the form of a chat completion"),
        ((200, {}, '{"error": "no"}'), {}, "not the form of a chat completion"),
        ((200, {}, '{"choices": [{"message": {"content": null}}]}'), {}, "without text"),
        ((200, {}, '{"choices": [{"message": {"content": "Score: 1"}, "finish_reason": "length"}]}'), {}, "cut off"),
        ((401, {}, "no such key"), {}, "HTTP 401.*no such key"),
    ],
)
async def test_no_verdict_is_a_failure_and_never_a_number(server: Server, answer: Answer, options: dict, why: str):
    server.answers = [answer]
    with pytest.raises(RewardError, match=why):
        await score(server, **options)
    assert len(server.requests) == 1  # asking again would not help


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_server_is_asked_again(server: Server, status: int):
    server.answers = [(status, {}, "busy"), (status, {"Retry-After": "0.02"}, "busy"), "Score: 5"]
    assert await score(server) == pytest.approx(0.5)
    assert len(server.requests) == 3


async def test_it_gives_up_after_so_many_requests(server: Server):
    server.answers = [(503, {}, "busy")]
    with pytest.raises(RewardError, match="no answer in 3 requests; the last: HTTP 503: 'busy'"):
        await score(server, retries=2)
    assert len(server.requests) == 3


async def test_what_the_server_asks_for_is_waited_for(server: Server):
    server.answers = [(429, {"Retry-After": "0.3"}, ""), "Score: 5"]
    start = time.monotonic()
    await score(server)
    assert time.monotonic() - start >= 0.3


async def test_a_request_out_of_time_is_made_again_and_then_fails(server: Server):
    server.delay_s = 0.4
    with pytest.raises(RewardError, match=r"no answer in 2 requests; the last: .*Timeout"):
        await score(server, request_timeout_s=0.1, retries=1)


async def test_a_server_that_is_not_there_is_told():
    reward = JudgeReward(base_url="http://127.0.0.1:9/v1", model="j", retries=1)
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:9.*2 requests; the last: ConnectError"):
        await reward(episode())


async def test_no_more_are_asked_at_a_time_than_allowed_and_waiting_is_no_delay(server: Server):
    server.delay_s = 0.1
    options = {"base_url": server.url, "model": "j", "max_concurrent": 2}
    scorer = build_scorer(RewardConfig(use="judge", timeout_s=0.35, **options))
    given = [episode(index=i) for i in range(8)]  # 0.4 s in all, more than any may take by itself
    await asyncio.gather(*(scorer.score(one) for one in given))
    assert [one.error for one in given] == [None] * 8
    assert server.most_active == 2
    assert scorer.rewards[0].reward._endpoint._client is None  # connections end with the last call


async def test_a_failure_costs_its_episode_alone(server: Server):
    server.answers = ["Score: 4", "no idea", "Score: 6"]
    scorer = build_scorer(RewardConfig(use="judge", base_url=server.url, model="j", max_concurrent=1))
    given = [episode(index=i) for i in range(3)]
    for one in given:
        await scorer.score(one)
    assert [one.status for one in given] == ["completed", "failed", "completed"]
    assert given[1].reward is None and "holds no verdict" in str(given[1].error)


@pytest.mark.parametrize(
    "options,why",
    [
        ({"base_url": "localhost:8000"}, "expected a URL"),
        ({"template": "Rate this: {prompt}"}, r"has no \{response\}"),
        ({"api_key_env": "NO_SUCH_KEY_HERE"}, "'NO_SUCH_KEY_HERE', but that environment variable is not set"),
        ({"parse": "("}, "no regular expression"),
        ({"parse": "score"}, None),
        ({"parse": r"\d+"}, "has 0 groups"),
        ({"lowest": 3, "highest": 3}, "not below highest"),
        ({"retries": -1}, "at least 0"),
        ({"modle": "j"}, "did you mean model"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(options: dict, why: str | None):
    config = RewardConfig(**{"use": "judge", "base_url": "http://x/v1", "model": "j", **options})
    if why is None:
        assert build_scorer(config)
        return
    with pytest.raises(ConfigError, match=why):
        build_scorer(config)


def test_a_label_that_is_asked_for_must_be_there():
    scorer = build_scorer(
        RewardConfig(use="judge", base_url="http://x/v1", model="j", template="{response} or {label}? {prompt}")
    )
    scorer.check([Prompt("p0", (1,), "2+2?", 4)])
    with pytest.raises(DataError, match="the label is missing"):
        scorer.check([Prompt("p0", (1,), "2+2?")])
