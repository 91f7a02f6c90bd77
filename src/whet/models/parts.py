"""The two parts of a causal language model that we call apart: its decoder, and the head that makes logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whet.errors import ModelError

# Names under which models of transformers keep the limit of a tanh over their logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """A linear layer from hidden states to logits, and what the model does to them afterwards.

    `scale` multiplies the logits, then `softcap` bounds them: softcap * tanh(logits / softcap).
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear) -> Tensor:
        """hidden [..., H] -> float32 logits [..., V], as the model's own forward gives them.

        `linear` computes the layer itself, where that is done otherwise.
        """
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def base(model: nn.Module) -> nn.Module:
    """The transformers model itself, below an adapter's wrapping if there is one."""
    # By name, not by type: peft takes a second to import and most runs have no adapter.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """The module whose call returns `last_hidden_state` [B, T, H]: all of the model but its head.

    An adapter's layers lie inside it. Raises ModelError for a model that does not have one.
    """
    inner = base(model)
    found = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if found is inner:  # Llama 4 names another part than the one it has
        found = getattr(inner, "model", inner)
    if found is inner:
        raise ModelError(f"{type(inner).__name__} has no decoder apart from its head; use a causal language model")
    return found


def head(model: nn.Module) -> Head:
    """How the model turns hidden states into logits. Raises ModelError for a head that is not one linear layer."""
    inner = base(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head; use a causal language model")
    if hasattr(module, "base_layer"):
        raise ModelError(
            "the language-model head carries an adapter, but the loss needs its plain weights; "
            "leave the head out of model.adapter.target_modules ('all-linear' does)"
        )
    return Head(module, module.weight, getattr(module, "bias", None), _scale(inner), _softcap(inner))


def score_head(model: nn.Module) -> nn.Module:
    """The linear layer [H] -> [1] of a reward model. Raises ModelError for a model without one."""
    module = getattr(base(model), "score", None)
    if module is None:
        raise ModelError(f"{type(base(model)).__name__} has no score head; load it as a reward model")
    return module


def _scale(model: nn.Module) -> float:
    """What logits are multiplied by, under whichever name the family keeps it."""
    config = model.config.get_text_config()
    # Cohere. Read from the model: other configurations (MPT) carry the name and do not apply it.
    scale = float(getattr(model, "logit_scale", None) or 1.0)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        # Granite and MiniCPM3 divide by what HyperCLOVA X multiplies with.
        scale *= scaling if config.model_type.startswith("hyperclovax") else 1.0 / scaling
    scale *= getattr(decoder(model), "lm_head_multiplier", 1.0)  # Falcon-H1
    return scale * getattr(config, "output_multiplier", 1.0)  # Muse


def _softcap(model: nn.Module) -> float | None:
    config = model.config.get_text_config()
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    return next((float(cap) for cap in caps if cap is not None), None)
