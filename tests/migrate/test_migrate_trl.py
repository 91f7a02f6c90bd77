"""TRL's files: every trainer's, with its defaults; what differs is told, and what comes out is a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from imports import Import, idle, loaded, lost

from whet.errors import ConfigError
from whet.migrate.run import import_file

DPO = """\
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
"""

BASE = "model_name_or_path: m\ndataset_name: data/rows.jsonl\n"


def test_a_dpo_file_becomes_a_configuration(imported: Import):
    result = imported("trl", DPO + "beta: 0.2\nloss_type: ipo\n", "dpo.yaml")
    config = loaded(result)
    assert (config.method, config.loss) == ("dpo", {"use": "ipo", "beta": 0.2})
    assert (config.model.path, config.output_dir) == ("Qwen/Qwen2-0.5B-Instruct", "Qwen2-0.5B-DPO")
    assert config.data.train == "trl-lib/ultrafeedback_binarized"
    assert config.data.eval == "trl-lib/ultrafeedback_binarized:test"
    assert (config.optim.lr, config.train.epochs) == (5e-7, 1.0)
    assert (config.train.batch_size, config.train.accumulation) == (2, 8)
    assert config.backend.activation_checkpointing and config.eval.every_steps == 50
    assert lost(result) == {} and set(idle(result)) == {"eval_strategy"}


def test_defaults_that_a_run_depends_on_are_trls(imported: Import):
    config = loaded(imported("trl", BASE + "beta: 0.1\n", "dpo.yaml"))
    assert (config.train.epochs, config.train.batch_size, config.optim.lr) == (3.0, 8, 1e-6)
    assert (config.optim.weight_decay, config.data.max_length) == (0.0, 1024)
    assert config.data.eval is None


def test_settings_say_where_they_come_from(imported: Import):
    result = imported("trl", BASE + "learning_rate: 1e-5\n", "sft.yaml")
    assert result.sources[("optim", "lr")] == "learning_rate in sft.yaml, line 3"
    assert result.sources[("train", "epochs")].endswith("TRL's default")
    assert result.sources[("data", "train")] == "dataset_name in sft.yaml, line 2"


@pytest.mark.parametrize(
    "text,method,loss",
    [
        ("loss_type: kto\ndesirable_weight: 1.5\n", "kto", {"use": "kto", "desirable_weight": 1.5}),
        ("loss_type: apo_zero_unpaired\n", "kto", {"use": "apo_zero_unpaired"}),
        ("undesirable_weight: 0.5\nbeta: 0.1\n", "kto", {"undesirable_weight": 0.5, "beta": 0.1}),
        ("center_rewards_coefficient: 0.01\n", "reward", {"centering": 0.01}),
        ("assistant_only_loss: true\n", "sft", {}),
        ("loss_type: dft\n", "sft", {"use": "dft"}),
        ("loss_type: sigmoid\ncpo_alpha: 0.5\n", "cpo", {"use": "cpo", "beta": 0.1}),
        ("loss_type: [sigmoid]\n", "dpo", {"use": "sigmoid", "coef": 1.0}),
        ("f_divergence_type: forward_kl\n", "dpo", {"f_divergence": "forward_kl"}),
        ("ld_alpha: 0.5\n", "dpo", {"ld_alpha": 0.5}),
    ],
)
def test_the_trainer_is_told_by_names_that_only_it_has(imported: Import, text: str, method: str, loss: dict):
    config = loaded(imported("trl", BASE + text))
    assert (config.method, config.loss) == (method, loss)


def test_the_trainer_is_told_by_the_files_name_where_nothing_else_tells(imported: Import):
    result = imported("trl", BASE, "my-orpo_run.yaml")
    assert loaded(result).method == "orpo"
    assert any("taken from the file's name" in remark for remark in result.remarks)


def test_a_loss_that_several_trainers_have_is_the_one_of_the_files_name(imported: Import):
    assert loaded(imported("trl", BASE + "loss_type: sigmoid\nbeta: 0.1\n", "my_cpo.yaml")).method == "cpo"
    unnamed = imported("trl", BASE + "loss_type: sigmoid\nbeta: 0.1\n", "run.yaml")
    assert loaded(unnamed).method == "dpo"
    assert any("if it is not dpo, say --method" in remark for remark in unnamed.remarks)


def test_without_a_trainer_the_import_asks_for_it(imported: Import):
    with pytest.raises(ConfigError, match="nothing in it tells which of TRL's trainers"):
        imported("trl", BASE)
    assert loaded(imported("trl", BASE, method="kto")).method == "kto"
    with pytest.raises(ConfigError, match=r"dpoo \(from --method\) is no trainer.*did you mean dpo"):
        imported("trl", BASE, method="dpoo")


def test_a_mixture_becomes_terms(imported: Import):
    text = BASE + "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\nbeta: 0.1\n"
    config = loaded(imported("trl", text))
    assert [(term.use, term.coef, term.options) for term in config.terms] == [
        ("sigmoid", 0.8, {"beta": 0.1}),
        ("bco_pair", 0.2, {"beta": 0.1}),
    ]
    assert config.nll_coef == 1.0


def test_an_option_that_the_loss_does_not_have_is_left_out_and_told(imported: Import):
    result = imported("trl", BASE + "loss_type: hinge\nlabel_smoothing: 0.1\n")
    assert loaded(result).loss == {"use": "hinge"}
    assert lost(result) == {"label_smoothing": "'hinge' has no option label_smoothing"}


@pytest.mark.parametrize(
    "alpha,method,coef",
    [("", "cpo-simpo", None), ("cpo_alpha: 0.0\n", "simpo", 0.0), ("cpo_alpha: 2\n", "cpo-simpo", 2.0)],
)
def test_simpo_of_cpo_is_the_method_that_it_silently_is(imported: Import, alpha: str, method: str, coef: float | None):
    result = imported("trl", BASE + "loss_type: simpo\nbeta: 2.5\n" + alpha)
    config = loaded(result)
    assert (config.method, config.nll_coef) == (method, coef)
    assert config.loss == {"beta": 2.5, "gamma": 0.5}
    assert any("silently adds" in remark for remark in result.remarks) == (alpha == "")


def test_the_reference_moves_only_when_it_is_asked_to(imported: Import):
    config = loaded(imported("trl", BASE + "sync_ref_model: true\nref_model_mixup_alpha: 0.5\n", "dpo.yaml"))
    assert (config.reference.sync_steps, config.reference.sync_alpha) == (512, 0.5)
    config = loaded(imported("trl", BASE + "sync_ref_model: true\nref_model_sync_steps: 64\n", "dpo.yaml"))
    assert config.reference.sync_steps == 64
    result = imported("trl", BASE + "ref_model_sync_steps: 64\n", "dpo.yaml")
    assert loaded(result).reference.sync_steps is None
    assert "only with sync_ref_model" in idle(result)["ref_model_sync_steps"]


def test_an_adapter_is_made_only_with_use_peft_and_has_trls_defaults(imported: Import):
    adapter = loaded(imported("trl", BASE + "use_peft: true\nlora_r: 32\n", "sft.yaml")).model.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules) == (
        32,
        32,
        0.05,
        ["q_proj", "v_proj"],
    )
    result = imported("trl", BASE + "lora_r: 32\nlora_alpha: 16\n", "sft.yaml")
    assert loaded(result).model.adapter is None
    assert set(idle(result)) == {"lora_r", "lora_alpha"}


def test_qlora_is_an_adapter_on_quantised_weights(imported: Import):
    text = BASE + "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\nuse_bnb_nested_quant: true\n"
    quantization = loaded(imported("trl", text, "sft.yaml")).model.quantization
    assert quantization is not None and (quantization.bits, quantization.type, quantization.double) == (4, "nf4", True)


def test_a_distillation_has_its_teacher_and_trls_defaults(imported: Import):
    text = BASE + "teacher_model_name_or_path: big\nteacher_model_init_kwargs: {dtype: bfloat16, device_map: auto}\n"
    result = imported("trl", text, "gkd.yaml")
    config = loaded(result)
    assert (config.method, config.distill.teacher, config.distill.dtype) == ("gkd", "big", "bfloat16")
    assert (config.distill.lmbda, config.loss) == (0.5, {"beta": 0.5})
    assert (config.rollout.temperature, config.rollout.max_tokens) == (0.9, 128)
    assert "device_map" in lost(result)


GRPO = (
    BASE
    + """\
