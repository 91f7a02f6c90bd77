"""A model's folder on disk, read tensor by tensor into the ranks and written from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from whet.config.model import ModelConfig
from whet.errors import ModelError
from whet.models.scores import KEY as SCORE
from whet.models.source import INDEXES, WEIGHTS, check_weights, locate, read_json
from whet.weights.arguments import read_arguments, with_dtype
from whet.weights.hf import write
from whet.weights.stored import Entry, Stored

HEAD = "lm_head.weight"


class Files:
    """The safetensors of a folder, each tensor by its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / INDEXES[0], folder / WEIGHTS[0]
        if not index.is_file() and not single.is_file():
            raise ModelError(f"{folder} has no safetensors; convert it first (whet convert {folder} OUTPUT --to hf)")
        check_weights(folder)
        if index.is_file() and not single.is_file():
            self._places: Mapping[str, str] = read_json(index)["weight_map"]
        else:
            with safe_open(single, framework="pt") as file:
                self._places = dict.fromkeys(file.keys(), single.name)

    @classmethod
    def of(cls, model: ModelConfig) -> Files:
        """Those of `model.path`, fetched from the hub if it is a name there."""
        where = locate(model)
        folder = Path(where["pretrained_model_name_or_path"])
        if not folder.is_dir():
            wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            options = {"revision": model.revision, "local_files_only": where["local_files_only"]}
            folder = Path(snapshot_download(model.path, allow_patterns=wanted, **options))
        return cls(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ModelError where the folder has none of that name."""
        if name not in self._places:
            raise ModelError(f"{self.folder} lacks {name}; give a complete causal language model")
        with safe_open(self.folder / self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    @property
    def score(self) -> Tensor | None:
        """[1, H] the head of a reward model, None where the folder has none."""
        return self.read(SCORE) if SCORE in self else None


def write_folder(
    source: Path, entries: Mapping[str, Entry], tensors: Iterator[tuple[str, Tensor]], folder: Path
) -> None:
    """Write these tensors, one at a time, with the small files that lie beside the weights in `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = with_dtype(read_arguments(source), _main_type(entries))
    write(Stored(entries, lambda: tensors, arguments), folder)


def _main_type(entries: Mapping[str, Entry]) -> torch.dtype:
    """The type of most of the numbers."""
    sizes: dict[torch.dtype, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
