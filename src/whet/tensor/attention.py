"""Our attention inside stock transformers models: one registered function that asks a context what to do.

A context travels as a keyword argument of the model's forward call and decides how the tokens of that
call attend to one another: `segments.Segments` for training batches, the cache of the embedded engine
for decoding. No model code is changed.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

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


@contextmanager
def attention(model: PreTrainedModel):
    """Within this context the model attends by the `attention_context` given to its forward call.

    Call it as `decoder(input_ids=…, position_ids=…, attention_mask=None, use_cache=False,
    attention_context=context)`.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "eager")