num_generations: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
max_completion_length: 128
max_prompt_length: 64
beta: 0.04
epsilon: 0.2
epsilon_high: 0.28
scale_rewards: none
reward_funcs: [accuracy_reward]
"""
)


def test_completions_per_device_become_prompts_per_step(imported: Import):
    config = loaded(imported("trl", GRPO))
    # 8 completions x 2 of accumulation in groups of 4.
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.optimizer_steps) == (4, 4, 1)
    assert (config.rollout.max_tokens, config.data.max_prompt_length, config.kl.coef) == (128, 64, 0.04)
    assert config.loss == {"weight": "token", "clip_low": 0.2, "clip_high": 0.28}  # dapo is TRL's default
    assert config.credit is not None and config.credit.use == "grpo_no_std"
    assert config.reward.use == "math" and config.data.columns == {"label": "solution"}  # type: ignore[union-attr]


def test_steps_per_generation_are_optimizer_steps(imported: Import):
    config = loaded(imported("trl", GRPO + "steps_per_generation: 8\nloss_type: dr_grpo\n"))
    assert (config.rollout.prompts_per_step, config.rollout.optimizer_steps) == (16, 4)
    assert config.loss["weight"] == "fixed_length"
    config = loaded(imported("trl", GRPO + "generation_batch_size: 32\n"))
    assert (config.rollout.prompts_per_step, config.rollout.optimizer_steps) == (8, 2)


def test_completions_that_are_no_whole_groups_are_refused(imported: Import):
    with pytest.raises(ConfigError, match=r"16 completions .* no whole groups of num_generations 3"):
        imported("trl", GRPO.replace("num_generations: 4", "num_generations: 3"))


def test_rloo_takes_its_penalty_from_the_reward_here_as_there(imported: Import):
    text = BASE + "reward_funcs: [accuracy_reward]\nepsilon: 0.1\n"
    config = loaded(imported("trl", text, method="rloo"))
    assert (config.method, config.credit, config.loss, config.kl.where) == ("rloo", None, {}, "reward")
    assert (config.rollout.group_size, config.rollout.prompts_per_step, config.kl.coef) == (2, 4, 0.05)
    again = loaded(imported("trl", text + "num_iterations: 2\n", method="rloo"))
    assert again.loss == {"use": "ppo_clip", "clip_low": 0.1, "clip_high": 0.1}
    assert again.rollout.num_ppo_epochs == 2


def test_the_losses_of_grpo_that_stand_for_themselves(imported: Import):
    config = loaded(imported("trl", GRPO.replace("0.28", "5.0") + "loss_type: cispo\n"))
    assert config.loss == {"use": "cispo", "clip_high": 4.0}
    assert loaded(imported("trl", GRPO + "loss_type: sapo\n")).loss == {"use": "sapo"}


def test_a_reward_of_ones_own_is_to_be_filled_in(imported: Import):
    result = imported("trl", GRPO.replace("accuracy_reward", "my.rewards.length"))
    assert [problem.path for problem in result.missing] == [("reward",)] and result.config is None
    assert "async (episode) -> float" in lost(result)["reward_funcs"]


def test_what_is_missing_is_told_and_nothing_is_invented(imported: Import):
    result = imported("trl", "beta: 0.1\n", "dpo.yaml")
    assert {problem.path for problem in result.missing} == {("model", "path"), ("data", "train")}
    assert result.config is None


def test_names_that_mean_something_else_here_are_not_mistaken(imported: Import):
    result = imported("trl", BASE + "optim: adamw_torch\nenv: {A: b}\n", "sft.yaml")
    assert loaded(result).env is None
    assert "AdamW" in idle(result)["optim"] and "env" in lost(result)
    assert "AdamW" in lost(imported("trl", BASE + "optim: adafactor\n", "sft.yaml"))["optim"]
    assert "AdamW" in lost(imported("trl", BASE + "optim: paged_adamw_8bit\n", "sft.yaml"))["optim"]


def test_unknown_names_are_told_with_the_nearest(imported: Import):
    result = imported("trl", BASE + "learning_rte: 1e-5\nzzz: 1\nmodel: {path: x}\n", "sft.yaml")
    loaded(result)
    assert "did you mean learning_rate (optim.lr)?" in lost(result)["learning_rte"]
    assert "docs/configuration.md lists all settings" in lost(result)["zzz"]
    assert "model" in lost(result)


def test_settings_that_do_not_go_together_are_taken_out_one_by_one(imported: Import):
    text = BASE + "load_best_model_at_end: true\nmetric_for_best_model: rouge\nfp16: true\nuse_cpu: true\n"
    result = imported("trl", text, "sft.yaml")
    config = loaded(result)
    assert not config.checkpoint.best and config.eval.metric is None and config.backend.precision == "auto"
    assert "there is nothing to evaluate on" in lost(result)["load_best_model_at_end"]
    assert {"load_best_model_at_end", "metric_for_best_model", "fp16"} == set(lost(result))


@pytest.mark.parametrize(
    "text,train",
    [
        ("dataset_config: main\n", "trl-lib/x:main:train"),
        ("dataset_train_split: train_prefs\n", "trl-lib/x:train_prefs"),
        ("dataset_train_split: 'train[:1000]'\n", "trl-lib/x@[:1000]"),
        ("dataset_train_split: 'test[5:10]'\ndataset_config: de\n", "trl-lib/x:de:test@[5:10]"),
    ],
)
def test_splits_and_slices_of_a_data_set_stay(imported: Import, text: str, train: str):
    result = imported("trl", "model_name_or_path: m\ndataset_name: trl-lib/x\n" + text, "sft.yaml")
    assert loaded(result).data.train == train


def test_a_split_that_cannot_be_said_is_refused_with_its_line(imported: Import):
    with pytest.raises(ConfigError, match=r"sft.yaml, line 2: the split 'train\[:10%\]' cannot be said here"):
        imported("trl", BASE + "dataset_train_split: 'train[:10%]'\n", "sft.yaml")


def test_a_mixture_of_data_sets_is_a_list(imported: Import):
    text = """\
