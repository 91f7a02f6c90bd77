"""The fsdp backend: one model over several processes, its weights in shards (FSDP2), its matrices, tokens and experts
divided as the layout says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from whet.backends import experts, kept, sharded, tensor_parallel
from whet.backends.device import Arithmetic
from whet.backends.divides import check_divides
from whet.backends.forward import Forward, Mode
from whet.backends.local import CRITIC_FOLDER, LocalBackend, explained
from whet.backends.mesh import make_meshes
from whet.backends.passes import backward_pass, forward_pass, looked
from whet.config.backend import BackendConfig
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.errors import ConfigError
from whet.losses.base import Output
from whet.methods import Term
from whet.models.adapters import has_adapter
from whet.models.load import load_model
from whet.models.parts import base
from whet.models.restore import saved_weights
from whet.models.scores import load_head, save_head
from whet.models.source import adapter_base, load_config
from whet.ranks.layout import Layout
from whet.ranks.share import Share
from whet.tree import Tree


class FsdpBackend(LocalBackend):
    """This rank's part of a model that is trained by all ranks together; see `RankBackend` for the contract.

    Rank 0 reads the model's files and hands every rank its part of each weight, one weight after the other.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        config: BackendConfig,
        arithmetic: Arithmetic,
        *,
        layout: Layout,
        scores: bool = False,
        frozen: bool = False,
        optim: OptimConfig | None = None,
        attention: Mode | Literal["auto"] = "auto",
        temperature: float = 1.0,
        values: bool = False,
    ):
        check_divides(load_config(adapter_base(model) or model), config)
        self.parallel = layout
        loaded = load_model(model, torch.device("cpu"), scores=scores, hollow=dist.get_rank() > 0)
        if frozen:
            loaded.requires_grad_(False)
        options = {"optim": optim, "attention": attention, "temperature": temperature, "values": values}
        super().__init__(loaded, tokenizer, config, arithmetic, **options)

    def _place(self) -> None:
        if self.parallel.tensor > 1:
            tensor_parallel.check_structure(self.model)
        if self.parallel.expert > 1:
            experts.check_structure(self.model)
        self.meshes = make_meshes(self.parallel, self.arithmetic.device.type, self.config.timeout_s)
        self.whole = sharded.Whole(self.model, self.value_head)
        begun = {name: tensor.detach() for name, tensor in self._state()}
        sharded.shard(self.whole, self.meshes, self.config, self.arithmetic)
        sharded.broadcast_from_first(self._state(), begun, self.arithmetic.device)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers, in the same order on every rank."""
        yield from self.whole.named_parameters()
        yield from self.whole.named_buffers()

    def _forward(self, model: nn.Module, mode: Mode, **options: Any) -> Forward:  # pyright: ignore
        if mode == "rows" and self.meshes.slices.count > 1:
            raise ConfigError(
                f"backend.tensor_parallel is {self.parallel.tensor} and context_parallel {self.parallel.context}, but "
                f"{type(base(model)).__name__} attends within padded rows only, which cannot be cut; set both to 1"
            )
        made = Forward(model, mode, **options)
        made.enter = self._inside
        made.slices = self.meshes.slices if self.meshes.slices.count > 1 else None
        return made

    def _inside(self, function: Callable[[], Any]) -> Any:
        """What the function returns where weights are gathered."""
        found = self.whole(function)
        if not torch.is_grad_enabled():  # else the backward pass does so when it is through
            sharded.let_go(self.whole)
        return found

    def forward(self, share: Share, outputs: Set[Output]) -> tuple[dict[Any, Tensor], float]:  # pyright: ignore
        """Outputs over the share's batch, on the CPU, and this rank's floating-point operations."""
        self.model.eval()
        found = forward_pass(self.compute, self.arithmetic, share.batch, share.micros(), outputs)
        found = {name: values.cpu() for name, values in found.items()}
        return found, self._flops(share, self.counts.forward, outputs)

    def forward_backward(self, share: Share, terms: Sequence[Term]) -> tuple[dict[str, Any], float]:  # pyright: ignore
        """Add the share's gradient; returns `Tally.state()` and this rank's floating-point operations."""
        self.model.train()
        with explained(self.config):
            tally = backward_pass(self.compute, self.arithmetic, share.micros(), terms, self._backward)
        outputs = frozenset().union(*(term.outputs for term in terms))
        return tally.state(), self._flops(share, self.counts.forward_backward, outputs)

    def _flops(self, share: Share, count: Callable[[Tree, int], float], outputs: Set[Output]) -> float:
        """What this rank's part of a pass took."""
        return count(share.batch.tree, looked(share.batch, outputs)) / self.meshes.slices.count

    def optim_step(self, lr: float) -> dict[str, float]:
        """As `local` does, for the gradient of all ranks; state that is offloaded is there for the step alone."""
        if self.config.offload != "optimizer":
            return super().optim_step(lr)
        self._move_optimizer(self.arithmetic.device)
        found = super().optim_step(lr)
        self._move_optimizer(torch.device("cpu"))
        return found

    def _clip(self, trainable: list[nn.Parameter], limit: float) -> Tensor:
        if self.parallel.tensor > 1:
            sharded.sum_over_tensor_ranks(trainable, self.meshes)
        grads = [p.grad for p in trainable if p.grad is not None]
        norm = sharded.norm(grads, self.arithmetic.device)
        factor = min(1.0, limit / (norm.item() + 1e-6))
        if factor < 1:
            for grad in grads:
                (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
        return norm

    def save(self, folder: Path) -> None:
        """The whole model's weights as transformers or peft load them, and what each rank has of the optimizer."""
        self.export_weights(folder)
        if self.optimizer is not None:
            kept.write_optimizer(self.optimizer, self.whole.named_parameters(), folder)
        dist.barrier()  # whoever led may seal the folder now

    def load(self, folder: Path) -> None:
        """Exactly what `save` wrote, on whatever ranks. Raises CheckpointError."""
        found: dict[str, Tensor] = {}
        if dist.get_rank() == 0:
            found = {f"model.{name}": tensor for name, tensor in saved_weights(self.model, folder).items()}
        if self.value_head is not None:
            head = nn.Linear(self.value_head.weight.shape[1], 1, bias=False)
            load_head(head, folder / CRITIC_FOLDER)
            found["value_head.weight"] = head.weight
        names = [list(found)]
        dist.broadcast_object_list(names, 0)
        told = set(names[0])
        sharded.broadcast_from_first(((n, t) for n, t in self._state() if n in told), found, self.arithmetic.device)
        if self.optimizer is not None:
            kept.read_optimizer(self.optimizer, self.whole.named_parameters(), folder)

    def export_weights(self, folder: Path) -> None:
        """The weights, in the type they are trained in; those of a value head in a folder of their own."""
        trained = ((name, weight) for name, weight in self.whole.named_parameters() if weight.requires_grad)
        kept.require_finite(((name, tensor_parallel.local(w)) for name, w in trained), self.arithmetic.device)
        kept.write_model(self.model, self.tokenizer, folder, self.weights(trained=has_adapter(self.model)))
        if self.value_head is not None:
            weight = sharded.full(self.value_head.weight, self.arithmetic.device)
            head = nn.Linear(weight.shape[1], 1, bias=False)
            head.weight.data = weight.cpu()
            if dist.get_rank() == 0:
                save_head(head, folder / CRITIC_FOLDER)

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, full tensor) of every parameter, or of those that are trained, gathered one by one."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad or not trained:
                yield name, sharded.full(weight, self.arithmetic.device)

    def set_temperature(self, temperature: float) -> float:
        """Divide logits by this from now on. Returns what they were divided by before."""
        before, self.compute.temperature = self.compute.temperature, temperature
        return before

    @torch.no_grad()
    def move_towards(self, other: FsdpBackend, share: float) -> None:
        """Each weight becomes (1 - share) of itself and `share` of the other's, which is spread alike."""
        for own, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            tensor_parallel.local(own).lerp_(tensor_parallel.local(theirs).to(own.dtype), share)

    def offload(self) -> None:
        """Move this rank's part of weights and optimizer state to the CPU."""
        if self.config.offload != "all":
            self.whole.to("cpu")
            self._move_optimizer(torch.device("cpu"))

    def onload(self) -> None:
        """Move them back to where they are in training."""
        if self.config.offload != "all":
            self.whole.to(self.arithmetic.device)
            if self.config.offload == "none":
                self._move_optimizer(self.arithmetic.device)
