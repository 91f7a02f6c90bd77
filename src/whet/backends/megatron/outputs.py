"""Micro-batches through this rank's part of a model, and what a loss asks of the last stage's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from whet import tree
from whet.backends.exchange import sum_alike
from whet.backends.megatron.model import Decoder
from whet.backends.megatron.parts import Stream
from whet.batch import Batch
from whet.losses.base import Output
from whet.tensor.logprobs import EXTRAS
from whet.tensor.segments import Segments
from whet.tensor.vocabulary import divided_logprobs
from whet.tree import Tree

OUTPUTS: frozenset[Output] = EXTRAS | {"logprobs", "values", "scores"}
Read = Callable[[Tensor, Tensor], dict[Output, Tensor]]


class Compute:
    """Runs streams through a decoder. Ranks that share a stream hold slices of it, one after the other.

    `temperature` divides the logits.
    """

    mode = "tree"

    def __init__(self, decoder: Decoder, *, vocab_size: int, temperature: float, chunk_mb: int) -> None:
        self.decoder, self.words = decoder, vocab_size
        self.temperature, self.chunk_mb = temperature, chunk_mb
        self.groups = ProcessGroupCollection.use_mpu_process_groups()

    def learn_from(self, teacher: Compute) -> None:
        """Nothing to agree on: of a teacher only logprobs are asked here."""

    def hidden(self, model: Any, batch: Batch) -> Tensor:
        """What this stage makes of a micro-batch, [n, 1, H]. `model` is the decoder, bare or wrapped."""
        stream, device = self._padded(batch.tree), batch.tokens.device
        positions = torch.from_numpy(stream.position_ids).to(device)
        own = self._slice(stream.num_tokens)
        about = Stream.over(Segments(stream, device), self._arranged(positions))
        tokens = torch.from_numpy(stream.tokens[own]).to(device)
        return model(tokens[None], positions[None, own], None, packed_seq_params=about)

    def outputs(self, hidden: Tensor, batch: Batch, wanted: Set[Output]) -> dict[Output, Tensor]:
        """`wanted` of a micro-batch, from the last stage's hidden states; the same on all ranks that share the stream.

        `scores` are [N], the others [T], 0 where no token is trained.
        """
        assert wanted <= OUTPUTS, f"this backend has no outputs {sorted(map(str, wanted - OUTPUTS))}"
        if self.decoder.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden[:, 0]
        found: dict[Output, Tensor] = {}
        if "scores" in wanted:
            ends = torch.from_numpy(batch.tree.index).to(hidden.device)[batch.cu_seqlens[1:].long() - 1]
            found |= self._at(ends, hidden, lambda seen, _: {"scores": self._scalar(seen)})
        if tokens := wanted - {"scores"}:
            looks = _Looks.of(batch)
            values = self._at(looks.predictors, hidden, lambda seen, own: self._read(seen, looks.targets[own], tokens))
            found |= {name: looks.to_rows(value, batch.num_tokens) for name, value in values.items()}
        return found

    def _read(self, hidden: Tensor, targets: Tensor, wanted: Set[Output]) -> dict[Output, Tensor]:
        """Outputs [k] of the places with these hidden states [k, H], which predict `targets`."""
        found: dict[Output, Tensor] = {"values": self._scalar(hidden)} if "values" in wanted else {}
        if of_head := wanted - {"values"}:
            read = divided_logprobs(
                hidden,
                self.decoder.head_weight,
                targets,
                self.groups.tp,
                width=self.words,
                temperature=self.temperature,
                extras=of_head & EXTRAS,
                chunk_mb=self.chunk_mb,
            )
            found |= {name: value for name, value in read.items() if name in wanted}
        return found

    def _scalar(self, hidden: Tensor) -> Tensor:
        """[k, H] -> [k] by the value head, in float32."""
        assert self.decoder.value_head is not None, "a model without a value head"
        return self.decoder.value_head(hidden.float())[:, 0]

    # --- slices of a stream -------------------------------------------------------------------------------

    def _padded(self, stream: Tree) -> Tree:
        """The tree with a segment of padding in the end, so that it can be cut into slices."""
        tensor = self.groups.tp.size() if self.decoder.config.sequence_parallel else 1
        context = self.groups.cp.size()
        lacking = -stream.num_tokens % (tensor * context * (2 if context > 1 else 1))
        if not lacking:
            return stream
        return tree.join([stream, tree.flat([np.zeros(lacking, dtype=np.int64)])])

    def _slice(self, length: int) -> slice:
        size = length // self.groups.cp.size()
        return slice(self.groups.cp.rank() * size, (self.groups.cp.rank() + 1) * size)

    def _arranged(self, positions: Tensor) -> Tensor:
        """Positions in an order from which Megatron takes those of this rank's slice.

        It divides a sequence over context ranks in twice as many pieces: a rank has one from either end.
        """
        ranks = self.groups.cp.size()
        if ranks == 1:
            return positions
        pieces = positions.unflatten(0, (ranks, 2, -1))
        return torch.cat([*pieces[:, 0], *pieces[:, 1].flip(0)])

    def _at(self, places: Tensor, hidden: Tensor, read: Read) -> dict[Output, Tensor]:
        """What `read` finds in the hidden states of the places [K] of the stream that are in this rank's slice, given
        those [k, H] and which of the places they are [k]; joined over the slices."""
        ranks = self.groups.cp.size()
        if ranks == 1:
            return read(hidden[places], torch.arange(len(places), device=places.device))
        size = len(hidden)
        own = (places // size == self.groups.cp.rank()).nonzero()[:, 0]
        joined: dict[Output, Tensor] = {}
        for name, value in read(hidden[places[own] % size], own).items():
            kind = value.dtype
            value = value.long() if kind == torch.bool else value
            spread = value.new_zeros(len(places)).index_copy(0, own, value)
            joined[name] = sum_alike(spread, self.groups.cp).to(kind)
        return joined


@dataclass(frozen=True)
class _Looks:
    """Where the head looks: K places whose hidden states predict the `targets`, and which look each trained token
    takes; rows that share a trained token share one look."""

    predictors: Tensor
    targets: Tensor
    inverse: Tensor
    trained: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Looks:
        trained = batch.loss_mask.nonzero()[:, 0]
        stream, device = batch.tree, batch.tokens.device
        places, inverse = np.unique(stream.index[trained.cpu().numpy()], return_inverse=True)
        arrays = stream.predecessors[places], stream.tokens[places], inverse
        return cls(*(torch.from_numpy(array).to(device) for array in arrays), trained)

    def to_rows(self, values: Tensor, num_tokens: int) -> Tensor:
        """[K] -> [T], 0 where no token is trained."""
        values = values if values.dtype == torch.bool else values.float()
        return values.new_zeros(num_tokens).index_copy(0, self.trained, values[self.inverse])
