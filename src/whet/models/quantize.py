"""Weights in 4 or 8 bits through bitsandbytes, computed alike in training and evaluation."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from whet.config.model import ModelConfig
from whet.errors import ModelError

# It warns at its import, which is peft's too, of a kernel of the hub that is not there, and at every step of casts.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_installed(cfg: ModelConfig) -> None:
    """Raises ModelError where the model is to be quantised and there is no bitsandbytes to do it."""
    if cfg.quantization is not None and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization asks for {cfg.quantization.bits} bits, but the package bitsandbytes is not installed; "
            "install it (pip install -e '.[qlora]' in the checkout of whet), or remove model.quantization"
        )


def loading_options(cfg: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` must be told so that weights are quantised while they are read; nothing if unasked for.

    Linear layers are quantised, the head and the embeddings are not.
    Source: Dettmers et al. 2023 (arXiv:2305.14314); 8 bits: Dettmers et al. 2022 (arXiv:2208.07339).
    """
    wanted = cfg.quantization
    if wanted is None:
        return {}
    check_installed(cfg)
    options = BitsAndBytesConfig(
        load_in_4bit=wanted.bits == 4,
        load_in_8bit=wanted.bits == 8,
        bnb_4bit_quant_type=wanted.type,
        bnb_4bit_use_double_quant=wanted.double,
        bnb_4bit_compute_dtype=cfg.dtype if wanted.compute_dtype == "auto" else wanted.compute_dtype,
    )
    return {"quantization_config": options, "device_map": {"": device}}


def is_quantised(model: nn.Module) -> bool:
    """Whether the transformers model itself (not what is wrapped around it) holds quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; in 4 bits two share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def compute_alike(model: nn.Module) -> None:
    """Make quantised layers compute in evaluation what they compute in training.

    Left alone, the first evaluation on a CPU that knows bfloat16 repacks 4-bit weights for good, with rounded
    scales, and a layer that was repacked passes no gradient on. In 8 bits, evaluation on a CPU rounds the inputs
    too and training does not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        state = getattr(module, "state", None)
        if hasattr(state, "has_fp16_weights") and hasattr(state, "is_training"):
            always = property(lambda state: True, lambda state, value: None)
            state.__class__ = type("AlwaysTraining", (type(state),), {"is_training": always})
