"""LLaMA-Factory's files: every stage, its data sets by `dataset_info.json`, and what is told about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imports import Import, idle, loaded, lost

from whet.errors import ConfigError

SFT = """\
### model
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: alpaca_en_demo
template: qwen
cutoff_len: 1024
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/qwen/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
INFO: dict[str, Any] = {
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "identity": {"file_name": "identity.json"},
    "glaive": {
        "file_name": "glaive.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "tools"},
    },
    "openai": {
        "file_name": "openai.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "dpo_demo": {
        "file_name": "dpo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "ranked": {
        "hf_hub_url": "owner/ranked",
        "subset": "en",
        "split": "train_prefs",
        "ranking": True,
        "columns": {"prompt": "question", "query": "context", "chosen": "good", "rejected": "bad"},
    },
    "kto_demo": {
        "file_name": "kto.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "wiki": {"file_name": "wiki.jsonl", "columns": {"prompt": "body"}},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "scripted": {"script_url": "loader.py"},
    "odd": {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"user_tag": "customer"}},
    "some": {"file_name": "some.json", "num_samples": 100, "columns": {"prompt": "instruction", "response": "output"}},
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> Path:
    """The folder of data sets."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    return tmp_path / "data"


def test_an_sft_file_becomes_a_configuration(imported: Import):
    result = imported("llamafactory", SFT)
    config = loaded(result)
    assert (config.method, config.model.path) == ("sft", "Qwen/Qwen2.5-0.5B-Instruct")
    adapter = config.model.adapter
    assert adapter is not None and config.model.trust_remote_code
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules) == (8, 16, 0.0, "all-linear")
    assert (config.data.train, config.data.max_length) == ("data/alpaca_en_demo.json@[0:500]", 1024)
    assert (config.data.eval_share, config.data.columns) == (0.1, {})
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (config.optim.weight_decay, config.backend.precision) == (0.0, "bf16")
    assert (config.eval.every_steps, config.checkpoint.every_steps, config.log.every_steps) == (500, 500, 10)
    assert lost(result) == {}
    assert {"template", "overwrite_cache", "preprocessing_num_workers", "plot_loss", "ddp_timeout"} <= set(idle(result))


def small(dataset: str, stage: str = "sft", **further: object) -> str:
    lines = {"model_name_or_path": "m", "stage": stage, "finetuning_type": "full", "dataset": dataset, **further}
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())


@pytest.mark.parametrize(
    "dataset,stage,train,columns",
    [
        ("identity", "sft", "data/identity.json", {}),
        ("glaive", "sft", "data/glaive.json", {"conversations": "turns"}),
        ("openai", "sft", "data/openai.jsonl", {}),
        ("dpo_demo", "dpo", "data/dpo.json", {}),
        ("dpo_demo", "rm", "data/dpo.json", {}),
        (
            "ranked",
            "dpo",
            "owner/ranked:en:train_prefs",
            {"instruction": "question", "input": "context", "chosen": "good", "rejected": "bad"},
        ),
        ("kto_demo", "kto", "data/kto.json", {"kto_tag": "label"}),
        ("wiki", "pt", "data/wiki.jsonl", {"text": "body"}),
        ("some", "sft", "data/some.json@[0:100]", {}),
        ("alpaca_en_demo, identity", "sft", ["data/alpaca_en_demo.json", "data/identity.json"], {}),
    ],
)
def test_data_sets_become_files_and_columns(imported: Import, dataset: str, stage: str, train: object, columns: dict):
    config = loaded(imported("llamafactory", small(dataset, stage)))
    assert (config.data.train, config.data.columns) == (train, columns)


def test_several_data_sets_may_be_a_list_and_have_their_own_to_evaluate(imported: Import):
    text = small("x").replace('"x"', "[alpaca_en_demo, identity]") + "eval_dataset: identity\n"
    config = loaded(imported("llamafactory", text))
    assert config.data.train == ["data/alpaca_en_demo.json", "data/identity.json"]
    assert config.data.eval == "data/identity.json"


@pytest.mark.parametrize(
    "dataset,why",
    [
        ("glaive", "data.columns is one for all files: rename the columns"),
        ("pictures", "it has images, and models read text here"),
        ("scripted", "it is read by a script"),
        ("odd", "it has the tags {'user_tag': 'customer'}"),
    ],
)
def test_a_data_set_that_cannot_be_read_beside_the_others_is_left_out_and_told(
    imported: Import, dataset: str, why: str
):
    result = imported("llamafactory", small(f"identity,{dataset}"))
    assert loaded(result).data.train == "data/identity.json"
    assert why in lost(result)[dataset]


def test_when_no_data_set_is_left_one_is_to_be_filled_in(imported: Import):
    result = imported("llamafactory", small("scripted"))
    assert [problem.path for problem in result.missing] == [("data", "train")]


def test_differences_in_what_is_read_are_told(imported: Import):
    remarks = " ".join(imported("llamafactory", small("some")).remarks)
    assert "draws num_samples rows at random" in remarks and "here `input` is read" in remarks
    assert "cuts them into blocks of cutoff_len" in " ".join(imported("llamafactory", small("wiki", "pt")).remarks)


def test_a_folder_of_files_is_all_of_them(imported: Import, data: Path):
    (data / "many").mkdir()
    for name in ("b.json", "a.jsonl", "readme.md"):
        (data / "many" / name).write_text("{}")
    (data / "dataset_info.json").write_text(json.dumps({"many": {"file_name": "many"}}))
    assert loaded(imported("llamafactory", small("many"))).data.train == ["data/many/a.jsonl", "data/many/b.json"]


def test_the_folder_of_data_sets_can_be_said(imported: Import, data: Path):
    data.rename(data.parent / "elsewhere")
    with pytest.raises(ConfigError, match=r"cannot read data/dataset_info\.json: No such file.*--dataset_dir"):
        imported("llamafactory", small("identity"))
    config = loaded(imported("llamafactory", small("identity"), dataset_dir="elsewhere"))
    assert config.data.train == "elsewhere/identity.json"
    assert loaded(imported("llamafactory", small("identity", dataset_dir="elsewhere"))).data.train == config.data.train


def test_the_folder_of_data_sets_is_found_beside_the_file(imported: Import, data: Path):
    (data.parent / "configs").mkdir()
    data.rename(data.parent / "configs" / "data")
    config = loaded(imported("llamafactory", small("identity"), "configs/sft.yaml"))
    assert config.data.train == "configs/data/identity.json"


def test_names_on_the_hub_need_no_description(imported: Import):
    config = loaded(imported("llamafactory", small("owner/rows", dataset_dir="ONLINE", max_samples=10)))
    assert config.data.train == "owner/rows@[0:10]"


@pytest.mark.parametrize(
    "text,method,loss,nll",
    [
        (small("dpo_demo", "dpo", pref_beta=0.2, pref_loss="hinge"), "dpo", {"beta": 0.2, "use": "hinge"}, None),
        (small("dpo_demo", "dpo", pref_ftx=0.5), "dpo", {"beta": 0.1}, 0.5),
        (small("dpo_demo", "dpo", pref_loss="orpo"), "orpo", {"beta": 0.1}, None),
        (small("dpo_demo", "dpo", pref_loss="simpo", pref_beta=2.0), "simpo", {"beta": 2.0, "gamma": 0.5}, None),
        (small("dpo_demo", "dpo", pref_loss="simpo", simpo_gamma=0.7), "simpo", {"beta": 0.1, "gamma": 0.7}, None),
        (small("dpo_demo", "dpo", dpo_label_smoothing=0.1), "dpo", {"beta": 0.1, "label_smoothing": 0.1}, None),
        (
            small("kto_demo", "kto", pref_beta=0.3, kto_chosen_weight=1.5),
            "kto",
            {"beta": 0.3, "desirable_weight": 1.5},
            None,
        ),
        (small("dpo_demo", "rm", pref_beta=0.1), "reward", {}, None),
    ],
)
def test_preferences_have_their_loss(imported: Import, text: str, method: str, loss: dict, nll: float | None):
    config = loaded(imported("llamafactory", text))
    assert (config.method, config.loss, config.nll_coef) == (method, loss, nll)


def test_stage_pt_trains_every_token(imported: Import):
    result = imported("llamafactory", small("wiki", "pt", packing=True, train_on_prompt=False))
    config = loaded(result)
    assert (config.method, config.data.train_on) == ("sft", "all")
    assert {"packing", "train_on_prompt"} <= set(idle(result))


def test_weights_of_four_bits_go_with_the_adapter(imported: Import):
    text = SFT + "quantization_bit: 4\nquantization_method: bnb\ndouble_quantization: false\n"
    quantization = loaded(imported("llamafactory", text)).model.quantization
    assert quantization is not None and (quantization.bits, quantization.double) == (4, False)


def test_the_adapter_is_the_default_and_its_alpha_twice_the_rank(imported: Import):
    text = small("identity").replace('finetuning_type: "full"\n', "lora_rank: 64\nlora_target: q_proj,v_proj\n")
    adapter = loaded(imported("llamafactory", text)).model.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.target_modules) == (64, 128, ["q_proj", "v_proj"])
    assert loaded(imported("llamafactory", text + "lora_alpha: 32\n")).model.adapter.alpha == 32  # type: ignore[union-attr]
    assert loaded(imported("llamafactory", text + "lora_alpha: null\n")).model.adapter.alpha == 128  # type: ignore[union-attr]


def test_without_an_adapter_its_names_are_idle(imported: Import):
    result = imported("llamafactory", small("identity", lora_rank=8))
    assert loaded(result).model.adapter is None
    assert "only with finetuning_type: lora" in idle(result)["lora_rank"]


def test_an_adapter_that_is_given_is_trained_on(imported: Import):
    result = imported("llamafactory", SFT + "adapter_name_or_path: saves/before\n")
    config = loaded(result)
    assert (config.model.path, config.model.adapter) == ("saves/before", None)
    assert "adapter_config.json" in " ".join(result.remarks)


def test_what_has_no_counterpart_is_told_with_what_to_do(imported: Import):
    text = small(
        "identity", deepspeed="ds_z3.json", mask_history=True, use_galore=True, val_size=100, neftune_noise_alpha=5
    )
    result = imported("llamafactory", text + "finetuning: x\n")
    loaded(result)
    assert set(lost(result)) == {
        "deepspeed",
        "mask_history",
        "use_galore",
        "val_size",
        "neftune_noise_alpha",
        "finetuning",
    }
    assert "data.eval_share the share that 100 rows are" in lost(result)["val_size"]
    assert "did you mean finetuning_type" in lost(result)["finetuning"]


@pytest.mark.parametrize(
    "text,message",
    [
        (small("identity", "ppo"), "stage in config.yaml, line 2: stage 'ppo' has prompts, reward and batches"),
        (small("identity", "sfft"), "stage 'sfft' is unknown"),
        (small("identiti"), "data/dataset_info.json: identiti is not in it; did you mean identity?"),
        (small("identity", dataset_dir="REMOTE:owner/data"), "dataset_dir is 'REMOTE:owner/data': fetch it"),
        (small("identity", max_samples=0), "config.yaml, line 5: max_samples is 0"),
        (small("identity").replace('"identity"', "3"), "config.yaml, line 4: dataset is 3, expected names"),
        ("stage: [\n", "config.yaml, line 2: this is not valid YAML"),
    ],
)
def test_bad_input_is_told_with_file_and_line(imported: Import, text: str, message: str):
    with pytest.raises(ConfigError) as raised:
        imported("llamafactory", text)
    assert message in str(raised.value)


def test_a_broken_description_is_told_with_its_line(imported: Import, data: Path):
    (data / "dataset_info.json").write_text('{\n  "a": 1,\n}')
    with pytest.raises(ConfigError, match=r"data/dataset_info\.json, line 3: broken JSON"):
        imported("llamafactory", small("a"))
    (data / "dataset_info.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a mapping of names to data sets"):
        imported("llamafactory", small("a"))
