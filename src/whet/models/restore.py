"""Read weights that `save_model` wrote back into a model that is there already."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from whet.errors import CheckpointError
from whet.models.adapters import has_adapter
from whet.models.export import ADAPTER_WEIGHTS
from whet.models.scores import head_names


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Set every weight (of the adapter, if there is one) to what `folder` holds, bit for bit.

    Raises CheckpointError when a file is missing or holds other weights than the model has.
    """
    folder = Path(folder)
    names = [ADAPTER_WEIGHTS] if has_adapter(model) else sorted(p.name for p in folder.glob("model*.safetensors"))
    if not names or not all((folder / name).is_file() for name in names):
        missing_file = names[0] if names else "model.safetensors"
        raise CheckpointError(f"{folder} holds no {missing_file}; is it a checkpoint of this run?")
    state = {key: tensor for name in names for key, tensor in load_file(folder / name).items()}
    remedy = "it was saved from another model or with another adapter"
    missing: list[str] = []
    try:
        if has_adapter(model):
            from peft import set_peft_model_state_dict

            unexpected = set_peft_model_state_dict(model, state).unexpected_keys
        else:
            missing, unexpected = model.load_state_dict(state, strict=False)
            unsaved = set(getattr(model, "all_tied_weights_keys", {}))
            if hasattr(model, "score"):
                unsaved |= head_names(model)
            missing = [key for key in missing if key not in unsaved]
    except RuntimeError as error:  # tensors of another shape
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{folder} does not fit the model: {first}; {remedy}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing[:3]}, unknown {list(unexpected)[:3]}; {remedy}"
        )
