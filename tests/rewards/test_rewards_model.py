"""The reward `model` scores what arrives together in one go, groups with the same bits in any company."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reward_models import make_reward_model
from whet.config.backend import BackendConfig
from whet.config.rollout import RewardConfig
from whet.errors import ConfigError, ModelError
from whet.rewards.model import ModelReward
from whet.rewards.registry import build_scorer
from whet.scorer import RewardModel
from whet.types import Episode, Prompt


@pytest.fixture(scope="module")
def folder(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tiny_qwen, tmp_path_factory.mktemp("reward") / "model")


def episodes(group: str, *responses: str, prompt: str | list = "2+2=") -> list[Episode]:
    made = [Episode(Prompt(group, (1,), prompt), group, i) for i in range(len(responses))]
    for episode, response in zip(made, responses, strict=True):
        episode.response, episode.status = response, "completed"
    return made


async def scores_of(reward: ModelReward, given: list[Episode]) -> list[float]:
    return await asyncio.gather(*(reward(episode) for episode in given))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many groups each pass through a reward model has."""
    seen: list[int] = []
    original = RewardModel.score_groups

    def counted(self, groups):
        seen.append(len(groups))
        return original(self, groups)

    monkeypatch.setattr(RewardModel, "score_groups", counted)
    return seen


async def test_calls_that_arrive_together_are_scored_together(folder: Path, passes: list[int]):
    reward = ModelReward(path=str(folder))
    given = [*episodes("g0", "4", "5", "6"), *episodes("g1", "7", prompt=[{"role": "user", "content": "3+4?"}])]
    scores = await scores_of(reward, given)
    assert passes == [2]  # one pass, two groups
    model = RewardModel.load(folder)
    assert scores == pytest.approx(model.score([(e.prompt.content, e.response) for e in given]), abs=1e-5)


async def test_a_group_has_the_same_bits_in_any_company(folder: Path):
    reward = ModelReward(path=str(folder))
    group = episodes("g0", "4", "five", "6" * 20)
    alone = await scores_of(reward, group)
    crowd = [episode for i in range(1, 9) for episode in episodes(f"g{i}", "x" * i, "y" * 3 * i)]
    assert (await scores_of(reward, [*crowd[:5], *group, *crowd[5:]]))[5:8] == alone


async def test_one_that_cannot_be_scored_does_not_spoil_the_others(folder: Path):
    scorer = build_scorer(RewardConfig(use="model", path=str(folder), weight=2.0))
    scorer.load(BackendConfig(device="cpu"))
    good, bad = episodes("g0", "4", "5" * 5000)
    await asyncio.gather(scorer.score(good), scorer.score(bad))
    assert bad.status == "failed" and "positions" in str(bad.error) and bad.reward is None
    assert good.reward == 2.0 * good.rewards["model"]


async def test_it_is_loaded_once(folder: Path, monkeypatch):
    loads = []
    original = RewardModel.load
    monkeypatch.setattr(RewardModel, "load", lambda *a, **k: loads.append(k["backend"]) or original(*a, **k))
    reward = ModelReward(path=str(folder))
    assert loads == []  # checked, but not loaded
    for _ in range(2):
        reward.load(BackendConfig(device="cpu", max_tokens_per_device=100))
    await scores_of(reward, episodes("g0", "4"))
    assert [backend.max_tokens_per_device for backend in loads] == [100]


async def test_a_failure_reaches_everyone_who_waits(folder: Path, monkeypatch):
    reward = ModelReward(path=str(folder))
    reward.load(BackendConfig())
    monkeypatch.setattr(RewardModel, "score_groups", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    outcomes = await asyncio.gather(*(reward(e) for e in episodes("g0", "4", "5")), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no memory", "no memory"]


def test_a_model_that_is_none_is_refused_before_anything_is_loaded(tiny_qwen: Path, folder: Path):
    with pytest.raises(ModelError, match=r"reward\.path is .*has no score head"):
        build_scorer(RewardConfig(use="model", path=str(tiny_qwen)))
    with pytest.raises(ModelError, match=r"reward\.path is '/nowhere"):
        build_scorer(RewardConfig(use="model", path="/nowhere/model"))
    with pytest.raises(ConfigError, match="path is missing"):
        build_scorer(RewardConfig(use="model"))
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        build_scorer(RewardConfig(use="model", path=str(folder), prompt_template="Q:"))
