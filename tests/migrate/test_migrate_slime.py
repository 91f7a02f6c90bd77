"""slime's launch scripts: arrays, variables, sourced models; settings as in its documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from imports import Import, idle, loaded, lost

from whet.config.aliases import ALIASES
from whet.errors import ConfigError

# As the launch scripts in slime's documentation are written.
SCRIPT = r"""#!/bin/bash

# for rerun the task
pkill -9 sglang
sleep 3
ray stop --force

set -ex
export PYTHONBUFFERED=16

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/glm4-9B.sh"

BASE=/models/GLM-Z1-9B-0414
CKPT_ARGS=(
   # sglang 需要的 hf ckpt
   --hf-checkpoint ${BASE}
   --ref-load ${BASE}_torch_dist
   --load ${BASE}_slime/
   --save ${BASE}_slime/
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data /models/dapo-math-17k/dapo-math-17k.jsonl
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle

   --rm-type math

   --num-rollout 3000
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --rollout-temperature 0.8

   --global-batch-size 64
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 5
   --eval-prompt-data aime /models/aime-2024/aime-2024.jsonl
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 16384
   --eval-top-p 0.7
)

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   # --micro-batch-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 4608
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.01
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 2
   --sglang-mem-fraction-static 0.7
)

MISC_ARGS=(
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --attention-backend flash
)

export MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
ray start --head --node-ip-address ${MASTER_ADDR} --num-gpus 8 --disable-usage-stats

RUNTIME_ENV_JSON="{
  \"env_vars\": {
    \"PYTHONPATH\": \"/models/Megatron-LM/\"
  }
}"

ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train.py \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 8 \
   --colocate \
   ${MODEL_ARGS[@]} \
   ${CKPT_ARGS[@]} \
   ${ROLLOUT_ARGS[@]} \
   ${OPTIMIZER_ARGS[@]} \
   ${GRPO_ARGS[@]} \
   ${PERF_ARGS[@]} \
   ${EVAL_ARGS[@]} \
   ${SGLANG_ARGS[@]} \
   ${MISC_ARGS[@]}
