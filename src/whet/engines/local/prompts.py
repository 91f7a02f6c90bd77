"""Prompts in the embedded engine's slots: each computed once, from where another's keys and values end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whet.engines.local.forward import Forward
from whet.engines.local.kept import MIN_REUSED, Kept, KeptPrefixes, num_shared
from whet.engines.local.request import Request
from whet.engines.local.shared import Sharers

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Prompt:
    """A prompt in flight: the requests whose slots hold its keys and values, and its last hidden state [H].

    Its first `start` tokens are taken from `source`.
    """

    tokens: np.ndarray
    source: Kept | Prompt | None
    start: int
    holders: list[Request] = field(default_factory=list)
    hidden: Tensor | None = None


class Prompts:
    """The prompts in flight by their tokens, and what is kept of requests that have ended (at most `max_bytes`)."""

    def __init__(self, forward: Forward, max_bytes: int):
        self.forward = forward
        self.kept = KeptPrefixes(forward.cache, max_bytes)
        self._held: dict[Tokens, Prompt] = {}

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Forget everything: it is not, or no longer, what the weights compute."""
        self._held.clear()
        self.kept.clear()

    def forget_slots(self) -> None:
        """What lies in slots is gone; what is kept stays."""
        self._held.clear()

    def get(self, tokens: Tokens) -> Prompt | None:
        return self._held.get(tokens)

    def num_uncomputed(self, tokens: Tokens) -> int:
        """How many of these tokens are to be computed if a request for them joins now."""
        return 0 if tokens in self._held else len(tokens) - self._begun(tokens).start

    def join(self, requests: Sequence[Request]) -> tuple[int, int]:
        """Fill the slots of requests that have their rows: copied from where the prompt lies, or computed.

        Returns how many tokens were computed, and how many were not because they were there.
        """
        new: dict[Tokens, Prompt] = {}
        wanted = 0
        for request in requests:
            wanted += len(request.tokens)
            prompt = self._held.get(request.tokens)
            if prompt is None:
                prompt = new[request.tokens] = self._held.setdefault(request.tokens, self._begun(request.tokens))
            elif prompt.hidden is not None:
                self.forward.cache.copy(prompt.holders[0].row, request.row, len(request.tokens))
            prompt.holders.append(request)
        computed = self._compute_whole([p for p in new.values() if p.source is None])
        computed += self._compute_rest([p for p in new.values() if p.source is not None])
        return computed, wanted - computed

    def sharers(self) -> list[Sharers]:
        """The rows of each prompt in flight."""
        rows = ([one.row for one in prompt.holders if one.row >= 0] for prompt in self._held.values())
        listed = zip(self._held, rows, strict=True)
        return [Sharers(np.sort(np.array(held)), len(tokens)) for tokens, held in listed if len(held) > 1]

    def leave(self, request: Request, num_held: int) -> Prompt | None:
        """A request gives up its row, which holds its first `num_held` tokens, by weights that have not changed since.

        Returns its prompt, which the row still holds, unless that is out of date; see `drop_unheld`.
        """
        if num_held > len(request.tokens) and len(request.marks) == 1:
            self.kept.keep([*request.tokens, *request.output][:num_held], request.row)
        prompt = self._held.get(request.tokens)
        if prompt is None or request not in prompt.holders:
            return None  # the row was filled before the weights changed
        prompt.holders.remove(request)
        return prompt

    def drop_unheld(self, tokens: Tokens) -> None:
        """Forget a prompt that no slot holds any more."""
        if (prompt := self._held.get(tokens)) is not None and not prompt.holders:
            del self._held[tokens]

    def first_hidden(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Hidden states [prompts, H] after the prompts of these requests, each once, and which one each takes."""
        prompts = [self._held[request.tokens] for request in requests]
        distinct = list(dict.fromkeys(prompts))
        hidden = torch.stack([prompt.hidden for prompt in distinct])
        return hidden, torch.tensor([distinct.index(prompt) for prompt in prompts], device=hidden.device)

    def _begun(self, tokens: Tokens) -> Prompt:
        """A new prompt, and where most of its beginning lies. Its last token is always computed: it is looked at."""
        array = np.asarray(tokens, dtype=np.int64)
        source, start = self.kept.find(array)
        for held, prompt in self._held.items():
            if prompt.hidden is None or held[:MIN_REUSED] != tokens[:MIN_REUSED]:
                continue
            if (shared := num_shared(prompt.tokens, array)) > start:
                source, start = prompt, shared
        start = min(start, len(tokens) - 1)
        return Prompt(array, source, start) if start >= MIN_REUSED else Prompt(array, None, 0)

    def _compute_whole(self, prompts: Sequence[Prompt]) -> int:
        if not prompts:
            return 0
        slots = [[request.row for request in prompt.holders] for prompt in prompts]
        hidden, computed = self.forward.prefill([prompt.tokens for prompt in prompts], slots)
        for prompt, state in zip(prompts, hidden, strict=True):
            prompt.hidden = state
        return computed

    def _compute_rest(self, prompts: Sequence[Prompt]) -> int:
        if not prompts:
            return 0
        cache, slots = self.forward.cache, [prompt.holders[0].row for prompt in prompts]
        for prompt, slot in zip(prompts, slots, strict=True):
            if isinstance(prompt.source, Kept):
                self.kept.load(prompt.source, slot, prompt.start)
            else:
                cache.copy(prompt.source.holders[0].row, slot, prompt.start)
            prompt.source = None
        rests = [prompt.tokens[prompt.start :] for prompt in prompts]
        hidden = self.forward.extend(rests, slots, [prompt.start for prompt in prompts])
        for prompt, state, slot in zip(prompts, hidden, slots, strict=True):
            prompt.hidden = state
            for request in prompt.holders[1:]:
                cache.copy(slot, request.row, len(prompt.tokens))
        return sum(map(len, rests))
