"""slime: a launch script, with its arrays of arguments and the `ray job submit … train.py …` that they go to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whet.config.aliases import ALIASES
from whet.errors import ConfigError
from whet.migrate.draft import Draft, named
from whet.migrate.place import place
from whet.migrate.shell import Script, Word, command_with, flags_of, read_script

_AHEAD = "train_async.py"
"""The command that samples the next step while this one is trained."""
_TRAINERS = ("train.py", _AHEAD)
_DEFAULTS: Mapping[str, Any] = {
    "n_samples_per_prompt": 1,
    "rollout_shuffle": False,
    "input_key": "input",
    "eps_clip": 0.2,
}
"""slime's defaults that the result of a run depends on, where ours are others."""
_SFT = "sft_rollout"


def read(path: str) -> Draft:
    """A launch script as a draft. Nothing in it is run.

    Raises ConfigError with file and line for what cannot be read, and where there are no arguments in it.
    """
    draft = Draft("slime", path)
    script = read_script(path)
    for name, words in _arguments(draft, script).items():
        draft.add_flag(name, words)
    for file in script.missing:
        draft.remarks.append(f"{file} is not there, so it was not read; what it says of the model is not needed here")
    if script.branches:
        lines = ", ".join(map(str, script.branches))
        draft.remarks.append(f"conditions and loops (line {lines}) are read as if every branch was gone through once")
    _method(draft)
    _mode(draft, script)
    _weights(draft)
    place(draft)
    _penalty(draft)
    _credit(draft)
    _rate(draft)
    return draft


def _arguments(draft: Draft, script: Script) -> dict[str, list[Word]]:
    """The flags of the training command; without one, those in all arrays."""
    found = command_with(script, _TRAINERS)
    if found is not None:
        words, at = found
        flags, _ = flags_of(words[at + 1 :])
        return flags
    flags, _ = flags_of([word for words in script.arrays.values() for word in words])
    if not flags:
        raise ConfigError(
            f"{draft.file}: it has no command that runs train.py and no array of arguments; give the launch script"
        )
    draft.remarks.append(
        "there is no command that runs train.py in the script; the flags in all of its arrays are taken"
    )
    return flags


def _method(draft: Draft) -> None:
    """Reinforcement learning, unless the script asks for slime's supervised loss."""
    loss, rollout = draft.take("loss_type"), draft.value("rollout_function_path")
    is_supervised = (loss is not None and loss.value == "sft_loss") or (isinstance(rollout, str) and _SFT in rollout)
    if is_supervised:
        source = loss.source if loss is not None else draft.names["rollout_function_path"].source
        draft.method, draft.method_source = "sft", named("loss_type" if loss else "rollout_function_path", source)
        draft.take("rollout_function_path")
        step = "global_batch_size" if "global_batch_size" in draft.names else "rollout_batch_size"
        draft.rename(step, "train.batch_size")
        draft.pass_over("rollout_batch_size", "train.batch_size rows make a step")
        draft.rename("input_key", "data.columns.messages")
        draft.pass_over("n_samples_per_prompt", "rows are read once per epoch")
        for name in ("calculate_per_token_loss", "disable_compute_advantages_and_returns", "debug_train_only"):
            draft.pass_over(name, "it is how sft trains")
        draft.defaults["rollout_shuffle"] = False
        return
    draft.method, draft.method_source = "grpo", "slime's method"
    draft.defaults |= _DEFAULTS
    if draft.value("eval_interval") is not None:
        draft.defaults["skip_eval_before_train"] = False
    if draft.value("custom_rm_path"):
        draft.pass_over("rm_type", "custom_rm_path takes its place")
        draft.remarks.append(f"custom_rm_path: {ALIASES['custom_rm_path'].note}")
    _steps(draft)


def _mode(draft: Draft, script: Script) -> None:
    """slime's other command samples the next step while this one is trained."""
    found = command_with(script, _TRAINERS)
    if draft.method != "sft" and found is not None and (word := found[0][found[1]]).text.endswith(_AHEAD):
        draft.set("rollout.mode", "one_step_off", named(_AHEAD, word.source))


