"""Scoring makes one number of several rewards, and keeps whatever is no number out of training."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from whet.errors import DataError, RewardError
from whet.rewards.exact import ExactReward
from whet.rewards.math import MathReward
from whet.rewards.score import MAX_THREADS, NamedReward, RewardScorer
from whet.types import Episode, Prompt


def an_episode(index: int = 0, label: object = 4) -> Episode:
    prompt = Prompt("p7", [1, 2], "What is 2+2?", label=label)
    return Episode(prompt, "g3", index, response="4", status="completed")


async def scored(reward: Callable[..., Any], *, timeout_s: float = 5.0, weight: float = 1.0) -> Episode:
    episode = an_episode()
    await RewardScorer([NamedReward("mine", reward, weight, timeout_s)]).score(episode)
    return episode


async def test_rewards_add_up_with_their_weights():
    async def one(episode: Episode) -> float:
        return 1.0

    rewards = [NamedReward("one", one, weight=2.0), NamedReward("length", lambda e: len(e.response), weight=-0.5)]
    episode = an_episode()
    await RewardScorer(rewards).score(episode)
    assert episode.reward == 2.0 * 1.0 - 0.5 * 1
    assert episode.rewards == {"one": 1.0, "length": 1.0}
    assert episode.status == "completed"


def leaves(episode: Episode) -> float:
    raise SystemExit("enough")


def cancels(episode: Episode) -> float:
    raise asyncio.CancelledError


async def cancels_itself(episode: Episode) -> float:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda e: next(iter(())), "StopIteration"),
        (leaves, "SystemExit enough"),
        (cancels, "CancelledError"),
        (cancels_itself, "CancelledError"),
    ],
    ids=["stop", "exit", "cancel", "cancel async"],
)
async def test_what_would_end_the_run_or_never_be_heard_of_costs_the_episode(reward, told):
    episode = await asyncio.wait_for(scored(reward), 5)
    assert episode.status == "failed" and episode.error == f"reward 'mine' raised RuntimeError: {told}"


async def test_a_number_that_float32_cannot_square_is_no_reward():
    episode = await scored(lambda e: -2e18)
    assert episode.reward is None and "too large to compute with in float32" in (episode.error or "")
    assert (await scored(lambda e: 1e18)).reward == 1e18


async def test_the_score_of_a_dict_counts_and_its_parts_are_recorded():
    episode = await scored(lambda e: {"score": 0.5, "acc": 1})
    assert episode.reward == 0.5
    assert episode.rewards == {"mine": 0.5, "mine/score": 0.5, "mine/acc": 1.0}


async def test_text_beside_a_score_is_left_out():
    assert (await scored(lambda e: {"score": 0.5, "pred": "4"})).rewards == {"mine": 0.5, "mine/score": 0.5}


async def test_the_parts_of_a_dict_without_a_score_add_up():
    episode = await scored(lambda e: {"format": 0.25, "answer": 1.0}, weight=2.0)
    assert episode.reward == 2.5
    assert episode.rewards["mine"] == 1.25


@pytest.mark.parametrize("value", [True, 1, np.float32(1.0), torch.tensor(1.0)])
async def test_any_kind_of_number_will_do(value: object):
    assert (await scored(lambda e: value)).reward == 1.0


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "returned None"),
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ("1.0", "returned '1.0'"),
        ({}, "empty dict"),
        ({"score": math.nan}, "returned nan"),
        ({"score": 1.0, "format": None}, "returned None"),
        ({"score": "1.0"}, "returned '1.0'"),
        ({"right": 1.0, "said": "yes"}, "returned 'yes'"),
    ],
)
async def test_what_is_no_number_fails_the_episode_and_never_becomes_one(value: object, told: str):
    episode = await scored(lambda e: value)
    assert (episode.status, episode.reward, episode.rewards) == ("failed", None, {})
    assert "reward 'mine'" in episode.error and told in episode.error


async def test_an_exception_fails_the_episode_and_is_told():
    episode = await scored(lambda e: 1 / 0)
    assert episode.status == "failed"
    assert episode.error == "reward 'mine' raised ZeroDivisionError: division by zero"


async def test_a_timeout_of_the_users_own_is_told_as_such():
    async def impatient(episode: Episode) -> float:
        raise TimeoutError("the judge is asleep")

    assert (await scored(impatient)).error == "reward 'mine' raised TimeoutError: the judge is asleep"


async def sleeping(episode: Episode) -> float:
    await asyncio.sleep(60)
    return 1.0


def test_a_reward_that_sleeps_past_its_limit_fails_the_episode_sync_or_async():
    release = threading.Event()

    def stuck(episode: Episode) -> float:
        release.wait(60)
        return 1.0

    start = time.monotonic()
    for reward in (sleeping, stuck):
        episode = asyncio.run(scored(reward, timeout_s=0.1))
        assert episode.status == "failed"
        assert episode.error == "reward 'mine' took longer than its timeout_s of 0.1 s"
    # Ending the event loop did not wait for the stuck thread either.
    assert time.monotonic() - start < 5.0
    release.set()


async def test_stuck_threads_do_not_block_the_next_calls():
    release = threading.Event()
    stuck = RewardScorer([NamedReward("stuck", lambda e: release.wait(60), timeout_s=0.1)])
    await asyncio.gather(*(stuck.score(an_episode(i)) for i in range(2 * MAX_THREADS)))
    episodes = [an_episode(i) for i in range(2 * MAX_THREADS)]
    fast = RewardScorer([NamedReward("fast", lambda e: e.index, timeout_s=5.0)])
    await asyncio.gather(*(fast.score(episode) for episode in episodes))
    assert [episode.reward for episode in episodes] == [float(i) for i in range(2 * MAX_THREADS)]
    release.set()


async def test_threads_are_limited_and_waiting_for_one_does_not_count_against_the_limit():
    running: set[int] = set()
    most = 0

    # 48 calls of 0.25 s, 16 at a time: the last ones wait for 0.5 s before they start.
    def slow(episode: Episode) -> float:
        nonlocal most
        running.add(episode.index)
        most = max(most, len(running))
        time.sleep(0.25)
        running.remove(episode.index)
        return 1.0

    scorer = RewardScorer([NamedReward("slow", slow, timeout_s=0.6)])
    episodes = [an_episode(i) for i in range(3 * MAX_THREADS)]
    await asyncio.gather(*(scorer.score(episode) for episode in episodes))
    assert {episode.status for episode in episodes} == {"completed"}
    assert most == MAX_THREADS


def test_a_program_ends_while_a_reward_is_stuck():
    code = (
        "import asyncio, time\n"
        "from whet.rewards.score import NamedReward, RewardScorer\n"
        "from whet.types import Episode, Prompt\n"
        "episode = Episode(Prompt('p', [1], '?'), 'g', 0)\n"
        "scorer = RewardScorer([NamedReward('stuck', lambda e: time.sleep(60), timeout_s=0.1)])\n"
        "asyncio.run(scorer.score(episode))\n"
        "print(episode.status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.stdout == "failed\n"


def test_one_scorer_serves_one_event_loop_after_another():
    scorer = RewardScorer([NamedReward("slow", lambda e: time.sleep(0.01) or 1.0)])

    async def score_many() -> float:
        episodes = [an_episode(i) for i in range(2 * MAX_THREADS)]
        await asyncio.gather(*(scorer.score(episode) for episode in episodes))
        return sum(episode.reward for episode in episodes)

    assert asyncio.run(score_many()) == asyncio.run(score_many()) == 2 * MAX_THREADS


async def test_one_failing_reward_of_several_fails_the_episode():
    rewards = [NamedReward("good", lambda e: 1.0), NamedReward("bad", lambda e: None)]
    episode = an_episode()
    await RewardScorer(rewards).score(episode)
    assert (episode.status, episode.reward) == ("failed", None)
    assert "'bad'" in episode.error and "'good'" not in episode.error


@pytest.mark.parametrize("status", ["aborted", "failed"])
async def test_aborted_and_failed_episodes_are_not_scored(status: str):
    episode = an_episode()
    episode.status, episode.error = status, "as it was"
    await RewardScorer([NamedReward("mine", lambda e: 1.0)]).score(episode)
    assert (episode.status, episode.reward, episode.error) == (status, None, "as it was")


async def test_a_cut_off_response_is_scored_and_stays_truncated():
    episode = an_episode()
    episode.status = "truncated"
    await RewardScorer([NamedReward("mine", lambda e: 0.0)]).score(episode)
    assert (episode.status, episode.reward) == ("truncated", 0.0)


def with_rewards(*rewards: float | None) -> list[Episode]:
    episodes = [an_episode(index) for index in range(len(rewards))]
    for episode, reward in zip(episodes, rewards, strict=True):
        episode.reward = reward
        if reward is None:
            episode.status, episode.error = "failed", "reward 'mine' returned nan, which is no reward"
    return episodes


def a_scorer() -> RewardScorer:
    return RewardScorer([NamedReward("mine", lambda e: 1.0)])


def test_failures_are_reported_with_their_prompt_and_reward(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "whet"):
        a_scorer().report_failures(with_rewards(1.0, None, 0.0))
    assert "1 of 3 episodes failed" in caplog.text
    assert "prompt p7 ('What is 2+2?')" in caplog.text and "reward 'mine'" in caplog.text


def test_a_step_in_which_every_episode_failed_stops_with_the_first_cause():
    with pytest.raises(RewardError, match=r"all 2 episodes .* prompt p7 .* reward 'mine' returned nan"):
        a_scorer().report_failures(with_rewards(None, None))


def test_nothing_is_reported_when_nothing_failed(caplog: pytest.LogCaptureFixture):
    a_scorer().report_failures(with_rewards(1.0, 0.0))
    a_scorer().report_failures([])
    assert caplog.text == ""


def test_the_same_reward_everywhere_is_reported_at_ever_longer_intervals(caplog: pytest.LogCaptureFixture):
    scorer, told = a_scorer(), []
    with caplog.at_level(logging.WARNING, "whet"):
        for _ in range(9):
            caplog.clear()
            scorer.report_uniform(with_rewards(0.0, 0.0))
            told.append("same reward, 0 " in caplog.text)
        assert told == [True, True, False, True, False, False, False, True, False]
        caplog.clear()
        scorer.report_uniform(with_rewards(0.0, 1.0))
        scorer.report_uniform(with_rewards(1.0))
        assert caplog.text == ""
        scorer.report_uniform(with_rewards(1.0, 1.0))
        assert "steps in a row: 1" in caplog.text


def test_prompts_that_can_never_be_judged_are_refused_beforehand():
    prompts = [Prompt(f"p{i}", [1], f"{i}?", label=label) for i, label in enumerate([0, None, "", 3])]
    scorer = RewardScorer([NamedReward("mine", lambda e: 1.0), NamedReward("math", MathReward())])
    with pytest.raises(
        DataError, match=r"reward 'math' cannot judge 2 prompts; .* prompt p1 \('1\?'\): .*label is None"
    ):
        scorer.check(prompts)
    scorer.check([prompts[0], prompts[3]])
    with pytest.raises(DataError, match="reward 'exact' cannot judge 1 prompts"):
        RewardScorer([NamedReward("exact", ExactReward())]).check(prompts)
