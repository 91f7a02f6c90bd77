"""From a batch to model outputs: the prefix tree through the decoder, the head where a loss looks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whet.annotate import Top
from whet.backends.slices import SlicedSegments, Slices
from whet.batch import Batch
from whet.losses.base import Output
from whet.losses.distill import Divergence, TopK
from whet.models.parts import base, decoder, head, score_head
from whet.tensor.attention import attention
from whet.tensor.divergence import Divergence as DivergenceReader
from whet.tensor.head import Reader, read_head
from whet.tensor.logits import CHUNK_MB
from whet.tensor.logprobs import EXTRAS, Tokens, Words, top_logprobs
from whet.tensor.segments import Segments

Mode = Literal["tree", "packed", "rows"]

REQUESTS = (Divergence, TopK, Top)


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
        self.value_head: nn.Module | None = None
        """What `values` are read by; the model's score head when not set."""
        self.slices: Slices | None = None
        """How this rank shares each stream with others; None: it has it for itself."""
        self.enter: Callable[[Callable[[], Any]], Any] = _call
        """Calls a function inside of which weights that are sharded over ranks are there as a whole. Set where there
        are other ranks: they then all run through the whole model, whether or not anything is trained."""
        self._vocabulary: int | None = None
        self._teacher: weakref.ref[Forward] | None = None

    def learn_from(self, teacher: Forward) -> None:
        """From now on outputs that compare the two models are over the words that both heads have.

        `Divergence` runs the teacher's head, which must then be there; for `TopK` its words are enough.
        """
        self._vocabulary = teacher._vocabulary = min(self.words, teacher.words)
        self._teacher = weakref.ref(teacher)  # whoever holds the teacher may let go of it

    @property
    def words(self) -> int:
        """Words that a distribution held against another model's is over."""
        return self._vocabulary or len(head(self.model).weight)

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches are to be collated with shared prefixes."""
        return self.mode == "tree"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The context in which `__call__` runs, and the backward pass after it: the model attends as `mode` needs."""
        if self.mode == "rows":
            yield
        elif self.slices is None:
            with attention(base(self.model)):
                yield
        else:
            with attention(base(self.model)), self.slices.in_use():
                yield

    def __call__(self, batch: Batch, outputs: Set[Output]) -> dict[Output, Tensor]:
        """`outputs` for this micro-batch: `scores` [N]; `hidden` [T, H], the state that predicts each trained token;
        `values` [T], what the value head reads off it;
        and of the head, [T, ...] each, under what was asked for (of `Top`: `top_ids` and `top_logprobs`, without
        gradient). 0 where no token is trained, and without gradient if none is."""
        known = EXTRAS | {"logprobs", "scores", "hidden", "values"}
        unknown = [one for one in outputs if one not in known and not isinstance(one, REQUESTS)]
        assert not unknown, f"a language model has no outputs {unknown}"
        if any(isinstance(one, Divergence) for one in outputs):  # which reads the teacher's head
            teacher = self._its_teacher
            return teacher.enter(lambda: self.enter(lambda: self._compute(batch, outputs)))
        return self.enter(lambda: self._compute(batch, outputs))

    def _compute(self, batch: Batch, outputs: Set[Output]) -> dict[Output, Tensor]:
        trained = batch.loss_mask.nonzero()[:, 0]
        if not len(trained) and "scores" not in outputs and self.enter is _call:
            return self._nothing(batch, outputs)
        stream = (self._rows if self.mode == "rows" else self._tree)(batch)
        result: dict[Output, Tensor] = {"scores": self._scores(batch, stream)} if "scores" in outputs else {}
        if wanted := outputs - {"scores"}:
            looks = _Looks.at(trained, stream, shared=len(stream.tokens) < batch.num_tokens)
            own = stream.own(looks.predictors)
            values = self._values(batch, stream, looks if own is None else looks.part(own), wanted)
            values = {name: self._combined(value, own, looks.predictors) for name, value in values.items()}
            result |= {name: _to_rows(value, looks, trained, batch.num_tokens) for name, value in values.items()}
        return result

    def _values(self, batch: Batch, stream: _Stream, looks: _Looks, outputs: Set[Output]) -> dict[Output, Tensor]:
        """Outputs [K, ...] at the looks."""
        seen, own = stream.at(looks.predictors), head(self.model)
        values: dict[Output, Tensor] = {"hidden": seen} if "hidden" in outputs else {}
        if "values" in outputs:
            values["values"] = _scalar(self.value_head or score_head(self.model), seen)
        for top in (one for one in outputs if isinstance(one, Top)):
            k, words = min(top.k, self.words), self.words
            values["top_ids"], values["top_logprobs"] = top_logprobs(
                seen, own, k, temperature=top.temperature, vocabulary=words, chunk_mb=self.chunk_mb
            )
        if readers := self._readers(batch, looks, outputs):
            found = read_head(seen, own, list(readers.values()), chunk_mb=self.chunk_mb)
            for asked, read in zip(readers, found, strict=True):
                if asked is None:
                    values |= {one: value for one, value in read.items() if one in outputs}
                else:
                    values[asked] = read[asked.name]
        return values

    def _readers(self, batch: Batch, looks: _Looks, outputs: Set[Output]) -> dict[Divergence | TopK | None, Reader]:
        """What looks at the logits, by request; None stands for all that is about the tokens themselves."""
        readers: dict[Divergence | TopK | None, Reader] = {}
        extras = {name for name in EXTRAS if name in outputs}
        if extras or "logprobs" in outputs:
            width = len(head(self.model).weight)
            readers[None] = Tokens(looks.targets, width=width, temperature=self.temperature, extras=extras)
        for request in sorted(outputs - EXTRAS, key=repr):  # in an order that is the same in every process
            if isinstance(request, Divergence):
                readers[request] = self._divergence(request, batch["teacher_hidden"][looks.tokens])
            elif isinstance(request, TopK):
                ids = batch["teacher_topk_ids"][looks.tokens]
                readers[request] = Words(ids, width=self.words, temperature=request.temperature)
        return readers

    @property
    def _its_teacher(self) -> Forward:
        teacher = self._teacher and self._teacher()
        assert teacher is not None, "there is no teacher to learn from"
        return teacher

    def _divergence(self, request: Divergence, hidden: Tensor) -> DivergenceReader:
        return DivergenceReader(
            hidden, head(self._its_teacher.model), beta=request.beta, width=self.words, temperature=request.temperature
        )

    def _nothing(self, batch: Batch, outputs: Set[Output]) -> dict[Output, Tensor]:
        """Outputs of a batch without trained tokens."""
        zeros = torch.zeros(batch.num_tokens, device=batch.tokens.device)
        width = head(self.model).weight.shape[1]
        found: dict[Output, Tensor] = {}
        for one in outputs:
            if isinstance(one, Top):
                found["top_logprobs"] = zeros.new_zeros(batch.num_tokens, min(one.k, self.words))
                found["top_ids"] = found["top_logprobs"].long()
            elif isinstance(one, TopK):
                found[one] = zeros.new_zeros(batch["teacher_topk_ids"].shape)
            else:
                found[one] = zeros.new_zeros(batch.num_tokens, width) if one == "hidden" else zeros
        return found

    def _scores(self, batch: Batch, stream: _Stream) -> Tensor:
        """[N] the score head at the last token of each sequence."""
        places = stream.places[batch.cu_seqlens[1:].long() - 1]
        own = stream.own(places)
        scores = _scalar(score_head(self.model), stream.at(places if own is None else places[own]))
        return self._combined(scores, own, places)

    def _combined(self, values: Tensor, own: Tensor | None, places: Tensor) -> Tensor:
        """Values [k, ...] at those of the places that are this rank's `own`, for all of them."""
        if own is None:
            return values
        assert self.slices is not None, "a rank that has only some places has only a slice"
        return self.slices.combine(values, own, len(places))

    def _tree(self, batch: Batch) -> _Stream:
        """The tree's stream, or this rank's slice of it, through the decoder."""
        tree, device, slices = batch.tree, batch.tokens.device, self.slices
        if slices is not None:
            tree = slices.padded(tree)
        part = slice(0, tree.num_tokens) if slices is None else slices.own(tree.num_tokens)
        tokens = torch.from_numpy(tree.tokens).to(device)
        hidden = self.decoder(
            input_ids=tokens[None, part],
            position_ids=torch.from_numpy(tree.position_ids).to(device)[None, part],
            attention_mask=None,
            use_cache=False,
            attention_context=Segments(tree, device) if slices is None else SlicedSegments(tree, slices, device),
        ).last_hidden_state[0]
        predecessors = torch.from_numpy(tree.predecessors).to(device)
        return _Stream(hidden, tokens, torch.from_numpy(tree.index).to(device), predecessors, part)

    def _rows(self, batch: Batch) -> _Stream:
        """The same from rows padded on the right to the longest."""
        longest = int(batch.lengths.max())
        places = batch.sequence_ids * longest + batch.position_ids
        tokens = batch.tokens.new_zeros(batch.num_sequences * longest).index_copy(0, places, batch.tokens)
        mask = torch.zeros_like(tokens).index_fill(0, places, 1)
        hidden = self.decoder(
            input_ids=tokens.view(-1, longest), attention_mask=mask.view(-1, longest), use_cache=False
        ).last_hidden_state.flatten(0, 1)
        predecessors = torch.arange(len(tokens), device=tokens.device) - 1
        return _Stream(hidden, tokens, places, predecessors, slice(0, len(tokens)))