"""
MODEL = """\
MODEL_ARGS=(
   --swiglu
   --num-layers 40
   --hidden-size 4096
   --group-query-attention
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-10000}"
   --moe-router-topk 8
)
"""


def test_a_launch_script_becomes_a_configuration(imported: Import, tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "glm4-9B.sh").write_text(MODEL)
    result = imported("slime", SCRIPT, "run.sh")
    config = loaded(result)
    assert (config.method, config.model.path) == ("grpo", "/models/GLM-Z1-9B-0414")
    assert config.output_dir == "/models/GLM-Z1-9B-0414_slime/"
    assert (config.data.train, config.data.chat, config.data.shuffle) == (
        "/models/dapo-math-17k/dapo-math-17k.jsonl",
        "always",
        True,
    )
    assert config.data.columns == {"prompt": "prompt", "label": "label"}
    assert {name: one.path for name, one in config.eval.sets.items()} == {"aime": "/models/aime-2024/aime-2024.jsonl"}
    assert config.reward.use == "math"  # type: ignore[union-attr]
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.group_size, rollout.optimizer_steps) == (32, 8, 4)
    assert (rollout.max_tokens, rollout.temperature, config.train.steps) == (8192, 0.8, 3000)
    assert config.loss == {"clip_low": 0.2, "clip_high": 0.28}
    assert (config.kl.coef, config.kl.type, config.entropy_coef) == (0.01, "low_var_kl", 0.0)
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.weight_decay, optim.beta2) == (1e-6, "constant", 0.1, 0.98)
    assert (config.eval.every_steps, config.eval.num_samples, config.eval.max_tokens, config.eval.top_p) == (
        5,
        16,
        16384,
        0.7,
    )
    assert (config.backend.max_tokens_per_device, config.backend.activation_checkpointing) == (4608, True)
    assert config.checkpoint.every_steps == 20
    backend, engine, cluster = config.backend, config.engine, config.cluster
    assert (backend.use, backend.tensor_parallel, backend.sequence_parallel) == ("megatron", 2, True)
    assert (cluster.size, cluster.colocate) == (8, True)
    assert (engine.use, engine.num_engines, engine.tensor_parallel, engine.sleep) == ("sglang", 4, 2, True)
    assert (engine.options, engine.max_concurrent) == ({"mem_fraction_static": 0.7}, 256)
    assert lost(result) == {}
    assert {"ref_load", "load", "num_layers", "swiglu", "rotary_base", "moe_router_topk"} <= set(idle(result))
    assert result.remarks == []
    assert result.sources[("optim", "lr")] == f"lr in run.sh, line {SCRIPT.splitlines().index('   --lr 1e-6') + 1}"


def test_a_model_script_that_is_not_there_is_no_loss(imported: Import):
    result = imported("slime", SCRIPT, "run.sh")
    loaded(result)
    assert len(result.remarks) == 1 and "models/glm4-9B.sh (run.sh, line 12) is not there" in result.remarks[0]


def small(*flags: str) -> str:
    return "ray job submit -- python3 train.py --hf-checkpoint m --prompt-data p.jsonl --rm-type math " + " ".join(
        flags
    )


def test_defaults_that_a_run_depends_on_are_slimes(imported: Import):
    config = loaded(imported("slime", small("--n-samples-per-prompt 4"), "run.sh"))
    assert (config.data.shuffle, config.data.columns) == (False, {"prompt": "input"})
    assert config.loss == {"clip_low": 0.2, "clip_high": 0.2}


@pytest.mark.parametrize(
    "flags,steps",
    [
        ("--rollout-batch-size 16 --n-samples-per-prompt 4 --global-batch-size 32", 2),
        ("--rollout-batch-size 16 --n-samples-per-prompt 4 --num-steps-per-rollout 4 --global-batch-size 16", 4),
        ("--rollout-batch-size 16 --n-samples-per-prompt 4", 1),
    ],
)
def test_the_samples_of_a_step_say_how_many_steps_there_are(imported: Import, flags: str, steps: int):
    assert loaded(imported("slime", small(flags), "run.sh")).rollout.optimizer_steps == steps


def test_samples_that_do_not_divide_are_to_be_looked_at(imported: Import):
    result = imported(
        "slime", small("--rollout-batch-size 16 --n-samples-per-prompt 4 --global-batch-size 33"), "run.sh"
    )
    assert loaded(result).rollout.optimizer_steps == 1
    assert "does not divide the 64 samples" in result.remarks[0]


def test_a_penalty_that_slime_would_not_read_is_idle(imported: Import):
    result = imported("slime", small("--n-samples-per-prompt 4 --kl-loss-coef 0.1 --kl-loss-type k2"), "run.sh")
    assert loaded(result).kl.coef == 0.0
    assert {"kl_loss_coef", "kl_loss_type"} <= set(idle(result))
    result = imported("slime", small("--n-samples-per-prompt 4 --use-kl-loss --kl-loss-coef 0.1"), "run.sh")
    assert loaded(result).kl.coef == 0.1 and "k1 by default" in result.remarks[0]


def test_what_becomes_of_a_reward_of_ones_own_is_told(imported: Import):
    result = imported("slime", small("--n-samples-per-prompt 4 --custom-rm-path my.rm.score"), "run.sh")
    assert loaded_without_method(result) == "my.rm.score"
    assert ALIASES["custom_rm_path"].note in result.remarks[0] and "rm_type" in idle(result)


def loaded_without_method(result) -> str:
    """The reward of a configuration whose own code is not there to be looked at."""
    assert result.missing == [] and result.config is not None
    return result.config.reward.use


@pytest.mark.parametrize(
    "flags,credit,weight",
    [
        ("--advantage-estimator rloo", "rloo", None),
        ("--advantage-estimator grpo --disable-grpo-std-normalization", "grpo_no_std", None),
        ("--disable-grpo-std-normalization", "grpo_no_std", None),
        ("--advantage-estimator grpo --calculate-per-token-loss", "grpo", "token"),
    ],
)
def test_credit_and_weights_are_kept(imported: Import, flags: str, credit: str, weight: str | None):
    config = loaded(imported("slime", small("--n-samples-per-prompt 4", flags), "run.sh"))
    assert config.credit is not None and (config.credit.use, config.loss.get("weight")) == (credit, weight)


@pytest.mark.parametrize(
    "flags,credit,loss",
    [
        ("ppo --gamma 0.9 --critic-lr 1e-5", {"use": "gae", "gamma": 0.9, "lam": 1.0}, None),
        ("gspo --gamma 0.9 --lambd 0.9 --critic-lr 1e-5", {"use": "grpo"}, "gspo"),
        ("reinforce_plus_plus --gamma 0.9 --lambd 0.9", {"use": "reinforce_plus_plus", "gamma": 0.9}, None),
    ],
)
def test_other_estimators_are_credit_or_losses(imported: Import, flags: str, credit: dict, loss: str | None):
    result = imported("slime", small("--n-samples-per-prompt 4 --advantage-estimator", flags), "run.sh")
    config = loaded(result)
    assert config.credit is not None and config.credit.model_dump() == credit
    assert config.loss.get("use") == loss and lost(result) == {}
    assert config.critic.lr == (1e-5 if credit["use"] == "gae" else None)


def test_groups_are_filtered_and_left_over_as_in_the_guide(imported: Import):
    hub = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    flags = (
        f"--n-samples-per-prompt 8 --rollout-batch-size 32 --over-sampling-batch-size 64 --partial-rollout "
        f"--dynamic-sampling-filter-path {hub} --use-wandb --wandb-project x --kl-coef 0.1 --use-tis --tis-clip 3.0 "
        "--debug-rollout-only --eval-interval 5 --eval-prompt-data aime-2024 a.jsonl gpqa b.jsonl --eval-top-k 20"
    )
    result = imported("slime", small(flags), "run.sh")
    config = loaded(result)
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.oversampling, rollout.partial) == (32, 64, True)
    assert rollout.filter is not None and rollout.filter.use == "nonzero_std"
    assert (config.kl.coef, config.kl.where, config.correction.limits) == (0.1, "reward", (0.0, 3.0))
    assert config.debug.rollout_only and config.eval.at_start and config.eval.top_k == 20
    assert {name: one.path for name, one in config.eval.sets.items()} == {"aime_2024": "a.jsonl", "gpqa": "b.jsonl"}
    assert set(lost(result)) == {"use_wandb", "wandb_project"}


def test_the_other_command_samples_ahead(imported: Import):
    text = small("--n-samples-per-prompt 4").replace("train.py", "train_async.py")
    assert loaded(imported("slime", text, "run.sh")).rollout.mode == "one_step_off"


def test_supervised_training_is_sft(imported: Import):
    flags = "--loss-type sft_loss --input-key messages --rollout-batch-size 256 --global-batch-size 128 --num-epoch 3"
    text = f"python3 train_async.py --hf-checkpoint m --prompt-data p.parquet {flags} --calculate-per-token-loss"
    result = imported("slime", text, "run.sh")
    config = loaded(result)
    assert (config.method, config.train.batch_size, config.train.epochs) == ("sft", 128, 3.0)
    assert config.data.columns == {"messages": "messages"} and lost(result) == {}


@pytest.mark.parametrize(
    "flags,ratio,warmup",
    [
        ("--lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 128 --lr-warmup-fraction 0.9", 0.1, 128),
        ("--lr 1e-5 --min-lr 1e-6 --lr-decay-style constant", 0.0, None),
        ("--lr 1e-5", 0.0, None),
    ],
)
def test_the_lowest_rate_is_a_share_of_the_highest(imported: Import, flags: str, ratio: float, warmup: int | None):
    result = imported("slime", small("--n-samples-per-prompt 4", flags), "run.sh")
    optim = loaded(result).optim
    assert (optim.min_lr_ratio, optim.warmup_steps) == (pytest.approx(ratio), warmup)
    assert lost(result) == {}


def test_a_name_that_is_refused_anyway_needs_no_value(imported: Import):
    result = imported("slime", small("--n-samples-per-prompt 4 --wandb-key ${WANDB_KEY} --num-layers ${N}"), "run.sh")
    assert "TensorBoard" in lost(result)["wandb_key"] and "config.json" in idle(result)["num_layers"]


def test_values_that_the_script_does_not_say_are_to_be_written(imported: Import):
    text = small("--n-samples-per-prompt 4 --save ${OUT}/x").replace("--hf-checkpoint m", "--hf-checkpoint $1")
    result = imported("slime", text, "run.sh")
    assert [problem.path for problem in result.missing] == [("model", "path")]
    assert "the script does not say what ${1} is" in lost(result)["hf_checkpoint"]
    assert "the script does not say what ${OUT} is" in lost(result)["save"]


def test_arrays_alone_are_read_where_there_is_no_command(imported: Import):
    text = (
        "A_ARGS=(\n --hf-checkpoint m\n --n-samples-per-prompt 4\n)\nB_ARGS=( --prompt-data p.jsonl --rm-type math )\n"
    )
    result = imported("slime", text, "run.sh")
    assert loaded(result).data.train == "p.jsonl"
    assert "the flags in all of its arrays are taken" in result.remarks[0]


def test_conditions_are_told(imported: Import):
    result = imported(
        "slime", 'if [ "$A" ]; then\n  LR=1e-5\nfi\n' + small("--n-samples-per-prompt 4 --lr $LR"), "run.sh"
    )
    assert loaded(result).optim.lr == 1e-5
    assert "conditions and loops (line 1)" in result.remarks[0]


@pytest.mark.parametrize(
    "text,message",
    [
        ("echo hello\n", "run.sh: it has no command that runs train.py and no array of arguments"),
        ("A=(\n --lr 1\n", "run.sh, line 1: the parenthesis is never closed"),
        (small("--rollout-batch-size x --global-batch-size 8"), "run.sh, line 1: rollout_batch_size is 'x'"),
        (small("--global-batch-size 0"), "run.sh, line 1: global_batch_size is 0"),
    ],
)
def test_bad_input_is_told_with_file_and_line(imported: Import, text: str, message: str):
    with pytest.raises(ConfigError) as raised:
        imported("slime", text, "run.sh")
    assert message in str(raised.value)


def placed(*flags: str) -> str:
    return small("--n-samples-per-prompt 8 --rollout-batch-size 32", *flags)


def test_engines_apart_take_the_gpus_that_are_not_the_trainers(imported: Import):
    flags = "--actor-num-gpus-per-node 4 --rollout-num-gpus 4 --rollout-num-gpus-per-engine 2 --context-parallel-size 2"
    result = imported("slime", placed(flags, "--sglang-server-concurrency 64"), "run.sh")
    config = loaded(result)
    assert (config.cluster.size, config.cluster.colocate, config.backend.context_parallel) == (4, False, 2)
    assert (config.engine.num_engines, config.engine.tensor_parallel, config.engine.sleep) == (2, 2, False)
    assert config.engine.max_concurrent == 2 * 64
    assert lost(result) == {}


def test_many_nodes_are_a_cluster_and_experts_are_divided(imported: Import):
    flags = (
        "--actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate --rollout-num-gpus-per-engine 64 "
        "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
        "--context-parallel-size 4 --expert-model-parallel-size 32 --expert-tensor-parallel-size 1 "
        "--decoder-last-pipeline-num-layers 13 --optimizer-cpu-offload --use-precision-aware-optimizer "
        "--moe-token-dispatcher-type flex --moe-enable-deepep --sglang-enable-dp-attention --sglang-dp-size 8"
    )
    result = imported("slime", placed(flags), "run.sh")
    config = loaded(result)
    assert (config.cluster.size, config.cluster.address) == (128, "auto")
    assert (config.backend.expert_parallel, config.backend.pipeline_parallel) == (32, 4)
    assert config.backend.options == {
        **{"expert_tensor_parallel_size": 1, "num_layers_in_last_pipeline_stage": 13, "moe_enable_deepep": True},
        **{"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True, "moe_token_dispatcher_type": "flex"},
    }
    assert (config.engine.num_engines, config.engine.tensor_parallel) == (2, 64)
    assert config.engine.options == {"enable_dp_attention": True, "dp_size": 8}
    assert lost(result) == {}


def test_a_script_of_one_gpu_needs_no_server(imported: Import):
    result = imported(
        "slime", placed("--actor-num-gpus-per-node 1 --colocate --sglang-mem-fraction-static 0.4"), "r.sh"
    )
    config = loaded(result)
    assert (config.backend.use, config.engine.use, config.cluster.size) == ("local", "local", 1)
    assert {"colocate", "sglang_mem_fraction_static"} <= set(idle(result)) and lost(result) == {}


def test_supervised_training_on_many_gpus_samples_nothing(imported: Import):
    flags = "--loss-type sft_loss --input-key messages --rollout-batch-size 128 --actor-num-gpus-per-node 8"
    text = small(flags, "--sequence-parallel --tensor-model-parallel-size 1 --num-epoch 3").replace(
        "--rm-type math", ""
    )
    result = imported("slime", text, "r.sh")
    config = loaded(result)
    assert (config.method, config.backend.use, config.cluster.size) == ("sft", "megatron", 8)
    assert (config.backend.sequence_parallel, config.engine.use) == (False, "local")
    assert lost(result) == {}
