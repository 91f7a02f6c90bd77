"""Reading a configuration: layers, sources, flags as text, and errors that tell everything at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from whet.config.loader import dump, from_values, load
from whet.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--model.path", "tiny", "--data.train", "rows.jsonl"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_yaml(text: str) -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"


def sft(*flags: str):
    return load("sft", None, [*BASE, *flags]).config


def error_of(method: str | None, text: str | None, *flags: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(method, None if text is None else run_yaml(text), list(flags))
    return str(raised.value)


def test_flags_override_the_file_and_the_file_overrides_defaults():
    path = run_yaml("model: {path: tiny}\ndata: {train: a.jsonl}\noptim:\n  lr: 1e-6\n  eps: 1e-7\n")
    loaded = load("sft", path, ["--optim.lr", "3e-6"])
    optim = loaded.config.optim
    assert (optim.lr, optim.eps, optim.beta1) == (3e-6, 1e-7, 0.9)
    assert loaded.sources["optim.lr"] == "--optim.lr"
    assert loaded.sources["optim.eps"] == "run.yaml, line 5"
    assert loaded.sources["method"] == "the command"
    assert "optim.beta1" not in loaded.sources


def test_a_flag_is_written_in_any_of_its_forms():
    spellings = (["--train.batch_size", "4"], ["--train.batch_size=4"], ["--train.batch-size", "4"], ["--batch-size=4"])
    assert [sft(*flags).train.batch_size for flags in spellings] == [4, 4, 4, 4]


def test_a_flag_alone_means_true_for_a_switch_only():
    config = sft("--backend.activation_checkpointing", "--data.shuffle", "false")
    assert (config.backend.activation_checkpointing, config.data.shuffle) == (True, False)
    assert "--optim.lr needs a value" in error_of("sft", None, *BASE, "--optim.lr")
    assert "--actor-num-nodes needs a value" in error_of("sft", None, *BASE, "--actor-num-nodes")
    assert "--data.eval needs a value" in error_of("sft", None, *BASE, "--data.eval", "--optim.lr", "1")


def test_there_is_no_negated_flag_and_the_error_says_what_to_write():
    for flag in ("--no-log.progress", "--no-progress", "--nolog.progress"):
        assert "write --log.progress false" in error_of("sft", None, *BASE, flag)


def test_a_negative_number_is_a_value():
    error = error_of("sft", None, *BASE, "--optim.lr", "-1")
    assert error == "optim.lr must be greater than 0, got -1 (from --optim.lr)"


@pytest.mark.parametrize(
    "flag,text,value",
    [
        ("data.prompt_template", "Q: {prompt}", "Q: {prompt}"),
        ("data.prompt_template", "{prompt} =", "{prompt} ="),
        ("data.prompt_template", "[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]"),
        ("data.prompt_template", '"{prompt}\\n"', "{prompt}\n"),
        ("data.system", "# Be brief # really", "# Be brief # really"),
        ("data.system", "Be brief # really", "Be brief # really"),
        ("data.system", "", ""),
        ("data.system", "null", None),
        ("data.train", "rows.jsonl@[0:1000]", "rows.jsonl@[0:1000]"),
        ("data.train", "[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("data.train", "2024-13-45", "2024-13-45"),
        ("output_dir", "5", "5"),
        ("output_dir", "yes", "yes"),
        ("model.revision", "1e-6", "1e-6"),
        ("model.freeze.layers", "[0, 1]", [0, 1]),
        ("model.freeze.layers", "6", 6),
        ("checkpoint.resume", "false", False),
        ("checkpoint.resume", "runs/a", "runs/a"),
        ("train.epochs", "1e-1", 0.1),
    ],
)
def test_text_of_a_flag_is_yaml_only_where_the_setting_takes_that(flag: str, text: str, value: object):
    base = ["--model.path", "tiny", *(() if flag == "data.train" else ("--data.train", "rows.jsonl"))]
    node = load("sft", None, [*base, f"--{flag}", text]).config
    for part in flag.split("."):
        node = getattr(node, part)
    assert node == value and type(node) is type(value)


def test_text_of_an_option_is_yaml_where_it_was_meant_so():
    flags = ("--loss.a", "x: y # z", "--loss.b", "{x: 1}", "--loss.c", "[1]", "--loss.d", "'1'", "--loss.e", "1.5")
    assert sft(*flags).loss == {"a": "x: y # z", "b": {"x": 1}, "c": [1], "d": "1", "e": 1.5}


def test_lists_and_single_list_items_are_set_by_flags():
    path = run_yaml("model: tiny\ndata: {train: a}\nreward:\n  - math\n  - {use: exact, weight: 2}\n")
    loaded = load("grpo", path, ["--rollout.stop", '["a"]', "--reward.1.weight", "3"])
    assert loaded.config.rollout.stop == ["a"]
    assert [(one.use, one.weight) for one in loaded.config.reward] == [("math", 1.0), ("exact", 3.0)]
    assert loaded.sources["reward.0"] == "run.yaml, line 4"
    error = error_of("grpo", Path(path).read_text(), "--reward.2.weight", "1", "--reward.use", "x")
    assert "reward.2.weight (from --reward.2.weight) cannot be set: reward is a list of 2" in error
    assert "reward.use (from --reward.use) cannot be set: reward is a list of 2" in error


def test_an_unexpected_argument_is_named():
    error = error_of("sft", None, *BASE, "--lora_target_modules", "q_proj", "v_proj")
    assert error.startswith("unexpected argument 'v_proj' after --lora_target_modules")


def test_a_text_in_place_of_a_section_names_what_is_used():
    config = load("grpo", run_yaml("model: tiny\ncredit: rloo\n"), ["--reward", "math", "--data.train", "a"]).config
    assert (config.model.path, config.reward.use, config.credit.use) == ("tiny", "math", "rloo")
    assert sft("--loss", "dft").loss == {"use": "dft"}


def test_options_of_plugins_and_mappings_pass_to_who_checks_them():
    config = load(
        "grpo", run_yaml("model: tiny\nreward: {use: a.b:c, my_option: [1]}\n"), ["--loss.clip_high", "0.3", *BASE[2:]]
    ).config
    assert (config.reward.options, config.loss) == ({"my_option": [1]}, {"clip_high": 0.3})


def test_a_heading_with_nothing_below_it_leaves_the_defaults():
    config = load("sft", run_yaml("model: {path: tiny, adapter: {}}\ndata: {train: a}\noptim:\n  # lr: 1\n"), []).config
    assert config.optim.lr == 2e-5
    assert config.model.adapter is not None and config.model.adapter.rank == 8


def test_dotted_names_and_merge_keys_in_the_file():
    text = "model.path: tiny\ndata: &d {train: a, max_length: 64}\n"
    assert load("sft", run_yaml(text), []).config.model.path == "tiny"
    shared = "model: {path: tiny}\ndata:\n  <<: {train: a, max_length: 64}\n  max_length: 32\n"
    config = load("sft", run_yaml(shared), []).config
    assert (config.data.train, config.data.max_length) == ("a", 32)


def test_all_violations_are_told_at_once_each_with_value_source_and_remedy():
    text = """\
