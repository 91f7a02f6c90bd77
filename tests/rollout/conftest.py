"""What the tests of the rollout share: a tokenizer, prompts, and an engine that answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whet.types import Completion, FinishReason, Prompt, Sampling, VersionSpan


class ScriptedEngine:
    """Answers with what `answer(tokens, sampling)` says: text, or a whole Completion. Nothing is sampled.

    Text becomes its bytes (the tiny tokenizer has one token per byte) and the token that ends a turn,
    unless `max_tokens` cuts it; logprobs count down from -0.1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: Callable[[list[int], Sampling], str | Completion]):
        self.tokenizer, self.answer = tokenizer, answer
        self.calls: list[tuple[list[int], Sampling, str | None]] = []
        self.snapshots: list[Any] = []
        self.active = self.most_active = 0

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        self.calls.append((list(tokens), sampling, prefix_key))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        await asyncio.sleep(0)
        self.active -= 1
        answer = self.answer(list(tokens), sampling)
        return answer if isinstance(answer, Completion) else self.complete(answer, sampling)

    def complete(self, text: str, sampling: Sampling) -> Completion:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        reason: FinishReason = "stop" if len(tokens) <= sampling.max_tokens else "length"
        tokens = tokens[: sampling.max_tokens]
        logprobs = [-0.1 * (position + 1) for position in range(len(tokens))]
        return Completion(tokens, logprobs, reason, (VersionSpan(0, 0, len(tokens)),))

    async def update_weights(self, snapshot: Any) -> None:
        self.snapshots.append(snapshot)


class ListedPrompts:
    """Prompts in their order, over and over; a window ends with the list."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts, self.taken = list(prompts), 0

    async def take(self, n: int) -> list[Prompt]:
        start = self.taken % len(self.prompts) if self.prompts else 0
        window = self.prompts[start : start + n]
        self.taken += len(window)
        return window

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


@pytest.fixture(scope="session")
def tokenizer(tiny_qwen: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_qwen)


@pytest.fixture
def scripted(tokenizer: PreTrainedTokenizerBase) -> Callable[..., ScriptedEngine]:
    """Makes a ScriptedEngine from its `answer`."""
    return lambda answer: ScriptedEngine(tokenizer, answer)


@pytest.fixture
def make_prompt(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Prompt]:
    """Makes the prompt of a text, with its label."""
    return lambda text, label=None, id="p0": Prompt(id, tokenizer.encode(text, add_special_tokens=False), text, label)


@pytest.fixture
def listed() -> type[ListedPrompts]:
    return ListedPrompts
