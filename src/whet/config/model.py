"""Settings of the model: where it comes from, which of its weights are trained."""

import re
from typing import Literal

from pydantic import Field, field_validator

from whet.config.base import Config

INIT = re.compile(r"default|gaussian|pissa|pissa_niter_[1-9]\d*|olora")
"""What an adapter can begin as."""


class AdapterConfig(Config):
    """A low-rank adapter (LoRA, arXiv:2106.09685) in place of training all weights."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    rank: int = Field(default=8, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / rank, or with `rslora` by alpha / sqrt(rank)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input during training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, a regular expression, or `all-linear`."""
    rslora: bool = False
    """Scale by the root of the rank, so that higher ranks learn as fast (arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of each row of the weights apart from its direction (DoRA, arXiv:2402.09353)."""
    init: str = "default"
    """What the matrices begin as: `default` (uniform, and zero), `gaussian` (normal, and zero), `pissa` (the
    principal singular vectors of the weights, arXiv:2404.02948), `pissa_niter_N` (the same, found approximately
    in N rounds, which is much faster) or `olora` (orthonormal columns, arXiv:2406.01775)."""

    @field_validator("init")
    @classmethod
    def _is_known(cls, init: str) -> str:
        if INIT.fullmatch(init) is None:
            raise ValueError(
                f"{init!r} is not among default, gaussian, pissa, pissa_niter_N (as in pissa_niter_16), olora"
            )
        return init


class QuantizationConfig(Config):
    """Frozen weights of few bits beneath an adapter (QLoRA, arXiv:2305.14314), through bitsandbytes."""

    bits: Literal[4, 8] = 4
    """Bits of a weight. With 8, a GPU rounds the inputs of layers to 8 bits as well."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a 4-bit weight: spaced as a normal distribution, or as floating-point numbers."""
    double: bool = True
    """Quantise the scales of the blocks of 4-bit weights too: 0.4 bits less per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which 4-bit weights are multiplied with their inputs; `auto` is `model.dtype`."""


class FreezeConfig(Config):
    """Weights that are kept as they are."""

    layers: int | list[int] = 0
    """Freeze the first N decoder layers (a number), or the layers at these indices (a list)."""
    patterns: list[str] = Field(default_factory=list)
    """Freeze every parameter whose name matches one of these regular expressions."""
    embeddings: bool = False
    """Freeze the input embeddings (and the head, where the two are tied)."""


class ModelConfig(Config):
    """The model that is trained."""

    path: str
    """Folder of a transformers model, or its name on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights held for training. float32 master weights go with `backend.precision`."""
    attention: Literal["auto", "tree", "packed", "rows"] = "auto"
    """How a batch goes through the model: shared prefixes once (`tree`), sequences side by side without
    padding (`packed`), or padded rows through the model's own attention (`rows`). `auto` takes the
    first that agrees with the model's own forward and says which."""
    chat_template: str | None = None
    """A Jinja chat template, or a file holding one, in place of the tokenizer's."""
    adapter: AdapterConfig | None = None
    """Train a low-rank adapter in place of the weights."""
    quantization: QuantizationConfig | None = None
    """Hold the weights of linear layers in 4 or 8 bits. They are frozen: training needs an adapter as well."""
    freeze: FreezeConfig = FreezeConfig()
    """Weights to leave alone."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
