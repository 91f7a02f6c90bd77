"""What users get wrong: each is told on one screen, with its remedy and exit code 2, before a model is loaded."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from runs import QUIET, flags_of, in_process, metrics, saved_weights, sums
from whet import cli
from whet.checkpoints.folder import claimed

SCREEN = 24
"""Lines of one screen."""
MESSAGES = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
ROW = {"prompt": "1+1=", "response": "2"}


@dataclass
class Case:
    """A run that is about to go wrong: a folder of its own, with rows and a model to be spoilt, and settings."""

    folder: Path
    model: Path
    method: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self, *rows: dict[str, Any] | str | bytes, name: str = "rows.jsonl") -> str:
        """Data as given: rows, lines as they stand, or bytes."""
        path = self.folder / name
        lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
        path.write_bytes(b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines))
        return str(path)

    def own_model(self) -> Path:
        """A copy of the model, for this case alone."""
        folder = self.folder / "model"
        shutil.copytree(self.model, folder)
        self.settings["model.path"] = str(folder)
        return folder

    def edit_config(self, **values: Any) -> None:
        path = self.own_model() / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    @property
    def arguments(self) -> list[str]:
        """The command line: what every run has, with this case's settings on top."""
        common = {"model.path": str(self.model), "data.train": str(self.folder / "rows.jsonl"), "train.steps": 2}
        common |= {"output_dir": str(self.folder / "out"), "data.cache_dir": str(self.folder / "cache"), **QUIET}
        if self.method == "grpo":
            common |= {"reward.use": "exact", "rollout.prompts_per_step": 2, "rollout.group_size": 2}
            common |= {"rollout.max_tokens": 3}
        given = {name: value for name, value in {**common, **self.settings}.items() if value is not ...}
        return [self.method, *flags_of(given)]


@pytest.fixture
def case(tmp_path: Path, tiny_qwen: Path) -> Case:
    case = Case(tmp_path, tiny_qwen)
    case.rows(*({**row, "label": row["response"]} for row in sums(8)))
    return case


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """Run a case that must be refused; returns what is said. `loads`: the model has to be there to find out."""

    def run(case: Case, *texts: str, loads: bool = False) -> str:
        capsys.readouterr()
        with monkeypatch.context() as patched:
            if not loads:
                patched.setattr("whet.roles.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
            assert cli.main(case.arguments) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and "?it/s" not in line]
        text = "\n".join(said)
        assert 0 < len(said) <= SCREEN and len(text) < 80 * SCREEN
        assert "Traceback" not in text
        missing = [wanted for wanted in texts if wanted not in text]
        assert not missing, f"{missing} not in: {text}"
        return text

    return run


Spoil = Callable[[Case], Any]


def settings(**given: Any) -> Spoil:
    return lambda case: case.settings.update({name.replace("__", "."): value for name, value in given.items()})


def grpo(**given: Any) -> Spoil:
    def spoil(case: Case) -> None:
        case.method = "grpo"
        settings(**given)(case)

    return spoil


def rows(*given: dict[str, Any] | str | bytes, **more: Any) -> Spoil:
    def spoil(case: Case) -> None:
        case.rows(*given)
        settings(**more)(case)

    return spoil


def prompts(*given: dict[str, Any], **more: Any) -> Spoil:
    def spoil(case: Case) -> None:
        case.rows(*given)
        grpo(**more)(case)

    return spoil


def model_without(pattern: str, *given: dict[str, Any], **more: Any) -> Spoil:
    def spoil(case: Case) -> None:
        for path in case.own_model().glob(pattern):
            path.unlink()
        if given:
            case.rows(*given)
        settings(**more)(case)

    return spoil


def broken_model(name: str, content: bytes) -> Spoil:
    return lambda case: (case.own_model() / name).write_bytes(content)


