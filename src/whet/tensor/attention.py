"""Our attention inside stock transformers models: one registered function that asks a context what to do.

A context travels as a keyword argument of the model's forward call and decides how the tokens of that
call attend to one another: `segments.Segments` for training batches, the cache of the embedded engine
for decoding. No model code is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

NAME = "whet"


class AttentionContext(Protocol):
    """How the tokens of one forward call attend to one another."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options
    ) -> Tensor:
        """query [B, H, Q, D]; key and value [B, Hkv, Q, D], this call's own. Returns [B, Q, H, D].

        `module.layer_idx` names the layer. `options` are what the model passes on to any attention
        function (`sliding_window`, `softcap`, `s_aux`, …).
        """
        ...


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, attention_context=None, **options):
    assert attention_context is not None, "the model runs with whet's attention but was given no attention_context"
    return attention_context.attend(module, query, key, value, scaling, **options), None


def _no_mask(*args, **kwargs):
    return None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)


_configs: WeakKeyDictionary[PreTrainedModel, list[PreTrainedConfig]] = WeakKeyDictionary()


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model attends by the `attention_context` given to its forward call.

    Call it as `decoder(input_ids=…, position_ids=…, attention_mask=None, use_cache=False,
    attention_context=context)`.
    """
    # To look through all modules, as transformers' own switch does, takes as long as a layer takes to decode a token.
    if model not in _configs:
        _configs[model] = _switchable(model)
    configs = _configs[model]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def _switchable(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations, of the model and of models inside it, that transformers lets our attention be set in."""
    found = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in found.values()]
    model.set_attn_implementation(NAME)
    switched = [config for config, _ in before if config._attn_implementation == NAME]
    for config, own in before:
        config._attn_implementation = own
    return switched
