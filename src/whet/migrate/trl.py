"""TRL: a YAML file as its command line reads it, or a script that holds such a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.config.names import did_you_mean
from whet.config.problems import refuse
from whet.config.written import Document, read_document
from whet.errors import ConfigError
from whet.migrate.datasets import hub_name
from whet.migrate.draft import Draft, evaluated_every, named
from whet.migrate.launch import beside_the_file, launched, several
from whet.migrate.shell import Word, command_with, flags_of, read_script

TRAINERS: Mapping[str, str] = {
    **{name: name for name in ("sft", "reward", "dpo", "kto", "cpo", "orpo", "gkd", "grpo", "rloo", "bco")},
    **{"reward_modeling": "reward", "cpo-simpo": "cpo", "simpo": "cpo"},
}
"""What a command, a script or `--method` can be called -> the trainer."""
_OTHERS = ("ppo", "online_dpo", "nash_md", "xpo", "prm", "distillation", "gold", "async_grpo")

_TELLS: Mapping[str, tuple[str, ...]] = {
    "gkd": ("lmbda", "seq_kd", "teacher_model_name_or_path"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "reward": ("center_rewards_coefficient",),
    "grpo": ("num_generations", "reward_funcs", "epsilon", "epsilon_high", "scale_rewards"),
    "dpo": ("f_divergence_type", "use_weighting", "ld_alpha", "rpo_alpha", "loss_weights", "discopop_tau"),
}
"""Trainer -> names that it has and those before it do not, so the first that is met decides."""
_SUPERVISED = ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field", "packing_strategy")
_LOSSES = {"kto": "kto", "apo_zero_unpaired": "kto", "dft": "sft", "chunked_nll": "sft", "simpo": "cpo"}
_LOSSES |= dict.fromkeys(("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"), "grpo")

_RATES = {"sft": 2e-5, "gkd": 2e-5, "reward": 1e-4}
_PEFT = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": ["q_proj", "v_proj"]}
_COMMON: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "weight_decay": 0.0}
_OF_TRAINER: Mapping[str, dict[str, Any]] = {
    "cpo": {"beta": 0.1},
    "gkd": {"beta": 0.5, "lmbda": 0.5, "temperature": 0.9, "max_new_tokens": 128},
    "grpo": {"loss_type": "dapo", "epsilon": 0.2, "max_completion_length": 512},
    "rloo": {"num_generations": 2, "beta": 0.05, "max_completion_length": 512},
}
"""TRL's defaults (version 1.16) that the result of a run depends on."""


def read(path: str, method: str | None = None) -> Draft:
    """A YAML file, or a script with a `trl …` or `… dpo.py` command, as a draft.

    `method` names the trainer where the file does not tell. Raises ConfigError with file and line for what
    cannot be read, and where the trainer cannot be told.
    """
    draft = Draft("TRL", path)
    command = None if path.endswith((".yaml", ".yml")) else _command(draft, path)
    if command is None:
        _add_document(draft, read_document(path))
    trainer, source = _trainer(draft, method, command)
    _unfold(draft)
    _data(draft)
    _adapter(draft, source)
    draft.method, draft.method_source = trainer, source
    draft.defaults |= _COMMON | {"learning_rate": _RATES.get(trainer, 1e-6)} | _OF_TRAINER.get(trainer, {})
    if trainer in ("grpo", "rloo"):
        _rollouts(draft, trainer, source)
    else:
        draft.defaults["max_length"] = 1024
        many_devices(draft)
    beside_the_file(draft)
    several(draft)
    _vllm(draft)
    if trainer == "cpo":
        _cpo(draft, source)
    if trainer == "sft" and not draft.value("assistant_only_loss"):
        draft.remarks.append(
            "TRL trains on every token of `messages` unless assistant_only_loss is true, whet on the assistant's: "
            "set data.train_on: all to keep TRL's way (rows of prompt and completion are alike in both)"
        )
    evaluated_every(draft, logging_steps=10)
    if not draft.value("sync_ref_model"):
        for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
            draft.pass_over(name, "TRL reads it only with sync_ref_model: true")
    if draft.value("f_divergence_type", "reverse_kl") != "alpha_divergence":
        draft.pass_over("f_alpha_divergence_coef", "TRL reads it only with f_divergence_type: alpha_divergence")
    return draft


