"""The Python face of fine-tuning, used as its examples print it; a tiny model lies under the hub name they give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import QUIET, column, metrics, same_bits, saved_weights, sums, write_rows
from whet.errors import CheckpointError, ConfigError, DataError
from whet.losses import create_loss
from whet.models.tiny import make_tiny
from whet.trainer import SFTrainer, TrainingConfig

NUM_LAYERS = 8


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, since an example freezes six."""
    return make_tiny(tmp_path_factory.mktemp("deep"), num_layers=NUM_LAYERS, hidden_size=32, intermediate_size=64)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, deep_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model and the data files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-8B").symlink_to(deep_model)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", sums(12))
    write_rows(tmp_path / "data" / "eval.jsonl", sums(20)[-4:])
    return tmp_path


def files(**settings) -> dict:
    """What the examples leave out: where the rows are, and silence."""
    return {"train_file": "data/train.jsonl", "eval_file": "data/eval.jsonl", **QUIET, **settings}


# --- the examples -----------------------------------------------------------------------------------------


def test_the_basic_example_runs_as_printed(workplace: Path):
    # 创建配置
    config = TrainingConfig(
        experiment_name="my_sft_experiment",
        model_name="Qwen/Qwen3-8B",  # 或本地模型路径
        model_type="Qwen",
        train_file="data/train.jsonl",
        eval_file="data/eval.jsonl",
        batch_size=4,
        learning_rate=2e-5,
        num_train_epochs=3,
    )
    # 创建训练器
    trainer = SFTrainer(config)
    # 开始训练
    results = trainer.train()
    # 预测
    predictions = trainer.predict(["你好，请介绍一下你自己。"])

    assert results["global_step"] == 9  # 12 rows, 4 per step, 3 epochs
    assert results["eval/loss"] == column(workplace / "runs" / "my_sft_experiment", "eval/loss")[-1]
    assert (workplace / "runs" / "my_sft_experiment" / "model.safetensors").is_file()
    assert len(predictions) == 1 and isinstance(predictions[0], str)


