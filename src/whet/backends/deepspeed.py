"""The deepspeed backend: one model over several processes, its optimizer, gradients and weights divided by ZeRO.

Source: Rajbhandari et al. 2020 (arXiv:1910.02054).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from whet.backends import kept
from whet.backends.device import Arithmetic
from whet.backends.forward import Forward, Mode
from whet.backends.local import CRITIC_FOLDER, LocalBackend, checkpoint_activations, explained, unfit
from whet.backends.moments import Moments, write_moments
from whet.backends.optimizer import adamw
from whet.backends.passes import backward_pass, forward_pass, looked
from whet.backends.sharded import Whole
from whet.config.backend import BackendConfig
from whet.config.deepspeed import settings
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.errors import ConfigError, TrainingError
from whet.losses.base import Output
from whet.methods import Term
from whet.models.adapters import has_adapter, trainable_summary
from whet.models.load import load_model
from whet.models.parts import base, head
from whet.models.restore import saved_weights
from whet.models.scores import load_head, save_head
from whet.ranks.layout import Layout
from whet.ranks.share import Share
from whet.tree import Tree

BUCKET_BYTES = 1 << 27
"""Of weights that are gathered at a time."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
"""The float32 weights that 16-bit ones are rounded from."""


class DeepSpeedBackend(LocalBackend):
    """This rank's part of a model that is trained by all ranks together; see `RankBackend` for the contract.

    Rank 0 reads the model's files and hands on the weights, one after the other. A model that is not trained is whole
    on every rank, unless weights are divided (ZeRO-3).
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
        self.parallel, self.library = layout, _library(arithmetic.device)
        self.divides = config.zero_stage == 3
        """Whether no rank has the whole of a weight."""
        self._begun = optim
        is_handed_on = (self.divides or optim is not None) and model.quantization is None
        device = torch.device("cpu") if model.quantization is None else arithmetic.device
        loaded = load_model(model, device, scores=scores, hollow=is_handed_on and dist.get_rank() > 0)
        self.outline: Any = load_model(model, device, scores=scores, hollow=True) if self.divides else loaded
        """The model with the shapes of its weights, which its own do not have once they are divided."""
        base(self.outline).generation_config = base(loaded).generation_config  # a hollow one has read none
        if frozen:
            loaded.requires_grad_(False)
        _solidify(loaded)
        self.summary = trainable_summary(loaded)
        self.engine: Any = None
        self.steps = 0
        """Updates so far."""
        self._has_gradient = False
        options = {"attention": attention, "temperature": temperature, "values": values}
        super().__init__(loaded, tokenizer, config, arithmetic, **options)
        self.optim = optim
        if optim is not None and config.activation_checkpointing:
            checkpoint_activations(base(self.model))

    def _place(self) -> None:
        self.whole = Whole(self.model, self.value_head)
        if self._begun is None and not self.divides:
            super()._place()
            return
        for name, buffer in list(self.whole.named_buffers()):
            _set_buffer(self.whole, name, buffer := buffer.to(self.arithmetic.device).contiguous())
            dist.broadcast(buffer, 0)
        optimizer = None
        if self._begun is not None:
            optimizer = adamw(self.model, self._begun, beside=self.value_head)
        trained = {weight.dtype for weight in self.whole.parameters() if weight.requires_grad}
        limit = self._begun.max_grad_norm if self._begun is not None else None
        told = settings(self.config, max_grad_norm=limit, in_bf16=trained == {torch.bfloat16})
        if self.divides:
            zero = self.library.zero
            where = "cpu" if self.config.offload == "all" else None
            zero.Init(module=self.whole, config_dict_or_path=told, remote_device=where)
            for module in (head(self.model).module, getattr(base(self.model), "score", None), self.value_head):
                for weight in module.parameters() if module is not None else ():
                    zero.register_external_parameter(self.whole, weight)  # read without a call of its module
        self.engine, *_ = self.library.initialize(
            model=self.whole, optimizer=optimizer, config=told, dist_init_required=False
        )

    # --- passes -------------------------------------------------------------------------------------------

    def _forward(self, model: nn.Module, mode: Mode, **options: Any) -> Forward:  # pyright: ignore
        made = Forward(model, mode, **options)
        made.enter = self._inside
        return made

    def _inside(self, function: Callable[[], Any]) -> Any:
        """What the function returns where weights are gathered and the engine follows what happens to them."""
        if self._begun is None and torch.is_grad_enabled():  # a student's loss reads the head of this teacher
            self._gather_head()
            return function()
        if not self.divides and not torch.is_grad_enabled():
            return function()
        found: list[Any] = []

        def inside() -> Tensor | None:
            with self.arithmetic.context():  # DeepSpeed ends the one around its call
                found.append(function())
            return _flat(found[0]) if torch.is_grad_enabled() else None

        flat = self.engine(inside)
        return found[0] if flat is None else _unflat(flat, found[0])

    def _gather_head(self) -> None:
        """Have the head whole on every rank until the next pass of this model: it is read in the backward pass of the
        student's, which this model's engine does not follow."""
        for weight in head(self.model).module.parameters() if self.divides else ():
            if weight.ds_status.name != "AVAILABLE":
                weight.all_gather()

    def forward(self, share: Share, outputs: Set[Output]) -> tuple[dict[Any, Tensor], float]:  # pyright: ignore
        self.model.eval()
        found = forward_pass(self.compute, self.arithmetic, share.batch, share.micros(), outputs)
        found = {name: values.cpu() for name, values in found.items()}
        return found, self._flops(share, self.counts.forward, outputs)

    def forward_backward(self, share: Share, terms: Sequence[Term]) -> tuple[dict[str, Any], float]:  # pyright: ignore
        self.model.train()
        with explained(self.config):
            tally = backward_pass(self.compute, self.arithmetic, share.micros(), terms, self._backward)
        outputs = frozenset().union(*(term.outputs for term in terms))
        return tally.state(), self._flops(share, self.counts.forward_backward, outputs)

    def _backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of ranks what is to be added up.
        self.engine.backward(loss * self.parallel.data)
        self._has_gradient = True

    def _flops(self, share: Share, count: Callable[[Tree, int], float], outputs: Set[Output]) -> float:
        return count(share.batch.tree, looked(share.batch, outputs))

    def optim_step(self, lr: float) -> dict[str, float]:
        """Clip, update, clear. Returns `grad_norm` of the whole gradient before clipping."""
        if not self._has_gradient:
            return {"grad_norm": 0.0}
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self._has_gradient = False
        if not self.engine.was_step_applied():
            raise TrainingError(unfit(float("nan")))
        self.steps += 1
        return {"grad_norm": float(self.engine.get_global_grad_norm())}

    def set_temperature(self, temperature: float) -> float:
        """Divide logits by this from now on. Returns what they were divided by before."""
        before, self.compute.temperature = self.compute.temperature, temperature
        return before

    # --- weights ------------------------------------------------------------------------------------------

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, full tensor) of every parameter, or of those that are trained, gathered by the bucket."""
        named = [(n, w) for n, w in self.model.named_parameters() if w.requires_grad or not trained]
        for bucket in _buckets(named):
            with self._gathered([weight for _, weight in bucket]):
                for name, weight in bucket:
                    yield name, weight.detach()

    def _gathered(self, weights: Sequence[Tensor], *, written_by: int | None = None) -> Any:
        """Within this context the weights are whole; what one rank writes to them all ranks have afterwards."""
        return self.library.zero.GatheredParameters(weights, modifier_rank=written_by, enabled=self.divides)

    @torch.no_grad()
    def move_towards(self, other: DeepSpeedBackend, share: float) -> None:
        """Each weight becomes (1 - share) of itself and `share` of the other's, which is spread alike."""
        pairs = zip(self.model.named_parameters(), other.model.parameters(), strict=True)
        theirs_of = {name: theirs for (name, _), theirs in pairs}
        for bucket in _buckets(list(self.model.named_parameters())):
            own, theirs = [weight for _, weight in bucket], [theirs_of[name] for name, _ in bucket]
            with self._gathered(theirs), self._gathered(own, written_by=0):
                for one, another in zip(own, theirs, strict=True):
                    one.data.lerp_(another.data.to(one.dtype), share)

    def export_weights(self, folder: Path) -> None:
        """The weights, in the type they are trained in; those of a value head in a folder of their own."""
        kept.require_finite(self._own_parts(), self.arithmetic.device)
        for name, buffer in self.model.named_buffers() if self.outline is not self.model else ():
            _set_buffer(self.outline, name, buffer)
        kept.write_model(self.outline, self.tokenizer, folder, self.weights(trained=has_adapter(self.model)))
        if self.value_head is not None:
            with self._gathered([self.value_head.weight]):
                if dist.get_rank() == 0:
                    save_head(self.value_head, folder / CRITIC_FOLDER)

    def _own_parts(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.whole.named_parameters():
            if weight.requires_grad:
                yield name, getattr(weight, "ds_tensor", weight)

    # --- checkpoints --------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """The whole model's weights as transformers or peft load them, and the optimizer's state, written by rank 0."""
        self.export_weights(folder)
        if self._begun is not None:
            write_moments(self._moments(), folder)
        dist.barrier()  # whoever led may seal the folder now

    def load(self, folder: Path) -> None:
        """Exactly what `save` wrote, on however many ranks. Raises CheckpointError."""
        found: dict[str, Tensor] = {}
        if dist.get_rank() == 0:
            found = {f"model.{name}": tensor for name, tensor in saved_weights(self.outline, folder).items()}
        if self.value_head is not None:
            own = nn.Linear(self.value_head.in_features, 1, bias=False)
            load_head(own, folder / CRITIC_FOLDER)
            found["value_head.weight"] = own.weight.detach()
        self._set_weights(found)
        if self._begun is not None:
            self.engine.optimizer.refresh_fp32_params()
            self._set_moments(folder)

    @torch.no_grad()
    def _set_weights(self, found: Mapping[str, Tensor]) -> None:
        """Set what rank 0 has found, on all ranks."""
        names: list[Any] = [set(found)]
        dist.broadcast_object_list(names, 0)
        for name, tensor in [*self.whole.named_parameters(), *self.whole.named_buffers()]:
            if name not in names[0]:
                continue
            with self._gathered([tensor] if isinstance(tensor, nn.Parameter) else [], written_by=0):
                if dist.get_rank() == 0:
                    tensor.data.copy_(found[name])
                if not hasattr(tensor, "ds_id"):
                    dist.broadcast(tensor.data, 0)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.whole.named_parameters() if weight.requires_grad]

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """The state of the optimizer under names of its own, each whole and on the CPU; made by all ranks together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.steps:
            self._link_moments()
        for name, weight in self._trained():
            if weight.dtype != torch.float32:
                yield f"{name}.{MASTER}", safe_get_full_fp32_param(weight).cpu()
            if self.steps:
                yield f"{name}.step", torch.tensor(float(self.steps))
                for key in MOMENTS:
                    yield f"{name}.{key}", safe_get_full_optimizer_state(weight, key).cpu()

    def _set_moments(self, folder: Path) -> None:
        """Set this rank's part of the optimizer's state. Raises CheckpointError where it is for other weights."""
        shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in self._trained()}
        saved = Moments(folder, shapes)
        self.steps = saved.steps
        if self.steps:
            self._make_moments()
        for name, weight in self._trained():
            if weight.dtype != torch.float32:
                self._set_state(weight, saved.read(f"{name}.{MASTER}"), None)
            for key in MOMENTS if self.steps else ():
                self._set_state(weight, saved.read(f"{name}.{key}"), key)

    def _make_moments(self) -> None:
        """An optimizer that has made no step yet has none; DeepSpeed keeps one flat tensor for many weights."""
        zero = self.engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.divides else zero.single_partition_of_fp32_groups
        for part in flat:
            moments = {key: torch.zeros_like(part) for key in MOMENTS}
            # A tensor on the device, as AdamW itself keeps it when it is fused.
            step = torch.tensor(float(self.steps), device=part.device)
            zero.optimizer.state[part] = {"step": step, **moments}
        self._link_moments()

    def _link_moments(self) -> None:
        """Let weights find their moments: DeepSpeed does so once, when only those of its first group are there."""
        if not self.divides:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_state(self, weight: nn.Parameter, values: Tensor, key: str | None) -> None:
        """Set a moment of a weight, or its float32 numbers, to values that are whole."""
        from deepspeed import utils

        if not self.divides:
            set_whole = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
            set_whole(weight, values, *([] if key is None else [key]))
            return
        # The last rank's part may reach beyond the end.
        size, flat = weight.ds_tensor.numel(), values.flatten()
        own = torch.zeros(size, dtype=values.dtype)
        there = flat[dist.get_rank() * size : (dist.get_rank() + 1) * size]
        own[: len(there)] = there
        set_part = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
        set_part(weight, own, *([] if key is None else [key]))

    # --- the accelerator ----------------------------------------------------------------------------------

    def offload(self) -> None:
        """Move the optimizer's state to the CPU, and a model that is whole and not trained; other weights stay."""
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        """Move them back."""
        self._move(self.arithmetic.device)

    def _move(self, device: torch.device) -> None:
        if self.engine is None:
            super()._move(device)
        elif self._begun is not None and self.config.offload == "none":
            for state in self.engine.optimizer.optimizer.state.values():
                state.update({key: state[key].to(device) for key in MOMENTS if key in state})

    def describe(self) -> dict[str, Any]:
        """Device, precision, attention, how much is trained, and how it is divided."""
        trainable, total = self.summary
        return {**super().describe(), "parameters": total, "trainable": trainable, "zero_stage": self.config.zero_stage}