model_name_or_path: m
datasets:
  - path: trl-lib/a
    split: train_sft
  - path: json
    data_files: data/b.jsonl
    fraction: 0.5
test_split_size: 0.1
"""
    result = imported("trl", text, "sft.yaml")
    config = loaded(result)
    assert (config.data.train, config.data.eval_share) == (["trl-lib/a:train_sft", "data/b.jsonl"], 0.1)
    assert "datasets.fraction" in lost(result)


def test_arguments_of_the_model_are_taken_apart(imported: Import):
    text = BASE + "model_init_kwargs: {dtype: bfloat16, revision: v2, attn_implementation: flash_attention_2}\n"
    result = imported("trl", text, "sft.yaml")
    config = loaded(result)
    assert (config.model.dtype, config.model.revision) == ("bfloat16", "v2")
    assert "attn_implementation" in idle(result)


SCRIPT = """\
#!/bin/bash
MODEL=Qwen/Qwen2-0.5B
accelerate launch --config_file zero2.yaml --num_processes 4 examples/scripts/dpo.py \\
    --model_name_or_path ${MODEL} \\
    --dataset_name trl-lib/x \\
    --learning_rate 5e-7 --loss_type sigmoid hinge --loss_weights 0.5 0.5 \\
    --bf16 --output_dir ${OUT}/dpo