model: {path: tiny}
data: {train: a.jsonl}
optim:
  lr: -1
  shedule: cosine
seed: abc
eval:
  patience: 2
train: {batch_size: true}
attn_implementation: sdpa
"""
    error = error_of("sft", text, "--optim.schedule", "cosin", "--learning-rat=3")
    assert error.splitlines() == [
        "9 problems in the configuration:",
        "  - optim.shedule is not a setting (value 'cosine', from run.yaml, line 5); did you mean optim.schedule?",
        "  - train.batch_size must be a whole number, got true (from run.yaml, line 9)",
        "  - attn_implementation is 'sdpa' (from run.yaml, line 10), but it is refused: attention is whet's own; "
        "choose how a batch runs with model.attention",
        "  - learning_rat is not a setting (value 3, from --learning-rat); did you mean learning_rate (optim.lr)?",
        "  - seed must be a whole number, got 'abc' (from run.yaml, line 6)",
        "  - optim.lr must be greater than 0, got -1 (from run.yaml, line 4)",
        "  - optim.schedule must be one of linear, cosine or constant, got 'cosin'; did you mean cosine? "
        "(from --optim.schedule)",
        "  - eval.patience is 2, but there is nothing to evaluate on; give data.eval or data.eval_share "
        "(from run.yaml, line 8)",
        "  - eval.patience is 2, but evaluations during training are off; give eval.every_steps or "
        "eval.every_epochs (from run.yaml, line 8)",
    ]


@pytest.mark.parametrize(
    "written,suggested",
    [
        ("optm.lr", "did you mean optim.lr?"),
        ("optim.learnin_rate", "did you mean learning_rate (optim.lr)?"),
        ("epochs", "did you mean train.epochs?"),
        ("evl.batch_size", "did you mean eval.batch_size?"),
        ("temprature", "did you mean eval.temperature or rollout.temperature?"),
        ("n-sample-per-prompt", "did you mean n_samples_per_prompt (rollout.group_size)?"),
        ("xqzw", "docs/configuration.md lists all settings"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(written: str, suggested: str):
    error = error_of("sft", None, *BASE, f"--{written}", "3")
    assert "is not a setting (value 3, from --" + written + ")" in error
    assert suggested in error


def test_wrong_values_are_described_in_plain_words():
    text = """data: {train: [1], columns: {prompt: 5}}
