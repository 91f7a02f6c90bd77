"""Which reward judges a prompt, in order: its own, the user's function, the type of its row, that of the run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError, DataError
from whet.rewards.registry import build_scorer
from whet.types import Episode, Prompt

MODULE = """
def shout(episode, *, factor: float = 1.0):
    return factor * episode.response.isupper()

def special(episode):
    return 7.0
"""
MATH, WORDS = {"label": 4}, {"label": "the brown fox"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_chosen_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def a_prompt(label: Any = 4, **metadata: Any) -> Prompt:
    return Prompt("p1", [1], "2+2?", label=label, metadata=metadata)


async def judged(configs: Any, prompt: Prompt, response: str) -> Episode:
    episode = Episode(prompt, "g0", 0, response=response, status="completed")
    await build_scorer(configs).score(episode)
    return episode


async def test_a_row_chooses_by_its_type_and_others_keep_that_of_the_run():
    scorer = build_scorer(RewardConfig(use="math"))
    by_f1, by_math = a_prompt("the brown fox", rm_type="f1"), a_prompt(4)
    scorer.check([by_f1, by_math])
    episodes = [Episode(by_f1, "g0", 0, response="a quick brown fox"), Episode(by_math, "g1", 0, response=r"\boxed{4}")]
    await asyncio.gather(*(scorer.score(episode) for episode in episodes))
    assert [episode.rewards for episode in episodes] == [{"f1": pytest.approx(0.8)}, {"math": 1.0}]


async def test_the_users_function_comes_before_the_type_of_the_row(mine: str):
    episode = await judged(RewardConfig(use=f"{mine}:shout"), a_prompt("X", rm_type="exact"), "YES")
    assert episode.rewards == {"shout": 1.0}


async def test_the_rows_own_function_comes_before_the_users(mine: str):
    config = RewardConfig(use=f"{mine}:shout", by_type={f"{mine}:special": {}})
    episode = await judged(config, a_prompt(custom_rm_path=f"{mine}:special", rm_type="exact"), "yes")
    assert episode.rewards == {"special": 7.0}
    config = RewardConfig(use="math", by_type={f"{mine}:special": {}})
    episode = await judged(config, a_prompt("yes", custom_rm_path=f"{mine}:special", rm_type="exact"), "yes")
    assert episode.rewards == {"special": 7.0}


async def test_a_reward_that_the_environment_gave_stays():
    episode = Episode(a_prompt(), "g0", 0, response="wrong", status="completed", reward=0.25)
    await build_scorer(RewardConfig(use="math")).score(episode)
    assert (episode.reward, episode.status) == (0.25, "completed")
    broken = Episode(a_prompt(), "g0", 0, response="4", status="completed", reward=float("nan"))
    await build_scorer(RewardConfig(use="math")).score(broken)
    assert (broken.reward, broken.status) == (None, "failed") and "environment" in (broken.error or "")


async def test_only_the_first_built_in_reward_of_several_is_replaced(mine: str):
    configs = [
        RewardConfig(use=f"{mine}:shout", weight=0.5),
        RewardConfig(use="math", weight=2),
        RewardConfig(use="exact"),
    ]
    episode = await judged(configs, a_prompt("A FOX", rm_type="f1"), "FOX")
    assert episode.rewards == {"shout": 1.0, "f1": 1.0, "exact": 0.0}
    assert episode.reward == 0.5 * 1 + 2 * 1 + 0


async def test_a_type_that_is_there_already_has_a_name_of_its_own():
    episode = await judged([RewardConfig(use="math"), RewardConfig(use="exact")], a_prompt("4", rm_type="exact"), "4")
    assert episode.rewards == {"exact-2": 1.0, "exact": 1.0}


async def test_rows_may_ask_for_the_same_as_the_run_with_its_options():
    episode = await judged(RewardConfig(use="math", last_number=False), a_prompt(rm_type=" math "), "so it is 4")
    assert episode.rewards == {"math": 0.0}


async def test_options_of_what_rows_choose_stand_in_by_type():
    config = RewardConfig(use="exact", by_type={"math": {"last_number": False}, "boxed_f1": {}})
    assert (await judged(config, a_prompt(rm_type="math"), "so it is 4")).reward == 0.0
    assert (await judged(config, a_prompt("4", rm_type="boxed_f1"), r"so it is \boxed{4}")).reward == 1.0


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"rm_type": "maths"}, "math"),
        ({"rm_type": 5}, "expected the name of a reward"),
        ({"rm_type": ""}, "expected the name of a reward"),
        ({"rm_type": "os:system"}, "by_type lists"),
        ({"custom_rm_path": "os.system"}, "by_type lists"),
        ({"rm_type": "remote_rm"}, "rm_url"),
        ({"rm_type": "boxed_dapo"}, "no box holds"),
        ({"rm_type": "gpqa"}, "expected a letter"),
    ],
)
def test_what_rows_ask_for_and_cannot_have_is_told_before_the_first_step(metadata: dict, told: str):
    scorer = build_scorer(RewardConfig(use="math"))
    with pytest.raises(DataError, match=r"cannot judge 2 prompts; the first is prompt p1 \('2\+2\?'\)") as caught:
        scorer.check([a_prompt(4), a_prompt("fox", **metadata), a_prompt("fox", **metadata)])
    assert told in str(caught.value)


def test_all_kinds_of_faults_are_told_at_once():
    prompts = [a_prompt(None), a_prompt(rm_type="maths"), a_prompt("fox", rm_type="gpqa")]
    with pytest.raises(DataError) as caught:
        build_scorer(RewardConfig(use="math")).check(prompts)
    lines = str(caught.value).splitlines()
    assert [line.partition(" cannot")[0] for line in lines] == ["reward 'math'", "the rewards", "reward 'gpqa'"]


async def test_a_prompt_that_was_never_checked_fails_its_episode_alone():
    episode = await judged(RewardConfig(use="math"), a_prompt(rm_type="maths"), "4")
    assert (episode.status, episode.reward) == ("failed", None) and "maths" in (episode.error or "")


@pytest.mark.parametrize(
    ("by_type", "told"),
    [
        ({"math": {"last_numbr": False}}, r"reward\.by_type\.math.*last_number"),
        ({"maths": {}}, "math"),
        ({"code": {"timeout_s": -1}}, r"reward\.by_type\.code: .*timeout_s"),
        ({"remote_rm": {}}, "rm_url"),
    ],
)
def test_mistakes_in_by_type_are_told_without_any_row(by_type: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        build_scorer(RewardConfig(use="exact", by_type=by_type))