SETTINGS = {
    "a misspelt option": (settings(optim__lrr=1), "optim.lrr", "did you mean optim.lr?", "--optim.lrr"),
    "an option of another section": (settings(batch_size_=4), "batch_size_", "did you mean"),
    "a wrong dtype": (settings(model__dtype="float8"), "float8", "bfloat16"),
    "half precision on a CPU": (settings(model__dtype="float16", backend__device="cpu"), "float16", "use float32"),
    "text for a number": (settings(train__steps="many"), "train.steps", "whole number", "'many'"),
    "a fraction for a count": (settings(train__steps=2.5), "train.steps", "whole number", "2.5"),
    "no number": (settings(optim__lr="nan"), "optim.lr", "finite"),
    "a negative rate": (settings(optim__lr=-1), "optim.lr", "greater than 0", "-1"),
    "a negative seed": (settings(seed=-1), "seed", "at least 0"),
    "an empty batch": (settings(train__batch_size=0), "train.batch_size", "at least 1"),
    "several at once": (settings(train__batch_size=0, optim__lrr=1, seed=-1), "3 problems", "seed", "optim.lrr"),
    "evaluation of nothing": (settings(eval__every_steps=1), "eval.every_steps", "data.eval"),
    "the best of nothing": (settings(checkpoint__best=True), "checkpoint.best", "data.eval"),
    "another method": (settings(method="grpo"), "method", "the command is sft"),
    "an unknown loss": (settings(loss__use="sftt"), "sftt", "did you mean sft?"),
    "a loss of another method": (settings(loss__use="ppo_clip"), "ppo_clip", "advantages"),
    "a wrong option of a loss": (settings(loss__label_smoothingg=0.1), "did you mean label_smoothing?"),
    "an unknown backend": (settings(backend__use="locall"), "locall", "did you mean local?"),
    "an unknown kind of attention": (settings(model__attention="flash"), "flash", "packed"),
    "resuming from nowhere": (settings(checkpoint__resume="/nowhere"), "/nowhere", "no folder"),
    "insisting on a checkpoint": (settings(checkpoint__resume=True), "has no checkpoint", "auto"),
    "layers that are not there": (settings(model__freeze__layers=[99]), "99", "layers 0 to 1"),
    "a pattern that is none": (settings(**{"model.freeze.patterns": ["("]}), "'('", "regular expression"),
    "everything frozen": (settings(**{"model.freeze.patterns": [".*"]}), "nothing to train", "freeze less"),
    "an adapter on nothing": (settings(**{"model.adapter.target_modules": ["q"]}), "'q'", "q_proj"),
    "no reward": (grpo(reward__use=...), "reward is missing", "reward.use: math"),
    "an unknown reward": (grpo(reward__use="mathh"), "mathh", "did you mean math?"),
    "a reward in no module": (grpo(reward__use="no.such:thing"), "no.such", "working directory"),
    "a reward that is no function": (grpo(reward__use="json:decoder"), "a module", "expected a function"),
    "an unknown credit rule": (grpo(credit__use="gaee"), "gaee", "rloo"),
    "an unknown engine": (grpo(engine__use="vllmm"), "vllmm", "local"),
    "an unknown environment": (grpo(env__use="browser"), "browser", "package.module:attribute"),
    "a group of one": (grpo(rollout__group_size=1), "rollout.group_size is 1", "raise it"),
    "more optimizer steps than groups": (grpo(rollout__optimizer_steps=5), "rollout.optimizer_steps is 5", "lower it"),
    "a penalty without gradient": (grpo(kl__coef=0.1, kl__type="k1"), "k1", "k3"),
    "completions beyond the positions": (grpo(rollout__max_tokens=5000), "4,096 positions", "rollout.max_tokens"),
}

DATA = {
    "a missing column": (rows({"question": "a", "answer": "b"}), "question, answer", "{prompt: question,"),
    "a misspelt mapping": (settings(**{"data.columns": {"promt": "prompt"}}), "'promt'", "did you mean prompt?"),
    "a mapping to nothing": (settings(**{"data.columns": {"prompt": "promp"}}), "'promp'", "did you mean 'prompt'?"),
    "an empty file": (rows(), "rows.jsonl is empty"),
    "a broken line": (rows(ROW, '{"prompt": "a", "resp'), "rows.jsonl:2", "broken JSON", "correct the line"),
    "a line that is no object": (rows(ROW, "[1, 2]"), "rows.jsonl:2", "a list ([1, 2])", "expected an object"),
    "a row with nothing to train": (rows(ROW, {"prompt": "a", "response": ""}), "rows.jsonl:2", "'response' is empty"),
    "a number for text": (rows({"prompt": 3, "response": "b"}), "rows.jsonl:1", "'prompt' is a number (3)"),
    "nothing for text": (rows({"prompt": "a", "response": None}), "rows.jsonl:1", "'response' is null"),
    "bytes that are no text": (rows(b'{"prompt": "\xff", "response": "a"}\n'), "rows.jsonl:1", "0xff", "UTF-8"),
    "something else altogether": (rows(bytes(range(255, 100, -1)) * 20), "not UTF-8"),
    "nothing left after the cut": (rows({"prompt": "a" * 50, "response": "b"}, data__max_length=8), "data.max_length"),
    "rows beyond the positions": (rows({"prompt": "a" * 5000, "response": "b"}, data__max_length=10**9), "4,096 pos"),
    "a folder for a file": (lambda case: settings(data__train=str(case.folder))(case), "is a folder", "rows.jsonl"),
    "a file that is not there": (settings(data__train="/nowhere/rows.jsonl"), "/nowhere", "does not exist"),
    "a name that is nearly right": (lambda c: settings(data__train=f"{c.folder}/row.jsonl")(c), "did you mean rows.js"),
    "a cache that is a file": (lambda case: settings(data__cache_dir=case.rows(ROW))(case), "data.cache_dir"),
    "too few rows to hold some out": (rows(ROW, data__eval_share=0.5), "data.eval_share", "data.eval"),
    "a prompt without tokens": (prompts({"prompt": "", "label": "2"}), "rows.jsonl:1", "'prompt' is empty"),
    "a template without its place": (settings(data__prompt_template="Q:"), "data.prompt_template", "{prompt}"),
    "a missing label": (prompts({"prompt": "a"}), "label is None", "data.columns"),
    "a label that is no text": (prompts({"prompt": "a", "label": {"x": 1}}), "{'x': 1}", "a text or a number"),
    "prompts that are all too long": (prompts({"prompt": "abc", "label": "2"}, data__max_prompt_length=2), "raise it"),
}

