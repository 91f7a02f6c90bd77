"""The command `whet import`: what it writes, what it says where, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from imports import Import

from whet import cli
from whet.config.loader import load
from whet.migrate.write import configuration, report

DPO = """\
model_name_or_path: m
dataset_name: owner/pairs
beta: 1e-1
loss_type: ipo
deepspeed: zero3.json
packing: true
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo.yaml").write_text(DPO)
    return tmp_path


def test_the_configuration_is_shown_and_the_findings_are_told_beside_it(capsys):
    assert cli.main(["import", "trl", "dpo.yaml"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["loss"] == {"use": "ipo", "beta": 0.1}
    assert "dpo.yaml (TRL) -> standard output: method dpo; run it with whet dpo OUT.yaml" in err
    assert "deepspeed: 'zero3.json' (dpo.yaml, line 5)" in err


def test_a_file_is_written_and_loads_as_the_method_that_it_names(capsys):
    assert cli.main(["import", "trl", "dpo.yaml", "-o", "made/run.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "run it with whet dpo made/run.yaml" in out and err == ""
    config = load("dpo", "made/run.yaml", []).config
    assert (config.model.path, config.loss, config.optim.lr) == ("m", {"use": "ipo", "beta": 0.1}, 1e-6)


def test_a_file_that_is_there_is_not_written_over_unasked(folder: Path, capsys):
    (folder / "run.yaml").write_text("precious: true\n")
    assert cli.main(["import", "trl", "dpo.yaml", "-o", "run.yaml"]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == "precious: true\n"
    assert cli.main(["import", "trl", "dpo.yaml", "-o", "run.yaml", "--force"]) == 0
    assert "ipo" in (folder / "run.yaml").read_text()


def test_what_must_be_filled_in_ends_with_2_and_stands_in_the_file(folder: Path, capsys):
    (folder / "bare.yaml").write_text("beta: 0.1\n")
    assert cli.main(["import", "trl", "bare.yaml", "--method", "dpo", "-o", "run.yaml"]) == 2
    out = capsys.readouterr().out
    assert "fill in what is missing first" in out and "model.path is missing" in out
    text = (folder / "run.yaml").read_text()
    assert "# Fill in: model.path is missing" in text and "# Fill in: data.train is missing" in text
    assert load("dpo", "run.yaml", ["--model.path", "m", "--data.train", "rows.jsonl"]).config.loss == {"beta": 0.1}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["import"], "usage: whet import"),
        (["import", "axolotl", "dpo.yaml"], "invalid choice"),
        (["import", "trl"], "the following arguments are required: file"),
        (["import", "slime", "run.sh", "--method", "dpo"], "--method is for trl"),
        (["import", "trl", "dpo.yaml", "--dataset_dir", "x"], "--dataset_dir is for llamafactory"),
        (["import", "trl", "none.yaml"], "cannot read the configuration none.yaml"),
        (["import", "slime", "none.sh"], "cannot read none.sh"),
    ],
)
def test_wrong_use_ends_with_2_and_a_word_on_stderr(capsys, arguments: list[str], message: str):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_help_says_what_it_reads(capsys):
    assert cli.main(["import", "--help"]) == 0
    out = capsys.readouterr().out
    assert "whet import" in out and all(tool in out for tool in ("trl", "llamafactory", "slime", "dataset_info.json"))


def test_every_setting_says_where_it_came_from(imported: Import):
    lines = configuration(imported("trl", DPO, "dpo.yaml")).splitlines()
    assert lines[0] == "# From dpo.yaml (TRL)."
    assert "method: dpo  # the name of dpo.yaml" in lines
    assert "  path: m  # model_name_or_path, line 1" in lines
    assert "  epochs: 3.0  # TRL's default" in lines
    settings = [line for line in lines if ":" in line and not line.lstrip().startswith("#")]
    assert [line for line in settings if "#" not in line and not line.endswith(":")] == []


def test_what_was_left_out_stands_at_the_end_of_the_file_and_in_the_report(imported: Import):
    result = imported("trl", DPO + "assistant_only_loss: true\n", "dpo.yaml")
    for text in (configuration(result), report(result, "run.yaml")):
        assert text.index("without a counterpart") < text.index("deepspeed") < text.index("without effect here")
        assert "packing: true (dpo.yaml, line 6): rows never see each other" in text
        assert text.endswith("\n")


def test_sections_stand_in_the_order_of_the_schema(imported: Import):
    values = yaml.safe_load(configuration(imported("trl", DPO + "learning_rate: 1\nweight_decay: 0.5\n", "dpo.yaml")))
    assert list(values) == ["method", "model", "data", "train", "optim", "loss"]
    assert list(values["optim"]) == ["lr", "weight_decay"]


def test_texts_that_yaml_would_read_otherwise_stay_texts(imported: Import):
    text = DPO.replace("output_dir", "x") + "output_dir: '2024'\nrun_name: 'a: b # c'\nmodel_revision: 'null'\n"
    result = imported("trl", text, "dpo.yaml")
    Path("run.yaml").write_text(configuration(result))
    config = load(None, "run.yaml", []).config
    assert (config.output_dir, config.model.revision) == ("2024", "null")


def test_an_import_needs_no_torch(folder: Path):
    code = (
        "import sys; from whet.migrate.run import import_file; import_file('trl', 'dpo.yaml'); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout.strip() == "[]"


def test_secrets_are_not_passed_on(imported: Import):
    script = "python3 train.py --hf-checkpoint m --prompt-data p.jsonl --rm-type math --n-samples-per-prompt 2"
    result = imported("slime", f"{script} --wandb-key s3cret", "run.sh")
    trl = imported("trl", DPO + "hub_token: s3cret\n", "dpo.yaml")
    for one in (result, trl):
        assert "s3cret" not in configuration(one) + report(one, None)
    assert "wandb_key (run.sh, line 1): it is refused" in report(result, None)
    assert "hub_token (dpo.yaml, line 7)" in report(trl, None)
