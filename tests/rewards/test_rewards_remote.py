"""The reward `remote_rm` against a real server."""

from __future__ import annotations

import re

import pytest
from servers import Server

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError, RewardError
from whet.rewards.registry import build_scorer
from whet.rewards.remote import RemoteReward
from whet.types import Episode, Prompt


def an_episode() -> Episode:
    messages = [{"role": "user", "content": "2+2?"}]
    return Episode(Prompt("p0", (1,), messages, label=4), "g0", 0, response="It is 4.", status="completed")


def text(body: str, status: int = 200) -> tuple[int, dict[str, str], str]:
    return status, {}, body


async def test_prompt_response_and_label_are_posted_and_the_answer_is_the_reward(server: Server):
    server.answers = [text("0.25")]
    assert await RemoteReward(rm_url=f"{server.url}/reward")(an_episode()) == 0.25
    path, headers, body = server.requests[0]
    assert path == "/v1/reward" and "Authorization" not in headers
    assert body == {"prompt": [{"role": "user", "content": "2+2?"}], "response": "It is 4.", "label": 4}


async def test_an_object_of_numbers_is_recorded_part_by_part(server: Server):
    server.answers = [text('{"score": 0.5, "style": 1}')]
    episode = an_episode()
    await build_scorer(RewardConfig(use="remote_rm", rm_url=server.url)).score(episode)
    assert episode.rewards == {"remote_rm": 0.5, "remote_rm/score": 0.5, "remote_rm/style": 1.0}


async def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RM_KEY", "secret")
    server.answers = [text("1")]
    await RemoteReward(rm_url=server.url, api_key_env="RM_KEY")(an_episode())
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


async def test_a_busy_server_is_asked_again_and_then_given_up(server: Server):
    server.answers = [text("busy", 503), text("busy", 429), text("1")]
    assert await RemoteReward(rm_url=server.url)(an_episode()) == 1
    server.answers = [text("busy", 503)]
    with pytest.raises(RewardError, match=r"the reward model at .* gave no answer in 2 requests; the last: HTTP 503"):
        await RemoteReward(rm_url=server.url, retries=1)(an_episode())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (text("nonsense"), "no JSON"),
        (text("no", 404), "refused the request: HTTP 404"),
        (text("null"), "returned None"),
        (text('"1.0"'), "returned '1.0'"),
        (text("NaN"), "returned nan"),
        (text("[1]"), r"returned \[1\]"),
    ],
)
async def test_what_is_no_number_costs_the_episode(server: Server, answer: tuple, why: str):
    server.answers = [answer]
    episode = an_episode()
    await build_scorer(RewardConfig(use="remote_rm", rm_url=server.url)).score(episode)
    assert (episode.status, episode.reward) == ("failed", None)
    assert re.search(why, episode.error or "")


async def test_a_slow_server_is_out_of_time(server: Server):
    server.answers, server.delay_s = [text("1")], 0.5
    with pytest.raises(RewardError, match=r"1 requests; the last: .*Timeout"):
        await RemoteReward(rm_url=server.url, retries=0, request_timeout_s=0.1)(an_episode())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rm_url": "localhost:80"}, "rm_url is 'localhost:80'"),
        ({"rm_url": "http://x", "api_key_env": "NO_KEY"}, "NO_KEY"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        RemoteReward(**options)
