"""Samples and arguments as functions written for slime know them: `(args, sample)`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whet.config.base import Config
from whet.config.slime_names import SLIME_NAMES
from whet.types import Episode


class Status(enum.Enum):
    """How far a sample has come."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class SlimeSample:
    """A view of an episode under slime's names. What a function writes to it is read again by `rollout.generate`
    only, and `remove_sample` by `rollout.sample_filter`."""

    Status = Status

    prompt: str | list[dict[str, Any]]
    response: str
    label: Any
    metadata: dict[str, Any]
    tokens: list[int]
    response_length: int
    loss_mask: list[int]
    rollout_log_probs: list[float]
    weight_versions: list[int]
    reward: float | None
    rewards: dict[str, float]
    status: Status
    group_index: str
    index: int
    remove_sample: bool = False

    @classmethod
    def of(cls, episode: Episode) -> SlimeSample:
        """`loss_mask` and `rollout_log_probs` are those of the response, `tokens` all."""
        prompt, length = episode.prompt, len(episode.tokens) - len(episode.prompt.tokens)
        return cls(
            prompt=prompt.content,
            response=episode.response,
            label=prompt.label,
            metadata=dict(prompt.metadata),
            tokens=list(episode.tokens),
            response_length=length,
            loss_mask=[int(one) for one in episode.loss_mask[len(prompt.tokens) :]],
            rollout_log_probs=list(episode.sampler_logprobs[len(prompt.tokens) :]),
            weight_versions=[span.version for span in episode.versions],
            reward=episode.reward,
            rewards=dict(episode.rewards),
            status=Status(episode.status),
            group_index=episode.group,
            index=episode.index,
        )

    def get_reward_value(self, args: Any) -> float | None:
        """The reward: of several parts it is the one that counts already."""
        return self.reward


@dataclass(frozen=True)
class SlimeArgs:
    """The settings of a run as a namespace that can only be read.

    A name is looked for among `extra`, then among slime's names of our settings (`rollout_max_response_len` is
    `rollout.max_tokens`), then among our sections (`args.rollout.max_tokens`).
    """

    settings: Config | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and the like ask for
            raise AttributeError(name)
        if name in self.extra:
            return self.extra[name]
        path = _PATHS.get(name, name)
        found: Any = self.settings
        for part in path.split("."):
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif hasattr(found, part):
                found = getattr(found, part)
            else:
                raise AttributeError(
                    f"args has no {name!r}: it is no setting of this run; write it beside `use`, as in "
                    f"`reward: {{use: …, {name}: …}}`"
                )
        return found


def _renamings() -> dict[str, str]:
    """slime's names whose value is that of one setting of ours, as it is."""
    found = {}
    for alias in SLIME_NAMES:
        value = object()
        if alias.effect == "sets" and len(alias.targets) == 1:
            try:
                converted = alias.convert(value, "grpo")
            except (TypeError, ValueError):
                continue  # its values are written differently
            if converted == {alias.targets[0]: value}:
                found[alias.name] = alias.targets[0]
    return found


_PATHS = _renamings()
