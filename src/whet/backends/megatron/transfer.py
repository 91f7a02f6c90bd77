"""Weights between a Hugging Face folder and the ranks that hold a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import functional as F

from whet.backends.megatron.model import Decoder, padded_vocabulary
from whet.weights.megatron.blueprint import Blueprint
from whet.weights.megatron.names import Weight, join, part, separate, weights_of, whole
from whet.weights.stored import Entry

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
BUFFERS = (".expert_bias",)
"""Endings of weights that are no parameters."""


@dataclass(frozen=True)
class Held:
    """A weight of the model, and this rank's part of it."""

    weight: Weight
    tensor: Tensor
    dim: int | None
    """Along which it is divided over the tensor-parallel ranks; None: each has the whole."""


class Transfer:
    """Where each weight of one model is."""

    def __init__(self, decoder: Decoder, model: Blueprint) -> None:
        self.decoder, self.model = decoder, model
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.weights = list(weights_of(model))
        tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
        layers = [layer.layer_number - 1 for layer in decoder.decoder.layers]
        self.first_layer = layers[0]
        self.held: dict[str, Held] = {}
        for weight in self.weights:
            tensor = tensors.get(name) if (name := self._local_name(weight)) is not None else None
            if tensor is not None:
                divided = getattr(tensor, "tensor_model_parallel", False) and self.groups.tp.size() > 1
                self.held[weight.name] = Held(weight, tensor, tensor.partition_dim if divided else None)

    def _local_name(self, weight: Weight) -> str | None:
        """The name under which this rank would hold it; None where it cannot."""
        name = weight.name
        if weight.layer is not None:
            if not 0 <= weight.layer - self.first_layer < len(self.decoder.decoder.layers):
                return None
            name = name.replace(f"layers.{weight.layer}.", f"layers.{weight.layer - self.first_layer}.", 1)
        if weight.expert is not None:
            count = self.model.num_experts // self.groups.ep.size()
            if weight.expert // count != self.groups.ep.rank():
                return None
            name = name.replace(f"local_experts.{weight.expert}.", f"local_experts.{weight.expert % count}.", 1)
        return name

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor], *, without: Set[str] = frozenset()) -> None:
        """Set this rank's part of every weight but those named, given how a tensor of the folder is read by name."""
        for held in self.held.values():
            if held.weight.name not in without:
                full = join(held.weight.how, [read(name) for name in held.weight.sources], self.model.settings)
                held.tensor.copy_(self._own(held, full))
        if self.model.tied and self.is_last and not self.decoder.pre_process:
            # The last stage of a pipeline has a copy of the embedding, which is the head.
            full = self._padded(read("model.embed_tokens.weight"))
            self.decoder.output_layer.weight.copy_(part("same", full, 0, self.groups.tp.rank(), self.groups.tp.size()))

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage of the pipeline."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def _own(self, held: Held, full: Tensor) -> Tensor:
        if held.weight.name in VOCABULARY:
            full = self._padded(full)
        if held.dim is None:
            return full
        return part(held.weight.how, full, held.dim, self.groups.tp.rank(), self.groups.tp.size())

    def _padded(self, full: Tensor) -> Tensor:
        return F.pad(full, (0, 0, 0, padded_vocabulary(self.model, self.groups.tp.size()) - len(full)))

    @torch.no_grad()
    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """(name as in a Hugging Face folder, full tensor) on every rank, collective over all; each valid until the next
        is asked for."""
        for weight in self.weights:
            yield from zip(weight.sources, separate(weight.how, self._full(weight), self.model.settings), strict=True)

    @torch.no_grad()
    def gather_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The same as the model in memory has them: without buffers, and with the experts of a layer as one tensor."""
        for (layer, _), group in groupby(self.weights, lambda weight: (weight.layer, weight.expert is None)):
            stacks: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
            for weight in group:
                if weight.name.endswith(BUFFERS):
                    continue
                full = self._full(weight)
                if weight.expert is None:
                    yield from zip(weight.sources, separate(weight.how, full, self.model.settings), strict=True)
                else:
                    stacks["gate_up_proj" if weight.how == "gate_up" else "down_proj"].append(full.clone())
            for name, experts in stacks.items():
                if experts:
                    yield f"model.layers.{layer}.mlp.experts.{name}", torch.stack(experts)

    def entries(self) -> dict[str, Entry]:
        """What `gather` gives, without the numbers; collective over all ranks."""
        found = {}
        for weight in self.weights:
            _, shape, dtype = self._owners[weight.name]
            if weight.name in VOCABULARY:
                shape = (self.model.vocab_size, *shape[1:])
            parts = separate(weight.how, torch.empty(shape, dtype=dtype, device="meta"), self.model.settings)
            for name, tensor in zip(weight.sources, parts, strict=True):
                found[name] = Entry(tensor.dtype, tuple(tensor.shape))
        return found

    def from_last(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What the last stage has, on every rank, in float32."""
        last = dist.get_process_group_ranks(self.groups.pp)[-1]
        device = next(self.decoder.parameters()).device
        found = tensor.detach().clone() if tensor is not None else torch.empty(shape, device=device)
        if self.groups.pp.size() > 1:
            dist.broadcast(found, src=last, group=self.groups.pp)
        return found

    def _full(self, weight: Weight) -> Tensor:
        full = self._whole(weight)
        return full[: self.model.vocab_size] if weight.name in VOCABULARY else full

    def _whole(self, weight: Weight) -> Tensor:
        """A weight from the ranks that hold it, on all ranks."""
        held = self.held.get(weight.name)
        full: Tensor | None = None
        if held is not None:
            full = held.tensor.detach()
            if held.dim is not None:
                parts = [torch.empty_like(full) for _ in range(self.groups.tp.size())]
                dist.all_gather(parts, full.contiguous(), group=self.groups.tp)
                full = whole(weight.how, parts, held.dim)
        if dist.get_world_size() == 1:
            assert full is not None, "a rank alone holds every weight"
            return full
        return self._from_owner(weight, full)

    def _from_owner(self, weight: Weight, full: Tensor | None) -> Tensor:
        owner, shape, dtype = self._owners[weight.name]
        if full is None:
            full = torch.empty(shape, dtype=dtype, device=next(self.decoder.parameters()).device)
        full = full.contiguous()
        dist.broadcast(full, src=owner)
        return full

    @cached_property
    def _owners(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """For each weight the first rank that holds it, its shape and type, asked once of all."""
        own = {name: (self._full_shape(held), held.tensor.dtype) for name, held in self.held.items()}
        told: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(told, own)
        known: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        for rank, names in enumerate(told):
            for name, (shape, dtype) in names.items():
                known.setdefault(name, (rank, shape, dtype))
        return known

    def _full_shape(self, held: Held) -> tuple[int, ...]:
        shape = list(held.tensor.shape)
        if held.dim is not None:
            shape[held.dim] *= self.groups.tp.size()
        return tuple(shape)