def test_the_lora_example_runs_as_printed(workplace: Path):
    config = TrainingConfig(
        experiment_name="my_lora_experiment",
        model_name="Qwen/Qwen3-8B",
        model_type="Qwen",
        # LoRA配置
        use_lora=True,
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.1,
        lora_target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
        # LoRA训练可以使用更大的batch size
        batch_size=8,
        learning_rate=1e-4,
        **files(),
    )
    SFTrainer(config).train()
    folder = workplace / "runs" / "my_lora_experiment"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (16, 32, 0.1)
    assert sorted(written["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert len(saved_weights(folder)) == NUM_LAYERS * 4 * 2


def test_the_frozen_example_runs_as_printed(workplace: Path, deep_model: Path):
    config = TrainingConfig(
        experiment_name="my_frozen_experiment",
        model_name="Qwen/Qwen3-8B",
        # 冻结前6层
        freeze_layers=list(range(6)),
        batch_size=4,
        learning_rate=5e-5,
        **files(),
    )
    SFTrainer(config).train()
    before, after = load_file(deep_model / "model.safetensors"), saved_weights(workplace / "runs/my_frozen_experiment")
    moved = {name.split(".")[2] for name in before if ".layers." in name and not after[name].equal(before[name])}
    assert moved == {"6", "7"}


def test_the_templates_of_the_example_stand_around_prompt_and_response():
    config = TrainingConfig(
        prompt_template="请回答以下问题：{prompt}",
        response_template="答案：{response}",
        **files(),
    )
    trainer = SFTrainer(config)
    sample = trainer._run.feed.train[0].samples[0]
    assert trainer.tokenizer.decode(sample.tokens) == "请回答以下问题：1+1=答案：2<|im_end|>"
    trained = [token for token, is_trained in zip(sample.tokens, sample.loss_mask, strict=True) if is_trained]
    assert trainer.tokenizer.decode(trained) == "答案：2<|im_end|>"


@pytest.mark.parametrize(
    "name,text",
    [
        ("train.jsonl", '{"prompt": "问题", "response": "回答"}\n{"prompt": "另一个问题", "response": "另一个回答"}\n'),
        ("train.json", '{"data": [{"prompt": "问1", "response": "回答1"}, {"prompt": "问2", "response": "回答2"}]}'),
        ("train.csv", 'prompt,response\n"问题1","回答1"\n"问题2","回答2"\n'),
    ],
)
def test_the_data_formats_of_the_example_are_read(name: str, text: str):
    Path("data", name).write_text(text, encoding="utf-8")
    trainer = SFTrainer(TrainingConfig(**files(train_file=f"data/{name}")))
    assert len(trainer._run.feed.train) == 2
    assert "回答" in trainer.tokenizer.decode(trainer._run.feed.train[1].samples[0].tokens)


def test_the_examples_of_advanced_use_run_as_printed(workplace: Path, deep_model: Path, capsys):
    # 创建自定义损失的模型
    loss_fn = create_loss("sft", label_smoothing=0.1)

    def my_callback(trainer):
        print(f"训练步骤: {trainer.global_step}")
        # 自定义逻辑

    config = TrainingConfig(output_dir="checkpoints", num_train_epochs=2, learning_rate=1e-3, save_steps=2, **files())
    trainer = SFTrainer(config, loss=loss_fn)
    trainer.callbacks.append(my_callback)
    trainer.train()
    assert capsys.readouterr().out.splitlines() == [f"训练步骤: {step}" for step in (1, 2, 3, 4)]

    # 保存模型
    trainer.model.save_pretrained("./checkpoints/my_model")
    assert same_bits(saved_weights(Path("checkpoints/my_model")), saved_weights(Path("checkpoints/checkpoint-4")))

    # 加载训练器状态
    Path("checkpoints/checkpoint-2").rename("checkpoints/checkpoint-1000")
    trainer.load_from_checkpoint("./checkpoints/checkpoint-1000")
    assert trainer.global_step == 2
    model = AutoModelForCausalLM.from_pretrained("checkpoints/checkpoint-1000")
    assert same_bits(dict(trainer.model.state_dict()), dict(model.state_dict()))

    # 评估
    eval_result = trainer.evaluate()
    print(f"评估结果: {eval_result}")
    assert eval_result["eval/loss"] > 0

    # 单轮对话
    response = trainer.chat([
        {"role": "system", "content": "你是一个AI助手。"},
        {"role": "user", "content": "你好"}
    ])  # fmt: skip
    assert isinstance(response, str)

    # 批量生成
    prompts = ["问题1", "问题2", "问题3"]
    responses = trainer.predict(prompts, max_new_tokens=512)
    assert len(responses) == 3
    assert all(isinstance(response, str) for response in responses)


# --- beyond the examples ----------------------------------------------------------------------------------


async def test_everything_works_where_an_event_loop_runs_already():
    trainer = SFTrainer(TrainingConfig(**files(max_steps=2)))
    assert trainer.train()["global_step"] == 2
    assert trainer.evaluate()["eval/loss"] > 0
    together = trainer.predict(["1+1=", "a", "b c"], max_new_tokens=4)
    assert together == [trainer.predict([prompt], max_new_tokens=4)[0] for prompt in ("1+1=", "a", "b c")]
    assert isinstance(trainer.chat([{"role": "user", "content": "1+1="}], max_new_tokens=4), str)


async def test_errors_reach_the_caller_where_an_event_loop_runs_already():
    trainer = SFTrainer(TrainingConfig(**files(max_steps=2)))
    trainer.callbacks.append(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def test_predictions_are_what_was_trained():
    rows = [{"prompt": f"{word}:", "response": word[::-1]} for word in ("ab", "cd", "ef", "gh")]
    write_rows(Path("data/train.jsonl"), rows)
    settings = {"num_train_epochs": 80, "batch_size": 4, "learning_rate": 1e-2, "eval_file": None}
    trainer = SFTrainer(TrainingConfig(**files(**settings)))
    trainer.train()
    assert trainer.predict([row["prompt"] for row in rows]) == [row["response"] for row in rows]
    folder = Path("runs/sft_experiment")
    assert SFTrainer(TrainingConfig(model_name=str(folder))).predict(["cd:"]) == ["dc"]


def test_a_callback_may_predict_evaluate_and_stop_nothing():
    plain = SFTrainer(TrainingConfig(**files(output_dir="plain", max_steps=4, learning_rate=1e-3)))
    plain.train()
    watched = SFTrainer(TrainingConfig(**files(output_dir="watched", max_steps=4, learning_rate=1e-3)))
    seen = []

    def look(trainer: SFTrainer) -> None:
        answer = trainer.predict(["1+2="], max_new_tokens=3, temperature=1.0)[0]
        seen.append((trainer.global_step, trainer.evaluate()["eval/loss"], answer))

    watched.callbacks.append(look)
    watched.train()
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][1] < seen[0][1]
    assert same_bits(saved_weights(Path("watched")), saved_weights(Path("plain")))


def test_training_again_from_an_earlier_checkpoint_gives_the_same_end():
    config = TrainingConfig(**files(output_dir="out", max_steps=4, save_steps=2, learning_rate=1e-3))
    trainer = SFTrainer(config)
    trainer.train()
    weights, losses = saved_weights(Path("out")), column(Path("out"), "loss")
    trainer.load_from_checkpoint("out/checkpoint-2")
    assert column(Path("out"), "loss") == losses  # to look at an earlier state costs nothing
    assert trainer.train()["global_step"] == 4
    assert same_bits(saved_weights(Path("out")), weights)
    assert column(Path("out"), "loss") == losses


def test_a_trainer_that_is_only_made_leaves_an_earlier_run_as_it_was():
    settings = files(output_dir="out", max_steps=2)
    SFTrainer(TrainingConfig(**settings)).train()
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    SFTrainer(TrainingConfig(**{**settings, "max_steps": 3})).predict(["1+1="], max_new_tokens=2)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_a_second_call_of_train_trains_no_further():
    trainer = SFTrainer(TrainingConfig(**files(max_steps=2)))
    assert trainer.train() == trainer.train()
    assert len(metrics(Path("runs/sft_experiment"), "loss")) == 2


def test_an_exception_in_a_callback_leaves_a_run_that_can_go_on():
    settings = files(output_dir="out", max_steps=4, save_steps=2, learning_rate=1e-3)
    broken = SFTrainer(TrainingConfig(**settings))
    broken.callbacks.append(lambda trainer: 1 / 0 if trainer.global_step == 3 else None)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    again = SFTrainer(TrainingConfig(**settings))
    assert again.global_step == 3  # the step was whole; only what came after it failed
    assert again.train()["global_step"] == 4
    assert [line["step"] for line in metrics(Path("out"), "loss")] == [1, 2, 3, 4]


def test_a_trainer_without_rows_predicts_and_says_what_it_cannot_do():
    trainer = SFTrainer(TrainingConfig(**QUIET))
    assert len(trainer.predict(["a", "b"], max_new_tokens=3)) == 2
    assert trainer.global_step == 0
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ConfigError, match="train_file"):
            call()


def test_what_is_wrong_is_said_when_the_configuration_is_made():
    with pytest.raises(ConfigError) as error:
        TrainingConfig(learing_rate=1e-5, batch_size=0)
    assert "learing_rate is not a setting" in str(error.value) and "learning_rate" in str(error.value)
    assert "batch_size" in str(error.value)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        SFTrainer(TrainingConfig(train_file="data/nowhere.jsonl"))
    with pytest.raises(ConfigError, match="there are no held-out rows"):
        SFTrainer(TrainingConfig(**files(eval_file=None))).evaluate()
    trainer = SFTrainer(TrainingConfig(**files(max_steps=1)))
    with pytest.raises(CheckpointError, match="checkpoint-7"):
        trainer.load_from_checkpoint("checkpoint-7")
    with pytest.raises(ConfigError, match="temperatur"):
        trainer.predict(["a"], temperatur=1.0)


def test_distillation_without_a_teacher_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("whet.roles.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"reads teacher_hidden.* set method to gkd and distill\.teacher to a model"):
        SFTrainer(TrainingConfig(**files()), loss=create_loss("kd", beta=0.1))


def test_a_loss_of_ones_own_takes_the_place_of_the_method():
    smooth = SFTrainer(TrainingConfig(**files(output_dir="s", max_steps=1)), loss=create_loss("sft", label_smoothing=1))
    smooth.train()
    plain = SFTrainer(TrainingConfig(**files(output_dir="p", max_steps=1)))
    plain.train()
    assert column(Path("s"), "loss") != column(Path("p"), "loss")
    assert torch.isfinite(torch.tensor(column(Path("s"), "loss"))).all()
