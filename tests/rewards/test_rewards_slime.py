"""Rewards written for slime run as they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.config.loader import from_values
from whet.config.rollout import RewardConfig
from whet.config.run import RunConfig
from whet.rewards.registry import build_scorer
from whet.rollout.slime import SlimeArgs, SlimeSample, Status
from whet.types import Completion, Episode, Prompt, VersionSpan

MODULE = """
async def exact(args, sample, **kwargs):
    right = sample.response.strip() == sample.label
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": sample.response}

def short(args, sample, *, bonus: float = 0.5):
    return bonus * (sample.response_length <= args.rollout_max_response_len - args.margin)

async def best(args, samples, **kwargs):
    assert len(samples) == args.n_samples_per_prompt
    return [float(len(sample.response)) for sample in samples]

def keyed(args, sample):
    return {args.reward_key: 0.25, "other": None, "list": [1]}

def missing(args, sample):
    return args.no_such_thing

def writes(args, sample):
    args.seed = 5
    return 1.0

def truncated(args, sample):
    return float(sample.status == sample.Status.TRUNCATED)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_slime_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def a_run(**reward: object) -> RunConfig:
    settings = {"model": "m", "data": {"train": "t.jsonl"}, "rollout": {"max_tokens": 10, "group_size": 2}}
    return from_values({**settings, "reward": reward}, method="grpo", where="a test").config


def an_episode(response: str = "yes", index: int = 0) -> Episode:
    prompt = Prompt("p", [1, 2], [{"role": "user", "content": "?"}], label="yes", metadata={"level": 3})
    episode = Episode(prompt, "g7", index)
    episode.extend(Completion([3, 4, 5], [-0.1, -0.2, -0.3], "stop", (VersionSpan(6, 0, 3),)))
    episode.response, episode.status = response, "completed"
    return episode


async def judged(mine: str, name: str, *episodes: Episode, **options: object) -> Episode:
    run = a_run(use=f"{mine}.{name}", **options)
    scorer = build_scorer(run.reward, run=run)
    for episode in episodes or (an_episode(),):
        await scorer.score(episode)
    await scorer.score_group(episodes)
    return episodes[0] if episodes else episode


async def test_a_function_of_args_and_sample_is_called_with_both(mine: str):
    episode = await judged(mine, "exact")
    assert episode.rewards == {"exact": 1.0, "exact/score": 1.0, "exact/acc": 1.0}


async def test_options_are_parameters_of_the_function_or_attributes_of_args(mine: str):
    assert (await judged(mine, "short", margin=7, bonus=0.25)).reward == 0.25
    assert (await judged(mine, "short", margin=8)).reward == 0.0


async def test_a_function_of_args_and_samples_judges_a_group(mine: str):
    episodes = [an_episode("a"), an_episode("abc", 1)]
    await judged(mine, "best", *episodes)
    assert [episode.reward for episode in episodes] == [1.0, 3.0]


async def test_the_key_picks_the_part_that_counts_and_the_rest_may_be_anything(mine: str):
    episode = await judged(mine, "keyed", key="style", reward_key="style")
    assert episode.rewards == {"keyed": 0.25, "keyed/style": 0.25}
    assert "without 'tone'" in ((await judged(mine, "keyed", key="tone", reward_key="style")).error or "")


async def test_what_args_does_not_have_is_told(mine: str):
    assert "args has no 'no_such_thing'" in ((await judged(mine, "missing")).error or "")


async def test_args_can_only_be_read(mine: str):
    assert "cannot assign to field 'seed'" in ((await judged(mine, "writes")).error or "")


async def test_the_status_is_an_enumeration(mine: str):
    episode = an_episode()
    episode.status = "truncated"
    assert (await judged(mine, "truncated", episode)).reward == 1.0


def test_args_know_slimes_names_and_ours():
    run = a_run(use="math")
    args = SlimeArgs(run, {"rm_url": "http://x"})
    assert (args.rollout_max_response_len, args.n_samples_per_prompt, args.hf_checkpoint) == (10, 2, "m")
    assert (args.rollout.max_tokens, args.seed, args.rm_type, args.rm_url) == (10, 0, "math", "http://x")
    assert args.reward_key is None
    with pytest.raises(AttributeError, match="args has no 'rollout_max_response_length'"):
        _ = args.rollout_max_response_length
    with pytest.raises(AttributeError, match="args has no 'seed'"):
        _ = SlimeArgs().seed


def test_a_sample_shows_an_episode():
    episode = an_episode()
    sample = SlimeSample.of(episode)
    assert (sample.prompt, sample.response, sample.label) == (episode.prompt.content, "yes", "yes")
    assert (sample.tokens, sample.response_length, sample.loss_mask) == ([1, 2, 3, 4, 5], 3, [1, 1, 1])
    assert sample.rollout_log_probs == [-0.1, -0.2, -0.3] and sample.weight_versions == [6]
    assert (sample.group_index, sample.index, sample.status) == ("g7", 0, Status.COMPLETED)
    sample.metadata["level"] = 4
    sample.tokens.append(9)
    assert episode.prompt.metadata == {"level": 3} and len(episode.tokens) == 5


def test_slimes_flags_for_rewards_are_understood():
    values = {"hf_checkpoint": "m", "prompt_data": "t.jsonl", "n_samples_per_prompt": 2}
    remote = from_values(
        {**values, "rm_type": "remote_rm", "rm_url": "http://x", "reward_key": "k"}, method="grpo", where=""
    )
    assert isinstance(remote.config.reward, RewardConfig)
    assert (remote.config.reward.use, remote.config.reward.key) == ("remote_rm", "k")
    assert remote.config.reward.options == {"rm_url": "http://x"}
    group = from_values(
        {**values, "custom_rm_path": "my.rm.f", "group_rm": True}, method="grpo", where=""
    ).config.reward
    assert isinstance(group, RewardConfig) and (group.use, group.group) == ("my.rm.f", True)
