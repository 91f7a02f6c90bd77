"""A training step rehearsed on tensors without content: which memory is alive when, by the model's own code.

The model is made from its configuration alone, with a few of its layers, and run forward and backward on PyTorch's
fake tensors, which have shapes and no content. What is alive is counted storage by storage. Layers are alike, so that
two depths tell any depth.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from whet.config.model import ModelConfig
from whet.models import adapters
from whet.models.parts import base, decoder, head
from whet.tensor.attention import attention
from whet.tensor.logits import BLOCK_ELEMENTS

logger = logging.getLogger(__name__)

SMALL = 32 * 2**20
"""Blocks from this size on are given back to the system when they are freed, whatever came before (glibc's
DEFAULT_MMAP_THRESHOLD_MAX on 64 bits); smaller ones come to lie in a heap."""
DEPTHS = (2, 3)
"""Layers of the two rehearsals. One layer alone would hide what is only alive between layers."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch: `tokens` that the model runs on, `looks` at which the head is read.

    `again` says whether gradients of an earlier micro-batch of the step are there already; `gathered`, whether
    attention gathers its keys and queries (sequences too short for calls of their own).
    """

    tokens: int
    looks: int
    again: bool = False
    gathered: bool = True


@dataclass(frozen=True)
class Peaks:
    """Bytes alive beside weights and optimizer, at the most: `activations` when the forward pass is done, of which
    `small` in blocks of less than SMALL; `top` while the head and the last layer are run (with the gradients so far),
    and `rest` from then to the end of the backward pass, when all gradients are there."""

    activations: float
    small: float
    top: float
    rest: float

    def along(self, other: Peaks, steps: float) -> Peaks:
        """What lies `steps` further in the direction from this one to the other."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(Peaks))
        return Peaks(*(one + (two - one) * steps for one, two in pairs))


def rehearse(
    cfg: ModelConfig,
    config: PreTrainedConfig,
    micro: Micro,
    *,
    autocast: torch.dtype | None,
    checkpointing: bool,
    chunk_mb: int,
) -> Peaks:
    """Peaks of one micro-batch of a training step.

    Raises whatever a model's code raises that cannot run without content.
    """
    depth = config.get_text_config().num_hidden_layers
    # DeepSeek's first layers are unlike the others: they have no experts.
    unlike = getattr(config.get_text_config(), "first_k_dense_replace", None) or 0
    depths = sorted({min(depth, unlike + d) for d in DEPTHS})
    found = []
    with _quietly():
        for layers in depths:
            model = _shortened(cfg, config, layers)
            if checkpointing:
                _checkpoint(model)
            found.append(_Rehearsal(model, micro, autocast, chunk_mb).run())
    if len(found) == 1:
        return found[0]
    return found[0].along(found[1], depth - depths[0])


def _shortened(cfg: ModelConfig, config: PreTrainedConfig, layers: int) -> nn.Module:
    """The model with its first few layers, as fake tensors on the CPU, adapter and freezing in place."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return _faked(outline(cfg, config)).train()


def outline(cfg: ModelConfig, config: PreTrainedConfig) -> nn.Module:
    """The model on the meta device: all its parameters, with shapes and without content.

    The adapter is in place, and what quantisation or `model.freeze.embeddings` leaves alone is frozen.
    """
    with _quietly(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=cfg.trust_remote_code, dtype=getattr(torch, cfg.dtype)
        )
        if cfg.adapter is not None:
            model = adapters.add_adapter(model, cfg.adapter)
        elif cfg.quantization is not None:
            model.requires_grad_(False)
        if cfg.freeze.embeddings:
            base(model).get_input_embeddings().requires_grad_(False)
    return model


def _faked(model: nn.Module) -> nn.Module:
    """The model with fake tensors on the CPU in place of those on the meta device: autocast knows the former only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is not None and id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if held is module._parameters else new
                    held[name] = None if old is None else made[id(old)]
    return model