def _solidify(model: nn.Module) -> None:
    """Give the weights of a hollow model (see `models.hollow`) addresses of their own; memory comes as they are
    written to."""
    for weight in model.parameters():
        if not weight.is_contiguous():
            weight.data = torch.empty(weight.shape, dtype=weight.dtype)


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    within, _, last = name.rpartition(".")
    setattr(model.get_submodule(within), last, buffer)


def _buckets(named: Sequence[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in lists of at most `BUCKET_BYTES`, or of a single one that is larger."""
    bucket: list[tuple[str, Tensor]] = []
    filled = 0
    for name, weight in named:
        size = getattr(weight, "ds_numel", weight.numel()) * weight.element_size()
        if bucket and filled + size > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, weight))
        filled += size
    if bucket:
        yield bucket


def _flat(outputs: Mapping[Any, Tensor]) -> Tensor:
    """All outputs that have a gradient in one tensor [n]: ZeRO-3 counts on every rank's backward pass to come back to
    each module as often as the others', whichever outputs a loss looks at."""
    return torch.cat([value.reshape(-1) for value in outputs.values() if value.requires_grad])


def _unflat(flat: Tensor, outputs: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The outputs again, as parts of what `_flat` made of them."""
    parts = iter(flat.split([value.numel() for value in outputs.values() if value.requires_grad]))
    return {name: next(parts).view_as(value) if value.requires_grad else value for name, value in outputs.items()}


def _library(device: torch.device) -> Any:
    """DeepSpeed, on this device, without anything that would have to be compiled.

    Raises ConfigError where it is not installed.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "backend.use is deepspeed, but the package deepspeed is not installed; install it (pip install -e "
            "'.[deepspeed]' in the checkout of whet), or set backend.use to fsdp"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # Sums in memory that processes on a CPU share: a minute of compilation for what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