MODELS = {
    "no folder": (settings(model__path="/nowhere/model"), "/nowhere/model", "no folder"),
    "a file for a folder": (lambda case: settings(model__path=case.rows(ROW))(case), "a file", "give the folder"),
    "an empty folder": (model_without("*"), "no config.json", "save_pretrained"),
    "no tokenizer": (model_without("tokenizer*"), "has no tokenizer", "copy tokenizer.json"),
    "no chat template": (model_without("chat*", MESSAGES), "no chat template", "model.chat_template"),
    "no chat template to wrap with": (model_without("chat*", data__chat="always"), "no chat template"),
    "no weights": (model_without("*.safetensors"), "has no weights", "model.safetensors"),
    "weights cut short": (broken_model("model.safetensors", b"\x10" + bytes(90)), "cut short", "again"),
    "a broken config.json": (broken_model("config.json", b"{"), "config.json", "not a valid JSON"),
    "another kind of model": (broken_model("config.json", b'{"model_type": "bert"}'), "bert", "causal"),
    "a broken tokenizer": (broken_model("tokenizer.json", b"{}"), "tokenizer cannot be loaded"),
    "a tokenizer larger than the model": (lambda case: case.edit_config(vocab_size=100), "259", "100 rows"),
    "a broken template": (settings(model__chat_template="{% for %}"), "model.chat_template", "line 1"),
    "a template file that is not there": (settings(model__chat_template="/no.jinja"), "/no.jinja", "no file"),
}

FOLDERS = {
    "a file": (lambda case: settings(output_dir=case.rows(ROW))(case), "output_dir", "is a file"),
    "below a file": (lambda case: settings(output_dir=case.rows(ROW) + "/a/b")(case), "output_dir", "is a file"),
    "the model's own": (lambda case: settings(output_dir=str(case.own_model()))(case), "output_dir", "model.path"),
    "another model's": (
        lambda case: settings(output_dir=str(shutil.copytree(case.model, case.folder / "other")))(case),
        *("output_dir", "a model that no run left there"),
    ),
}


@pytest.mark.parametrize("spoil,texts", [(s, t) for s, *t in SETTINGS.values()], ids=SETTINGS)
def test_a_wrong_setting_is_refused(case: Case, refused, spoil: Spoil, texts: list[str]):
    spoil(case)
    refused(case, *texts)
    assert not (case.folder / "out").exists()


@pytest.mark.parametrize("spoil,texts", [(s, t) for s, *t in DATA.values()], ids=DATA)
def test_data_that_cannot_be_used_are_refused(case: Case, refused, spoil: Spoil, texts: list[str]):
    spoil(case)
    refused(case, *texts)
    assert not (case.folder / "out").exists()


@pytest.mark.parametrize("spoil,texts", [(s, t) for s, *t in MODELS.values()], ids=MODELS)
def test_a_model_that_cannot_be_used_is_refused(case: Case, refused, spoil: Spoil, texts: list[str]):
    spoil(case)
    refused(case, *texts)
    assert not (case.folder / "out").exists()


@pytest.mark.parametrize("spoil,texts", [(s, t) for s, *t in FOLDERS.values()], ids=FOLDERS)
def test_a_folder_that_is_not_for_output_is_refused(case: Case, refused, spoil: Spoil, texts: list[str]):
    spoil(case)
    refused(case, *texts)