def _checkpoint(model: nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _quietly() -> Iterator[None]:
    """Models warn of what they are asked for; the run itself will say it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Rehearsal:
    """One forward and backward pass over fake tensors, with what is alive."""

    def __init__(self, model: nn.Module, micro: Micro, autocast: torch.dtype | None, chunk_mb: int) -> None:
        self.model, self.micro, self.chunk_mb = model, micro, chunk_mb
        self.fake = next(model.parameters()).fake_mode
        self.autocast = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        self.live = Live([*model.parameters(), *model.buffers()])

    def run(self) -> Peaks:
        """Peaks of this depth."""
        with self.fake:
            tokens = torch.zeros(1, self.micro.tokens, dtype=torch.long)
            looks = torch.zeros(self.micro.looks, dtype=torch.long)
        with attention(base(self.model)), self.fake, self.live:
            if self.micro.again:
                self._step(tokens, looks)
            return Peaks(*self._step(tokens, looks))

    def _step(self, tokens: Tensor, looks: Tensor) -> tuple[float, float, float, float]:
        passed: list[float] = []  # the peak when the gradient leaves the last layer
        watch = self._watch_last_layer(lambda: passed.append(self.live.mark()))
        before, small_before = self.live.now, self.live.small
        self.live.mark()
        values, held, small = self._forward(tokens, looks)
        values.sum().backward()
        watch.remove()
        ended = self.live.mark()
        return held - before, small - small_before, *((passed[0], ended) if passed else (ended, ended))

    def _forward(self, tokens: Tensor, looks: Tensor) -> tuple[Tensor, float, float]:
        """What is read off the head, and the bytes alive after the decoder, in all and in small blocks."""
        with self.autocast:
            hidden = decoder(self.model)(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=None,
                use_cache=False,
                attention_context=_AttentionOfPlaces(self.micro.gathered),
            ).last_hidden_state[0]
            held = self.live.now, self.live.small
            weight = head(self.model).weight
            rows = max(1, self.chunk_mb * 2**20 // (4 * len(weight)))
            rows = -(-len(looks) // -(-len(looks) // rows))  # as few chunks as can be, all about as long
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
            return _HeadOfPlaces.apply(hidden[looks], weight, rows, dtype), *held

    def _watch_last_layer(self, passed: Any) -> Any:
        seen: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple, options: dict) -> None:
            given = arguments[0] if arguments else options.get("hidden_states")
            if not seen and isinstance(given, Tensor) and given.requires_grad:
                seen.append(given)
                given.register_hook(lambda gradient: passed())

        return adapters.decoder_layers(self.model)[-1].register_forward_pre_hook(before, with_kwargs=True)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as they are alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.small = 0
        self._peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = {id(storage) for storage in self._known}

    def mark(self) -> float:
        """The most that was alive since the last mark."""
        peak, self._peak = self._peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # a model that looks at its input before it runs; there is no content to be found
        product = _grouped_product if func is torch.ops.aten._grouped_mm.default else func
        out = product(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        size = storage.nbytes()
        self._add(size)
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.now += size
        self.small += size if abs(size) < SMALL else 0


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """The empty result of products of experts with their tokens, which PyTorch's own fakes know in bf16 alone."""
    rows = [len(offs)] if left.ndim == right.ndim else []
    return left.new_empty(*rows, left.shape[-2], right.shape[-1])


class _AttentionOfPlaces:
    """An attention context that holds what `tensor.segments` holds, and computes nothing."""

    def __init__(self, gathered: bool) -> None:
        self.gathered = gathered

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options: Any
    ) -> Tensor:
        """query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, P, H, D] (see AttentionContext)."""
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        return _AttentionMemory.apply(query, key, value, self.gathered)[..., : value.shape[-1]]


class _AttentionMemory(torch.autograd.Function):
    """Allocates as `tensor.segments` does: by token, queries, keys, values and the output are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, gathered: bool) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        _taken = [x.clone() for x in (query, key, value)] if gathered else []
        _part = query.new_empty(query.shape)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.gathered = gathered
        return out.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, value, out, _ = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        _taken = [x.clone() for x in (query, key, value, out, grad_outputs[0][0])] if ctx.gathered else []
        _parts = [torch.empty_like(x) for x in (query, key, value)]
        return *(grad.transpose(0, 1).unsqueeze(0) for grad in grads), None


class _HeadOfPlaces(torch.autograd.Function):
    """Allocates as `tensor.head` does: one chunk of logits, kept for the backward pass, and a few blocks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        _operands = hidden.to(dtype), weight.to(dtype)
        chunk = hidden.new_empty((rows, len(weight)), dtype=torch.float32)
        _product = _as(dtype, chunk)
        _blocks = chunk.new_empty(_BLOCKS * BLOCK_ELEMENTS)
        ctx.save_for_backward(hidden, weight)
        ctx.chunk, ctx.dtype = chunk, dtype
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        chunk, ctx.chunk = ctx.chunk, None
        _operands = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        _blocks = chunk.new_empty(_BLOCKS * BLOCK_ELEMENTS)
        grad = chunk.to(ctx.dtype)
        if grad_weight is not None:
            _product = _as(grad.dtype, grad_weight)
        return grad_hidden, grad_weight, None, None


_BLOCKS = 3
"""Blocks of working memory beside the chunk: log-softmax, softmax, and a product."""


def _as(dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """What a product takes that is computed in another type than it is kept in."""
    return None if dtype == like.dtype else like.new_empty(like.shape, dtype=dtype)
