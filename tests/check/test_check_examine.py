"""The examination at the start of a run: what it tells before a model is loaded, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import config_of, sums, train, write_rows
from whet import cli
from whet.check.command import warnings_of_whet
from whet.check.examine import examine
from whet.compose import compose
from whet.errors import CheckpointError, ConfigError, DataError, Gathering, SeveralErrors


def settings(folder: Path, model: Path, **more: object) -> dict[str, object]:
    data = write_rows(folder / "rows.jsonl", sums(8))
    short = {"train__steps": 2, "train__batch_size": 4, "checkpoint__every_steps": 1}
    return {"model__path": str(model), "data__train": data, **short, **more}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.roles.load_model", lambda *_, **__: pytest.fail("a model was loaded"))


def test_other_data_than_the_checkpoints_are_refused_before_a_model_is_loaded(tmp_path: Path, tiny_qwen: Path, request):
    config = config_of("sft", tmp_path / "run", **settings(tmp_path, tiny_qwen))
    train(config)
    request.getfixturevalue("no_model")
    write_rows(tmp_path / "rows.jsonl", sums(9))
    with pytest.raises(CheckpointError, match="made with other data: its number of rows is 8, now it is 9"):
        compose(config)


def test_settings_that_changed_since_the_checkpoint_are_told(tmp_path: Path, tiny_qwen: Path):
    train(config_of("sft", tmp_path / "run", **settings(tmp_path, tiny_qwen)))
    same = config_of("sft", tmp_path / "run", **settings(tmp_path, tiny_qwen, log__every_steps=5))
    changed = config_of("sft", tmp_path / "run", **settings(tmp_path, tiny_qwen, optim__lr=0.5, train__steps=3))
    with warnings_of_whet() as warnings:
        examine(same)
        assert not warnings, "how often is logged changes nothing that is trained"
        examine(changed)
    (said,) = warnings
    assert said.endswith("checkpoint-2 was trained with: train.steps: 2 -> 3; optim.lr: 2e-05 -> 0.5")


def test_evaluation_without_held_out_data_is_refused_before_rows_are_read(tmp_path: Path, tiny_qwen: Path, capsys):
    flags = ["--model.path", str(tiny_qwen), "--data.train", str(tmp_path / "none.jsonl")]
    assert cli.main(["eval", *flags]) == 2
    said = capsys.readouterr().err
    assert "no held-out data to evaluate on" in said and "none.jsonl" not in said


def test_an_examination_leaves_no_trace(tmp_path: Path, tiny_qwen: Path, no_model: None):
    found = examine(config_of("sft", tmp_path / "run", **settings(tmp_path, tiny_qwen)))
    assert not found.errors.errors and not (tmp_path / "run").exists()
    assert found.schedule is not None and found.schedule.total_steps == 2
    assert found.work is not None and found.work.step_tokens == found.work.micro.tokens


def test_one_error_is_raised_as_it_is_and_several_together():
    gathering = Gathering()
    with gathering.going_on():
        raise ConfigError("one")
    with pytest.raises(ConfigError, match=r"^one$"):
        gathering.refuse()
    for error in (DataError("two"), ConfigError("one")):
        with gathering.going_on():
            raise error
    with pytest.raises(SeveralErrors) as raised:
        gathering.refuse()
    assert str(raised.value) == "2 things stand in the way:\n- ConfigError: one\n- DataError: two"
    with pytest.raises(KeyError), gathering.going_on():
        raise KeyError("a fault of ours goes through")


def test_rows_that_can_be_used_are_looked_at_beside_those_that_cannot(tmp_path: Path, tiny_qwen: Path):
    given = settings(tmp_path, tiny_qwen)
    write_rows(tmp_path / "rows.jsonl", [*sums(3), {"prompt": "1"}])
    found = examine(config_of("sft", tmp_path / "run", **given))
    assert [str(error).partition(": ")[2][:26] for error in found.errors.errors] == ["field 'response' is missin"]
    assert {name: len(part) for name, part in found.parts.items()} == {"training": 3}
    assert not list((tmp_path / "cache").glob("sft-*")), "what lacks rows must not be read from the cache later"