"""


def test_a_script_with_the_command_is_read(imported: Import):
    result = imported("trl", SCRIPT, "run.sh")
    config = loaded(result)
    assert (config.method, config.model.path, config.optim.lr) == ("dpo", "Qwen/Qwen2-0.5B", 5e-7)
    assert [(term.use, term.coef) for term in config.terms] == [("sigmoid", 0.5), ("hinge", 0.5)]
    assert config.backend.precision == "bf16"
    assert any("step of 4 devices" in remark for remark in result.remarks)
    assert any("zero2.yaml (run.sh, line 3) is not there" in remark for remark in result.remarks)
    assert (config.backend.use, config.cluster.size) == ("fsdp", 4)
    assert "the script does not say what ${OUT} is" in lost(result)["output_dir"]
    assert result.sources[("optim", "lr")] == "learning_rate in run.sh, line 6"


ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: none, zero3_init_flag: true}
mixed_precision: bf16
num_machines: 1
num_processes: 8
"""


def test_the_launchers_file_says_how_processes_train(imported: Import):
    Path("zero2.yaml").write_text(ACCELERATE, encoding="utf-8")
    result = imported("trl", SCRIPT, "run.sh")
    config = loaded(result)
    backend = config.backend
    assert (backend.use, backend.zero_stage, backend.offload, config.cluster.size) == ("deepspeed", 3, "optimizer", 4)
    assert backend.precision == "bf16"
    sharded = ACCELERATE.replace("DEEPSPEED", "FSDP").replace("deepspeed_config: {zero_stage: 3, ", "fsdp_config: {")
    sharded = sharded.replace("offload_optimizer_device: cpu, offload_param_device: none, zero3_init_flag: true", KEPT)
    Path("zero2.yaml").write_text(sharded, encoding="utf-8")
    backend = loaded(imported("trl", SCRIPT.replace("--num_processes 4 ", ""), "run.sh")).backend
    assert (backend.use, backend.reshard_after_forward, backend.offload) == ("fsdp", False, "all")