def _call(function: Callable[[], Any]) -> Any:
    return function()


@dataclass(frozen=True)
class _Stream:
    """What the model ran on: P places with tokens and predecessors [P]; `places` [T] says where each token of the
    batch stands. Hidden states [n, H] are those of `part` of the places."""

    hidden: Tensor
    tokens: Tensor
    places: Tensor
    predecessors: Tensor
    part: slice

    def own(self, places: Tensor) -> Tensor | None:
        """[k] which of these places have hidden states here; None: all."""
        if len(self.hidden) == len(self.tokens):
            return None
        return ((places >= self.part.start) & (places < self.part.stop)).nonzero()[:, 0]

    def at(self, places: Tensor) -> Tensor:
        """Hidden states [k, H] at places of `part`."""
        return self.hidden[places - self.part.start]


@dataclass(frozen=True)
class _Looks:
    """Where the head looks: K places of hidden states, the tokens they predict, and which look each of the M
    trained tokens takes ([M], None when it is one each). `tokens` [K] are places in the batch that take each look."""

    predictors: Tensor
    targets: Tensor
    inverse: Tensor | None
    tokens: Tensor

    @classmethod
    def at(cls, trained: Tensor, stream: _Stream, *, shared: bool) -> _Looks:
        """Looks that predict these tokens [M] of the batch; rows that share a trained token share one look."""
        places, inverse, tokens = stream.places[trained], None, trained
        if shared:
            places, inverse = torch.unique(places, return_inverse=True)
            # The first of those that share a look: what a column says of them follows from their common prefix.
            tokens = trained.max().expand(len(places)).scatter_reduce(0, inverse, trained, "amin")
        return cls(stream.predecessors[places], stream.tokens[places], inverse, tokens)

    def part(self, which: Tensor) -> _Looks:
        """Some of these looks."""
        return _Looks(self.predictors[which], self.targets[which], None, self.tokens[which])


def _scalar(head: nn.Module, hidden: Tensor) -> Tensor:
    """[K, H] -> [K] by a head of one number, in float32 whatever the decoder computes in."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[:, 0]


def _to_rows(values: Tensor, looks: _Looks, trained: Tensor, num_tokens: int) -> Tensor:
    """[K, ...] -> [T, ...], 0 where no token is trained; float32, or integers."""
    values = values if values.dtype == torch.int64 else values.float()
    values = values if looks.inverse is None else values[looks.inverse]
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
