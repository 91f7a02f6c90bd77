"""What one device keeps of a micro-batch: rehearsed on its share of the heads and columns of every layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from whet.check.memory import held_by
from whet.check.rehearsal import Micro, Peaks, outline, rehearse
from whet.config.model import ModelConfig
from whet.models.shape import head_dim, kv_heads
from whet.models.source import adapter_base
from whet.plan.arrangement import Arrangement
from whet.plan.models import Sized, config_of

REHEARSED = 2048, 8192
"""Tokens of the two rehearsals from which any number is reckoned: what is alive grows with them."""


def peaks_of(model: Sized, how: Arrangement, micro: Micro, *, half: bool, chunk_mb: int) -> Peaks:
    """Bytes alive beside weights, gradients and optimizer, for the part of a micro-batch that a device has.

    `rest` is without gradients, other than that of `check.rehearsal`: how they are divided is the backend's.
    """
    tokens, looks = -(-micro.tokens // how.context), -(-micro.looks // how.context)

    def whole(tensor: int) -> Peaks:
        share, looked = _share(model, tensor, half), round(looks / tokens, 2)
        few, many = (_rehearsed(share, count, looked, how.checkpointing, chunk_mb) for count in REHEARSED)
        return few.along(many, (tokens - REHEARSED[0]) / (REHEARSED[1] - REHEARSED[0]))

    found = whole(1)
    if how.tensor > 1:  # a part is divided and a part is not: two divisions tell of any
        found = found.along(whole(2), (1 - 1 / how.tensor) / (1 - 1 / 2))
    scale = 1 / how.tensor if how.sequence else 1.0
    kept, top = found.activations * scale, found.top - found.activations
    return Peaks(kept, found.small * scale, kept + top, max(0.0, found.rest) * scale)


@dataclass(frozen=True)
class _Share:
    """A model with fewer heads and columns than it has; hashable, so that it is rehearsed once."""

    cfg: str
    sizes: tuple[tuple[str, Any], ...]


def _share(model: Sized, tensor: int, half: bool) -> _Share:
    text = model.text
    sizes: dict[str, Any] = {
        "num_attention_heads": text.num_attention_heads // tensor,
        "num_key_value_heads": max(1, kv_heads(text) // tensor),
        "intermediate_size": text.intermediate_size // tensor,
    }
    if getattr(text, "first_k_dense_replace", None):
        sizes["first_k_dense_replace"] = 1  # a few layers without experts among many are as good as one, and quicker
    if not getattr(text, "kv_lora_rank", None):
        sizes["head_dim"] = head_dim(text)  # not what follows from the number of heads
    # Sharding casts weights, and with them all that is computed; autocast, layer by layer, keeps more in float32.
    cfg = model.cfg.model_copy(update={"dtype": "bfloat16"} if half else {})
    return _Share(cfg.model_dump_json(), tuple(sizes.items()))


@lru_cache(maxsize=256)
def _rehearsed(share: _Share, tokens: int, looked: float, checkpointing: bool, chunk_mb: int) -> Peaks:
    cfg = ModelConfig.model_validate_json(share.cfg)
    settings = copy.deepcopy(config_of(adapter_base(cfg) or cfg))
    for name, value in share.sizes:
        setattr(settings.get_text_config(), name, value)
    micro = Micro(tokens, max(1, int(tokens * looked)), gathered=False)
    found = rehearse(cfg, settings, micro, autocast=None, checkpointing=checkpointing, chunk_mb=chunk_mb)
    return Peaks(found.activations, found.small, found.top, found.rest - held_by(outline(cfg, settings), cfg).trained)
