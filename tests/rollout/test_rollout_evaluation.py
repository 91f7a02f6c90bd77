"""Evaluation by sampling: pass@k worked by hand, and the figures it reports."""

from __future__ import annotations

import itertools

import pytest

from whet.config.evaluation import EvalConfig
from whet.config.rollout import RolloutConfig
from whet.envs.single import SingleTurn
from whet.errors import DataError, EngineError
from whet.rollout.evaluation import evaluate_prompts, evaluation_sampling, pass_at_k, pass_at_powers
from whet.rollout.group import Group
from whet.types import Completion, Episode, Prompt, Sampling


class Table:
    """Rewards from a table: one row per prompt, one column per sample; None fails the episode."""

    def __init__(self, *rows: list[float | None]) -> None:
        self.rows = rows

    async def score(self, episode: Episode) -> None:
        if episode.status == "aborted":
            return
        reward = self.rows[episode.prompt.label][episode.index]
        if reward is None:
            episode.status = "failed"
        else:
            episode.reward, episode.rewards = reward, {"table": reward}

    async def score_group(self, episodes) -> None: ...

    def report_failures(self, episodes) -> None:
        self.reported = len(episodes)

    def report_uniform(self, episodes) -> None:
        raise AssertionError("an evaluation is not a training step")


@pytest.fixture
def evaluate(tokenizer, make_prompt, scripted):
    async def run(*rows, answer=lambda *_: "yes", num_samples=4, max_tokens=8):
        prompts = [make_prompt(f"{i}?", label=i, id=f"p{i}") for i in range(len(rows))]
        engine = scripted(answer)
        found = await evaluate_prompts(
            prompts,
            engine,
            SingleTurn,
            Table(*rows),
            Sampling(max_tokens=max_tokens),
            num_samples=num_samples,
            seed=0,
            tokenizer=tokenizer,
            timeout_s=5,
        )
        return found, engine

    return run


async def test_the_figures_of_two_prompts_and_four_samples(evaluate):
    found, engine = await evaluate([1, 0, 0, 0], [1, 1, 0, 0])
    # pass@1: (1/4 + 2/4) / 2. pass@2: 1 - C(3,2)/C(4,2) = .5, 1 - C(2,2)/C(4,2) = 5/6, mean 2/3.
    assert found.metrics["pass@1"] == pytest.approx(0.375)
    assert found.metrics["pass@2"] == pytest.approx(2 / 3)
    assert found.metrics["pass@4"] == 1.0
    assert {name for name in found.metrics if name.startswith("pass@")} == {"pass@1", "pass@2", "pass@4"}
    assert found.metrics["reward"] == found.metrics["mean@4"] == found.metrics["reward/table"] == 0.375
    assert found.metrics["truncated_ratio"] == 0.0
    assert found.metrics["response_length_mean"] == 4.0  # yes and the end
    assert len(engine.calls) == 8


async def test_powers_of_two_up_to_the_number_of_samples(evaluate):
    found, _ = await evaluate([1, 0, 0, 0, 0, 0], num_samples=6)
    assert {name for name in found.metrics if name.startswith("pass@")} == {"pass@1", "pass@2", "pass@4"}
    found, _ = await evaluate([1], num_samples=1)
    assert {name for name in found.metrics if "@" in name} == {"pass@1", "mean@1"}


async def test_a_failed_sample_is_left_out_of_every_mean_and_counted(evaluate):
    found, _ = await evaluate([1, None], [0, 0], num_samples=2)
    # Three rewards 1, 0, 0; means per prompt 1 and 0; only the second prompt has two samples.
    assert found.metrics["reward"] == pytest.approx(1 / 3)
    assert found.metrics["mean@2"] == 0.5
    assert found.metrics["pass@1"] == 0.5
    assert found.metrics["pass@2"] == 0.0
    assert found.metrics["num_failed"] == 1


async def test_cut_off_responses_are_counted(evaluate):
    found, _ = await evaluate([0, 0, 0, 0], answer=lambda *_: "far too long", max_tokens=5)
    assert found.metrics["truncated_ratio"] == 1.0


async def test_transcripts_show_prompt_response_and_reward(evaluate):
    found, _ = await evaluate(*[[1, 0]] * 5, num_samples=2)
    assert [(e.prompt.content, e.response, e.reward) for e in found.transcripts] == [
        ("0?", "yes", 1),
        ("1?", "yes", 1),
        ("2?", "yes", 1),
    ]


async def test_an_evaluation_repeats_its_seeds_and_no_two_samples_share_one(evaluate):
    _, first = await evaluate([0, 0], [0, 0], num_samples=2)
    _, second = await evaluate([0, 0], [0, 0], num_samples=2)
    seeds = [sampling.seed for _, sampling, _ in first.calls]
    assert seeds == [sampling.seed for _, sampling, _ in second.calls]
    assert len(set(seeds)) == 4


async def test_nothing_to_evaluate_is_an_error(evaluate):
    with pytest.raises(DataError, match=r"data\.eval"):
        await evaluate()
    with pytest.raises(EngineError, match="aborted all 2"):
        await evaluate([0, 0], answer=lambda *_: Completion([], [], "abort"), num_samples=2)


@pytest.mark.parametrize(("n", "solved"), [(5, 0), (5, 1), (5, 3), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_solved_sample(n: int, solved: int):
    outcomes = [True] * solved + [False] * (n - solved)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(n, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_an_episode_counts_as_solved_from_a_reward_of_one_on():
    prompt = Prompt("p", [1], "?")
    episodes = tuple(Episode(prompt, "e0", index, reward=reward) for index, reward in enumerate([0.9, 1.0, -1.0, 1.5]))
    assert pass_at_powers([Group("e0", episodes)], 4)["pass@1"] == 0.5


def test_evaluation_samples_as_the_rollout_does_but_for_what_it_sets():
    rollout = RolloutConfig(max_tokens=100, temperature=0.8, top_p=0.9, top_k=5, stop=["."])
    assert evaluation_sampling(rollout, EvalConfig(), [2]) == Sampling(
        max_tokens=100, temperature=0.8, top_p=0.9, top_k=5, stop=(".",), stop_token_ids=(2,)
    )
    own = evaluation_sampling(rollout, EvalConfig(max_tokens=7, temperature=0.0, top_p=1.0))
    assert (own.max_tokens, own.temperature, own.top_p, own.top_k) == (7, 0.0, 1.0, 5)
    assert evaluation_sampling(rollout, EvalConfig(top_k=0)).top_k == 0


async def test_sets_with_names_sample_other_completions(evaluate, tokenizer, make_prompt, scripted):
    _, unnamed = await evaluate([0, 0, 0, 0])
    engine = scripted(lambda *_: "yes")
    prompts = [make_prompt("0?", label=0, id="p0")]
    options = {"num_samples": 4, "seed": 0, "tokenizer": tokenizer, "name": "aime", "timeout_s": 5}
    await evaluate_prompts(prompts, engine, SingleTurn, Table([0, 0, 0, 0]), Sampling(max_tokens=8), **options)
    assert {key for _, _, key in engine.calls} == {"aime/e0"}
    assert not {s.seed for _, s, _ in engine.calls} & {s.seed for _, s, _ in unnamed.calls}