def _add_document(draft: Draft, document: Document) -> None:
    refuse(list(document.problems), draft.file)
    for name, value in document.values.items():
        draft.add(name.replace("-", "_"), value, document.origin.at((name,)))


def _command(draft: Draft, path: str) -> str | None:
    """Take the flags of the command in a script; returns the word that names the trainer, or None without one."""
    script = read_script(path)
    names = {**TRAINERS, **{f"{name}.py": trainer for name, trainer in TRAINERS.items()}}
    others = {other: None for name in _OTHERS for other in (name, f"{name}.py")}
    found = command_with(script, {**names, **others})
    if found is None:
        if Path(path).suffix in ("", ".sh", ".txt"):
            raise ConfigError(
                f"{path}: there is no command `trl dpo …` or `… dpo.py` in it; give the file that holds it"
            )
        return None
    words, at = found
    launcher, _ = flags_of(words[:at])
    flags, _ = flags_of(words[at + 1 :])
    for config in flags.pop("config", [])[1:2]:
        _add_document(draft, read_document(_beside(path, config)))
    for name, given in flags.items():
        draft.add_flag(name, given)
    launched(draft, launcher, lambda word: _beside(path, word))
    return words[at].text.rpartition("/")[2]


def _beside(path: str, word: Word) -> str:
    """A file that a script names: from the working directory, or from the script's own folder."""
    beside = Path(path).parent / word.text
    return str(beside) if not Path(word.text).is_file() and beside.is_file() else word.text


def _trainer(draft: Draft, method: str | None, command: str | None) -> tuple[str, str]:
    """The trainer and how it is known: said, named by the command, told by a name or by the file's own name."""
    word = command.removesuffix(".py") if command else None
    for name, source in ((method, "--method"), (word, f"the command in {draft.file}")):
        if name is not None and name not in TRAINERS:
            raise ConfigError(
                f"{draft.file}: {name} (from {source}) is no trainer that has a counterpart, as {', '.join(TRAINERS)} "
                f"have{did_you_mean(name, TRAINERS)}"
            )
        if name is not None:
            return TRAINERS[name], source
    loss = draft.value("loss_type")
    if isinstance(loss, str) and loss in _LOSSES:
        return _LOSSES[loss], named("loss_type", draft.names["loss_type"].source)
    for trainer, names in _TELLS.items():
        if name := next((name for name in names if name in draft.names), None):
            return trainer, named(name, draft.names[name].source)
    for part in Path(draft.file).stem.lower().replace("-", "_").split("_"):
        if part in TRAINERS:
            draft.remarks.append(f"the method is taken from the file's name; if it is not {part}, say it with --method")
            return TRAINERS[part], f"the name of {draft.file}"
    if loss is not None:
        draft.remarks.append(
            "loss_type names a loss on pairs that several trainers have; if it is not dpo, say --method"
        )
        return "dpo", named("loss_type", draft.names["loss_type"].source)
    if name := next((name for name in _SUPERVISED if name in draft.names), None):
        return "sft", named(name, draft.names[name].source)
    raise ConfigError(
        f"{draft.file}: nothing in it tells which of TRL's trainers it is for; say it, as in --method dpo "
        f"(there is {', '.join(TRAINERS)})"
    )


def _unfold(draft: Draft) -> None:
    """Take apart what holds names itself, and settle names that mean something else here."""
    if kwargs := draft.take("model_init_kwargs"):
        values = kwargs.value if isinstance(kwargs.value, dict) else {}
        for name, value in values.items():
            draft.add({"revision": "model_revision"}.get(str(name), str(name)), value, kwargs.source)
    if kwargs := draft.take("teacher_model_init_kwargs"):
        values = dict(kwargs.value) if isinstance(kwargs.value, dict) else {}
        dtype = values.pop("dtype", None) or values.pop("torch_dtype", None)
        if isinstance(dtype, str):
            draft.set("distill.dtype", dtype.removeprefix("torch."), named("teacher_model_init_kwargs", kwargs.source))
        for name, value in values.items():
            draft.add(str(name), value, kwargs.source)
            draft.lose(str(name), "of the teacher's arguments only dtype has a counterpart; see the section distill")
    if optimizer := draft.value("optim"):
        why = "AdamW is the optimizer"
        settle = draft.pass_over if "adamw" in str(optimizer) and "bit" not in str(optimizer) else draft.lose
        settle("optim", why)
    draft.lose("env", "variables of the environment are set where the command is given")
    for name in ("dtype", "torch_dtype"):
        if draft.value(name) == "auto":
            draft.lose(name, "weights held for training are float32 unless model.dtype says otherwise; set it")
    if draft.value("attn_implementation"):
        draft.pass_over("attn_implementation", "attention is whet's own (model.attention)")


