"""The rollout source gives out scored groups, the same ones after a resume, whatever fails on the way."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from whet.config.rollout import RolloutConfig
from whet.envs.single import SingleTurn
from whet.errors import DataError, EngineError, RewardError
from whet.rollout.protocols import Observation
from whet.rollout.sampling import RolloutSource, sampling_of
from whet.types import Completion, Prompt, Sampling, VersionSpan


class Scorer:
    """Gives what `reward(episode)` says; an exception or None fails the episode."""

    def __init__(self, reward) -> None:
        self.reward = reward
        self.uniform_reports = 0
        self.groups = []

    async def score(self, episode) -> None:
        if episode.status in ("aborted", "failed"):
            return
        value = self.reward(episode)
        if value is None:
            episode.status, episode.error = "failed", "no reward"
        else:
            episode.reward, episode.rewards = float(value), {"mine": float(value)}

    async def score_group(self, episodes) -> None:
        self.groups.append([(episode.group, episode.index, episode.reward) for episode in episodes])

    def report_failures(self, episodes) -> None:
        played = [episode for episode in episodes if episode.status != "aborted"]
        if played and all(episode.status == "failed" for episode in played):
            raise RewardError(f"all failed: {played[0].error}")

    def report_uniform(self, episodes) -> None:
        self.uniform_reports += 1


def spell(tokens: list[int], sampling: Sampling) -> str:
    """A text of a few letters that depends on the seed alone."""
    return "".join(chr(97 + int(digit)) for digit in str(sampling.seed)[:6])


@pytest.fixture
def make_source(tokenizer, make_prompt, listed, scripted):
    """Makes a source over `num_prompts` prompts p0, p1, …; the keywords are settings of the rollout."""

    def make(answer=spell, reward=lambda episode: episode.index, num_prompts=5, env=SingleTurn, seed=0, **settings):
        prompts = listed([make_prompt(f"{i}?", label=i, id=f"p{i}") for i in range(num_prompts)])
        engine = scripted(answer)
        config = RolloutConfig(**{"group_size": 3, "max_tokens": 16, **settings})
        source = RolloutSource(
            prompts, engine, env, Scorer(reward), config, tokenizer=tokenizer, seed=seed, timeout_s=5
        )
        return source, engine

    return make


async def test_each_prompt_gives_a_group_of_scored_samples(make_source, tokenizer):
    source, engine = make_source()
    units = await source.take(2)
    assert [unit.id for unit in units] == ["g0", "g1"]
    assert [[sample.reward for sample in unit.samples] for unit in units] == [[0.0, 1.0, 2.0]] * 2
    first = units[0].samples[0]
    assert list(first.tokens[:2]) == list(b"0?")
    assert list(first.loss_mask) == [False] * 2 + [True] * 7
    assert first.sampler_logprobs[:2] == (0.0, 0.0) and all(value < 0 for value in first.sampler_logprobs[2:])
    assert first.tokens[-1] == tokenizer.eos_token_id
    assert {key for _, _, key in engine.calls} == {"g0", "g1"}


async def test_a_group_is_scored_as_a_whole_once_every_member_has_been_scored(make_source):
    source, _ = make_source(group_size=2)
    await source.take(2)
    assert sorted(source._scorer.groups) == [[("g0", 0, 0.0), ("g0", 1, 1.0)], [("g1", 0, 0.0), ("g1", 1, 1.0)]]


async def test_all_episodes_are_submitted_at_once(make_source):
    source, engine = make_source()
    await source.take(4)
    assert engine.most_active == 12


async def test_no_two_episodes_sample_alike(make_source):
    source, _ = make_source()
    units = await source.take(5) + await source.take(5)
    assert len({sample.tokens[2:] for unit in units for sample in unit.samples}) == 30


async def test_the_same_seed_samples_the_same_and_another_does_not(make_source):
    units = await make_source(seed=4)[0].take(3)
    assert units == await make_source(seed=4)[0].take(3)
    assert units != await make_source(seed=5)[0].take(3)


async def test_a_resumed_source_goes_on_as_if_nothing_had_happened(make_source):
    source, _ = make_source()
    await source.take(4)
    state = source.state_dict()
    expected = [await source.take(3), await source.take(2)]
    resumed, _ = make_source()
    resumed.load_state_dict(state)
    assert [await resumed.take(3), await resumed.take(2)] == expected
    assert [unit.id for unit in expected[0]] == ["g4", "g5", "g6"]


async def test_requests_larger_than_the_data_set_wrap_with_new_groups(make_source):
    source, _ = make_source(num_prompts=2)
    units = await source.take(5)
    assert [unit.id for unit in units] == ["g0", "g1", "g2", "g3", "g4"]
    assert [bytes(unit.samples[0].tokens[:2]) for unit in units] == [b"0?", b"1?", b"0?", b"1?", b"0?"]
    # The same prompt again is sampled anew.
    assert units[0].samples[0].tokens != units[2].samples[0].tokens


async def test_a_failed_member_is_left_out_and_the_others_keep_their_index(make_source):
    source, _ = make_source(reward=lambda e: None if (e.group, e.index) == ("g1", 1) else e.index)
    units = await source.take(2)
    assert [[sample.metadata["index"] for sample in unit.samples] for unit in units] == [[0, 1, 2], [0, 2]]
    assert source.stats["rollout/num_failed"] == 1
    assert source.stats["rollout/num_episodes"] == 5


async def test_an_aborted_member_is_left_out(make_source):
    source, _ = make_source(
        answer=lambda tokens, sampling: Completion([97], [-0.5], "abort") if tokens == [*b"0?"] else "x"
    )
    units = await source.take(2)
    assert [unit.id for unit in units] == ["g1"]
    assert source.stats["rollout/num_aborted"] == 3
    assert source.stats["rollout/num_lost_groups"] == 1


async def test_a_group_without_a_member_is_dropped_and_counted(make_source):
    source, _ = make_source(reward=lambda e: None if e.group == "g0" else 1.0)
    assert [unit.id for unit in await source.take(3)] == ["g1", "g2"]
    assert source.stats["rollout/num_lost_groups"] == 1


async def test_a_step_without_any_reward_stops_with_the_first_cause(make_source):
    source, _ = make_source(reward=lambda e: None)
    with pytest.raises(RewardError, match="no reward"):
        await source.take(2)


async def test_an_engine_that_aborts_everything_is_an_error(make_source):
    source, _ = make_source(answer=lambda *_: Completion([], [], "abort"))
    with pytest.raises(EngineError, match="aborted all 6 completions"):
        await source.take(2)


async def test_an_engine_that_fails_stops_the_step_and_cancels_the_rest(make_source):
    cancelled = []

    class Failing:
        async def generate(self, tokens, sampling, *, prefix_key=None):
            if prefix_key == "g1":
                raise EngineError("the engine is gone")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(prefix_key)
                raise

    source, _ = make_source()
    source._player._engine = Failing()
    start = time.monotonic()
    with pytest.raises(EngineError, match="the engine is gone"):
        await source.take(2)
    assert cancelled == ["g0"] * 3
    assert time.monotonic() - start < 2.0


async def test_an_environment_that_cannot_be_made_fails_its_episodes(make_source):
    def make_env(prompt: Prompt, tokenizer):
        if prompt.id == "p0":
            raise RuntimeError("no browser")
        return SingleTurn(prompt, tokenizer)

    source, _ = make_source(env=make_env)
    assert [unit.id for unit in await source.take(2)] == ["g1"]
    failed = [episode for episode in source.rollout.episodes if episode.status == "failed"]
    assert {episode.error for episode in failed} == {"making the environment raised RuntimeError: no browser"}


async def test_every_episode_has_an_environment_of_its_own(make_source):
    made = []

    class Counted(SingleTurn):
        async def reset(self) -> Observation:
            made.append(self)
            return Observation()

    source, _ = make_source(env=Counted)
    await source.take(2)
    assert len({id(env) for env in made}) == 6


async def test_no_prompt_is_an_error(make_source):
    source, _ = make_source(num_prompts=0)
    with pytest.raises(DataError, match=r"data\.train"):
        await source.take(1)


async def test_new_weights_are_handed_to_the_engine(make_source):
    source, engine = make_source()
    await source.publish(7)
    assert engine.snapshots == [7]


async def test_a_dead_group_is_counted_among_the_zero_std_ones_and_reports_are_asked_for(make_source):
    source, _ = make_source(reward=lambda e: 1.0 if e.group == "g0" else e.index)
    await source.take(2)
    assert source.stats["rollout/num_zero_std_groups"] == 1
    assert source._scorer.uniform_reports == 1


def test_sampling_follows_the_configuration():
    config = RolloutConfig(max_tokens=9, temperature=0.5, top_p=0.9, top_k=4, stop=["\n"], stop_token_ids=[7])
    assert sampling_of(config, stop_token_ids=[3, 7]) == Sampling(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=4, stop=("\n",), stop_token_ids=(7, 3)
    )


async def test_version_spans_count_from_the_start_of_the_episode(make_source):
    completion = Completion([97, 98], [-1, -1], "stop", (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)))
    source, _ = make_source(answer=lambda *_: completion)
    await source.take(1)
    assert source.rollout.episodes[0].versions == [VersionSpan(3, 2, 3), VersionSpan(4, 3, 4)]


async def test_a_step_that_goes_well_says_nothing(make_source, caplog):
    with caplog.at_level(logging.WARNING, "whet"):
        await make_source()[0].take(3)
    assert caplog.text == ""