@pytest.mark.parametrize(
    "content,texts",
    [
        ("model: {path: x\n  data: [\n", ["bad.yaml, line 2", "not valid YAML"]),
        ("- a\n- b\n", ["bad.yaml, line 1", "this is a list"]),
        ("", ["bad.yaml", "is empty", "model: {path: ...}"]),
        (b"\xff\xfe\x00", ["bad.yaml", "not UTF-8"]),
        ("modell: {path: x}\n", ["modell is not a setting", "bad.yaml, line 1", "did you mean model?"]),
        (None, ["bad.yaml", "No such file"]),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path, capsys, content, texts: list[str]):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["sft", str(path)]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in texts), said
    assert len(said.splitlines()) <= SCREEN


def test_eval_without_data_is_refused(case: Case, capsys):
    assert cli.main(["eval", "--model.path", str(case.model)]) == 2
    assert "set data.eval" in capsys.readouterr().err


def test_weights_of_another_shape_are_refused(case: Case, refused):
    case.edit_config(vocab_size=300)
    refused(case, "[260, 64]", "[300, 64]", "config.json", loads=True)


def test_weights_that_hold_nan_are_refused_before_the_first_step(case: Case, refused):
    path = case.own_model() / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    refused(case, "not finite", "NaN", loads=True)


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(case: Case, refused):
    case.settings |= {"data.eval": str(case.folder / "rows.jsonl"), "eval.metric": "eval/accuracy"}
    refused(case, "eval/accuracy", "eval/mean_token_accuracy", loads=True)
    assert metrics(case.folder / "out") == []


def test_an_adapter_and_a_whole_model_are_not_left_side_by_side(case: Case, refused):
    assert cli.main(case.arguments) == 0
    case.settings["model.adapter.rank"] = 2
    refused(case, "config.json of an earlier run", "adapter_config.json", "set output_dir")


def test_a_second_run_in_the_same_folder_is_refused(case: Case, refused):
    with claimed(case.folder / "out"):
        refused(case, "another run is training", "set output_dir")
    assert cli.main(case.arguments) == 0


def test_a_damaged_checkpoint_is_named(case: Case, refused):
    case.settings["checkpoint.every_steps"] = 2
    assert cli.main(case.arguments) == 0
    (case.folder / "out" / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"")
    case.settings["train.steps"] = 3
    refused(case, "checkpoint-2", "optimizer.safetensors", "none of which is complete", "set a new output_dir")


def _as_nobody(arguments: list[str]) -> int:
    """The command line without the rights of root, which may write everywhere."""
    if os.getuid() == 0:
        os.setuid(65534)
    return cli.main(arguments)


@pytest.mark.parametrize("part", ["output", "checkpoints", "data", "model"])
def test_what_may_not_be_touched_is_named(case: Case, part: str):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name)
        case.model = shutil.copytree(case.model, folder / "model")
        (case.model / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        data = shutil.copy(case.rows(ROW), str(folder))
        for writable in ("cache", "out"):
            (folder / writable).mkdir()
            (folder / writable).chmod(0o777)
        case.settings |= {"data.train": data, "data.cache_dir": str(folder / "cache"), "checkpoint.every_steps": 1}
        case.settings |= {"output_dir": str(folder / "out")}
        if part == "data":
            os.chmod(data, 0)
        elif part == "model":
            (case.model / "model.safetensors").chmod(0)
        elif part == "output":
            (folder / "out").chmod(0o555)
        else:
            assert in_process(_as_nobody, case.arguments)[0] == 0
            (folder / "out").chmod(0o555)
            case.settings["train.steps"] = 4
        code, said = in_process(_as_nobody, case.arguments)
        assert code == 2, said
        assert {"data": "rows.jsonl: Perm", "model": "model.safetensors: Perm"}.get(part, "not writable") in said
        assert "Traceback" not in said


def _with_little_room(arguments: list[str], num_bytes: int) -> int:
    """The command line where no file may grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return cli.main(arguments)


@pytest.mark.parametrize(
    "num_bytes,settings,text",
    [
        (300_000, {"checkpoint.every_steps": 1}, "checkpoint 1 could not be written"),
        (300_000, {}, "the final model could not be written"),
        (6_000, {"train.steps": 40}, "metrics.jsonl cannot be written"),
    ],
)
def test_a_full_disk_is_said_and_nothing_is_spoilt(case: Case, num_bytes: int, settings: dict, text: str):
    assert cli.main(case.arguments) == 0
    before = saved_weights(case.folder / "out")
    case.settings |= settings
    code, said = in_process(_with_little_room, case.arguments, num_bytes)
    assert code == 2, said
    assert text in said and "set output_dir" in said and "Traceback" not in said
    after = saved_weights(case.folder / "out")
    assert all(after[name].equal(before[name]) for name in before)
    assert not [path.name for path in (case.folder / "out").iterdir() if path.name.startswith(".")]