model: {path: 5, freeze: {layers: x}}
checkpoint: {resume: 7}
optim: fast
rollout: [1]
reward:
  - {use: math, weight: x}
  - {weight: .nan}
terms: 5
train: {epochs: .inf, steps: 10.5}
"""
    assert error_of("grpo", text).splitlines()[1:] == [
        "  - model.path must be text, got 5; put it in quotes (from run.yaml, line 2)",
        "  - model.freeze.layers must be a whole number or a list of whole numbers, got 'x' (from run.yaml, line 2)",
        "  - data.train must be text, a list of texts or null, got [1] (from run.yaml, line 1)",
        "  - data.columns.prompt must be text, got 5; put it in quotes (from run.yaml, line 1)",
        "  - train.epochs must be a finite number, got inf (from run.yaml, line 10)",
        "  - train.steps must be a whole number or null, got 10.5 (from run.yaml, line 10)",
        "  - optim must be a mapping, got 'fast' (from run.yaml, line 4)",
        "  - checkpoint.resume must be text or true or false, got 7; put it in quotes (from run.yaml, line 3)",
        "  - terms must be a list of mappings or null, got 5 (from run.yaml, line 9)",
        "  - rollout must be a mapping, got [1] (from run.yaml, line 5)",
        "  - reward.0.weight must be a number, got 'x' (from run.yaml, line 7)",
        "  - reward.1.use is missing (a built-in name, or `package.module:attribute` of your own) "
        "(from run.yaml, line 8)",
        "  - reward.1.weight must be a finite number, got nan (from run.yaml, line 8)",
    ]


def test_the_model_is_asked_for_by_name():
    assert error_of("sft", None, "--data.train", "a").startswith("model.path is missing (folder of a transformers")


def test_one_setting_given_twice_in_one_layer_is_refused():
    text = "model: tiny\ndata: {train: a}\nlearning_rate: 1e-5\noptim: {lr: 2e-5}\n"
    assert error_of("sft", text) == (
        "optim.lr is given twice: '1e-5' (from learning_rate in run.yaml, line 3) and '2e-5' (from run.yaml, line 4); "
        "keep one"
    )
    twice = error_of("sft", None, *BASE, "--optim.lr", "1", "--learning-rate", "2")
    assert "optim.lr is given twice: 1 (from --optim.lr) and 2 (from --learning-rate)" in twice
    assert "model.adapter is given twice" in error_of("sft", None, *BASE, "--use_lora", "false", "--lora_r", "8")


def test_the_same_value_twice_is_no_contradiction():
    assert sft("--optim.lr", "1e-5", "--learning-rate", "1e-5").optim.lr == 1e-5


def test_a_key_written_twice_in_the_file_is_refused_with_both_lines():
    text = "model: tiny\ndata: {train: a}\noptim:\n  lr: 1\n  eps: 1\n  lr: 1\n"
    assert error_of("sft", text) == "optim.lr is given twice in run.yaml, in line 4 and line 6; keep one"


@pytest.mark.parametrize(
    "text,error",
    [
        ("", "run.yaml: the file is empty"),
        ("# nothing\n", "run.yaml: the file is empty"),
        ("- a\n- b\n", "run.yaml, line 1: settings are written `name: value`, but this is a list"),
        ("\nhello\n", "run.yaml, line 2: settings are written `name: value`, but this is the text 'hello'"),
        ("a: 1\nb: [1\nc: 2\n", "run.yaml, line 3: this is not valid YAML"),
        ("a:\n\tb: 1\n", "run.yaml, line 2: this is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "run.yaml, line 2: this is not valid YAML: expected a single document"),
        ("a: !!python/object:os.system 1\n", "run.yaml, line 1: this is not valid YAML"),
        ("seed: 2024-13-45\n", "run.yaml, line 1: '2024-13-45' cannot be read (month must be in 1..12)"),
        ("a: &x\n  b: *x\n", "run.yaml, line 1: this value contains itself"),
        ("model: tiny\ndata: {train: a}\n1: 2\n", "run.yaml, line 3: the name 1 is not text; put it in quotes"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(text: str, error: str):
    assert error_of("sft", text).startswith(error)


def test_names_that_yaml_takes_for_truth_values_are_text():
    plain = "model: tiny\ndata: {train: a, shuffle: no}\n"
    text = plain + "terms:\n  - {use: sigmoid}\n  - {use: sft, on: chosen}\n"
    flags = ["--terms", "[{use: sigmoid}, {use: sft, on: chosen}]"]
    for loaded in (load("dpo", run_yaml(text), []), load("dpo", run_yaml(plain), flags)):
        terms = loaded.config.terms
        assert terms is not None and [term.on for term in terms] == ["all", "chosen"]
        assert loaded.config.data.shuffle is False


def test_a_missing_or_binary_file_is_refused():
    with pytest.raises(ConfigError, match=r"cannot read the configuration nowhere.yaml: No such file"):
        load("sft", "nowhere.yaml", [])
    Path("binary.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"binary.yaml: it is not UTF-8 text"):
        load("sft", "binary.yaml", [])


def test_the_method_of_the_file_must_be_the_command():
    text = "method: grpo\nmodel: tiny\ndata: {train: a}\nreward: math\n"
    assert load(None, run_yaml(text), []).config.method == "grpo"
    told = (
        "method is 'grpo' (from run.yaml, line 1), but the command is ppo; run `whet grpo`, remove it, or add --method"
    )
    assert f"{told} ppo" in error_of("ppo", text)
    assert load("ppo", run_yaml(text), ["--method", "ppo"]).config.method == "ppo"
    with pytest.raises(ConfigError, match=r"\(from --method\), but the command is ppo; run `whet dapo`, or remove it"):
        load("ppo", run_yaml(text), ["--method", "dapo"])


def test_a_dumped_configuration_loads_to_an_equal_one():
    text = """model: {path: tiny, adapter: {rank: 4}}
