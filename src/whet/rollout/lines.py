"""A step's rollout as lines of a file, one per episode, and the way back to the units that were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from whet.errors import DataError
from whet.rollout.group import BASELINE_INDEX, Group
from whet.types import Episode, Prompt, Sample, Unit, VersionSpan

Line = dict[str, Any]

NEEDED = ("group", "index", "trained", "tokens", "loss_mask", "sampler_logprobs", "reward", "columns", "unit_columns")
"""What a unit is made of."""
TOLD = (
    *("prompt_id", "content", "label", "metadata", "num_prompt_tokens", "response", "rewards", "status", "error"),
    *("info", "versions"),
)
"""What is known of an episode beside its tokens: to be read, and for metrics."""


def lines_of(units: Sequence[Unit], groups: Sequence[Group]) -> Iterator[Line]:
    """The samples of the units in their order, then the episodes that are trained on in none.

    Of an episode that was trained on, tokens, mask, logprobs and reward are those of its sample: what was left out
    of training by a mask is left out here.
    """
    episodes = {(group.id, one.index): one for group in groups for one in group.members}
    for unit in units:
        for sample in unit.samples:
            episode = episodes.pop((unit.id, sample.metadata.get("index", -1)), None)
            yield {
                **({} if episode is None else _told(episode)),
                "group": unit.id,
                "index": sample.metadata.get("index"),
                "trained": True,
                "tokens": list(map(int, sample.tokens)),
                "loss_mask": list(map(int, sample.loss_mask)),
                "sampler_logprobs": _plain(sample.sampler_logprobs),
                "reward": _plain(sample.reward),
                "columns": {name: _plain(values) for name, values in sample.columns.items()},
                "unit_columns": {name: _plain(value) for name, value in unit.columns.items()},
            }
    for episode in episodes.values():
        yield {
            **_told(episode),
            "group": episode.group,
            "index": episode.index,
            "trained": False,
            "tokens": list(map(int, episode.tokens)),
            "loss_mask": list(map(int, episode.loss_mask)),
            "sampler_logprobs": _plain(episode.sampler_logprobs),
            "reward": _plain(episode.reward),
            "columns": {},
            "unit_columns": {},
        }


def units_of(lines: Sequence[Line]) -> list[Unit]:
    """The units that were trained on, to the bit. Raises DataError for lines that lack something."""
    for number, line in enumerate(lines, start=1):
        if missing := [name for name in NEEDED if name not in line]:
            raise DataError(f"line {number} has no {', '.join(missing)}; dump the rollout anew")
    trained = [line for line in lines if line["trained"]]
    return [
        Unit(name, tuple(map(_sample, members)), columns=members[0]["unit_columns"])
        for name, members in ((name, list(part)) for name, part in groupby(trained, lambda line: line["group"]))
    ]


def groups_of(lines: Sequence[Line]) -> list[Group]:
    """The groups as they were played, without what only their environments knew."""
    found: dict[str, list[Episode]] = {}
    for line in lines:
        if "prompt_id" in line:
            found.setdefault(line["group"], []).append(_episode(line))
    groups = []
    for name, episodes in found.items():
        members = sorted(episodes, key=lambda one: one.index)
        baseline = members.pop(0) if members[0].index == BASELINE_INDEX else None
        groups.append(Group(name, members, baseline))
    return groups


def _told(episode: Episode) -> Line:
    prompt = episode.prompt
    rewards = {name: _plain(value) for name, value in episode.rewards.items()}
    told = (prompt.id, prompt.content, prompt.label, dict(prompt.metadata), len(prompt.tokens))
    outcome = (episode.response, rewards, episode.status, episode.error, dict(episode.info))
    return dict(zip(TOLD, (*told, *outcome, list(map(asdict, episode.versions))), strict=True))


def _sample(line: Line) -> Sample:
    logprobs = line["sampler_logprobs"]
    return Sample(
        tokens=tuple(line["tokens"]),
        loss_mask=tuple(map(bool, line["loss_mask"])),
        sampler_logprobs=None if logprobs is None else tuple(logprobs),
        reward=line["reward"],
        columns=line["columns"],
        metadata={"index": line["index"], "status": line.get("status"), "rewards": line.get("rewards")},
    )


def _episode(line: Line) -> Episode:
    tokens = line["tokens"]
    content, label, metadata = line["content"], line["label"], line["metadata"]
    prompt = Prompt(line["prompt_id"], tokens[: line["num_prompt_tokens"]], content, label, metadata)
    own: Mapping[str, Any] = {name: line[name] for name in ("response", "reward", "rewards", "status", "error", "info")}
    return Episode(
        prompt,
        line["group"],
        line["index"],
        tokens=tokens,
        loss_mask=list(map(bool, line["loss_mask"])),
        sampler_logprobs=line["sampler_logprobs"],
        versions=[VersionSpan(**span) for span in line["versions"]],
        **own,
    )


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, their numbers as Python's: a float32 comes back from its text to the bit."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
