"""The scalar head of a reward model: made, found in a folder, read from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from whet.config.model import ModelConfig
from whet.errors import CheckpointError, ModelError
from whet.models.source import ADAPTER_CONFIG, INDEXES, WEIGHTS, read_json

logger = logging.getLogger(__name__)

KEY = "score.weight"
"""The head's name in files, the one that transformers' own classes for sequence classification give it."""
CLASSIFIER = "ForSequenceClassification"
HEAD_FILE = "value_head.safetensors"


def add_score_head(model: PreTrainedModel, weight: Tensor | None = None) -> None:
    """Put `model.score`, a linear layer [H] -> [1], beside the language-model head, which is frozen.

    The layer is float32 whatever the model's dtype. Without `weight` [1, H] it is drawn as the model's family
    draws its layers: scores begin near zero, and unlike after a head of zeros the decoder learns from the first
    step on.
    """
    config = model.config.get_text_config()
    model.score = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32, device=model.device)
    with torch.no_grad():
        if weight is None:
            model.score.weight.normal_(std=getattr(config, "initializer_range", None) or 0.02)
        else:
            model.score.weight.copy_(weight)
    for name in head_names(model):
        model.get_parameter(name).requires_grad_(False)


def value_head(model: PreTrainedModel) -> nn.Linear:
    """A linear layer [H] -> [1] beside the model, not in it: float32, drawn as `add_score_head` draws its own."""
    config = model.config.get_text_config()
    head = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32, device=model.device)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", None) or 0.02)
    return head


def save_head(head: nn.Linear, folder: Path) -> None:
    """Write a value head into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({KEY: head.weight.detach().contiguous()}, folder / HEAD_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_head(head: nn.Linear, folder: Path) -> None:
    """Set a value head to what `save_head` wrote, bit for bit. Raises CheckpointError."""
    path = folder / HEAD_FILE
    try:
        weight = load_file(path)[KEY]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is it a checkpoint with a shared critic?") from error
    if weight.shape != head.weight.shape:
        raise CheckpointError(f"{path} holds a head {list(weight.shape)}, and the model's is {list(head.weight.shape)}")
    head.weight.copy_(weight)


def head_names(model: nn.Module) -> set[str]:
    """The parameters of the language-model head, but for those tied to the embeddings: scores do without them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return set()
    own = {id(parameter) for parameter in head.parameters() if parameter is not embedding.weight}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def read_score_head(cfg: ModelConfig, config: PreTrainedConfig) -> Tensor | None:
    """The head [1, H] that a model's files hold, None where they hold none.

    Raises ModelError for a classifier of several classes, and for one whose head goes by another name.
    """
    folder = _files_of(cfg)
    file = _file_with_head(folder) if folder is not None else None
    if file is None:
        if _is_classifier(config):
            raise ModelError(
                f"model.path is {cfg.path!r}, a {config.architectures[0]}, but its files hold no {KEY}; give a reward "
                "model whose head has that name, in safetensors, or a causal language model, which gets a new head"
            )
        return None
    with safe_open(file, framework="pt") as tensors:
        weight = tensors.get_tensor(KEY)
    if weight.dim() != 2 or len(weight) != 1:
        raise ModelError(
            f"model.path is {cfg.path!r}, whose {KEY} is {list(weight.shape)}, expected [1, hidden]; give a reward "
            "model with one score"
        )
    return weight


def refuse_reward_model(cfg: ModelConfig, config: PreTrainedConfig) -> None:
    """Raises ModelError for a reward model where a language model is wanted: it has lost its head for words."""
    folder = _files_of(cfg)
    if _is_classifier(config) or (folder is not None and _file_with_head(folder) is not None):
        raise ModelError(
            f"model.path is {cfg.path!r}, a reward model (it holds {KEY}), which gives scores and no words; give the "
            "language model that it was trained from"
        )


def is_reward_adapter(folder: Path) -> bool:
    """Whether the adapter in a folder brings a score head of its own."""
    saved = read_json(folder / ADAPTER_CONFIG)
    return saved.get("task_type") == "SEQ_CLS" or "score" in (saved.get("modules_to_save") or ())


def classifier_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `config.json` says for plain transformers to load the model with its head and to score its last token."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad == tokenizer.eos_token_id:
        logger.warning(
            "%s is both pad and end token: plain transformers takes the score before it", tokenizer.pad_token
        )
    settings: dict[str, Any] = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad}
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
    return settings if kind is None else {**settings, "architectures": [kind]}


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith(CLASSIFIER) for name in config.architectures or ())


def _files_of(cfg: ModelConfig) -> Path | None:
    """The folder that holds the model's files, in the hub's cache for a name on the hub; None before it is there."""
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        return folder
    cached = try_to_load_from_cache(cfg.path, "config.json", revision=cfg.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _file_with_head(folder: Path) -> Path | None:
    index, single = folder / INDEXES[0], folder / WEIGHTS[0]
    if single.is_file():
        with safe_open(single, framework="pt") as tensors:
            return single if KEY in tensors.keys() else None  # noqa: SIM118, it is no dictionary
    name = read_json(index).get("weight_map", {}).get(KEY) if index.is_file() else None
    return folder / name if name is not None and (folder / name).is_file() else None
