"""slime's names of sampling, algorithms, evaluation and debugging, and what becomes of each."""

from __future__ import annotations

import re

from whet.config import conversions as read
from whet.config.algorithm_rules import REINFORCES
from whet.config.conversions import Converted, Refused, Unless, by_method, converted, idle, of_credit, refused, renamed
from whet.config.rules import TRAINS

_SLIME = ("slime",)
_TRL_TOO = ("slime", "TRL")

_OF_A_SET = "write it under the set, as in eval.sets.NAME"
_OWN_CODE = "a function of slime's own signature cannot be called here; see docs/extending.md for the one that can"
_CRITIC = "the critic begins as critic.path says, the folder of a transformers model, and is saved with the run"
_ROUTER = "there is no router whose choices could be replayed"


def _named(value: object) -> str:
    """A name of slime's, or of the user's own code."""
    if not isinstance(value, str):
        raise Refused("must be the path of a function, as in package.module.function")
    return value


def _of_slime(value: object, setting: str, ours: dict[str, str]) -> Converted:
    """A path, of which slime's own functions are called otherwise here."""
    path = _named(value)
    if path.startswith("slime."):
        name = path.rpartition(".")[2]
        if name not in ours:
            raise Refused(f"cannot be slime's {name}; there is {', '.join(ours.values())}, or a function of your own")
        path = ours[name]
    return {setting: path}


def _filter(value: object) -> Converted:
    return _of_slime(value, "rollout.filter.use", {"check_reward_nonzero_std": "nonzero_std"})


def _buffer(value: object) -> Converted:
    return _of_slime(value, "rollout.buffer.use", {"pop_first": "pop_first"})


def _rollout_function(value: object) -> Converted:
    """The whole of sampling, of which the modes of slime's own are ours as well."""
    path = _named(value)
    if "fully_async" in path:
        return {"rollout.mode": "async"}
    if path == "slime.rollout.sglang_rollout.generate_rollout":
        return {}
    raise Refused(
        "cannot take the place of all sampling: give a function that plays one episode as rollout.generate, or a "
        "source of prompts as rollout.source"
    )


def _data_source(value: object) -> Converted:
    if _named(value).startswith("slime."):
        return {}
    raise Refused("cannot be called as slime calls it; a class that takes the prompts is rollout.source")


def _eval_files(value: object) -> Converted:
    """`name path name path`, or one path alone."""
    if not isinstance(value, list):
        return {"data.eval": value}
    if len(value) % 2:
        raise Refused("must be pairs of a name and a file, or one file")
    names = [re.sub(r"\W", "_", str(name)) for name in value[::2]]
    if len(set(names)) < len(names):
        raise Refused(f"names a set twice: {', '.join(names)}; give each a name of its own")
    return {f"eval.sets.{name}.path": path for name, path in zip(names, value[1::2], strict=True)}


def _eval_rows(value: object) -> Converted:
    return {"data.eval": list(_eval_files(value).values())} if isinstance(value, list) else {"data.eval": value}


def _eval_top_k(value: object) -> Converted:
    return {"eval.top_k": 0 if value == -1 else value}


def _skips_start(value: object) -> Converted:
    return {"eval.at_start": not read.switch(value)}


def _penalty_of_reward(value: object) -> Converted:
    """The coefficient of a penalty that is taken from the reward; 0 is none."""
    return {} if value in (0, None) else {"kl.coef": value, "kl.where": "reward"}


def _use_kl_loss(value: object) -> Converted:
    return {"kl.where": "loss"} if read.switch(value) else {"kl.coef": 0.0}


def _old_logprobs(value: object) -> Converted:
    return {"rollout.old_logprobs": "sampler"} if read.switch(value) else {}


def _use_tis(value: object) -> Converted:
    return {"correction.use": "tis"} if read.switch(value) else {}


def _use_opsm(value: object) -> Converted:
    return {"correction.opsm": Unless(1e-4)} if read.switch(value) else {}


def _dumped(value: object) -> Converted:
    return {} if value in (None, False) else {"log.rollouts": True}


def _train_only(value: object) -> Converted:
    if value is True:
        raise Refused("must be a folder: that of a run with log.rollouts, whose rollouts are then trained on")
    return {} if value in (None, False) else {"debug.train_only": value}


