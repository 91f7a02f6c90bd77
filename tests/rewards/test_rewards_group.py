"""Rewards over a whole group see its members together, when all of them have been played."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path
from typing import Any

import pytest

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError
from whet.rewards.registry import build_scorer
from whet.rewards.score import NamedReward, RewardScorer
from whet.types import Episode, Prompt

MODULE = """
import asyncio

async def ranked(episodes, *, best: float = 1.0):
    await asyncio.sleep(0)
    longest = max(len(episode.response) for episode in episodes)
    return [best * (len(episode.response) == longest) for episode in episodes]

def parts(samples):
    return [{"score": 1.0, "size": len(samples), "note": "text"} for _ in samples]

def pairs(group):
    return [float(len(group))] * len(group)

class Spread:
    def __call__(self, episodes):
        return list(range(len(episodes)))

def single(episode):
    return 1.0
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_groups_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def a_group(*responses: str) -> list[Episode]:
    prompt = Prompt("p", [1], "say it", label="a")
    return [Episode(prompt, "g0", i, response=text, status="completed") for i, text in enumerate(responses)]


async def scored(configs: Any, episodes: list[Episode]) -> list[float | None]:
    scorer = configs if isinstance(configs, RewardScorer) else build_scorer(configs)
    await asyncio.gather(*(scorer.score(episode) for episode in episodes))
    await scorer.score_group(episodes)
    return [episode.reward for episode in episodes]


async def test_a_function_of_episodes_gives_one_reward_for_each(mine: str):
    assert await scored(RewardConfig(use=f"{mine}:ranked", best=2), a_group("a", "abc", "ab")) == [0.0, 2.0, 0.0]
    assert await scored(RewardConfig(use=f"{mine}:Spread"), a_group("a", "b")) == [0.0, 1.0]
    assert await scored(RewardConfig(use=f"{mine}:pairs", group=True), a_group("a", "b")) == [2.0, 2.0]


async def test_the_parts_of_each_are_recorded(mine: str):
    episodes = a_group("a", "b")
    assert await scored(RewardConfig(use=f"{mine}:parts"), episodes) == [1.0, 1.0]
    assert episodes[0].rewards == {"parts": 1.0, "parts/score": 1.0, "parts/size": 2.0}


async def test_rewards_of_one_and_of_all_add_up(mine: str):
    configs = [RewardConfig(use="exact", weight=10), RewardConfig(use=f"{mine}:ranked")]
    episodes = a_group("a", "abc")
    assert await scored(configs, episodes) == [10.0, 1.0]
    assert episodes[1].rewards == {"exact": 0.0, "ranked": 1.0}


async def test_there_is_no_reward_before_the_group_is_complete(mine: str):
    scorer, (episode, _) = build_scorer(RewardConfig(use=f"{mine}:ranked")), a_group("a", "b")
    await scorer.score(episode)
    assert (episode.reward, episode.status) == (None, "completed")


async def test_failed_and_aborted_members_and_those_with_a_reward_of_their_own_are_not_seen(mine: str):
    episodes = a_group("abc", "abcd", "a", "ab")
    episodes[0].status, episodes[1].status, episodes[2].reward = "failed", "aborted", 5.0
    assert await scored(RewardConfig(use=f"{mine}:pairs", group=True), episodes) == [None, None, 5.0, 1.0]
    nobody = a_group("a")
    nobody[0].status = "aborted"
    assert await scored(RewardConfig(use=f"{mine}:ranked"), nobody) == [None]


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda episodes: [1.0], r"\[1.0\], expected a list of 2 rewards"),
        (lambda episodes: 1.0, "expected a list of 2 rewards"),
        (lambda episodes: {"a": 1, "b": 2}, "expected a list of 2 rewards"),
        (lambda episodes: "ab", "expected a list of 2 rewards"),
        (lambda episodes: [1.0, None], "None"),
        (lambda episodes: [1.0, math.nan], "nan"),
        (lambda episodes: 1 / 0, "ZeroDivisionError"),
    ],
)
async def test_a_failure_costs_the_whole_group(reward: Any, told: str):
    episodes = a_group("a", "b")
    assert await scored(RewardScorer([NamedReward("mine", reward, group=True)]), episodes) == [None, None]
    assert {episode.status for episode in episodes} == {"failed"}
    assert all(re.search(f"reward 'mine' .*{told}", episode.error or "") for episode in episodes)


async def test_a_reward_over_groups_that_takes_too_long_fails_them():
    async def asleep(episodes: list[Episode]) -> list[float]:
        await asyncio.sleep(60)
        return [1.0] * len(episodes)

    episodes = a_group("a", "b")
    await scored(RewardScorer([NamedReward("mine", asleep, timeout_s=0.05, group=True)]), episodes)
    assert episodes[0].error == "reward 'mine' took longer than its timeout_s of 0.05 s"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use": "math", "group": True}, "group is true, but 'math' judges one at a time"),
        ({"use": "{mine}:single", "group": True}, "judges one at a time"),
        ({"use": "{mine}:ranked", "group": False}, "group is false, but .* judges a whole group at once"),
    ],
)
def test_a_setting_that_contradicts_the_function_is_refused(mine: str, settings: dict, told: str):
    settings = settings | {"use": settings["use"].replace("{mine}", mine)}
    with pytest.raises(ConfigError, match=told):
        build_scorer(RewardConfig(**settings))
