"""Where a model comes from: a folder or a name on the hub, and whether all of it is there."""

from __future__ import annotations

import functools
import json
import ssl
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from whet.config.model import ModelConfig
from whet.errors import ModelError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
ADAPTER_CONFIG = "adapter_config.json"
REACH_TIMEOUT_S = 10


def locate(cfg: ModelConfig) -> dict[str, Any]:
    """The arguments of every `from_pretrained` call for this model.

    A name on the hub that cannot be reached is served from the local cache. Raises ModelError, saying
    what was tried, where there is neither a folder nor a model of that name within reach.
    """
    folder = Path(cfg.path).expanduser()
    common = {"trust_remote_code": cfg.trust_remote_code}
    if folder.is_dir():
        return {"pretrained_model_name_or_path": str(folder.absolute()), "local_files_only": True, **common}
    if folder.exists():
        raise ModelError(f"model.path is {cfg.path!r}, a file; give the folder that holds config.json and the weights")
    try:
        validate_repo_id(cfg.path)
    except HFValidationError:
        raise ModelError(
            f"model.path is {cfg.path!r}, but there is no folder {folder.absolute()}; correct the path{_near(folder)}"
        ) from None
    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    if offline and not isinstance(try_to_load_from_cache(cfg.path, "config.json", revision=cfg.revision), str):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise ModelError(
            f"model.path is {cfg.path!r}: there is no folder {folder.absolute()}, the hub was not asked ({why}), and "
            f"its cache {constants.HF_HUB_CACHE} does not have it; give the folder of a model, or fetch it where "
            f"there is a network (hf download {cfg.path}) and give the folder it was put in{_near(folder)}"
        )
    return {
        "pretrained_model_name_or_path": cfg.path,
        "revision": cfg.revision or "main",
        "local_files_only": bool(offline),
        **common,
    }


def _near(folder: Path) -> str:
    """`; did you mean …?` with the folder most like one that is not there, among those beside its first wrong part."""
    parts = folder.absolute().parts
    depth = next(n for n in range(len(parts) - 1, 0, -1) if Path(*parts[:n]).is_dir())
    try:
        beside = [path.name for path in Path(*parts[:depth]).iterdir() if path.is_dir()]
    except PermissionError:
        return ""
    near = get_close_matches(parts[depth], beside, n=1)
    if not near:
        return ""
    meant = Path(*parts[:depth], near[0], *parts[depth + 1 :])
    meant = meant if meant.is_dir() else Path(*parts[:depth], near[0])
    return f"; did you mean {meant}?"


@functools.cache
def _reachable(endpoint: str) -> bool:
    """One question to the hub. transformers would ask five times for every file, for half a minute."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=REACH_TIMEOUT_S).close()
    except HTTPError:
        return True  # an answer, whatever it says
    except OSError as error:
        # Certificates are judged by the client that downloads: it may know others than this one.
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def adapter_base(cfg: ModelConfig) -> ModelConfig | None:
    """The base model of a folder that holds an adapter alone, None for any other model."""
    folder = Path(cfg.path).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"model.path is {cfg.path!r}, an adapter whose {ADAPTER_CONFIG} does not say which model it belongs to; "
            f"write that model's folder or name there as base_model_name_or_path"
        )
    return cfg.model_copy(update={"path": base, "revision": None})


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """The configuration of a causal language model. Raises ModelError for anything else."""
    source = locate(cfg)
    folder = Path(source["pretrained_model_name_or_path"])
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path is {cfg.path!r}, but {folder} has no config.json ({_listing(folder)}); "
            f"give the folder that save_pretrained wrote, or a checkpoint-N folder of a run"
        )
    try:
        config = AutoConfig.from_pretrained(**source)
    except (OSError, ValueError) as error:
        translate(cfg, "its configuration cannot be read", error)
    _check_architecture(cfg, config)
    return config


def _check_architecture(cfg: ModelConfig, config: PreTrainedConfig) -> None:
    kind = config.model_type
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # An encoder would load as a causal model and see the tokens it is asked to predict.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False
    if encoder or (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote):
        raise ModelError(
            f"model.path is {cfg.path!r}, a {kind!r} model ({', '.join(config.architectures or ['no architecture'])}), "
            f"which is no causal language model; use a decoder such as Qwen3 or Llama"
        )
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ModelError(
            f"model.path is {cfg.path!r}, whose weights are quantised ({method}) and cannot be trained; "
            f"give the model they were made from, with model.quantization to hold it in 4 bits"
        )


def check_weights(folder: Path) -> None:
    """Raises ModelError unless every weight file that the folder promises is there and not cut short."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    names = [name for name in WEIGHTS if (folder / name).is_file()][:1]
    if index is not None and not names:
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"{folder} lacks {', '.join(missing)}, named in {index.name}; copy or download them again")
    if not names:
        raise ModelError(
            f"{folder} has no weights: expected {WEIGHTS[0]} or {INDEXES[0]} ({_listing(folder)}); "
            f"copy or download them"
        )
    for name in names:
        if name.endswith(".safetensors"):
            _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    """The header says how long the file must be; half a download is found out without reading it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < size else {}
        except ValueError:
            header = {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or 8 + length + max(ends) != size:
        raise ModelError(f"{path} is damaged or cut short ({size} bytes); copy or download it again")


def check_tokenizer_files(cfg: ModelConfig) -> None:
    """Raises ModelError for a folder without tokenizer. transformers makes up an empty one, silently."""
    folder = Path(cfg.path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"model.path is {cfg.path!r}, but {folder} has no tokenizer ({_listing(folder)}); copy tokenizer.json and "
            f"tokenizer_config.json there from the model it was trained from"
        )


def translate(cfg: ModelConfig, what: str, error: Exception) -> NoReturn:
    """Raises ModelError with what transformers said, and what to do about it."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        remedy = "set model.trust_remote_code: true if you trust the code that comes with it"
    else:
        remedy = "check model.path and model.revision, or copy the model again"
    said = said if len(said) < 400 else f"{said[:400]} …"
    raise ModelError(f"model.path is {cfg.path!r}, but {what}: {said}; {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, expected an object; copy or download it again")
    return found


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty"
