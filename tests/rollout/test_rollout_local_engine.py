"""The rollout with the embedded engine, a real model, and real rewards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from whet.config.rollout import RewardConfig, RolloutConfig
from whet.engines.local.engine import LocalEngine
from whet.envs.single import SingleTurn
from whet.errors import EngineError
from whet.rewards.registry import build_scorer
from whet.rewards.score import NamedReward, RewardScorer
from whet.rollout.evaluation import evaluate_prompts
from whet.rollout.protocols import Observation, Turn
from whet.rollout.sampling import RolloutSource
from whet.types import Completion, Episode, Sampling, Unit

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model(tiny_qwen: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()


@pytest.fixture
def make_source(model, tokenizer, make_prompt, listed):
    """Makes a source over four sums, sampled with a tiny model and judged by `scorer`."""

    def make(scorer=None, env=SingleTurn, max_concurrent=8, **settings) -> RolloutSource:
        prompts = listed([make_prompt(f"{i}+{i}=", label=2 * i, id=f"p{i}") for i in range(4)])
        engine = LocalEngine(
            model, tokenizer, stop_token_ids=(tokenizer.eos_token_id,), max_concurrent=max_concurrent, timeout_s=60
        )
        config = RolloutConfig(**{"group_size": 4, "max_tokens": MAX_TOKENS, **settings})
        scorer = scorer or build_scorer(RewardConfig(use="random"))
        return RolloutSource(prompts, engine, env, scorer, config, tokenizer=tokenizer, seed=1, timeout_s=60)

    return make


def same(units: list[Unit], others: list[Unit]) -> None:
    """Same tokens, rewards and metadata; logprobs up to the rounding of another batch."""
    assert [unit.id for unit in units] == [unit.id for unit in others]
    for unit, other in zip(units, others, strict=True):
        assert [s.tokens for s in unit.samples] == [s.tokens for s in other.samples]
        assert [s.reward for s in unit.samples] == [s.reward for s in other.samples]
        for sample, twin in zip(unit.samples, other.samples, strict=True):
            assert sample.sampler_logprobs == pytest.approx(twin.sampler_logprobs, abs=1e-5)


async def test_sampler_logprobs_are_those_of_the_models_own_forward(make_source, model):
    units = await make_source(temperature=0.7).take(2)
    for sample in (sample for unit in units for sample in unit.samples):
        with torch.no_grad():
            logits = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].double() / 0.7
        tokens = torch.tensor(sample.tokens[1:])
        expected = torch.log_softmax(logits[:-1], -1).gather(1, tokens[:, None])[:, 0]
        mask = torch.tensor(sample.loss_mask[1:])
        assert mask.sum() > 0
        sampled = torch.tensor(sample.sampler_logprobs[1:], dtype=torch.float64)
        torch.testing.assert_close(sampled[mask], expected[mask], atol=1e-4, rtol=0)
        assert (sampled[~mask] == 0).all()


async def test_a_resumed_source_samples_what_would_have_come(make_source):
    source = make_source()
    first = await source.take(3)
    state = source.state_dict()
    expected = await source.take(3)
    resumed = make_source()
    resumed.load_state_dict(state)
    same(await resumed.take(3), expected)
    same(await make_source().take(3), first)
    assert first[0].samples[0].tokens != expected[0].samples[0].tokens


async def test_what_is_sampled_does_not_depend_on_how_many_decode_at_a_time(make_source):
    same(await make_source(max_concurrent=3).take(2), await make_source(max_concurrent=16).take(2))


def raises(episode: Episode) -> float:
    raise ValueError("cannot judge this one")


async def sleeps(episode: Episode) -> float:
    await asyncio.sleep(60)
    return 1.0


FAULTS = {
    "raises": raises,
    "not a number": lambda episode: float("nan"),
    "none": lambda episode: None,
    "sleeps": sleeps,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_the_reward_costs_one_member_and_nothing_else(fault, make_source):
    async def reward(episode: Episode):
        if (episode.group, episode.index) != ("g1", 2):
            return {"score": 1.0, "length": len(episode.response)}
        value = FAULTS[fault](episode)
        return await value if asyncio.iscoroutine(value) else value

    source = make_source(RewardScorer([NamedReward("mine", reward, timeout_s=0.5)]))
    units = await source.take(2)
    assert [[sample.metadata["index"] for sample in unit.samples] for unit in units] == [[0, 1, 2, 3], [0, 1, 3]]
    assert {sample.reward for unit in units for sample in unit.samples} == {1.0}
    assert source.stats["rollout/num_failed"] == 1
    assert source.stats["rollout/reward/mine"] == 1.0
    failed = source.rollout.groups[1].episodes[2]
    assert failed.status == "failed" and "reward 'mine'" in failed.error
    # The members that are left are what they would have been.
    whole = await make_source(RewardScorer([NamedReward("mine", lambda e: 1.0)])).take(2)
    assert [s.tokens for s in units[1].samples] == [whole[1].samples[index].tokens for index in (0, 1, 3)]


async def test_aborting_the_engine_leaves_what_had_ended(make_source):
    async def abort_after_a_while(source: RolloutSource) -> None:
        while source._engine.health()["active"] < 8:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        await source._engine.abort()

    source = make_source(max_tokens=2000)
    task = asyncio.create_task(abort_after_a_while(source))
    try:
        units = await source.take(2)
    except EngineError as error:
        assert "aborted all 8" in str(error)
        units = []
    await task
    episodes = source.rollout.episodes
    assert {episode.status for episode in episodes} <= {"aborted", "completed"}
    assert sum(episode.status == "aborted" for episode in episodes) == 8 - sum(len(unit.samples) for unit in units)
    assert any(episode.status == "aborted" and episode.num_sampled > 0 for episode in episodes)


async def test_a_second_turn_goes_on_from_the_tokens_of_the_first(make_source, model, tokenizer):
    class Again(SingleTurn):
        turns = 0

        async def step(self, completion: Completion) -> Turn:
            self.turns += 1
            return Turn(self.turns == 2, Observation(tokenizer.encode("again", add_special_tokens=False)))

    # A token of its own ends each turn, so that turns are short.
    source = make_source(env=Again, max_tokens=400, stop_token_ids=[ord("a"), ord("e"), ord("5")], group_size=8)
    units = await source.take(1)
    done = [e for e in source.rollout.episodes if e.status == "completed"]
    assert done, "with three stop tokens of 260 some episode ends by itself"
    sample = next(s for s in units[0].samples if s.metadata["index"] == done[0].index)
    injected = [position for position, mask in enumerate(sample.loss_mask) if not mask]
    assert bytes(sample.tokens[position] for position in injected) == b"0+0=again"
    with torch.no_grad():
        logits = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].double()
    expected = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(sample.tokens[1:])[:, None])[:, 0]
    for position, mask in enumerate(sample.loss_mask):
        if mask:
            assert sample.sampler_logprobs[position] == pytest.approx(float(expected[position - 1]), abs=1e-4)


async def test_an_evaluation_is_the_same_each_time_and_greedy_samples_agree(make_source, make_prompt, tokenizer):
    source = make_source()
    prompts = [make_prompt(f"{i}+1=", label=i + 1, id=f"e{i}") for i in range(3)]

    played: set[tuple] = set()

    def length(episode: Episode) -> int:
        played.add((episode.prompt.id, *episode.tokens))
        return len(episode.tokens)

    async def run(temperature: float):
        played.clear()
        return await evaluate_prompts(
            prompts,
            source._engine,
            SingleTurn,
            RewardScorer([NamedReward("length", length)]),
            Sampling(max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(tokenizer.eos_token_id,)),
            num_samples=4,
            seed=9,
            tokenizer=tokenizer,
            timeout_s=60,
        )

    first, second = await run(1.0), await run(1.0)
    assert first.metrics == second.metrics
    assert [e.tokens for e in first.transcripts] == [e.tokens for e in second.transcripts]
    assert len(played) == 12
    await run(0.0)
    assert len(played) == 3
    assert set(first.metrics) == {
        *("reward", "reward_std", "reward/length", "reward_std/length", "pass@1", "pass@2", "pass@4", "mean@4"),
        *(f"response_length_{name}" for name in ("mean", "median", "max", "min")),
        *("truncated_ratio", "num_failed"),
    }


async def test_the_math_reward_judges_what_the_engine_says(make_source):
    source = make_source(build_scorer([RewardConfig(use="math"), RewardConfig(use="random", weight=0.5)]))
    units = await source.take(4)
    for episode in source.rollout.episodes:
        assert set(episode.rewards) == {"math", "random"}
        assert episode.reward == episode.rewards["math"] + 0.5 * episode.rewards["random"]
    assert sum(len(unit.samples) for unit in units) == 16
    assert source.stats["perf/generation_tokens_per_s"] > 0
    assert source.stats["rollout/response_length_max"] <= MAX_TOKENS


async def test_what_the_engine_keeps_goes_when_the_step_has_been_sampled(make_source):
    source = make_source()
    await source.take(2)
    assert source._engine._prompts.kept.num_bytes == 0
