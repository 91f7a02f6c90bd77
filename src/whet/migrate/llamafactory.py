"""LLaMA-Factory: a YAML file with the data sets that its `dataset_info.json` describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.config.names import show
from whet.config.problems import refuse
from whet.config.written import read_document
from whet.errors import ConfigError
from whet.migrate.datasets import DataSet, Unlike, describe, read_info
from whet.migrate.draft import Draft, Left, evaluated_every, named
from whet.migrate.launch import beside_the_file

_METHODS = {"pt": "sft", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_DEFAULTS = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-5, "weight_decay": 0.0}
_SIDES = ("kto_chosen_weight", "kto_rejected_weight")
_PAIRS = ("pref_loss", "dpo_label_smoothing")
_UNREAD = {
    "dpo": _SIDES,
    "kto": _PAIRS,
    **dict.fromkeys(("pt", "sft", "rm"), (*_SIDES, *_PAIRS, "pref_beta", "pref_ftx", "ref_model")),
}
"""Stage -> names of other stages, which it does not read."""
_ADAPTER = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_rslora",
    "use_dora",
    "pissa_init",
    "pissa_iter",
)


def read(path: str, dataset_dir: str | None = None) -> Draft:
    """A YAML file of LLaMA-Factory as a draft. `dataset_dir` stands in for the one that the file names.

    Raises ConfigError with file and line for what cannot be read.
    """
    draft = Draft("LLaMA-Factory", path)
    document = read_document(path)
    refuse(list(document.problems), path)
    for name, value in document.values.items():
        draft.add(name.replace("-", "_"), value, document.origin.at((name,)))
    _unlike_ours(draft)
    stage = _stage(draft)
    draft.defaults |= _DEFAULTS
    if draft.method in ("dpo", "simpo", "orpo"):
        draft.defaults["pref_beta"] = 0.1
    if draft.method == "simpo":
        draft.defaults["simpo_gamma"] = 0.5
    _adapter(draft)
    evaluated_every(draft, logging_steps=500)
    _data(draft, stage, dataset_dir)
    if stage == "pt":
        for name in ("packing", "neat_packing", "train_on_prompt"):
            draft.pass_over(name, "in stage pt every token is trained")
        draft.remarks.append(
            "in stage pt LLaMA-Factory joins all texts and cuts them into blocks of cutoff_len; here each row is a "
            "sequence, and what is beyond data.max_length is cut off: split long texts before"
        )
    if draft.method in ("simpo", "orpo"):
        draft.pass_over("ref_model", f"{draft.method} has no reference")
    return draft


def _unlike_ours(draft: Draft) -> None:
    """Names that sound like sections of ours, and names that only ask for what is done anyway."""
    if draft.value("optim") is not None:
        is_adamw = "adamw" in str(draft.value("optim")) and "bit" not in str(draft.value("optim"))
        (draft.pass_over if is_adamw else draft.lose)("optim", "AdamW is the optimizer")
    draft.lose("env", "variables of the environment are set where the command is given")
    if written := draft.take("ray_num_workers"):
        draft.set("cluster.num_processes", written.value, named("ray_num_workers", written.source))
        draft.set("cluster.address", "auto", named("ray_num_workers", written.source))
        if "deepspeed" not in draft.names:
            draft.set("backend.use", "fsdp", named("ray_num_workers", written.source))
    for name in ("ray_run_name", "ray_storage_path", "resources_per_worker", "placement_strategy"):
        draft.pass_over(name, "processes are placed as cluster says, and runs are kept under output_dir")
    beside_the_file(draft)
    if "deepspeed" in draft.names:
        draft.remarks.append("how many processes train is said by the command there, and by cluster.num_processes here")
    if draft.value("do_train") is False:
        draft.remarks.append("do_train is false in the file, so it evaluates or predicts only: see whet eval")


def _stage(draft: Draft) -> str:
    """Set the method; some values of `pref_loss` are methods of their own."""
    written = draft.take("stage")
    stage, source = (written.value, named("stage", written.source)) if written else ("sft", "LLaMA-Factory's default")
    if stage not in _METHODS:
        by_hand = (
            "has prompts, reward and batches that are set otherwise here; write a configuration for whet ppo yourself"
        )
        why = by_hand if stage == "ppo" else "is unknown"
        raise ConfigError(f"{source}: stage {stage!r} {why}")
    draft.method, draft.method_source = _METHODS[stage], source
    loss = draft.value("pref_loss")
    if stage == "dpo" and loss in ("simpo", "orpo"):
        taken = draft.take("pref_loss")
        assert taken is not None, "it was just looked at"
        draft.method, draft.method_source = str(loss), named("pref_loss", taken.source)
    if stage == "pt":
        draft.set("data.train_on", "all", source)
    for name in _UNREAD[str(stage)]:
        draft.pass_over(name, f"stage {stage} does not read it")
    if draft.method != "simpo":
        draft.pass_over("simpo_gamma", "LLaMA-Factory reads it only with pref_loss: simpo")
    return str(stage)


def _adapter(draft: Draft) -> None:
    """`lora` is the default, its alpha twice the rank; an adapter that is given is trained on."""
    kind = draft.value("finetuning_type", "lora")
    given = draft.value("adapter_name_or_path")
    if kind == "lora" and isinstance(given, str) and "," not in given and not draft.value("create_new_adapter"):
        _go_on(draft, given)
        return
    if kind == "lora":
        rank = draft.number("lora_rank", 8)
        draft.defaults |= {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 2 * rank}
        if draft.value("lora_alpha", 0) is None:
            draft.take("lora_alpha")
        return
    for name in _ADAPTER:
        draft.pass_over(name, f"LLaMA-Factory reads it only with finetuning_type: lora, and it is {kind}")


def _go_on(draft: Draft, adapter: str) -> None:
    """Train on with an adapter: its folder is the model, and says which base it lies on."""
    written, base = draft.take("adapter_name_or_path"), draft.take("model_name_or_path")
    assert written is not None, "it was just looked at"
    draft.set("model.path", adapter, named("adapter_name_or_path", written.source))
    for name in ("finetuning_type", *_ADAPTER):
        draft.pass_over(name, "the adapter at model.path is trained on as it is")
    if base is not None:
        draft.remarks.append(
            f"the base model is the one that {adapter}/adapter_config.json names; here it was {base.value}"
        )


def _data(draft: Draft, stage: str, dataset_dir: str | None) -> None:
    """The data sets become files and columns."""
    named_folder = draft.take("dataset_dir")
    folder = dataset_dir or str(named_folder.value if named_folder else "data")
    if not Path(folder).is_dir() and (Path(draft.file).parent / folder).is_dir():
        folder = str(Path(draft.file).parent / folder)
    limit = draft.take("max_samples")
    count = limit.value if limit else None
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"{limit.source if limit else ''}: max_samples is {show(count)}, expected a whole number")
    columns: dict[str, str] | None = None
    for name, setting in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        written = draft.take(name)
        if written is None or written.value is None:
            continue
        place = "" if folder == "ONLINE" else f", by {folder}/dataset_info.json"
        paths: list[str] = []
        for label in _names(name, written.value, written.source):
            one = _data_set(draft, label, folder, stage, count, written.source)
            if one is not None and columns is not None and one.columns != columns:
                why = (
                    f"its columns are {dict(one.columns)}, and those of the data sets before it {columns}; data.columns"
                )
                draft.lost.append(Left(label, None, written.source, f"{why} is one for all files: rename the columns"))
            elif one is not None:
                columns = dict(one.columns)
                paths += one.paths
                draft.remarks += one.remarks
        if paths:
            draft.set(setting, paths[0] if len(paths) == 1 else paths, named(name, written.source) + place)
    for ours, theirs in (columns or {}).items():
        draft.set(f"data.columns.{ours}", theirs, f"{folder}/dataset_info.json")


def _names(name: str, value: Any, source: str) -> list[str]:
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
        raise ConfigError(f"{source}: {name} is {show(value)}, expected names with commas between them")
    return names


def _data_set(draft: Draft, name: str, folder: str, stage: str, limit: int | None, source: str) -> DataSet | None:
    """One data set in our terms; where it cannot be read here, that is told and it is left out."""
    if folder == "ONLINE":
        return DataSet((name + (f"@[0:{limit}]" if limit else ""),), {})
    try:
        return describe(name, read_info(folder), folder, stage, limit)
    except Unlike as reason:
        draft.lost.append(Left(name, None, source, str(reason)))
        return None
