"""A group knows how old it is, and begins anew with as many episodes as it began with."""

from __future__ import annotations

from whet.rollout.group import BASELINE_INDEX, Group, with_parts
from whet.types import Completion, Episode, Prompt, VersionSpan

PROMPT = Prompt("p0", (1, 2), "?")


def sampled(index: int, version: int) -> Episode:
    episode = Episode(PROMPT, "g0", index)
    episode.extend(Completion([7, 8], [-0.1, -0.2], "stop", (VersionSpan(version, 0, 2),)))
    episode.status, episode.reward = "completed", 1.0
    return episode


def test_a_group_is_as_old_as_its_oldest_token_the_baseline_included():
    group = Group("g0", [sampled(0, 3), Episode(PROMPT, "g0", 1)])
    assert group.oldest_version == 3
    assert Group("g0", [sampled(0, 3)], baseline=sampled(BASELINE_INDEX, 2)).oldest_version == 2
    assert Group("g0", [Episode(PROMPT, "g0", 0)]).oldest_version is None


def test_a_group_that_begins_anew_forgets_its_samples_and_the_parts_of_its_rollouts():
    first, second, part = sampled(0, 1), sampled(1, 1), sampled(1, 1)
    for episode in (second, part):
        episode.rollout = 1
    group = Group("g0", with_parts([first, second], [[], [part]]), baseline=sampled(BASELINE_INDEX, 1))
    assert [episode.index for episode in group.episodes] == [0, 1, 2]
    group.restart()
    assert [episode.index for episode in group.episodes] == [0, 1]
    for episode in group.members:
        assert (episode.tokens, episode.reward, episode.status, episode.rollout) == ([1, 2], None, "pending", None)
        assert episode.versions == [] and episode.loss_mask == [False, False]
