"""The models of a run by their sizes alone, from a folder that may hold no weights, or from a known name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from whet.check.memory import Held, beside, held_by
from whet.check.rehearsal import outline
from whet.config.model import ModelConfig
from whet.config.run import RunConfig
from whet.errors import ModelError
from whet.flops import ModelFlops
from whet.methods import Method
from whet.models.source import adapter_base, load_config
from whet.plan.known import SHAPES, known_config
from whet.roles import critic_of


@dataclass(frozen=True)
class Sized:
    """A model that is not there: its settings, the bytes of its weights, and what it computes."""

    cfg: ModelConfig
    settings: PreTrainedConfig
    held: Held
    flops: ModelFlops
    parameters: float

    @property
    def text(self) -> PreTrainedConfig:
        return self.settings.get_text_config()

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that is not quantised."""
        return getattr(torch, self.cfg.dtype).itemsize


@dataclass(frozen=True)
class Models:
    """The models of a run; `frozen` are those that are only run forward, `rewards` those that score completions."""

    policy: Sized
    critic: Sized | None
    frozen: tuple[Sized, ...]
    rewards: tuple[Sized, ...]


def models_of(config: RunConfig, method: Method) -> Models:
    """All models of a run. Raises ModelError for one whose shape is not to be found."""
    critic = sized(critic_of(config)) if "critic" in method.trains else None
    rewards = config.reward if isinstance(config.reward, list) else [config.reward] if config.reward else []
    scored = [
        ModelConfig(path=options["path"], dtype=options.get("dtype", "float32"))
        for reward in rewards
        if reward.use == "model" and "path" in (options := reward.options)
    ]
    frozen = tuple(sized(cfg) for cfg in beside(config, method))
    return Models(sized(config.model), critic, frozen, tuple(map(sized, scored)))


def sized(cfg: ModelConfig) -> Sized:
    """A model by its configuration: made without content, on no device."""
    return _sized(cfg.model_dump_json())


@lru_cache(maxsize=32)
def _sized(written: str) -> Sized:
    cfg = ModelConfig.model_validate_json(written)
    settings = config_of(adapter_base(cfg) or cfg)
    model = outline(cfg, settings)
    parameters = float(sum(parameter.numel() for parameter in model.parameters()))
    return Sized(cfg, settings, held_by(model, cfg), ModelFlops(model), parameters)


def config_of(cfg: ModelConfig) -> PreTrainedConfig:
    """The configuration of a model: of its folder, else of its name if that is known, else from the hub."""
    if not Path(cfg.path).expanduser().is_dir() and (found := known_config(cfg.path)) is not None:
        return found
    try:
        return load_config(cfg)
    except ModelError as error:
        names = ", ".join(SHAPES)
        raise ModelError(
            f"{error}; for a plan, a folder that holds config.json is enough, or one of the names {names}"
        ) from None
