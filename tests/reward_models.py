"""Tiny reward models for tests: a folder as `whet reward` leaves it, with a head that is drawn at random."""

from __future__ import annotations

from pathlib import Path

import torch

from whet.config.model import AdapterConfig, ModelConfig
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer


def make_reward_model(base: Path, folder: Path, *, adapter: bool = False) -> Path:
    """A reward model over the language model in `base`, whole or as an adapter."""
    config = ModelConfig(path=str(base), adapter=AdapterConfig(rank=2) if adapter else None)
    torch.manual_seed(3)
    model = load_model(config, torch.device("cpu"), scores=True)
    folder.mkdir(parents=True)
    save_model(model, load_tokenizer(config), folder)
    return folder