def _steps(draft: Draft) -> None:
    """slime derives the optimizer steps of a rollout from the samples of one step, or the other way round."""
    written = draft.take("global_batch_size")
    if written is None or "num_steps_per_rollout" in draft.names:
        return
    samples = draft.number("rollout_batch_size", 32) * draft.number("n_samples_per_prompt", 1)
    if isinstance(written.value, bool) or not isinstance(written.value, int) or written.value < 1:
        raise ConfigError(f"{written.source}: global_batch_size is {written.value!r}, expected a whole number")
    if samples % written.value:
        draft.remarks.append(
            f"global_batch_size {written.value} ({written.source}) does not divide the {samples} samples of a rollout; "
            "set rollout.optimizer_steps"
        )
        return
    draft.set("rollout.optimizer_steps", samples // written.value, named("global_batch_size", written.source))


def _weights(draft: Draft) -> None:
    """Megatron's copies of the weights are not needed: the model is read as transformers has it."""
    model = draft.value("hf_checkpoint")
    if isinstance(model, str) and str(draft.value("ref_load", "")).startswith(model.rstrip("/")):
        draft.pass_over("ref_load", "it is the model at model.path in Megatron's form, which is the reference anyway")
    if draft.value("load") is not None and draft.value("load") == draft.value("save"):
        draft.pass_over("load", "a run goes on from the newest checkpoint in output_dir by itself (checkpoint.resume)")
    draft.pass_over("model_name", "the architecture is read from the model's own config.json")


def _penalty(draft: Draft) -> None:
    if not draft.value("use_kl_loss"):
        draft.take("use_kl_loss")
        for name in ("kl_loss_coef", "kl_loss_type"):
            draft.pass_over(name, "slime reads it only with use_kl_loss")
    elif draft.value("kl_loss_coef", 0) and "kl_loss_type" not in draft.names:
        draft.remarks.append(
            "slime's kl_loss_type is k1 by default, which has no useful gradient; here it is k3 (kl.type)"
        )


def _credit(draft: Draft) -> None:
    estimator = draft.value("advantage_estimator", "grpo")
    if estimator == "ppo":
        draft.defaults |= {"lambd": 1.0, "value_clip": 0.2}
    else:
        draft.pass_over("lambd", "slime reads it only with advantage_estimator ppo")
        for name in ("critic_lr", "value_clip", "num_critic_only_steps", "critic_load", "critic_save"):
            draft.pass_over(name, "slime has a critic only with advantage_estimator ppo")
        if estimator != "reinforce_plus_plus":
            draft.pass_over("gamma", "slime reads it only with advantage_estimator ppo and reinforce_plus_plus")
    if not draft.value("use_tis"):
        for name in ("tis_clip", "tis_clip_low"):
            draft.pass_over(name, "slime reads it only with use_tis")
    if not draft.value("use_opsm"):
        draft.pass_over("opsm_delta", "slime reads it only with use_opsm")
    written = draft.take("disable_grpo_std_normalization")
    if written is not None and estimator == "grpo":
        draft.take("advantage_estimator")
        draft.set("credit.use", "grpo_no_std", named("disable_grpo_std_normalization", written.source))


def _rate(draft: Draft) -> None:
    """The lowest rate is a share of the highest here."""
    lowest, highest = draft.value("min_lr"), draft.value("lr")
    is_number = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (lowest, highest))
    if is_number and lowest and highest and draft.value("lr_decay_style", "linear") != "constant":
        written = draft.take("min_lr")
        assert written is not None, "it was just looked at"
        draft.set("optim.min_lr_ratio", round(lowest / highest, 12), named("min_lr", written.source))
    elif draft.value("lr_decay_style") == "constant":
        draft.pass_over("min_lr", "a constant rate has no lowest")
    if "lr_warmup_iters" in draft.names:
        draft.pass_over("lr_warmup_fraction", "lr_warmup_iters says it")