data: {train: [a, b], columns: {prompt: question}, system: "é: #1"}
optim: {lr: 1e-6}
loss: {use: a.b:c, cap: 1e-6, names: [x, null, 1.5]}
reward: [math, {use: c.d:e, weight: -0.5, name: "1e-6", nested: {a: [1]}}]
credit: rloo
"""
    config = load("grpo", run_yaml(text), []).config
    Path("saved.yaml").write_text(dump(config), encoding="utf-8")
    again = load(None, "saved.yaml", [])
    assert again.config == config
    assert dump(again.config) == dump(config)
    assert "é" in dump(config)


def test_a_loaded_configuration_cannot_be_changed():
    loaded = load("sft", None, BASE)
    with pytest.raises(ValidationError):
        loaded.config.optim.lr = 1.0
    with pytest.raises(AttributeError):
        loaded.config = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        loaded.sources["optim.lr"] = "here"  # type: ignore[index]


def test_a_configuration_does_not_share_what_was_passed_in():
    names = ["a"]
    config = from_values({"model": "tiny", "data.train": "a", "loss": {"names": names}}).config
    names.append("b")
    assert config.loss == {"names": ["a"]}


def test_what_was_passed_in_is_left_as_it_was():
    reward = ["math", {"use": "exact"}]
    values = {"model": "tiny", "data": {"train": "a"}, "reward": reward}
    loaded = from_values(values, method="grpo", where="Config")
    assert values == {"model": "tiny", "data": {"train": "a"}, "reward": ["math", {"use": "exact"}]}
    assert loaded.sources["data.train"] == "Config"


def test_values_from_python_take_the_same_names_and_checks():
    config = from_values({"model_name": "tiny", "train_file": "a", "optim.eps": 1e-7, "learning_rate": 1e-5}).config
    assert (config.method, config.model.path, config.optim.eps, config.optim.lr) == ("sft", "tiny", 1e-7, 1e-5)
    with pytest.raises(ConfigError, match=r"optim.lr must be greater than 0, got -1 \(from learning_rate in T\)"):
        from_values({"model_name": "tiny", "train_file": "a", "learning_rate": -1}, where="T")


def test_loading_imports_no_torch():
    code = (
        "import sys, whet.config.loader, whet.config.plugin, whet.config.reference;"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", check=True)
    assert done.stdout.strip() == "set()"


def test_sections_of_ones_own_names_are_read_like_any_section():
    text = "model: tiny\ndata: {train: a}\nreward: math\n"
    text += "eval:\n  num_samples: 4\n  sets:\n    aime-24:\n      path: b\n    sums: c\n"
    loaded = load("grpo", run_yaml(text), ["--eval.sets.aime_24.top-k", "5", "--eval.sets.sums.reward", "exact"])
    sets = loaded.config.eval.sets
    assert list(sets) == ["aime_24", "sums"]
    assert (sets["aime_24"].path, sets["aime_24"].top_k, sets["sums"].path) == ("b", 5, "c")
    assert sets["sums"].reward.use == "exact"  # type: ignore[union-attr]
    assert loaded.sources["eval.sets.aime_24.path"] == "run.yaml, line 8"
    assert load("grpo", run_yaml(dump(loaded.config)), []).config == loaded.config
    of_set = loaded.config.eval.of_set("aime_24")
    assert (of_set.num_samples, of_set.top_k, of_set.temperature) == (4, 5, None)


def test_zero_for_what_is_done_every_so_often_says_how_it_is_not_done():
    text = "model: tiny\ndata: {train: a, eval: b}\neval: {every_epochs: 0, batch_size: 0}\n"
    error = error_of("sft", text)
    assert "eval.every_epochs must be at least 1, got 0; leave it out to do without (from" in error
    assert "eval.batch_size must be at least 1, got 0 (from" in error


def test_what_is_wrong_within_a_section_of_ones_own_name_is_told_with_its_path():
    text = (
        "model: tiny\ndata: {train: a}\nreward: math\neval:\n  sets:\n    aime: {num_samples: 0, top_q: 1}\n    sums:\n"
    )
    error = error_of("grpo", text)
    assert "eval.sets.aime.num_samples must be at least 1, got 0 (from run.yaml, line 6)" in error
    assert "eval.sets.aime.path is missing" in error
    assert "eval.sets.aime.top_q is not a setting" in error
    assert "did you mean eval.sets.aime.top_p?" in error or "did you mean eval.sets.aime.top_k?" in error
    assert "eval.sets.sums must be a mapping, got null" in error
    template = "eval.sets.a: {path: b, prompt_template: nothing}"
    assert "eval.sets.a.prompt_template: 'nothing' has no {prompt}" in error_of(
        "grpo", f"model: tiny\ndata: {{train: a}}\nreward: math\n{template}\n"
    )