SLIME_ROLLOUT_NAMES = [
    # Sampling
    renamed(_SLIME, "over_sampling_batch_size", "rollout.oversampling"),
    converted(
        _SLIME,
        "dynamic_sampling_filter_path",
        "rollout.filter.use",
        _filter,
        "slime's check_reward_nonzero_std is `nonzero_std`; functions of `(args, samples)` run as they are",
    ),
    renamed(_SLIME, "partial_rollout", "rollout.partial"),
    renamed(_SLIME, "mask_offpolicy_in_partial_rollout", "rollout.mask_offpolicy"),
    converted(
        _SLIME,
        "buffer_filter_path",
        "rollout.buffer.use",
        _buffer,
        "functions of `(args, rollout_id, buffer, num_samples)` run as they are",
    ),
    renamed(_SLIME, "rollout_sample_filter_path", "rollout.sample_filter.use", "a function of `(args, groups)`"),
    renamed(
        _SLIME,
        "custom_generate_function_path",
        "rollout.generate.use",
        "functions of `(args, sample, sampling_params)` run as they are",
    ),
    converted(
        _SLIME,
        "rollout_function_path",
        "rollout.mode",
        _rollout_function,
        "slime's own is the default, its fully asynchronous one is `async`; others are refused",
    ),
    converted(_SLIME, "data_source_path", "rollout.source.use", _data_source, "slime's own is the default"),
    refused(_SLIME, "eval_function_path", _OWN_CODE, off=(None,)),
    refused(_SLIME, "custom_rollout_log_function_path", _OWN_CODE, off=(None,)),
    refused(_SLIME, "custom_eval_rollout_log_function_path", _OWN_CODE, off=(None,)),
    refused(_SLIME, "rollout_data_postprocess_path", f"{_OWN_CODE} (shaping.transform)", off=(None,)),
    refused(_SLIME, "custom_reward_post_process_path", f"{_OWN_CODE} (shaping.transform)", off=(None,)),
    idle(_SLIME, "update_weights_interval", "the engine has the new weights after every step", only=(1,)),
    renamed(_SLIME, "metadata_key", "data.columns.metadata"),
    renamed(_SLIME, "tool_key", "data.columns.tools"),
    renamed(_SLIME, "apply_chat_template_kwargs", "data.template_kwargs"),
    # Algorithms
    converted(
        _SLIME,
        "advantage_estimator",
        "credit.use loss.use",
        read.estimator,
        "`ppo` is `gae`, `on_policy_distillation` is `opd`; `gspo` and `cispo` are losses, with credit `grpo`",
    ),
    converted(
        _SLIME,
        "use_kl_loss",
        "kl.where kl.coef",
        _use_kl_loss,
        "false is `kl.coef: 0`; true is `kl.where: loss` with the coefficient of `kl_loss_coef`",
        switch=True,
    ),
    renamed(_SLIME, "kl_loss_coef", "kl.coef"),
    renamed(_SLIME, "kl_loss_type", "kl.type"),
    renamed(_SLIME, "use_unbiased_kl", "kl.unbiased"),
    converted(_TRL_TOO, "kl_coef", "kl.coef kl.where", _penalty_of_reward, "above 0 it is `kl.where: reward` as well"),
    refused(_SLIME, "ref_update_interval", "use reference.sync_steps with reference.sync_alpha 1", off=(None,)),
    renamed(_SLIME, "eps_clip_c", "loss.dual_clip"),
    renamed(_SLIME, "value_clip", "critic.value_clip"),
    renamed(_SLIME, "critic_lr", "critic.lr"),
    renamed(_SLIME, "num_critic_only_steps", "critic.warmup_steps"),
    refused(_SLIME, "critic_load", _CRITIC, off=(None,)),
    idle(_SLIME, "critic_save", _CRITIC, only=None),
    refused(_SLIME, "critic_lr_warmup_iters", "the critic warms up as optim says", off=(None, 0)),
    idle(_SLIME, "critic_num_nodes", "the critic is trained beside the policy, on one device", only=(1,)),
    idle(_SLIME, "critic_num_gpus_per_node", "the critic is trained beside the policy, on one device", only=(1,)),
    of_credit(_TRL_TOO, "gamma", "gamma"),
    of_credit(_SLIME, "lambd", "lam"),
    renamed(_TRL_TOO, "normalize_advantages", "shaping.whiten"),
    refused(
        _SLIME,
        "disable_rewards_normalization",
        "what is made of rewards is the credit rule's affair; choose another credit",
    ),
    converted(_SLIME, "use_tis", "correction.use", _use_tis, "true is `tis`", switch=True),
    renamed(_SLIME, "tis_clip", "correction.high"),
    renamed(_SLIME, "tis_clip_low", "correction.low"),
    refused(_SLIME, "custom_tis_function_path", "use correction.use (tis, icepop or mis)", off=(None,)),
    converted(_SLIME, "use_opsm", "correction.opsm", _use_opsm, "1e-4 unless `opsm_delta` is given", switch=True),
    renamed(_SLIME, "opsm_delta", "correction.opsm"),
    converted(_SLIME, "use_rollout_logprobs", "rollout.old_logprobs", _old_logprobs, "true is `sampler`", switch=True),
    idle(_SLIME, "use_rollout_entropy", "the entropy of every token is logged anyway"),
    idle(_SLIME, "get_mismatch_metrics", "the difference to the sampler is logged anyway"),
    idle(_SLIME, "keep_old_actor", "old logprobs are computed before the first update of a step"),
    refused(_SLIME, "custom_loss_function_path", f"{_OWN_CODE} (loss.use)", off=(None,)),
    refused(_SLIME, "custom_pg_loss_reducer_function_path", "choose loss.weight", off=(None,)),
    refused(_SLIME, "use_routing_replay", _ROUTER),
    refused(_SLIME, "use_rollout_routing_replay", _ROUTER),
    # Evaluation
    by_method(
        "eval_prompt_data",
        {
            REINFORCES: converted(
                _SLIME, "", "data.eval eval.sets", _eval_files, "pairs `name path` are sets, one path is `data.eval`"
            ),
            tuple(one for one in TRAINS if one not in REINFORCES): converted(
                _SLIME, "", "data.eval", _eval_rows, "of pairs `name path` the paths"
            ),
        },
        "it evaluates nothing; leave it out",
    ),
    renamed(_SLIME, "eval_interval", "eval.every_steps"),
    renamed(_SLIME, "n_samples_per_eval_prompt", "eval.num_samples"),
    renamed(_SLIME, "eval_max_response_len", "eval.max_tokens"),
    renamed(_SLIME, "eval_temperature", "eval.temperature"),
    renamed(_SLIME, "eval_top_p", "eval.top_p"),
    converted(_SLIME, "eval_top_k", "eval.top_k", _eval_top_k, "-1 is 0"),
    converted(_SLIME, "skip_eval_before_train", "eval.at_start", _skips_start, "true is false", switch=True),
    refused(_SLIME, "eval_config", "sets and their sampling stand under eval.sets", off=(None,)),
    refused(_SLIME, "eval_input_key", f"{_OF_A_SET}.columns", off=(None,)),
    refused(_SLIME, "eval_label_key", f"{_OF_A_SET}.columns", off=(None,)),
    refused(_SLIME, "eval_tool_key", f"{_OF_A_SET}.columns", off=(None,)),
    refused(_SLIME, "eval_reward_key", f"{_OF_A_SET}.reward.key", off=(None,)),
    refused(_SLIME, "eval_max_prompt_len", f"{_OF_A_SET}.max_prompt_length", off=(None,)),
    idle(_SLIME, "eval_min_new_tokens", "completions may be of any length", only=(None, 0)),
    idle(_SLIME, "eval_max_context_len", "eval.max_tokens limits completions, the model's positions all", only=None),
    idle(_SLIME, "log_passrate", "pass@k of evaluations is logged anyway"),
    # One half of a run without the other
    renamed(_SLIME, "debug_rollout_only", "debug.rollout_only"),
    converted(
        _SLIME,
        "debug_train_only",
        "debug.train_only",
        _train_only,
        "the folder whose rollouts are trained on",
        switch=True,
    ),
    converted(
        _SLIME, "save_debug_rollout_data", "log.rollouts", _dumped, "any path is true: they go to output_dir/rollouts"
    ),
    converted(_SLIME, "dump_details", "log.rollouts", _dumped, "any path is true: they go to output_dir/rollouts"),
    refused(
        _SLIME,
        "load_debug_rollout_data",
        "what slime saved cannot be read; dump the rollouts with log.rollouts and give that folder as debug.train_only",
        off=(None,),
    ),
    refused(_SLIME, "save_debug_train_data", "what is trained on stands in the dump of log.rollouts", off=(None,)),
]
