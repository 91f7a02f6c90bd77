"""Save a model so that plain transformers, or peft, load it with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from whet.errors import TrainingError
from whet.models.adapters import has_adapter
from whet.models.parts import base
from whet.models.scores import classifier_settings, head_names

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write weights, configuration, tokenizer and chat template into `folder`, which is made if need be.

    A model with an adapter leaves the adapter alone (`adapter_model.safetensors`), which names its
    base model; any other leaves `model.safetensors`, in shards if large. A reward model leaves its score head in
    place of the language-model head. Floating-point weights are written in `dtype` when given.
    Raises TrainingError, and writes nothing, where a trained weight is not finite.
    """
    _require_finite(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapter(model):
        _save_adapter(model, folder, dtype)
    else:
        _save_weights(model, tokenizer, folder, dtype)
    tokenizer.save_pretrained(folder)
    # safetensors writes files that only their owner may read; an engine may well run as someone else.
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _require_finite(model: nn.Module) -> None:
    """What follows from NaN is NaN: a checkpoint of it must not take the place of a good one."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"{name} holds numbers that are not finite, so nothing was saved; go on from an earlier checkpoint "
                "with a lower optim.lr"
            )


def _save_weights(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None):
    _name_pad(model, tokenizer)
    unused = unsaved_names(model)
    state = {name: tensor for name, tensor in _cast(model.state_dict(), dtype).items() if name not in unused}
    model.save_pretrained(folder, state_dict=state)
    # transformers writes the dtype of the model at hand, not that of the weights it was given.
    _amend_config(model, tokenizer, folder, {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})


def save_settings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Everything that `save_model` writes but the weights, for a model whose weights come by themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    _name_pad(model, tokenizer)
    told = {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    _amend_config(model, tokenizer, folder, told)
    tokenizer.save_pretrained(folder)


def unsaved_names(model: nn.Module) -> set[str]:
    """Weights that files go without: the head for words of a reward model."""
    return head_names(model) if hasattr(model, "score") else set()


def _name_pad(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def _amend_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: dict[str, Any]) -> None:
    """Settings, and those of a reward model, over what `config.json` says."""
    if hasattr(model, "score"):
        settings = {**settings, **classifier_settings(model, tokenizer)}
    if settings:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | settings
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_adapter(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    # Not model.save_pretrained: it adds a README of its own and may ask the hub about the embedding.
    from peft import get_peft_model_state_dict

    save_adapter(model, folder, _cast(get_peft_model_state_dict(model, save_embedding_layers=False), dtype))


def save_adapter(model: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write these weights of the model's adapter, named as peft names them, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    before = config.base_model_name_or_path, config.inference_mode
    # A folder is named whole: the adapter is loaded from other working folders than this one.
    local = Path(base(model).name_or_path).expanduser()
    config.base_model_name_or_path = str(local.absolute()) if local.is_dir() else base(model).name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.base_model_name_or_path, config.inference_mode = before


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors that share their memory (tied weights) still do so afterwards, so that they are written once."""
    if dtype is None:
        return state
    made: dict[tuple, Tensor] = {}
    for tensor in state.values():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        made.setdefault(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return {name: made[tensor.data_ptr(), tensor.shape, tensor.stride()] for name, tensor in state.items()}
