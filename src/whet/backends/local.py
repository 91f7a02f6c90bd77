"""The local backend: one process, one model, a CPU or one GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whet.backends import kept
from whet.backends.device import Arithmetic
from whet.backends.forward import Forward, Mode
from whet.backends.optimizer import adamw
from whet.backends.parity import choose_mode
from whet.backends.passes import backward_pass, forward_pass, looked
from whet.batch import Batch
from whet.checkpoints.state import load_optimizer, read_json, save_optimizer, write_json
from whet.config.backend import BackendConfig
from whet.config.optim import OptimConfig
from whet.errors import TrainingError
from whet.flops import ModelFlops, peak_flops
from whet.losses.base import Output
from whet.methods import Term
from whet.models.adapters import adapter_off, trainable_summary
from whet.models.digest import digest
from whet.models.export import save_model
from whet.models.parts import base
from whet.models.restore import load_weights
from whet.models.scores import load_head, save_head, value_head
from whet.tally import divisible

SCALER_FILE = "scaler.json"
CRITIC_FOLDER = "critic"
"""Beside the weights of a policy, those of its critic, be it a model or a head."""

OUT_OF_MEMORY = (
    "the GPU ran out of memory. In this order: lower backend.max_tokens_per_device (now {max_tokens}); set "
    "backend.activation_checkpointing: true; lower data.max_length or rollout.max_tokens; train an adapter "
    "(model.adapter); lower backend.head_chunk_mb (now {chunk_mb})"
)


class LocalBackend:
    """Trains one model in this process; see `Backend` for the contract.

    With an optimizer configuration it trains; without one it only computes (a reference, a teacher). With `values` it
    has a value head beside the model, which is trained and saved with it but is no part of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BackendConfig,
        arithmetic: Arithmetic,
        *,
        optim: OptimConfig | None = None,
        attention: Mode | Literal["auto"] = "auto",
        temperature: float = 1.0,
        values: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.config, self.arithmetic = config, arithmetic
        self.counts = ModelFlops(model)
        self.flops = 0.0
        """Floating-point operations of all passes so far."""
        self.value_head = value_head(model) if values else None
        self._place()
        modes = {"temperature": temperature, "chunk_mb": config.head_chunk_mb, "made": self._forward}
        self.compute = choose_mode(model, attention, arithmetic, **modes)
        self.compute.value_head = self.value_head
        self.optim = optim
        self.optimizer = None
        if optim is not None:
            if config.activation_checkpointing:
                checkpoint_activations(base(model))
            self.optimizer = adamw(model, optim, beside=self.value_head)
        scales = arithmetic.autocast == torch.float16
        self.scaler = torch.amp.GradScaler(arithmetic.device.type, enabled=scales)

    def _place(self) -> None:
        """Bring the model to where it is trained."""
        self.model.to(self.arithmetic.device)
        if self.value_head is not None:
            self.value_head.to(self.arithmetic.device)

    _forward = staticmethod(Forward)

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches for this backend are to be collated with shared prefixes."""
        return self.compute.shares_prefixes

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device can reach at most; None where that is not known, and for CPUs."""
        if self.arithmetic.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.arithmetic.device)
        return peak_flops(name, self.arithmetic.autocast, self.arithmetic.matmul)

    def forward(self, batch: Batch, outputs: Set[Output]) -> dict[Any, Tensor]:
        """Outputs over the whole batch, on the batch's device."""
        self.model.eval()
        batch = batch.refined(self.config.max_tokens_per_device)
        self.flops += self.counts.forward(batch.tree, looked(batch, outputs))
        return forward_pass(self.compute, self.arithmetic, batch, self._micro_batches(batch), outputs)

    def forward_backward(self, batch: Batch, terms: Sequence[Term]) -> dict[str, float]:
        """Add up the gradient over micro-batches; see `Backend.forward_backward`."""
        self.model.train()
        outputs = frozenset().union(*(term.outputs for term in terms))
        batch = divisible(batch, terms, self.config.max_tokens_per_device)
        self.flops += self.counts.forward_backward(batch.tree, looked(batch, outputs))
        with explained(self.config):
            tally = backward_pass(self.compute, self.arithmetic, self._micro_batches(batch), terms, self._backward)
        result = tally.finish()
        if not math.isfinite(result["loss"]):
            raise TrainingError(tally.not_finite(result["loss"]))
        return result

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def optim_step(self, lr: float) -> dict[str, float]:
        """Clip the gradient, step, clear; returns `grad_norm` before clipping."""
        assert self.optimizer is not None and self.optim is not None, "this backend has no optimizer"
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in trainable):  # no token of the batch was trained
            return {"grad_norm": 0.0}
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(trainable, self.optim.max_grad_norm or float("inf"))
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise TrainingError(unfit(norm.item()))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)  # fp16: skips the step when the scaled gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm.item()}

    def _clip(self, trainable: list[nn.Parameter], limit: float) -> Tensor:
        """The norm of the gradient, which is at most `limit` afterwards."""
        return nn.utils.clip_grad_norm_(trainable, limit)

    def save(self, folder: Path) -> None:
        """Weights as transformers or peft load them, and the optimizer beside them."""
        self.export_weights(folder)
        if self.optimizer is not None:
            save_optimizer(self.optimizer, folder)
            write_json(self.scaler.state_dict(), folder / SCALER_FILE)

    def load(self, folder: Path) -> None:
        """Exactly the weights and the optimizer state that `save` wrote. Raises CheckpointError."""
        load_weights(self.model, folder)
        if self.value_head is not None:
            load_head(self.value_head, folder / CRITIC_FOLDER)
        if self.optimizer is None:
            return
        if (folder / kept.FOLDER).is_dir():  # of a run over several processes
            kept.read_optimizer(self.optimizer, self._named(), folder)
            return
        load_optimizer(self.optimizer, folder)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(read_json(folder / SCALER_FILE))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters under the names that checkpoints of several processes have for them."""
        yield from ((f"model.{name}", weight) for name, weight in self.model.named_parameters())
        if self.value_head is not None:
            yield from ((f"value_head.{name}", weight) for name, weight in self.value_head.named_parameters())

    def export_weights(self, folder: Path) -> None:
        """The weights, in the type they are trained in; those of a value head in a folder of their own."""
        save_model(self.model, self.tokenizer, folder)
        if self.value_head is not None:
            save_head(self.value_head, folder / CRITIC_FOLDER)

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its name in the model, or those that are trained: the tensors themselves."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad or not trained:
                yield name, weight.detach()

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Compute outputs at this temperature for as long as this lasts."""
        before, self.compute.temperature = self.compute.temperature, temperature
        try:
            yield
        finally:
            self.compute.temperature = before

    @torch.no_grad()
    def move_towards(self, other: LocalBackend, share: float) -> None:
        """Each weight becomes (1 - share) of itself and `share` of the other's."""
        for own, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            own.lerp_(theirs.to(own), share)

    def offload(self) -> None:
        """Move weights and optimizer state to the CPU."""
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        """Move weights and optimizer state back."""
        self._move(self.arithmetic.device)

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        if self.value_head is not None:
            self.value_head.to(device)
        self._move_optimizer(device)

    def _move_optimizer(self, device: torch.device) -> None:
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor) and k != "step"})

    def describe(self) -> dict[str, Any]:
        """Device, precision, attention and how much is trained."""
        trainable, total = trainable_summary(self.model)
        dtype = self.arithmetic.autocast or next(self.model.parameters()).dtype
        return {
            "device": str(self.arithmetic.device),
            "precision": str(dtype).removeprefix("torch."),
            "matmul": self.arithmetic.matmul,
            "threads": torch.get_num_threads(),
            "attention": self.compute.mode,
            "parameters": total,
            "trainable": trainable,
        }

    def digest(self) -> str:
        """A hash of what outputs follow from, an adapter left out."""
        return digest(self.model)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[list[int], Batch]]:
        for units in batch.micro_batches(self.config.max_tokens_per_device, self.config.micro_batch_size):
            yield units, batch.select(units)


