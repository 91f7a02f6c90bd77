"""What is logged of a rollout: rewards, lengths, truncation, repetition, groups without signal, speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from whet.engines.protocol import Engine
from whet.rollout.group import Group, Rollout
from whet.types import Episode

NGRAM = 4


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Metrics `rollout/…` and `perf/…` of played and scored groups.

    Rewards, lengths and shares are over the episodes that have a reward; standard deviations are
    those of the population. `rollout/reward` is the weighted sum, `rollout/reward/<name>` what one
    function said. Zero-std groups have two or more scored members, all with the same reward; lost
    groups have no scored member.
    """
    episodes = rollout.episodes
    scored = [episode for episode in episodes if episode.reward is not None]
    metrics: dict[str, float] = {}
    if scored:
        metrics |= reward_metrics("rollout/", scored) | response_metrics("rollout/", scored)
        metrics |= env_metrics("rollout/", scored)
        metrics["rollout/repetition_fraction"] = statistics.fmean(map(repetition, scored))
    metrics["rollout/num_episodes"] = len(scored)
    metrics["rollout/num_failed"] = sum(episode.status == "failed" for episode in episodes)
    metrics["rollout/num_aborted"] = sum(episode.status == "aborted" for episode in episodes)
    zero_std = sum(map(has_zero_std, rollout.groups))
    metrics["rollout/num_zero_std_groups"] = zero_std
    metrics["rollout/zero_std_share"] = zero_std / max(len(rollout.groups), 1)
    metrics["rollout/num_lost_groups"] = sum(not scored_rewards(group) for group in rollout.groups)
    return metrics | speed_metrics(rollout)


def reward_metrics(prefix: str, scored: Sequence[Episode]) -> dict[str, float]:
    """Mean and standard deviation of the reward, and of each function's part in it."""
    columns = {"": [episode.reward or 0.0 for episode in scored]}
    for name in dict.fromkeys(name for episode in scored for name in episode.rewards):
        columns[f"/{name}"] = [episode.rewards[name] for episode in scored if name in episode.rewards]
    metrics = {}
    for name, values in columns.items():
        metrics[f"{prefix}reward{name}"] = statistics.fmean(values)
        metrics[f"{prefix}reward_std{name}"] = statistics.pstdev(values)
    return metrics


def response_metrics(prefix: str, scored: Sequence[Episode]) -> dict[str, float]:
    """Length in tokens after the prompt (mean, median, max, min), and the share that was cut off."""
    lengths = [response_length(episode) for episode in scored]
    return {
        f"{prefix}response_length_mean": statistics.fmean(lengths),
        f"{prefix}response_length_median": statistics.median(lengths),
        f"{prefix}response_length_max": max(lengths),
        f"{prefix}response_length_min": min(lengths),
        f"{prefix}truncated_ratio": sum(episode.status == "truncated" for episode in scored) / len(scored),
    }


def env_metrics(prefix: str, scored: Sequence[Episode]) -> dict[str, float]:
    """Means of what environments counted, each over the episodes that have it."""
    names = dict.fromkeys(name for episode in scored for name in episode.info)
    return {
        f"{prefix}env/{name}": statistics.fmean(episode.info[name] for episode in scored if name in episode.info)
        for name in names
    }


def speed_metrics(rollout: Rollout) -> dict[str, float]:
    """Seconds, and sampled tokens per second, of the whole rollout and of its longest episode."""
    sampled = [episode.num_sampled for episode in rollout.episodes]
    # A clock may not have moved for something this short.
    seconds = max(rollout.generation_s, 1e-9)
    return {
        "perf/generation_s": rollout.generation_s,
        "perf/generation_tokens_per_s": sum(sampled) / seconds,
        "perf/longest_sample_tokens_per_s": max(sampled, default=0) / seconds,
        "perf/rollout_s": rollout.total_s,
    }


def age_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How old the groups of a step are, in optimizer steps of their oldest token, and the share of sampled tokens that
    an earlier policy than `version` sampled."""
    ages = [version - group.oldest_version for group in groups if group.oldest_version is not None]
    spans = [span for group in groups for episode in group.episodes for span in episode.versions]
    if not ages:
        return {}
    old = sum(span.end - span.start for span in spans if span.version < version)
    return {
        "rollout/staleness": statistics.fmean(ages),
        "rollout/staleness_max": max(ages),
        "rollout/offpolicy_share": old / max(1, sum(span.end - span.start for span in spans)),
    }


class PrefixHits:
    """How much of the prompts an engine did not have to compute, as its `stats` tell, if it has any."""

    def __init__(self, engine: Engine) -> None:
        self._stats: Callable[[], Mapping[str, float]] = getattr(engine, "stats", dict)
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        told = self._stats()
        self._before = [told.get(name, 0) for name in ("prefill_tokens", "prefill_tokens_saved")]

    def metrics(self) -> dict[str, float]:
        """`rollout/prefix_hit_rate` since the last restart, where a prompt was looked at."""
        before, told = self._before, self._stats()
        self.restart()
        now = [told.get(name, 0) for name in ("prefill_tokens", "prefill_tokens_saved")]
        computed, saved = (later - earlier for later, earlier in zip(now, before, strict=True))
        return {"rollout/prefix_hit_rate": saved / (computed + saved)} if computed + saved else {}


def response_length(episode: Episode) -> int:
    return len(episode.tokens) - len(episode.prompt.tokens)


def scored_rewards(group: Group) -> list[float]:
    return [episode.reward for episode in group.episodes if episode.reward is not None]


def has_zero_std(group: Group) -> bool:
    rewards = scored_rewards(group)
    return len(rewards) > 1 and len(set(rewards)) == 1


def repetition(episode: Episode) -> float:
    """Share of a response's runs of four tokens that have occurred in it before: 0 for none, near 1 for a loop."""
    tokens = np.asarray(episode.tokens[len(episode.prompt.tokens) :], dtype=np.int64)
    if len(tokens) < NGRAM:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return 1.0 - len(np.unique(ngrams, axis=0)) / len(ngrams)
