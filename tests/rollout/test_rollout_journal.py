"""The journal gives back what was put into it, to the bit, and knows of every group what became of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whet.errors import CheckpointError
from whet.rollout.group import BASELINE_INDEX, Group
from whet.rollout.journal import RolloutJournal
from whet.types import Completion, Episode, Prompt, VersionSpan

PROMPT = Prompt("p0", (1, 2), [{"role": "user", "content": "Wie?"}], label=0, metadata={"rm_type": "math", "n": [1]})


def begin(name: str, prompt: Prompt, step: int, size: int = 2, baseline: bool = False) -> Group:
    greedy = Episode(prompt, name, BASELINE_INDEX) if baseline else None
    return Group(name, [Episode(prompt, name, i) for i in range(size)], greedy, step)


def played(name: str, **settings) -> Group:
    group = begin(name, PROMPT, 3, **settings)
    for episode in group.members:
        spans = (VersionSpan(4, 0, 1), VersionSpan(5, 1, 3))
        episode.extend(Completion([7, 8, 9], [-0.1, -1 / 3, -2e-17], "stop", spans))
        episode.inject([11])
        episode.status, episode.reward, episode.rewards = "completed", 0.1 + episode.index, {"math": 0.1}
        episode.response, episode.info = "ä\n", {"num_turns": 2.0}
    return group


@pytest.fixture
def journal(tmp_path: Path) -> RolloutJournal:
    journal = RolloutJournal(tmp_path / "rollout.sqlite")
    journal.begin({"seed": "0"})
    return journal


def reopened(journal: RolloutJournal) -> RolloutJournal:
    journal.close()
    return RolloutJournal(journal.path)


def contents(groups: list[Group]) -> list:
    return [(g.id, g.step, list(g.episodes), g.baseline) for g in groups]


def test_groups_come_back_with_every_field_of_their_episodes(journal):
    groups = [played("g0"), played("g1", baseline=True)]
    journal.fetched(groups, {"position": 2})
    for group in groups:
        journal.kept(group)
    found = reopened(journal).in_state("ready", lambda *told: begin(*told, baseline=told[0] == "g1"))
    for group in groups:
        for episode in group.members:
            episode.prompt = Prompt(
                **{
                    **json.loads(json.dumps({"id": "p0", "content": PROMPT.content})),
                    "tokens": [1, 2],
                    "label": 0,
                    "metadata": dict(PROMPT.metadata),
                }
            )
    assert contents(found) == contents(groups)


def test_members_of_which_nothing_is_known_begin_anew(journal):
    group = played("g0")
    journal.fetched([group], {})
    journal.note(group.episodes[1])
    (found,) = reopened(journal).in_state("open", begin)
    assert found.episodes[1].tokens == group.episodes[1].tokens
    assert found.episodes[0].status == "pending" and found.episodes[0].tokens == [1, 2]


def test_a_step_gets_its_groups_in_the_order_it_took_them(journal):
    groups = [played(f"g{i}") for i in range(4)]
    journal.fetched(groups, {})
    journal.taken(1, [groups[2], groups[0]])
    journal.taken(2, [groups[3]])
    again = reopened(journal)
    assert [g.id for g in again.of_step(1, begin)] == ["g2", "g0"]
    assert again.of_step(3, begin) == [] and again.last_step() == 2


def test_the_position_is_that_of_the_last_fetch(journal):
    assert journal.position() == (0, None)
    journal.fetched([played("g0"), played("g1")], {"position": 2})
    journal.fetched([played("g2")], {"position": 3})
    assert reopened(journal).position() == (3, {"position": 3})


def test_what_was_consumed_before_a_checkpoint_is_only_listed_any_more(journal):
    groups = [played(f"g{i}") for i in range(3)]
    journal.fetched(groups, {})
    for group in groups:
        journal.kept(group)
    journal.taken(1, groups[:1])
    journal.taken(2, groups[1:2])
    journal.dropped(groups[2], "nonzero_std")
    journal.forget(1)
    assert journal.last_forgotten() == 1
    assert journal.census() == [
        (0, "p0", "taken", 1, None),
        (1, "p0", "taken", 2, None),
        (2, "p0", "dropped", None, "nonzero_std"),
    ]
    assert journal.of_step(2, begin)[0].episodes[0].reward == 0.1


def test_going_back_makes_later_groups_as_if_they_had_never_been(journal):
    groups = [played(f"g{i}") for i in range(4)]
    journal.fetched(groups[:3], {"position": 3})
    journal.fetched(groups[3:], {"position": 4})
    for group in groups:
        journal.kept(group)
    journal.taken(1, groups[:1])
    journal.taken(2, groups[1:2])
    journal.go_back(1, 3, {"seed": "1"})
    assert journal.census() == [
        (0, "p0", "taken", 1, None),
        (1, "p0", "open", None, None),
        (2, "p0", "open", None, None),
    ]
    assert journal.position() == (3, {"position": 3}) and journal.settings() == {"seed": "1"}
    assert all(e.tokens == [1, 2] for g in journal.in_state("open", begin) for e in g.episodes)


def test_a_file_that_is_no_journal_is_told(tmp_path: Path):
    path = tmp_path / "rollout.sqlite"
    path.write_text("not a database, and long enough to be taken for one " * 20)
    with pytest.raises(CheckpointError, match=r"rollout\.sqlite cannot be read or written"):
        RolloutJournal(path)