def _data(draft: Draft) -> None:
    """The data set and its splits become `data.train` and `data.eval`."""
    evaluates = draft.value("eval_strategy", "no") not in ("no", False, None)
    config, test = draft.take("dataset_config"), draft.take("dataset_test_split")
    train, name = draft.take("dataset_train_split"), draft.take("dataset_name")
    draft.lose("dataset_streaming", "rows are prepared before the first step and kept on disk")
    subset = config.value if config else None
    if name is not None:
        source = named("dataset_name", name.source)
        draft.set("data.train", hub_name(name.value, subset, train.value if train else "train", source), source)
        if evaluates:
            draft.set("data.eval", hub_name(name.value, subset, test.value if test else "test", source), source)
    mixture = draft.take("datasets")
    if mixture is not None and isinstance(mixture.value, list):
        source = named("datasets", mixture.source)
        draft.set("data.train", [path for one in mixture.value for path in _of_mixture(draft, one, source)], source)
    draft.lose("streaming", "rows are prepared before the first step and kept on disk")
    share = draft.take("test_split_size")
    if share is not None and share.value is not None:
        draft.set("data.eval_share", share.value, named("test_split_size", share.source))


def _of_mixture(draft: Draft, one: Any, source: str) -> list[str]:
    if not isinstance(one, dict) or not isinstance(one.get("path"), str):
        raise ConfigError(f"{source}: each of datasets is a mapping with a path, got {one!r}")
    for name in ("columns", "fraction", "data_dir"):
        if one.get(name) is not None:
            draft.add(f"datasets.{name}", one[name], source)
            draft.lose(
                f"datasets.{name}", "files are read whole; take a slice with path@[0:1000], or write the part out"
            )
    files = one.get("data_files")
    if isinstance(files, str | list):
        return [files] if isinstance(files, str) else files
    return [hub_name(one["path"], one.get("name"), one.get("split", "train"), source)]


def _adapter(draft: Draft, method_source: str) -> None:
    """TRL reads the names of an adapter only with `use_peft`."""
    if draft.value("use_peft"):
        draft.defaults |= _PEFT
        if "lora_target_modules" not in draft.names:
            draft.remarks.append(
                "lora_target_modules is left to peft in TRL, which takes q_proj and v_proj of most models; all-linear "
                "learns more"
            )
        return
    draft.take("use_peft")
    for name in [name for name in draft.names if name.startswith("lora_") or name in ("use_rslora", "use_dora")]:
        draft.pass_over(name, "TRL reads it only with use_peft: true")


def many_devices(draft: Draft) -> None:
    """Say that a step was larger by the number of devices: here it is the same however many there are."""
    written = draft.names.get("num_processes")
    if written is not None and written.value > 1:
        draft.remarks.append(
            f"the step of {written.value} devices ({written.source}) was that many times as large: multiply "
            f"train.accumulation by {written.value} to keep it"
        )


