"""Evaluating a policy by what it samples: mean reward, pass@k, truncation, and a few transcripts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whet.config.evaluation import EvalConfig, EvalSetConfig
from whet.config.rollout import RolloutConfig
from whet.engines.protocol import Engine
from whet.errors import DataError, EngineError
from whet.rollout.group import Group, GroupPlayer
from whet.rollout.protocols import EnvFactory, Scorer
from whet.rollout.sampling import sampling_of
from whet.rollout.statistics import env_metrics, response_metrics, reward_metrics, scored_rewards
from whet.types import Episode, Prompt, Sampling

# The least reward of an episode that counts as solved.
SOLVED_AT = 1.0
NUM_TRANSCRIPTS = 3


@dataclass(frozen=True, slots=True)
class PromptEvaluation:
    """Metrics by name, without a prefix, and a few episodes to look at."""

    metrics: dict[str, float]
    transcripts: tuple[Episode, ...]


def evaluation_sampling(
    rollout: RolloutConfig, evaluation: EvalConfig | EvalSetConfig, stop_token_ids: Sequence[int] = ()
) -> Sampling:
    """How an evaluation samples: as the rollout does, but for what `eval`, or the set, says itself."""
    overrides = {
        name: value
        for name in ("max_tokens", "temperature", "top_p", "top_k")
        if (value := getattr(evaluation, name)) is not None
    }
    return replace(sampling_of(rollout, stop_token_ids), **overrides)


async def evaluate_prompts(
    prompts: Sequence[Prompt],
    engine: Engine,
    env: EnvFactory,
    scorer: Scorer,
    sampling: Sampling,
    *,
    num_samples: int,
    seed: int,
    tokenizer: Any,
    name: str | None = None,
    timeout_s: float = 600.0,
) -> PromptEvaluation:
    """Sample `num_samples` completions of every prompt, score them, and average.

    Metrics: `reward` and `reward_std`, and the same per reward function; `pass@k` for each power of
    two k up to `num_samples`, where an episode counts as solved from a reward of 1 on; `mean@n`, the
    mean over prompts of their mean reward; lengths and truncated ratio; how many failed. The same
    seed and `name` sample the same completions from the same weights; the name keeps sets apart that are evaluated
    together.
    Raises DataError without prompts, EngineError if the engine fails or aborts everything, RewardError
    if no episode got a reward.
    """
    if not prompts:
        raise DataError("there is no prompt to evaluate on; look at data.eval and data.max_prompt_length")
    player = GroupPlayer(engine, env, scorer, sampling, tokenizer=tokenizer, seed=seed, timeout_s=timeout_s)
    prefix = "e" if name is None else f"{name}/e"
    numbered = [(f"{prefix}{position}", prompt) for position, prompt in enumerate(prompts)]
    rollout = await player.play(numbered, num_samples)
    scorer.report_failures(rollout.episodes)
    scored = [episode for episode in rollout.episodes if episode.reward is not None]
    if not scored:
        raise EngineError(f"the engine aborted all {len(rollout.episodes)} completions of an evaluation")
    metrics = reward_metrics("", scored) | pass_at_powers(rollout.groups, num_samples)
    means = [statistics.fmean(rewards) for group in rollout.groups if (rewards := scored_rewards(group))]
    metrics[f"mean@{num_samples}"] = statistics.fmean(means)
    metrics |= response_metrics("", scored) | env_metrics("", scored)
    metrics["num_failed"] = sum(episode.status == "failed" for episode in rollout.episodes)
    transcripts = [group.episodes[0] for group in rollout.groups[:NUM_TRANSCRIPTS]]
    return PromptEvaluation(metrics, tuple(transcripts))


def pass_at_powers(groups: Sequence[Group], num_samples: int) -> dict[str, float]:
    """`pass@k` for k = 1, 2, 4, … up to `num_samples`, averaged over the groups with at least k scored members."""
    metrics = {}
    for k in (1 << power for power in range(num_samples.bit_length())):
        estimates = [
            pass_at_k(len(rewards), sum(reward >= SOLVED_AT for reward in rewards), k)
            for group in groups
            if len(rewards := scored_rewards(group)) >= k
        ]
        if estimates:
            metrics[f"pass@{k}"] = statistics.fmean(estimates)
    return metrics


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Chance that k of `num_samples` samples, drawn without replacement, hold a solved one.

    The unbiased estimate of Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)
