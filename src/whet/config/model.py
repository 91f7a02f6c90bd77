"""Settings of the model: where it comes from, which of its weights are trained."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class AdapterConfig(Config):
    """A low-rank adapter (LoRA, arXiv:2106.09685) in place of training all weights."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    rank: int = Field(default=8, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input during training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, a regular expression, or `all-linear`."""


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
    freeze: FreezeConfig = FreezeConfig()
    """Weights to leave alone."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