KEPT = "fsdp_version: 2, fsdp_reshard_after_forward: false, fsdp_offload_params: true"


def test_a_deepspeed_file_beside_the_configuration_is_read(imported: Import):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    Path("ds.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}), encoding="utf-8")
    result = imported("trl", BASE + "deepspeed: ds.json\n", "sft.yaml")
    backend = loaded(result).backend
    assert (backend.use, backend.zero_stage, backend.offload) == ("deepspeed", 3, "all")
    assert lost(result) == {}
    Path("ds.json").write_text("{}", encoding="utf-8")
    assert "ZeRO stage 0" in lost(imported("trl", BASE + "deepspeed: ds.json\n", "sft.yaml"))["deepspeed"]


def test_vllm_is_the_engine_where_it_is_used(imported: Import):
    base = "trl grpo --model_name_or_path m --dataset_name x --reward_funcs accuracy_reward --vllm_server_port 8123 "
    engine = loaded(imported("trl", base + "--use_vllm\n", "run.sh")).engine
    assert (engine.use, engine.address) == ("vllm", "http://127.0.0.1:8123")
    more = "--use_vllm --vllm_mode colocate --vllm_gpu_memory_utilization 0.3\n"
    config = loaded(imported("trl", base + more, "run.sh"))
    assert (config.engine.use, config.engine.sleep, config.cluster.colocate) == ("vllm", True, True)
    assert (config.engine.options, config.engine.address) == ({"gpu_memory_utilization": 0.3}, None)
    result = imported("trl", base, "run.sh")
    assert loaded(result).engine.use == "local" and "vllm_server_port" in idle(result)


def test_the_configuration_that_a_command_names_is_read_beneath_its_flags(imported: Import):
    Path("base.yaml").write_text(BASE + "learning_rate: 1e-5\nseed: 3\n", encoding="utf-8")
    config = loaded(imported("trl", "trl kto --config base.yaml --learning_rate 2e-5\n", "run.sh"))
    assert (config.method, config.optim.lr, config.seed) == ("kto", 2e-5, 3)


def test_a_script_without_a_command_of_trl_is_refused(imported: Import):
    with pytest.raises(ConfigError, match="there is no command `trl dpo …`"):
        imported("trl", "echo hello\n", "run.sh")
    with pytest.raises(ConfigError, match=r"ppo \(from the command in run.sh\) is no trainer"):
        imported("trl", "trl ppo --lr 1\n", "run.sh")


@pytest.mark.parametrize(
    "text,message",
    [
        ("a: [1\n", "dpo.yaml, line 2: this is not valid YAML"),
        ("- a\n", "dpo.yaml, line 1: settings are written `name: value`, but this is a list"),
        ("", "dpo.yaml: the file is empty"),
        ("beta: 1\nbeta: 2\n", "beta is given twice in dpo.yaml, in line 1 and line 2"),
        (BASE + "num_generations: 0\n", "dpo.yaml, line 3: num_generations is 0, expected a whole number"),
        (
            BASE + "rpo_alpha: 1.0\ncpo_alpha: 0.5\n",
            "nll_coef is given twice: 1.0 (from rpo_alpha in dpo.yaml, line 3)",
        ),
        (BASE + "loss_type: [ipo, sigmoid]\nloss_weights: [1.0]\n", "but there are 2 losses"),
        ("datasets: [3]\n", "dpo.yaml, line 1: each of datasets is a mapping with a path"),
    ],
)
def test_bad_input_is_told_with_file_and_line(imported: Import, text: str, message: str):
    with pytest.raises(ConfigError) as raised:
        imported("trl", text, "dpo.yaml")
    assert message in str(raised.value)


def test_a_file_that_is_not_there_is_told(imported: Import):
    with pytest.raises(ConfigError, match=r"cannot read the configuration none\.yaml: No such file"):
        import_file("trl", "none.yaml")
