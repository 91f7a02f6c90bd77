"""The backend of Megatron-Core, as one rank runs it; see `RankBackend`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from whet.backends.device import Arithmetic
from whet.backends.forward import Mode
from whet.backends.local import CRITIC_FOLDER
from whet.backends.megatron.files import HEAD, Files, write_folder
from whet.backends.megatron.model import build, check_sizes, set_up
from whet.backends.megatron.optimizer import Optimizer
from whet.backends.megatron.outputs import Compute
from whet.backends.megatron.settings import check_installed, check_options, transformer_config
from whet.backends.megatron.transfer import Transfer
from whet.batch import Batch
from whet.config.backend import BackendConfig
from whet.config.model import FreezeConfig, ModelConfig
from whet.config.optim import OptimConfig
from whet.errors import ConfigError, TrainingError
from whet.flops import ModelFlops, peak_flops
from whet.losses.base import PER_SEQUENCE, Output
from whet.methods import Term
from whet.models.scores import KEY as SCORE
from whet.models.scores import add_score_head, classifier_settings, load_head, save_head
from whet.models.source import adapter_base, load_config
from whet.ranks.layout import Layout
from whet.ranks.share import Share
from whet.tally import Tally
from whet.weights.megatron.blueprint import blueprint
from whet.weights.names import skeleton
from whet.weights.stored import Entry


class MegatronBackend:
    """This rank's part of a model that Megatron-Core computes.

    `model` is the transformers model without weights: configuration, names and shapes of the whole.
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
    ) -> None:
        _check(model, arithmetic, attention, optim)
        self.tokenizer, self.config, self.arithmetic, self.layout = tokenizer, config, arithmetic, layout
        self.scores, self.values = scores, values
        whole = load_config(model)
        self.blueprint = blueprint(whole)
        check_installed(self.blueprint)
        check_options(config.options, self.blueprint)
        check_sizes(self.blueprint, layout, config.sequence_parallel)
        set_up(config, torch.initial_seed() % 2**31)
        self.model = skeleton(whole.to_dict())
        if scores:
            add_score_head(self.model)
        self.model.requires_grad_(not frozen)
        self.counts = ModelFlops(self.model)
        settings = transformer_config(self.blueprint, config, arithmetic, extra=config.options)
        self.decoder = build(whole, self.blueprint, settings, values=values or scores, device=arithmetic.device)
        self.transfer = Transfer(self.decoder, self.blueprint)
        self.files = Files.of(model)
        self._read(self.files)
        chunk_mb = config.head_chunk_mb
        words = self.blueprint.vocab_size
        self.compute = Compute(self.decoder, vocab_size=words, temperature=temperature, chunk_mb=chunk_mb)
        self.shares_prefixes = attention != "packed"
        self.optimizer: Optimizer | None = None
        if optim is not None:
            self.optimizer = Optimizer(self.decoder, optim, config, arithmetic, config.options)
        else:
            self.decoder.requires_grad_(False)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device can reach at most; None where that is not known, and for CPUs."""
        if self.arithmetic.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.arithmetic.device)
        return peak_flops(name, self.arithmetic.autocast, self.arithmetic.matmul)

    # --- passes -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, share: Share, outputs: Set[Output]) -> tuple[Mapping[Any, Tensor], float]:
        """Outputs over the share's batch, on the CPU; empty where this stage is not the last."""
        self.decoder.eval()
        batch, results = share.batch, dict[Any, Tensor]()

        def collect(units: tuple[int, ...], micro: Batch, hidden: Tensor, **_: Any) -> None:
            found = self.compute.outputs(hidden, micro, outputs)
            sequences = torch.isin(batch.unit_ids, torch.tensor(units, dtype=torch.long))
            for name, values in found.items() if units else ():
                rows = sequences if name in PER_SEQUENCE else sequences[batch.sequence_ids]
                if name not in results:
                    results[name] = values.new_zeros(len(rows), *values.shape[1:], device="cpu")
                results[name][rows] = values.cpu()

        self._run(self.decoder, share, collect, forward_only=True, collect_non_loss_data=True)
        return results, self._flops(self.counts.forward, batch, outputs)

    def forward_backward(self, share: Share, terms: Sequence[Term]) -> tuple[Mapping[str, Any], float]:
        """Add the share's gradient; see `RankBackend`."""
        assert self.optimizer is not None, "this backend has no optimizer"
        self.decoder.train()
        tally = Tally(terms)
        outputs: frozenset[Output] = frozenset().union(*(term.outputs for term in terms))

        def loss(units: tuple[int, ...], micro: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            nothing = hidden.sum() * 0  # so that every rank goes back through its layers
            total = tally.add(self.compute.outputs(hidden, micro, outputs), micro) + nothing if units else nothing
            return total, torch.zeros((), dtype=torch.int, device=total.device), {}

        self._run(self.optimizer.model, share, loss, forward_only=False)
        return tally.state(), self._flops(self.counts.forward_backward, share.batch, outputs)

    def _run(self, model: nn.Module, share: Share, last: Any, **options: Any) -> None:
        """All micro-batches through the pipeline; `last(units, micro, hidden)` is called on its last stage."""

        def step(micros: Iterator[tuple[tuple[int, ...], Batch]], stage: nn.Module) -> tuple[Tensor, Any]:
            units, micro = next(micros)
            micro = micro.to(self.arithmetic.device)
            return self.compute.hidden(stage, micro), partial(last, units, micro)

        try:
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=share.micros(),
                model=[model],
                num_microbatches=len(share.micro_batches),
                seq_length=1,  # stages tell one another the shapes
                micro_batch_size=1,
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the GPU ran out of memory. In this order: lower backend.max_tokens_per_device (now "
                f"{self.config.max_tokens_per_device}); set backend.activation_checkpointing: true; set "
                "backend.sequence_parallel: true; raise backend.tensor_parallel or pipeline_parallel; lower "
                "data.max_length or rollout.max_tokens"
            ) from error

    def _flops(self, count: Any, batch: Batch, outputs: Set[Output]) -> float:
        looked = 0 if outputs <= {"values", *PER_SEQUENCE} else int(batch.num_trained.sum())
        return count(batch.tree, looked) / self.config.model_parallel

    def optim_step(self, lr: float) -> dict[str, float]:
        """Clip the gradient of all ranks, step, clear; returns `grad_norm` before clipping."""
        assert self.optimizer is not None, "this backend has no optimizer"
        return {"grad_norm": self.optimizer.step(lr)}

    def set_temperature(self, temperature: float) -> float:
        """Divide logits by this from now on. Returns what they were divided by before."""
        before, self.compute.temperature = self.compute.temperature, temperature
        return before

    # --- weights ------------------------------------------------------------------------------------------

    def weights(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name in the transformers model, full tensor) of every parameter, gathered one after the other."""
        if not trained or next(self.model.parameters()).requires_grad:
            yield from self.transfer.gather_parameters()

    def export_weights(self, folder: Path) -> None:
        """The whole model as transformers load it, streamed; a value head beside it in a folder of its own.

        Raises TrainingError, and writes nothing, where a weight is not finite.
        """
        self._require_finite()
        entries, tensors = self.transfer.entries(), self.transfer.gather()
        if self.scores:
            entries = {name: entry for name, entry in entries.items() if name != HEAD}
            entries[SCORE] = Entry(torch.float32, tuple(self.model.score.weight.shape))
            tensors = self._with_score(tensors)
        if dist.get_rank() == 0:
            write_folder(self.files.folder, entries, tensors, folder)
            self.tokenizer.save_pretrained(folder)
            if self.scores:
                _note(folder, classifier_settings(self.model, self.tokenizer))
        else:
            for _ in tensors:
                pass
        if self.values:
            head = self._head()
            if dist.get_rank() == 0:
                save_head(head, folder / CRITIC_FOLDER)

    def _with_score(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A reward model's head in place of that for words."""
        yield from ((name, tensor) for name, tensor in tensors if name != HEAD)
        yield SCORE, self._head().weight.detach()

    def _head(self) -> nn.Linear:
        """The value head, on every rank."""
        own = self.decoder.value_head
        width = self.model.config.hidden_size
        head = nn.Linear(width, 1, bias=False, device="meta")
        weight = self.transfer.from_last(None if own is None else own.weight, (1, width))
        head.weight = nn.Parameter(weight.cpu())
        return head

    def _require_finite(self) -> None:
        """What follows from NaN is NaN: a checkpoint of it must not take the place of a good one."""
        bad = [name for name, held in self.transfer.held.items() if not torch.isfinite(held.tensor).all()]
        told: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(told, bad[:1])
        if names := [name for one in told for name in one]:
            raise TrainingError(
                f"{names[0]} holds numbers that are not finite, so nothing was saved; go on from an earlier checkpoint "
                "with a lower optim.lr"
            )

    def save(self, folder: Path) -> None:
        """Weights as transformers load them, and the optimizer's state in Megatron's pieces."""
        self.export_weights(folder)
        if self.optimizer is not None:
            self.optimizer.save(folder)

    def load(self, folder: Path) -> None:
        """Go back to what `save` wrote, with whatever layout."""
        self._read(Files(folder))
        if self.values and self.decoder.value_head is not None:
            load_head(self.decoder.value_head, folder / CRITIC_FOLDER)
        if self.optimizer is not None:
            self.optimizer.reload()
            self.optimizer.load(folder)

    def _read(self, files: Files) -> None:
        """Weights from a folder; of one that has no head for scores, a new head is left as it is."""
        without = {"output_layer.weight"} if self.scores and HEAD not in files else set()
        self.transfer.load(files.read, without=without)
        if self.scores and self.decoder.value_head is not None and (score := files.score) is not None:
            with torch.no_grad():
                self.decoder.value_head.weight.copy_(score)

    @torch.no_grad()
    def move_towards(self, other: MegatronBackend, share: float) -> None:
        """Each weight becomes (1 - share) of itself and `share` of the other's."""
        for own, theirs in zip(self.decoder.parameters(), other.decoder.parameters(), strict=True):
            own.lerp_(theirs.to(own), share)

    # --- the device ---------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free the accelerator for an engine that shares it."""
        if self.arithmetic.device.type == "cpu":
            return
        if self.optimizer is not None:
            self.optimizer.offload()
        else:
            self.decoder.to("cpu")
        torch.cuda.empty_cache()

    def onload(self) -> None:
        """Take the accelerator back."""
        if self.arithmetic.device.type == "cpu":
            return
        if self.optimizer is not None:
            self.optimizer.onload()
        else:
            self.decoder.to(self.arithmetic.device)

    def describe(self) -> dict[str, Any]:
        """Device, precision, attention and how much is trained."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return {
            "device": str(self.arithmetic.device),
            "precision": str(self.arithmetic.autocast or torch.float32).removeprefix("torch."),
            "matmul": self.arithmetic.matmul,
            "threads": torch.get_num_threads(),
            "attention": "tree" if self.shares_prefixes else "packed",
            "parameters": total,
            "trainable": trained if self.optimizer is not None else 0,
        }


def _note(folder: Path, settings: Mapping[str, Any]) -> None:
    """Add settings to the configuration in a folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | dict(settings)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check(model: ModelConfig, arithmetic: Arithmetic, attention: str, optim: OptimConfig | None) -> None:
    """Raises ConfigError, with all of them, for what this backend cannot do."""
    problems = []
    if model.adapter is not None or adapter_base(model) is not None:
        problems.append("an adapter (model.adapter, or a model.path that holds one); use backend fsdp or deepspeed")
    if model.quantization is not None:
        problems.append("model.quantization; use backend fsdp or deepspeed")
    if optim is not None and model.freeze != FreezeConfig():
        problems.append("model.freeze; use backend fsdp")
    if arithmetic.autocast == torch.float16:
        problems.append("backend.precision fp16; use bf16")
    if attention == "rows":
        problems.append("model.attention rows; use auto, tree or packed")
    if problems:
        raise ConfigError("the backend megatron cannot do with " + "; nor with ".join(problems))
