"""What flows through the system: prompts, completions, episodes, samples, units. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
Status = Literal["pending", "completed", "truncated", "aborted", "failed"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One token sequence with what is known of it; the row that losses see.

    `tokens` and `loss_mask` have one entry per token, prompt included; `loss_mask` is true on the
    tokens that are trained. `sampler_logprobs` has the same length and holds 0 where nothing was
    sampled. `reward` is None where no reward applies. A loss mask on the first token is ignored:
    nothing predicts it. `columns` holds further columns of a batch by name: for one per token an array with
    as many entries as there are tokens ([T], or [T, k]), for one per sequence a number.
    """

    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    sampler_logprobs: Sequence[float] | None = None
    reward: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = len(self.tokens)
        assert length > 0, "a sample has at least one token"
        assert len(self.loss_mask) == length, f"loss_mask has {len(self.loss_mask)} entries for {length} tokens"
        if self.sampler_logprobs is not None:
            assert len(self.sampler_logprobs) == length, "sampler_logprobs and tokens differ in length"


@dataclass(frozen=True, slots=True)
class Unit:
    """Samples that belong together (one row, a pair, a group) and are never torn apart.

    `id` names the unit over the whole run; credit is assigned by it, never by position. A pair holds the chosen
    sample, then the rejected one. `columns` holds the batch columns that are one number per unit.
    """

    id: str
    samples: tuple[Sample, ...]
    columns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.samples, f"unit {self.id} has no samples"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine samples one completion. `seed` makes it reproducible; top_k 0 and top_p 1 are off.

    Logprobs are returned under the softmax of logits / temperature, before top-k and top-p cut it
    (temperature 0 is greedy, with logprobs at temperature 1).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine answers: sampled tokens (the stop token included), their logprobs, and why it ended."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt file, ready to be sampled from.

    `id` is stable over the run. `content` is what the row said: text, or chat messages.
    """

    id: str
    tokens: Sequence[int]
    content: str | list[Message]
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Episode:
    """One play of one prompt: the tokens so far, which of them the policy sampled, and the outcome.

    `tokens`, `loss_mask` and `sampler_logprobs` cover prompt and response alike and grow together;
    injected tokens (tool output, further user turns) carry mask False and logprob 0. `response` is
    the text after the prompt; of several turns `answer` is the last. `rewards` holds one number per
    reward function, `reward` their sum. `info` is what the environment counted (turns, calls), by
    name. `rollout` numbers, within the group, the rollout that a sequence is a part of, where one was
    split into several: they then count once.
    """

    prompt: Prompt
    group: str
    index: int
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    response: str = ""
    answer: str | None = None
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    status: Status = "pending"
    error: str | None = None
    info: dict[str, float] = field(default_factory=dict)
    rollout: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            self.inject(self.prompt.tokens)

    def inject(self, tokens: Sequence[int]) -> None:
        """Append tokens that the policy did not sample."""
        self.tokens.extend(tokens)
        self.loss_mask.extend([False] * len(tokens))
        self.sampler_logprobs.extend([0.0] * len(tokens))

    def extend(self, completion: Completion) -> None:
        """Append a sampled completion, its logprobs and its version spans."""
        offset = len(self.tokens)
        self.tokens.extend(completion.tokens)
        self.loss_mask.extend([True] * len(completion.tokens))
        self.sampler_logprobs.extend(completion.logprobs)
        self.versions.extend(VersionSpan(s.version, s.start + offset, s.end + offset) for s in completion.versions)

    def restart(self) -> None:
        """Forget all but the prompt."""
        for part in (self.tokens, self.loss_mask, self.sampler_logprobs, self.versions):
            part.clear()
        self.response, self.reward, self.rewards, self.status, self.error = "", None, {}, "pending", None
        self.info, self.rollout = {}, None
        self.inject(self.prompt.tokens)

    @property
    def num_sampled(self) -> int:
        return sum(self.loss_mask)

    def to_sample(self) -> Sample:
        assert self.reward is not None, f"episode {self.group}/{self.index} has no reward; it cannot be trained on"
        return Sample(
            tokens=tuple(self.tokens),
            loss_mask=tuple(self.loss_mask),
            sampler_logprobs=tuple(self.sampler_logprobs),
            reward=self.reward,
            columns={
                "truncated": float(self.status == "truncated"),
                **({"rollout_ids": self.rollout} if self.rollout is not None else {}),
            },
            metadata={"index": self.index, "status": self.status, "rewards": dict(self.rewards)},
        )
