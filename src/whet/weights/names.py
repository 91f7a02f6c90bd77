"""Names and shapes of weights: as a model in memory has them, and as the files of its family do.

Some families are kept in other tensors than those they compute with: the experts of a mixture are one tensor each in
files, and fused into one per layer in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from whet.errors import ModelError


def in_files(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names, and divided into the tensors, of the model's files, one in memory at a time.

    Weights that are tied to others are left out, as files leave them out.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name, tensor in weights:
        if name not in tied:
            yield from revert_weight_conversion(model, {name: tensor}).items()


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """The causal language model of a configuration file, without weights.

    Raises ModelError for a family that transformers do not know.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"config.json names the model type {kind!r}, which transformers do not know; convert its folder as "
            "safetensors, whose tensors need no model"
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(dict(config)))
        except ValueError as error:
            raise ModelError(f"config.json describes no causal language model: {error}") from error


def parameter_names(model: nn.Module) -> set[str]:
    """What a model in memory must be given: the names of its state, but for those tied to others."""
    return set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", {}))
