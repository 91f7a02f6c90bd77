"""The logged quantities of a rollout, worked by hand."""

from __future__ import annotations

import pytest

from whet.rollout.group import Group, Rollout
from whet.rollout.statistics import PrefixHits, has_zero_std, repetition, rollout_metrics
from whet.types import Completion, Episode, Prompt


def an_episode(index: int, reward: float | None, response: list[int], status: str = "completed") -> Episode:
    episode = Episode(Prompt("p", [9, 9, 9], "?"), "g0", index, status=status)
    episode.extend(Completion(response, [-1.0] * len(response), "stop"))
    if reward is not None:
        episode.reward, episode.rewards = reward, {"math": reward * 2, "short": 1.0}
    return episode


def metrics_of(*groups: list[Episode], seconds: float = 2.0) -> dict[str, float]:
    listed = tuple(Group(f"g{position}", tuple(group)) for position, group in enumerate(groups))
    return rollout_metrics(Rollout(listed, generation_s=seconds, total_s=2 * seconds))


def test_rewards_lengths_and_counts():
    metrics = metrics_of(
        [an_episode(0, 1.0, [1]), an_episode(1, 0.0, [1, 2, 3], "truncated")],
        [an_episode(0, 0.5, [1, 2]), an_episode(1, 0.5, [1] * 6), an_episode(2, None, [1] * 50, "failed")],
        [an_episode(0, None, [1], "aborted"), an_episode(1, None, [1], "failed")],
    )
    # Rewards 1, 0, .5, .5: mean .5, variance (.25 + .25 + 0 + 0) / 4 = .125. Lengths 1, 3, 2, 6.
    assert metrics["rollout/reward"] == 0.5
    assert metrics["rollout/reward_std"] == pytest.approx(0.125**0.5)
    assert metrics["rollout/reward/math"] == 1.0
    assert metrics["rollout/reward_std/math"] == pytest.approx(2 * 0.125**0.5)
    assert (metrics["rollout/reward/short"], metrics["rollout/reward_std/short"]) == (1.0, 0.0)
    assert metrics["rollout/response_length_mean"] == 3.0
    assert metrics["rollout/response_length_median"] == 2.5
    assert (metrics["rollout/response_length_max"], metrics["rollout/response_length_min"]) == (6, 1)
    assert metrics["rollout/truncated_ratio"] == 0.25
    # [1]*6 has three runs of four, two of them repeated: (0 + 0 + 0 + 2/3) / 4.
    assert metrics["rollout/repetition_fraction"] == pytest.approx(1 / 6)
    assert metrics["rollout/num_episodes"] == 4
    assert (metrics["rollout/num_failed"], metrics["rollout/num_aborted"]) == (2, 1)
    assert (metrics["rollout/num_zero_std_groups"], metrics["rollout/num_lost_groups"]) == (1, 1)


def test_speed_counts_every_sampled_token():
    metrics = metrics_of([an_episode(0, 1.0, [1] * 10), an_episode(1, None, [1] * 30, "failed")], seconds=4.0)
    assert metrics["perf/generation_tokens_per_s"] == 10.0
    assert metrics["perf/longest_sample_tokens_per_s"] == 7.5
    assert (metrics["perf/generation_s"], metrics["perf/rollout_s"]) == (4.0, 8.0)


def test_a_rollout_without_a_reward_still_counts():
    metrics = metrics_of([an_episode(0, None, [1], "aborted")])
    assert "rollout/reward" not in metrics
    assert metrics["rollout/num_aborted"] == 1


def test_metrics_are_plain_numbers():
    metrics = metrics_of([an_episode(0, 1.0, [1, 2, 3, 4, 5])])
    assert all(type(value) in (int, float) for value in metrics.values())


@pytest.mark.parametrize(
    ("rewards", "zero"),
    [([1.0, 1.0], True), ([1.0, 0.0], False), ([1.0], False), ([None, 1.0, 1.0], True), ([None, None], False)],
)
def test_a_group_has_zero_std_when_two_or_more_members_agree(rewards: list[float | None], zero: bool):
    group = Group("g", tuple(an_episode(index, reward, [1]) for index, reward in enumerate(rewards)))
    assert has_zero_std(group) is zero


def test_repetition_is_the_share_of_runs_of_four_seen_before():
    # a b c d a b c d a: runs abcd bcda cdab dabc abcd bcda, of which two are repeated.
    assert repetition(an_episode(0, 1.0, [1, 2, 3, 4, 1, 2, 3, 4, 1])) == pytest.approx(2 / 6)
    assert repetition(an_episode(0, 1.0, list(range(50)))) == 0.0
    assert repetition(an_episode(0, 1.0, [5] * 104)) == pytest.approx(100 / 101)
    assert repetition(an_episode(0, 1.0, [1, 2, 3])) == repetition(an_episode(0, 1.0, [])) == 0.0


def test_what_environments_count_is_averaged_over_the_scored_episodes_that_have_it():
    group = [an_episode(0, 1.0, [1]), an_episode(1, 0.0, [1]), an_episode(2, 0.0, [1]), an_episode(3, None, [1])]
    counted = ({"num_calls": 3}, {"num_calls": 1, "misses": 2}, {}, {"num_calls": 50})
    for episode, info in zip(group, counted, strict=True):
        episode.info = info
    metrics = metrics_of(group)
    assert (metrics["rollout/env/num_calls"], metrics["rollout/env/misses"]) == (2.0, 2.0)


def test_the_share_of_prompts_that_needed_no_computation_is_that_since_the_last_time():
    class Told:
        computed, saved = 100, 50

        def stats(self):
            return {"prefill_tokens": self.computed, "prefill_tokens_saved": self.saved}

    engine = Told()
    hits = PrefixHits(engine)  # type: ignore[arg-type]
    assert hits.metrics() == {}
    engine.computed, engine.saved = 120, 110
    assert hits.metrics() == {"rollout/prefix_hit_rate": 0.75}
    engine.computed = 200
    hits.restart()
    engine.saved += 1
    assert hits.metrics() == {"rollout/prefix_hit_rate": 1.0}
    assert PrefixHits(object()).metrics() == {}  # type: ignore[arg-type]