@contextmanager
def explained(config: BackendConfig) -> Iterator[None]:
    """Within this context a GPU that runs out of memory is told of with what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedies = {"max_tokens": config.max_tokens_per_device, "chunk_mb": config.head_chunk_mb}
        raise TrainingError(OUT_OF_MEMORY.format(**remedies)) from error


def unfit(norm: float) -> str:
    """What is said of a gradient that is not finite."""
    return (
        f"the gradient norm is {norm}, although the loss is finite; lower optim.lr, or use float32 or bf16 arithmetic "
        "(backend.precision). Nothing was updated"
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, layer by layer."""
    # The newer name where there is one: the older then warns.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


class WithoutAdapter:
    """The policy as it was before its adapter: a reference that needs no second copy of the weights."""

    def __init__(self, policy: LocalBackend):
        self.policy = policy

    @property
    def model(self) -> PreTrainedModel:
        """The policy's model; its adapter is on outside of `forward`."""
        return self.policy.model

    @property
    def compute(self) -> Forward:
        return self.policy.compute

    @property
    def counts(self) -> ModelFlops:
        return self.policy.counts

    @property
    def peak_flops(self) -> float | None:
        return self.policy.peak_flops

    @property
    def shares_prefixes(self) -> bool:
        return self.policy.shares_prefixes

    def forward(self, batch: Batch, outputs: Set[Output]) -> dict[Any, Tensor]:
        """Outputs of the base model."""
        with adapter_off(self.policy.model):
            return self.policy.forward(batch, outputs)

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Those of the policy, the adapter's among them."""
        return self.policy.weights(trained=trained)

    def describe(self) -> dict[str, Any]:
        return self.policy.describe()

    def digest(self) -> str:
        return self.policy.digest()
