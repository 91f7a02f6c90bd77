"""`whet merge`: an adapter added into plain weights, and what that changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whet.config.model import ModelConfig
from whet.errors import ModelError
from whet.models.adapters import has_adapter, load_adapter
from whet.models.export import save_model
from whet.models.load import load_model, load_tokenizer
from whet.models.parts import base, decoder, score_head
from whet.models.quantize import is_quantised
from whet.models.scores import is_reward_adapter
from whet.models.source import ADAPTER_CONFIG, TOKENIZERS, adapter_base, load_config

PROBE_TOKENS = 32
DTYPES = get_args(ModelConfig.model_fields["dtype"].annotation)


@dataclass(frozen=True)
class Merged:
    """What became of an adapter and its base."""

    base: str
    dtype: str
    outputs: str
    """What was compared: `logits`, or the `scores` of a reward model."""
    difference: float
    """Largest absolute difference of an output on a probe, with the adapter and merged."""
    largest: float
    """Largest absolute output on the probe."""


def merge_folder(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write the model that `adapter` and its base make together into `output`, as plain transformers load it.

    The base is the one that the adapter names, unless `base_model` does; it is loaded as it is, also where the
    adapter was trained on it quantised. Weights are merged and written in `dtype`, which is the base's own when
    not given. Raises ModelError before anything is loaded where the folders will not do.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    _check_folders(adapter, output)
    below = ModelConfig(path=str(adapter), trust_remote_code=trust_remote_code)
    below = below.model_copy(update={"path": base_model}) if base_model is not None else adapter_base(below)
    assert below is not None, "an adapter has a base"
    own = str(load_config(below).dtype).removeprefix("torch.")
    dtype = dtype or (own if own in DTYPES else "float32")
    below = below.model_copy(update={"dtype": dtype})
    has_tokenizer = any((adapter / name).is_file() for name in TOKENIZERS)
    tokenizer = load_tokenizer(below.model_copy(update={"path": str(adapter)}) if has_tokenizer else below)
    scored = is_reward_adapter(adapter)
    model = load_adapter(load_model(below, torch.device("cpu"), scores=scored), adapter)
    plain, difference, largest = merge(model)
    save_model(plain, tokenizer, output)
    return Merged(below.path, dtype, "scores" if scored else "logits", difference, largest)


@torch.no_grad()
def merge(model: nn.Module) -> tuple[PreTrainedModel, float, float]:
    """The model with its adapter added into plain weights; `model` itself is used up, no copy is made.

    Returns the plain model, the largest absolute difference of its logits (of a reward model: its scores) on a
    probe, and the largest of them: differences are about 1e-5 in float32, more in 16 bits, where the sums are
    rounded. Raises ModelError for quantised weights, and if a merged weight is not finite.
    """
    assert has_adapter(model), "merge of a model without adapter"
    if is_quantised(base(model)):
        raise ModelError(
            "the adapter cannot be merged into quantised weights: their few values do not hold its small steps; save "
            "the adapter and merge it into the model that was quantised (whet merge ADAPTER OUTPUT does)"
        )
    before = _outputs(model)
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {error}; go back to an earlier checkpoint") from error
    plain.requires_grad_(False)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain, float((before - _outputs(plain)).abs().max()), float(before.abs().max())


def _outputs(model: nn.Module) -> Tensor:
    """Logits [tokens, V] on a probe, or scores [tokens] of a model that has them."""
    inner = base(model)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    # A stride that is no divisor of common vocabulary sizes: tokens from all over it.
    tokens = torch.arange(PROBE_TOKENS, device=inner.device)[None] * 7919 % vocabulary
    model.eval()
    if hasattr(inner, "score"):
        hidden = decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state
        return score_head(model)(hidden[0].float())[:, 0]
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def _check_folders(adapter: Path, output: Path) -> None:
    if not (adapter / ADAPTER_CONFIG).is_file():
        what = "a complete model, with nothing to merge" if (adapter / "config.json").is_file() else "no adapter"
        raise ModelError(
            f"{adapter} holds {what}; give the folder of an adapter ({ADAPTER_CONFIG}), such as a run's output_dir"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise ModelError(f"{output} {what}; name a new folder for the merged model")
    present = next(folder for folder in output.absolute().parents if folder.exists())
    if not os.access(present, os.W_OK | os.X_OK):
        raise ModelError(f"{output} cannot be made: {present} is not writable; name another folder")
