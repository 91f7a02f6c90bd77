"""Checkpoints of Megatron-Core ("torch_dist"), which a Megatron of any layout of ranks loads, and which it writes.

The same files as torch.distributed.checkpoint's, with Megatron's names and tensors in them: those of all layers as one
where the layers are alike. Beside them stand the arguments that Megatron's own scripts take from a checkpoint, and the
small files of the Hugging Face folder, so that the way back needs nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from whet.errors import ModelError
from whet.models.source import read_json
from whet.weights.arguments import CONFIG, config_of, read_arguments, write_arguments
from whet.weights.megatron.blueprint import Blueprint, blueprint
from whet.weights.megatron.names import Weight, join, separate, weights_of
from whet.weights.megatron.pieces import Pieces, PiecesWriter
from whet.weights.stored import Entry, Layout, Stored, checked, digest

NAME = "megatron"
LATEST = "latest_checkpointed_iteration.txt"
"""Says which folder is the newest: `release`, or the number N of `iter_000000N`."""
RELEASE = "release"
ABOUT = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON = "common.pt"
TOLD = "whet.json"
"""Beside the arguments: checksums and the files of the folder that it was made from."""
FOLDER = "hf"
"""Where the small files of the Hugging Face folder stand."""


def recognise(folder: Path) -> bool:
    """Whether this is the folder of a Megatron run, or one of the checkpoints in it."""
    return (folder / LATEST).is_file() or (folder / ABOUT).is_file()


def open_folder(folder: Path) -> Stored:
    """The model in a checkpoint, whatever layout of ranks wrote it.

    Raises ModelError for one that was not written to its end, that has no configuration beside it, or lacks weights of
    the model.
    """
    root, place = _newest(folder)
    reader = Pieces(place)
    found = next((where for where in (root / FOLDER, place / FOLDER, place, root) if (where / CONFIG).is_file()), None)
    if found is None:
        raise ModelError(
            f"{folder} has no {FOLDER}/{CONFIG}: Megatron's own arguments are not all that a Hugging Face model needs; "
            f"copy the folder of the model that it was made from there, as {root / FOLDER}"
        )
    arguments = read_arguments(found)
    model = _blueprint(arguments)
    # Megatron may have been told to keep layers apart.
    stacked = model.stacked and any(weight.key in reader for weight in weights_of(model) if weight.layer is not None)
    weights = list(weights_of(model, stacked=stacked))
    _check_complete(reader, weights, model, folder)
    told = read_json(found / TOLD) if (found / TOLD).is_file() else {"layout": None, "digests": {}}

    def read() -> Iterator[tuple[str, Tensor]]:
        for weight in weights:
            full = reader.read(weight.key, weight.index)
            full = full[: model.vocab_size] if weight.layer is None and full.dim() == 2 else full
            parts = separate(weight.how, full, model.settings)
            yield from zip(weight.sources, (part.contiguous() for part in parts), strict=True)

    layout = Layout(**told["layout"]) if told["layout"] else None
    return checked(Stored(_entries(reader, weights, model), read, arguments, layout, told["digests"]), folder)


def write(stored: Stored, folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint that Megatron-Core loads with any layout of ranks, a few tensors in memory at a time.

    Files are of `shard_gb` gigabytes or little more. Raises ModelError for a model that there is no map for, or that
    holds other weights than its configuration says.
    """
    options = dict(options or {})
    shard_gb = options.pop("shard_gb", None)
    if options:
        raise ModelError(
            f"the format {NAME} has no option {', '.join(options)}: any layout of ranks loads what it writes"
        )
    model = _blueprint(stored.arguments)
    owners = {source: weight for weight in weights_of(model) for source in weight.sources}
    _check_same(stored, owners, model)
    place = folder / RELEASE
    place.mkdir()
    digests: dict[str, str] = {}
    waiting: dict[str, dict[str, Tensor]] = {}
    with PiecesWriter(place, shard_gb) as writer:
        for name, tensor in stored.read():
            digests[name] = digest(tensor)
            weight = owners[name]
            parts = waiting.setdefault(weight.name, {})
            parts[name] = tensor if len(weight.sources) == 1 else tensor.clone()
            if len(parts) == len(weight.sources):
                full = join(weight.how, [parts[source] for source in weight.sources], model.settings)
                writer.write(weight.key, weight.index, weight.of, full)
                del waiting[weight.name], parts, full
    _write_about(stored, model, place, digests)
    (folder / LATEST).write_text(RELEASE, encoding="utf-8")


