"""Rewards are found by name or dotted path, with their options checked before anything else is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError
from whet.rewards.registry import build_scorer, named_reward
from whet.types import Episode, Prompt

MODULE = """
def shout(episode, *, factor: float = 1.0):
    return factor * episode.response.isupper()

async def async_shout(episode):
    return float(episode.response.isupper())

class Keyword:
    def __init__(self, *, word: str):
        self.word = word
    async def __call__(self, episode):
        return {"score": float(self.word in episode.response), "length": len(episode.response)}

def make(*, value: float):
    return lambda episode: value

def two(episode, other):
    return 0.0

class Positional:
    def __init__(self, word):
        self.word = word
    def __call__(self, episode):
        return 1.0

class Silent:
    pass

number = 5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_rewards_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


async def score(config: RewardConfig | list[RewardConfig], response: str, label: object = "YES") -> Episode:
    episode = Episode(Prompt("p", [1], "say yes", label=label), "g0", 0, response=response, status="completed")
    await build_scorer(config).score(episode)
    return episode


async def test_built_in_rewards_are_found_by_name():
    assert (await score(RewardConfig(use="math"), r"\boxed{1/2}", 0.5)).reward == 1.0
    assert (await score(RewardConfig(use="exact"), " YES\n")).reward == 1.0
    assert (await score(RewardConfig(use="exact"), "NO")).reward == 0.0
    assert (await score(RewardConfig(use="random"), "")).reward in (0.0, 1.0)


async def test_the_random_reward_is_the_same_for_the_same_episode_only():
    prompt = Prompt("p", [1], "")
    coin = named_reward(RewardConfig(use="random")).reward
    tosses = [coin(Episode(prompt, "g0", index)) for index in range(200)]
    assert tosses == [coin(Episode(prompt, "g0", index)) for index in range(200)]
    assert 60 < sum(tosses) < 140
    other = named_reward(RewardConfig(use="random", seed=1)).reward
    assert tosses != [other(Episode(prompt, "g0", index)) for index in range(200)]


async def test_an_exact_reward_without_a_label_fails_the_episode():
    assert "label is None" in (await score(RewardConfig(use="exact"), "YES", None)).error


async def test_functions_classes_and_factories_of_users_are_found_by_path(mine: str):
    assert (await score(RewardConfig(use=f"{mine}:shout", factor=3), "YES")).reward == 3.0
    assert (await score(RewardConfig(use=f"{mine}.async_shout"), "YES")).reward == 1.0
    assert (await score(RewardConfig(use=f"{mine}:make", value=0.25), "YES")).reward == 0.25
    keyword = await score(RewardConfig(use=f"{mine}:Keyword", word="E", weight=2), "YES")
    assert keyword.reward == 2.0
    assert keyword.rewards == {"Keyword": 1.0, "Keyword/score": 1.0, "Keyword/length": 3.0}


async def test_several_rewards_have_names_of_their_own(mine: str):
    configs = [
        RewardConfig(use=f"{mine}:shout"),
        RewardConfig(use=f"{mine}:shout", factor=5, weight=0.5),
        RewardConfig(use="exact"),
    ]
    episode = await score(configs, "YES")
    assert episode.rewards == {"shout": 1.0, "shout-2": 5.0, "exact": 1.0}
    assert episode.reward == 1.0 + 0.5 * 5.0 + 1.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use": "maths"}, "math"),
        ({"use": "math", "last_numbr": False}, "last_number"),
        ({"use": "math", "last_number": "perhaps"}, "last_number"),
        ({"use": "math", "answer_timeout_s": 0}, "answer_timeout_s"),
        ({"use": "random", "sed": 1}, "seed"),
        ({"use": "{mine}:nothing"}, "nothing"),
        ({"use": "{mine}:two"}, "needs the positional parameters episode, other"),
        ({"use": "{mine}:Positional"}, "make the others keyword-only"),
        ({"use": "{mine}:Silent"}, "makes a Silent"),
        ({"use": "{mine}:number"}, "int"),
        ({"use": "{mine}:Keyword"}, "word"),
        ({"use": "nowhere.at_all:reward"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_it(mine: str, settings: dict, told: str):
    settings = settings | {"use": settings["use"].replace("{mine}", mine)}
    with pytest.raises(ConfigError, match="reward") as caught:
        build_scorer(RewardConfig(**settings))
    assert told in str(caught.value)


def test_an_error_in_a_list_names_its_place():
    with pytest.raises(ConfigError, match=r"reward\[1\]"):
        build_scorer([RewardConfig(use="math"), RewardConfig(use="mth")])


@pytest.mark.parametrize("configs", [None, []])
def test_reinforcement_learning_without_a_reward_is_an_error(configs: list | None):
    with pytest.raises(ConfigError, match="reward is not set"):
        build_scorer(configs)
