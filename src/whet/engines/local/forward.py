"""The model's forward calls in the embedded engine: prompts, or what is new of them, then one token per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from whet.engines.local.cache import SlotCache
from whet.engines.local.contexts import Decode, Extend, Prefill
from whet.engines.local.graphs import DecodeGraphs
from whet.engines.local.packed import Packed
from whet.engines.local.paged import PagedDecode, PagedExtend, PagedPrefill
from whet.engines.local.pages import PagedCache, Paging
from whet.engines.local.shared import Sharers
from whet.models import parts
from whet.tensor.attention import AttentionContext, attention
from whet.tensor.segments import Segments
from whet.tree import build


class Forward:
    """Runs the trainer's own model object: its weights are used where they are, its code as it is."""

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int,
        autocast: torch.dtype | None = None,
        packs: bool = False,
        paging: Paging | None = None,
    ):
        self.model = parts.base(model)
        self.decoder = parts.decoder(model)
        self.head = parts.head(model)
        self.config = self.model.config.get_text_config()
        self.autocast = autocast
        self.max_length: int | None = getattr(self.config, "max_position_embeddings", None)
        self.cache: SlotCache | PagedCache = SlotCache(max_rows, self.max_length, autocast)
        if paging is not None:
            self.cache = PagedCache(max_rows, self.max_length, autocast, paging)
        self.packed = Packed(self.model if packs else None, self.head, autocast)
        self._modules = list(model.modules())
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda":
            self.graphs = DecodeGraphs(self.call, self.cache, list(model.parameters()), self.device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def reads_once(self) -> bool:
        """Whether decoding has a use for knowing which rows share a prompt: the CPU's kernel over slots alone."""
        return self.device.type == "cpu" and isinstance(self.cache, SlotCache)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout; every module goes back to the mode it was in."""
        training = [module for module in self._modules if module.training]
        # nn.Module.__setattr__ looks through parameters and buffers first, which adds up over all modules.
        for module in training:
            object.__setattr__(module, "training", False)
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                object.__setattr__(module, "training", True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The state in which the methods below are called: evaluating, with our attention and autocast.

        All of it is undone on the way out: between two steps the model is the trainer's.
        """
        dtype, enabled = self.autocast or torch.bfloat16, self.autocast is not None
        autocast = torch.autocast(self.device.type, dtype, enabled)
        with self.evaluating(), autocast, attention(self.model), self.packed.installed():
            yield

    def free(self) -> None:
        """Let go of keys and values, and of the graphs that point at them."""
        self.cache.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Compute prompts and write their keys and values to the slots of each.

        Returns the hidden state of each prompt's last token [prompts, H], and how many tokens were computed:
        what the prompts have in common is computed once.
        """
        tree = build([np.asarray(prompt) for prompt in prompts])
        bounds = np.cumsum([0, *map(len, prompts)])
        written = [wanted[:1] for wanted in slots] if self.cache.shares else slots
        copies = [(slot, p) for p, wanted in enumerate(written) for slot in wanted]
        lengths = [len(prompts[p]) for _, p in copies]
        self.cache.ready([slot for slot, _ in copies], [0] * len(copies), np.array(lengths))
        rows = np.repeat([slot for slot, _ in copies], lengths)
        positions = np.concatenate([np.arange(n) for n in lengths])
        places = np.concatenate([tree.index[bounds[p] : bounds[p + 1]] for _, p in copies])
        prefill = Prefill
        if isinstance(self.cache, PagedCache):
            prefill, (rows, positions) = PagedPrefill, self.cache.places(rows, positions)
        at = self._tensor(rows), self._tensor(positions), self._tensor(places)
        context = prefill(self.cache, Segments(tree, self.device), *at)
        hidden = self._decoder(tree.tokens[None], tree.position_ids[None], context)
        for prompt, wanted, (first, *_) in zip(prompts, slots, written, strict=True):
            for slot in wanted[1:] if self.cache.shares else ():
                self.cache.copy(first, slot, len(prompt))
        return hidden[0, self._tensor(tree.index[bounds[1:] - 1])], tree.num_tokens

    def extend(self, rests: Sequence[Sequence[int]], slots: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Compute the rest of prompts whose first `starts` tokens lie in `slots` already, and write it there.

        Returns the hidden state of each one's last token [prompts, H].
        """
        lengths = [len(rest) for rest in rests]
        tokens = np.concatenate([np.asarray(rest, dtype=np.int64) for rest in rests])
        positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        self.cache.ready(slots, starts, np.add(starts, lengths))
        if isinstance(self.cache, PagedCache):
            context = PagedExtend(self.cache, slots, starts, lengths, self.device)
        else:
            context = Extend(self.cache, slots, starts, lengths)
        hidden = self._decoder(tokens[None], positions[None], context)
        return hidden[0, self._tensor(np.cumsum(lengths) - 1)]

    def decode(self, tokens: np.ndarray, positions: np.ndarray, sharers: Sequence[Sharers] = ()) -> Tensor:
        """One token [B] at its position [B] for each of the first B slots -> hidden states [B, H].

        `sharers` are rows whose slots hold the same prompt.
        """
        self.cache.ready(np.arange(len(tokens)), positions, positions + 1)
        if self.graphs is not None and (hidden := self.graphs.decode(tokens, positions)) is not None:
            return hidden
        if isinstance(self.cache, PagedCache):
            longest = int(positions.max()) + 1
            tables = self._tensor(self.cache.tables(np.arange(len(tokens)), longest))
            context = PagedDecode(self.cache, tables, self._tensor(positions), longest)
        else:
            context = Decode(self.cache, positions, self.device, sharers)
        return self._decoder(tokens[:, None], positions[:, None], context)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> float32 logits [B, V] that nobody else holds."""
        return self.head.logits(hidden, self.packed.head)

    def call(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """The decoder itself: tokens and positions [B, Q] -> hidden states [B, Q, H]."""
        output = self.decoder(
            input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, attention_context=context
        )
        return output.last_hidden_state

    def _decoder(self, tokens: np.ndarray, positions: np.ndarray, context: AttentionContext) -> Tensor:
        return self.call(self._tensor(tokens), self._tensor(positions), context)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