def _rollouts(draft: Draft, trainer: str, source: str) -> None:
    """TRL counts completions per device, whet prompts per step."""
    size = draft.number("per_device_train_batch_size", 8)
    accumulation = draft.number("gradient_accumulation_steps", 1)
    group = draft.number("num_generations", 2 if trainer == "rloo" else 8)
    processes = draft.number("num_processes", 1)
    steps = draft.number("steps_per_generation", accumulation)
    total = size * processes * steps
    if draft.value("generation_batch_size"):
        total = draft.number("generation_batch_size", total)
        steps = max(1, total // (size * processes))
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    written = [one for one in map(draft.take, (*names, "generation_batch_size")) if one is not None]
    draft.defaults.pop("per_device_train_batch_size")
    where = named(str(written[0].path[0]), written[0].source) if written else "TRL's default"
    if total % group:
        raise ConfigError(
            f"{draft.file}: a step has {total} completions ({where}), which are no whole groups of num_generations "
            f"{group}; correct one of them"
        )
    draft.set("rollout.prompts_per_step", total // group, where)
    if steps > accumulation:
        draft.set("rollout.optimizer_steps", max(1, steps // accumulation), where)
    if trainer == "rloo" and draft.value("num_iterations", 1) != 1:
        draft.set("loss.use", "ppo_clip", named("num_iterations", draft.names["num_iterations"].source))
    elif trainer == "rloo":
        for name in ("epsilon", "epsilon_high"):
            draft.pass_over(name, "samples are trained on once, so the ratio is 1 and nothing is cut")
    if draft.value("loss_type") == "cispo":
        draft.pass_over("epsilon", "the ratio has no lower limit in cispo")
        if written := draft.take("epsilon_high"):
            draft.set("loss.clip_high", written.value - 1, named("epsilon_high", written.source))
    elif draft.value("loss_type") == "sapo":
        for name in ("epsilon", "epsilon_high"):
            draft.pass_over(name, "sapo has no limits; its gate has temperatures")
    elif draft.value("importance_sampling_level") == "sequence":
        draft.remarks.append(
            "ratios of sequences are loss gspo, which TRL clips by epsilon as tokens; see loss.clip_low"
        )
    _rewards(draft)


def _vllm(draft: Draft) -> None:
    """TRL reads the names of vLLM only with `use_vllm`; a server is told by host and port."""
    if not draft.value("use_vllm"):
        for name in [one for one in draft.names if one.startswith("vllm_")]:
            draft.pass_over(name, "TRL reads it only with use_vllm: true")
        return
    host, port = draft.take("vllm_server_host"), draft.take("vllm_server_port")
    if draft.value("vllm_mode", "server") != "server":
        return
    if "vllm_server_base_url" not in draft.names:
        told = host or port or draft.names["use_vllm"]
        address = f"http://{host.value if host else '127.0.0.1'}:{port.value if port else 8000}"
        draft.set("engine.address", address, named(str(told.path[0]), told.source))
    draft.pass_over("vllm_tensor_parallel_size", "the server runs already")


def _rewards(draft: Draft) -> None:
    rewards = draft.value("reward_funcs")
    listed = rewards if isinstance(rewards, list) else [rewards]
    if listed == ["accuracy_reward"]:
        written = draft.take("reward_funcs")
        assert written is not None, "it was just looked at"
        source = named("reward_funcs", written.source)
        draft.set("reward.use", "math", source)
        draft.set("data.columns.label", "solution", source)
        draft.remarks.append("accuracy_reward became the reward `math`, whose label is the column `solution`")
    draft.lose("reward_funcs", "a reward is a function of an episode here: async (episode) -> float; set reward.use")
    draft.lose("reward_model_name_or_path", "a reward is a function of an episode here; set reward.use")


def _cpo(draft: Draft, source: str) -> None:
    """SimPO is a loss of TRL's CPO, which adds the cross-entropy of the chosen unless `cpo_alpha` is 0."""
    if draft.value("loss_type") != "simpo":
        draft.pass_over("simpo_gamma", "TRL reads it only with loss_type: simpo")
        return
    written = draft.take("loss_type")
    assert written is not None, "it was just looked at"
    alone = draft.value("cpo_alpha", 1.0) == 0
    draft.method, draft.method_source = ("simpo" if alone else "cpo-simpo"), named("loss_type", written.source)
    draft.defaults["simpo_gamma"] = 0.5
    if "cpo_alpha" not in draft.names:
        draft.remarks.append(
            "TRL's CPO with loss_type simpo silently adds the cross-entropy of the chosen (cpo_alpha is 1 by default), "
            "so this is method cpo-simpo; for SimPO as published use method simpo"
        )