def _write_about(stored: Stored, model: Blueprint, place: Path, digests: Mapping[str, str]) -> None:
    config = _config(stored.arguments)
    dtype = next(iter(stored.entries.values())).dtype
    torch.save(
        {
            "args": argparse.Namespace(**megatron_arguments(model, config, dtype)),
            "checkpoint_version": 3.0,
            "iteration": 0,
        },
        place / COMMON,
    )
    layout = stored.layout.to_json() if stored.layout is not None else None
    write_arguments(stored.arguments, place / FOLDER)
    told = {"layout": layout, "digests": dict(digests)}
    (place / FOLDER / TOLD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (place / ABOUT).write_text(json.dumps(FORMAT), encoding="utf-8")


def megatron_arguments(model: Blueprint, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What Megatron's scripts read with `--use-checkpoint-args`, under their names, as plain values."""
    settings, rope = dict(model.settings), config.rope_parameters
    renamed = {
        "group_query_attention": settings["num_query_groups"] != settings["num_attention_heads"],
        "norm_epsilon": settings.pop("layernorm_epsilon"),
        "num_experts": settings.pop("num_moe_experts", None),
        "swiglu": settings.pop("gated_linear_unit"),
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_seq_len_interpolation_factor": rope.get("factor") if rope["rope_type"] == "linear" else None,
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 8.0),
    }
    return {
        **settings,
        **renamed,
        "position_embedding_type": "rope",
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "untie_embeddings_and_output_weights": not model.tied,
        "padded_vocab_size": model.vocab_size,
        "vocab_size": model.vocab_size,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


def _newest(folder: Path) -> tuple[Path, Path]:
    """The folder of the run and that of its newest checkpoint, which may be the one that was given."""
    if not (folder / LATEST).is_file():
        return folder.parent, folder
    said = (folder / LATEST).read_text(encoding="utf-8").strip()
    place = folder / (said if said == RELEASE else f"iter_{int(said):07d}" if said.isdigit() else said)
    if not place.is_dir():
        raise ModelError(f"{folder / LATEST} says {said}, but there is no {place}; give one of the folders beside it")
    return folder, place


def _config(arguments: Mapping[str, bytes]) -> PreTrainedConfig:
    told = config_of(arguments)
    kind = told.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"config.json names the model type {kind!r}, which transformers do not know")
    return CONFIG_MAPPING[kind].from_dict(dict(told))


def _blueprint(arguments: Mapping[str, bytes]) -> Blueprint:
    return blueprint(_config(arguments))


def _check_same(stored: Stored, owners: Mapping[str, Weight], model: Blueprint) -> None:
    """Raises ModelError unless the folder holds the weights of the model and no others."""
    lacking, more = sorted(owners.keys() - stored.entries.keys()), sorted(stored.entries.keys() - owners.keys())
    if lacking:
        raise ModelError(f"the model lacks {len(lacking)} weights of a {model.family} ({lacking[0]} …); copy it again")
    if more:
        raise ModelError(
            f"the model has {len(more)} weights that Megatron-Core has no place for ({more[0]} …), such as those of "
            "quantised or further layers; load it with transformers and save it, in plain weights"
        )


def _check_complete(reader: Pieces, weights: list[Weight], model: Blueprint, folder: Path) -> None:
    """Raises ModelError where a checkpoint lacks a weight, or has one of another size."""
    wrong = [weight.key for weight in weights if not reader.fits(weight.key, weight.index, weight.of)]
    if wrong:
        raise ModelError(
            f"{folder} is no checkpoint of the {model.family} in its {CONFIG}: {len(wrong)} of its weights are missing "
            f"or of another shape ({wrong[0]} …); see whether {FOLDER}/{CONFIG} is of the same model"
        )


def _entries(reader: Pieces, weights: list[Weight], model: Blueprint) -> dict[str, Entry]:
    found = {}
    for weight in weights:
        dtype, shape = reader.entry(weight.key, weight.index)
        if weight.layer is None and len(shape) == 2:
            shape = (model.vocab_size, *shape[1:])
        parts = separate(weight.how, torch.empty(shape, dtype=dtype, device="meta"), model.settings)
        for name, part in zip(weight.sources, parts, strict=True):
            found[name] = Entry(part.dtype, tuple(part.shape))
    return found
