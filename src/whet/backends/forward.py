"""From a batch to model outputs: the prefix tree through the decoder, the head where a loss looks."""

from __future__ import annotations

from collections.abc import Set
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whet.batch import Batch
from whet.models.parts import base, decoder, head, score_head
from whet.tensor.attention import attention
from whet.tensor.logprobs import CHUNK_MB, EXTRAS, token_logprobs
from whet.tensor.segments import Segments

Mode = Literal["tree", "packed", "rows"]


class Forward:
    """Computes outputs of one model for batches that were collated for `mode`.

    `tree` and `packed` run the batch's tree as one token stream through our attention; `rows` runs padded
    rows through the model's own, for models that cannot do otherwise. `temperature` divides the logits.
    """

    def __init__(
        self, model: PreTrainedModel, mode: Mode, *, temperature: float = 1.0, chunk_mb: int = CHUNK_MB
    ) -> None:
        self.model, self.mode, self.temperature, self.chunk_mb = model, mode, temperature, chunk_mb
        self.decoder = decoder(model)

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches are to be collated with shared prefixes."""
        return self.mode == "tree"

    def installed(self):
        """The context in which `__call__` runs: the model attends as `mode` needs."""
        return nullcontext() if self.mode == "rows" else attention(base(self.model))

    def __call__(self, batch: Batch, outputs: Set[str]) -> dict[str, Tensor]:
        """`outputs` for this micro-batch: `scores` [N]; `hidden` [T, H], the state that predicts each trained token;
        and of the head, [T] each. 0 where no token is trained, and without gradient if none is."""
        known = EXTRAS | {"logprobs", "scores", "hidden"}
        assert outputs <= known, f"a language model has no outputs {sorted(outputs - known)}"
        trained = batch.loss_mask.nonzero()[:, 0]
        if not len(trained) and "scores" not in outputs:
            return {name: self._nothing(name, batch) for name in outputs}
        stream = (self._rows if self.mode == "rows" else self._tree)(batch)
        result = {"scores": self._scores(batch, stream)} if "scores" in outputs else {}
        if wanted := outputs - {"scores"}:
            looks = _Looks.at(trained, stream, shared=len(stream.tokens) < batch.num_tokens)
            values = self._values(stream, looks, wanted)
            result |= {name: _to_rows(values[name], looks, trained, batch.num_tokens) for name in wanted}
        return result

    def _values(self, stream: _Stream, looks: _Looks, outputs: Set[str]) -> dict[str, Tensor]:
        """Outputs [K] at the looks."""
        seen = stream.hidden[looks.predictors]
        values = {"hidden": seen} if "hidden" in outputs else {}
        if outputs - {"hidden"}:
            values |= token_logprobs(
                seen,
                head(self.model),
                looks.targets,
                temperature=self.temperature,
                extras=outputs & EXTRAS,
                chunk_mb=self.chunk_mb,
            )
        return values

    def _nothing(self, name: str, batch: Batch) -> Tensor:
        """An output of a batch without trained tokens."""
        shape = (batch.num_tokens, head(self.model).weight.shape[1]) if name == "hidden" else (batch.num_tokens,)
        return torch.zeros(shape, device=batch.tokens.device)

    def _scores(self, batch: Batch, stream: _Stream) -> Tensor:
        """[N] the score head at the last token of each sequence, in float32 whatever the decoder computes in."""
        last = stream.hidden[stream.places[batch.cu_seqlens[1:].long() - 1]]
        with torch.autocast(last.device.type, enabled=False):
            return score_head(self.model)(last.float())[:, 0]

    def _tree(self, batch: Batch) -> _Stream:
        """The tree's stream through the decoder."""
        tree, device = batch.tree, batch.tokens.device
        tokens = torch.from_numpy(tree.tokens).to(device)
        hidden = self.decoder(
            input_ids=tokens[None],
            position_ids=torch.from_numpy(tree.position_ids).to(device)[None],
            attention_mask=None,
            use_cache=False,
            attention_context=Segments(tree, device),
        ).last_hidden_state[0]
        predecessors = torch.from_numpy(tree.predecessors).to(device)
        return _Stream(hidden, tokens, torch.from_numpy(tree.index).to(device), predecessors)

    def _rows(self, batch: Batch) -> _Stream:
        """The same from rows padded on the right to the longest."""
        longest = int(batch.lengths.max())
        places = batch.sequence_ids * longest + batch.position_ids
        tokens = batch.tokens.new_zeros(batch.num_sequences * longest).index_copy(0, places, batch.tokens)
        mask = torch.zeros_like(tokens).index_fill(0, places, 1)
        hidden = self.decoder(
            input_ids=tokens.view(-1, longest), attention_mask=mask.view(-1, longest), use_cache=False
        ).last_hidden_state.flatten(0, 1)
        return _Stream(hidden, tokens, places, torch.arange(len(tokens), device=tokens.device) - 1)


@dataclass(frozen=True)
class _Stream:
    """What the model ran on: P places with hidden states [P, H], tokens and predecessors [P]; `places` [T] says where
    each token of the batch stands."""

    hidden: Tensor
    tokens: Tensor
    places: Tensor
    predecessors: Tensor


@dataclass(frozen=True)
class _Looks:
    """Where the head looks: K places of hidden states, the tokens they predict, and which look each of the M
    trained tokens takes ([M], None when it is one each)."""

    predictors: Tensor
    targets: Tensor
    inverse: Tensor | None

    @classmethod
    def at(cls, trained: Tensor, stream: _Stream, *, shared: bool) -> _Looks:
        """Looks that predict these tokens [M] of the batch; rows that share a trained token share one look."""
        places, inverse = stream.places[trained], None
        if shared:
            places, inverse = torch.unique(places, return_inverse=True)
        return cls(stream.predecessors[places], stream.tokens[places], inverse)


def _to_rows(values: Tensor, looks: _Looks, trained: Tensor, num_tokens: int) -> Tensor:
    """[K, ...] -> [T, ...], 0 where no token is trained."""
    values = values.float() if looks.inverse is None else values.float()[looks.inverse]
    return values.new_zeros(num_tokens, *values.shape[1:]).index_copy(0, trained, values)


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Logprobs [T] by the model's own forward, row by row: what `Forward` must agree with."""
    logprobs = torch.zeros(batch.num_tokens, device=batch.tokens.device)
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        tokens = batch.tokens[start:end]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float() / temperature
        logprobs[start + 1 : end] = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return torch.where(batch.loss_mask, logprobs, 0)
