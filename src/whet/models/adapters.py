"""Which weights are trained: low-rank adapters in place of all weights, and weights that are frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from whet.config.model import AdapterConfig, FreezeConfig
from whet.errors import ModelError
from whet.models.initial import begin_as_weights, begins_as_weights, check_rank
from whet.models.parts import base, decoder, head
from whet.models.quantize import num_weights
from whet.models.scores import KEY, is_reward_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


def add_adapter(model: PreTrainedModel, cfg: AdapterConfig) -> nn.Module:
    """Wrap the model with a low-rank adapter; everything else is frozen, but for a score head.

    The adapter is float32 whatever the model's dtype: its steps are too small for 16 bits. It starts
    as no change at all, or up to rounding none. A score head is trained, and saved, whole.
    Raises ModelError for target modules that match nothing, or that hold the head, and for a rank that the
    layers do not have.
    """
    from peft import get_peft_model

    _check_targets(model, cfg.target_modules)
    anchored = begins_as_weights(cfg.init)
    try:
        wrapped = get_peft_model(model, _lora(cfg, is_scored=hasattr(model, "score")))
    except ValueError as error:
        raise ModelError(f"model.adapter.target_modules is {cfg.target_modules!r}, but peft says: {error}") from error
    head(wrapped)
    if anchored:
        check_rank(wrapped, cfg.init, cfg.rank)
        # On the meta device (a rehearsal) there are no weights to begin as.
        if wrapped.device.type != "meta":
            begin_as_weights(wrapped, cfg.init)
    wrapped.adapter_is_new = True
    return wrapped


def _lora(cfg: AdapterConfig, *, is_scored: bool) -> LoraConfig:
    from peft import LoraConfig

    rank, alpha, rslora = cfg.rank, cfg.alpha, cfg.rslora
    if begins_as_weights(cfg.init):
        # Twice the rank (see Anchored), scaled as the rank asked for.
        scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        rank, alpha, rslora = 2 * rank, 2 * rank * scale, False
    return LoraConfig(
        task_type="SEQ_CLS" if is_scored else "CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=cfg.dropout,
        target_modules=cfg.target_modules,
        use_rslora=rslora,
        use_dora=cfg.dora,
        init_lora_weights="gaussian" if cfg.init == "gaussian" else True,
    )


def load_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """Put the adapter saved in `folder` on top of the model, ready to be trained on.

    A model with a score head keeps its own where the adapter brings none, and trains it whole.
    """
    from peft import PeftConfig, PeftModel

    try:
        if hasattr(model, "score") and not is_reward_adapter(folder):
            return _with_new_score_head(model, PeftConfig.from_pretrained(str(folder)), folder)
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        first, *others = [line.strip(" \t.") for line in str(error).splitlines()[:3]]
        said = f"{first} {others[0]} …" if others else first
        raise ModelError(
            f"the adapter in {folder} does not go with the base model {model.name_or_path!r}: {said}; give the base "
            "that it was trained on (base_model_name_or_path in its adapter_config.json)"
        ) from error


def _with_new_score_head(model: PreTrainedModel, config: PeftConfig, folder: Path) -> nn.Module:
    """The adapter of a language model, to go on as that of a reward model: peft insists on a head in its files."""
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    state = load_peft_weights(str(folder)) | {f"base_model.model.{KEY}": model.score.weight.detach().clone()}
    config.task_type, config.inference_mode = "SEQ_CLS", False
    wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, state)
    return wrapped


def reference_is_adapter_off(model: nn.Module) -> bool:
    """Whether `adapter_off` gives the model that the run began with.

    It does under a new adapter of any kind, also one that began as a part of the weights; it does not where an
    adapter of an earlier run is trained on.
    """
    return getattr(model, "adapter_is_new", False)


def freeze(model: nn.Module, cfg: FreezeConfig) -> None:
    """Freeze layers, matching parameters and embeddings, adapters inside them included.

    Raises ModelError for a layer that does not exist, a pattern that matches nothing, and when nothing
    is left to train.
    """
    layers = decoder_layers(model) if cfg.layers else []
    for index in _layer_indices(cfg.layers, len(layers)):
        layers[index].requires_grad_(False)
    named = dict(base(model).named_parameters())
    for pattern in cfg.patterns:
        matching = _compile(pattern, "model.freeze.patterns")
        found = [parameter for name, parameter in named.items() if matching.search(name)]
        if not found:
            raise ModelError(
                f"model.freeze.patterns has {pattern!r}, which matches no parameter{_nearest(pattern, named)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if cfg.embeddings:
        base(model).get_input_embeddings().requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("every weight is frozen and there is nothing to train; freeze less (model.freeze)")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the decoder, lowest first."""
    body = decoder(model)
    depth = base(model).config.get_text_config().num_hidden_layers
    for module in body.children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(
        f"{type(body).__name__} does not list its {depth} layers; freeze them by name with model.freeze.patterns"
    )


def trainable_summary(model: nn.Module) -> tuple[int, int]:
    """Number of trained weights, and of all weights. Tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(map(num_weights, parameters))


def has_adapter(model: nn.Module) -> bool:
    return base(model) is not model


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its own base: the reference policy, at no cost in memory."""
    assert has_adapter(model), "adapter_off on a model without adapter"
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        # On the way out peft makes every adapter weight trainable, the frozen ones too.
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Every name and every expression must match: peft is content if one of them does."""
    if targets == "all-linear":
        return
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)]
    if isinstance(targets, str):
        matching = _compile(targets, "model.adapter.target_modules")
        if not any(matching.fullmatch(name) for name in names):
            raise ModelError(
                f"model.adapter.target_modules is {targets!r}, a regular expression that matches no module's whole "
                f"name{_nearest(targets, names)}; a list ([{targets}]) gives the ends of names"
            )
        return
    if not targets:
        raise ModelError("model.adapter.target_modules is empty; name modules, or use 'all-linear'")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise ModelError(f"model.adapter.target_modules has {target!r}; expected among {', '.join(ends)}")


def _layer_indices(layers: int | list[int], depth: int) -> Iterable[int]:
    if isinstance(layers, int):
        if not 0 <= layers <= depth and layers != 0:
            raise ModelError(f"model.freeze.layers is {layers}, but the model has {depth} layers; give 0 to {depth}")
        return range(layers)
    if wrong := [index for index in layers if not 0 <= index < depth]:
        raise ModelError(
            f"model.freeze.layers has {wrong[0]}, but the model has layers 0 to {depth - 1}; correct the list"
        )
    return layers


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{where} has {pattern!r}, which is no regular expression: {error}") from error


def _nearest(pattern: str, names: Iterable[str]) -> str:
    # Layers repeat: one name of each kind is enough to choose from.
    kinds = {re.sub(r"\d+", "N", name): name for name in names}
    near = get_close_matches(pattern, kinds.values(), n=3, cutoff=0.0)
    return f"; the nearest are {', '.join(near)}" if near else ""
