"""Faults planted in configurations, models and rows: `whet check` finds all of a configuration in one pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.runs import sums, write_rows
from whet import cli
from whet.models.tiny import make_tiny

UNENDING = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""A chat template whose turns end with a line break and no token that a model could stop at."""


@dataclass
class Desk:
    """A folder to plant faults in, and the models that lie there."""

    folder: Path
    model: Path
    other: Path

    def rows(self, name: str, rows: list, *broken: str) -> str:
        path = Path(write_rows(self.folder / name, rows))
        path.write_text(path.read_text(encoding="utf-8") + "".join(f"{line}\n" for line in broken), encoding="utf-8")
        return str(path)

    def config(self, **sections: object) -> list[str]:
        path = self.folder / "run.yaml"
        data = {"cache_dir": str(self.folder / "cache"), **sections.pop("data", {})}  # type: ignore[dict-item]
        path.write_text(yaml.safe_dump({"data": data, **sections}), encoding="utf-8")
        return ["check", str(path)]


@pytest.fixture
def desk(tmp_path: Path, tiny_qwen: Path) -> Desk:
    corpus = [" ".join(row["prompt"] for row in sums(40))]
    other = make_tiny(tmp_path / "other", tokenizer="bpe", corpus=corpus, vocab_size=300)
    return Desk(tmp_path, tiny_qwen, other)


def preferences(desk: Desk) -> list[str]:
    """Twelve faults in one configuration for DPO."""
    rows = [{**row, "chosen": row["response"], "rejected": "no", "margin": 1.0} for row in sums(12)]
    for row in rows:
        del row["response"]
    rows[2].pop("margin")
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4].pop("rejected")
    rows[5]["chosen"] = 7
    (desk.folder / "taken").write_text("a file", encoding="utf-8")
    write_rows(desk.folder / "held_out.jsonl", sums(3))
    return desk.config(
        method="dpo",
        output_dir=str(desk.folder / "taken" / "run"),
        model={"path": str(desk.model)},
        data={
            "train": desk.rows("pairs.jsonl", rows, '{"prompt": "1+1=", '),
            "eval": str(desk.folder / "heldout.jsonl"),
        },
        optim={"lr": -1, "lrr": 2, "warmup_steps": 9},
        train={"steps": 4},
        loss={"use": "ipoo"},
        reference={"path": str(desk.other), "precompute": True, "sync_steps": 3},
    )


def with_start(desk: Desk) -> Path:
    """The model with a token that begins texts."""
    folder = Path(shutil.copytree(desk.model, desk.folder / "with_start"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|endoftext|>"}))
    return folder


def imitation(desk: Desk) -> list[str]:
    """Five faults in one for fine-tuning."""
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]} for _ in range(6)]
    rows.append({"messages": [{"role": "user", "content": "1"}]})
    rows.append({"messages": [{"role": "user", "content": "<|endoftext|>" * 2}, rows[0]["messages"][1]]})
    rows[0] = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "long " * 30}]}
    template = desk.folder / "template.jinja"
    template.write_text(UNENDING, encoding="utf-8")
    return desk.config(
        method="sft",
        output_dir=str(desk.folder / "run"),
        model={"path": str(with_start(desk)), "chat_template": str(template)},
        data={"train": desk.rows("chats.jsonl", rows), "max_length": 60, "max_cut_share": 0.01},
        backend={"memory_gb": 0.01},
    )


def reinforcement(desk: Desk) -> list[str]:
    """Five faults in one for reinforcement learning."""
    rows = [{"prompt": row["prompt"], "label": row["response"]} for row in sums(4)]
    rows[1].pop("label")
    return desk.config(
        method="grpo",
        output_dir=str(desk.model),
        model={"path": str(desk.model)},
        data={"train": desk.rows("prompts.jsonl", rows)},
        reward={"use": "math"},
        engine={"use": "locall"},
        rollout={"group_size": 1, "max_tokens": 5000},
    )


def labels(desk: Desk) -> list[str]:
    """Labels out of balance, and three wrong settings."""
    rows = [{"prompt": r["prompt"], "completion": r["response"], "label": i < 10} for i, r in enumerate(sums(12))]
    return desk.config(
        method="kto",
        output_dir=str(desk.folder / "run"),
        model={"path": str(desk.model), "freeze": {"patterns": ["no_such_weight"]}, "quantization": {"bits": 4}},
        data={"train": desk.rows("labels.jsonl", rows)},
        reward={"use": "math"},
        train={"batch_size": 0},
    )


PLANTED: dict[Callable[[Desk], list[str]], dict[str, str]] = {
    preferences: {
        "an unknown setting": "optim.lrr is not a setting",
        "a value out of range": "optim.lr must be greater than 0",
        "a combination of settings": "reference.precompute is true, but reference.sync_steps",
        "a warm-up longer than the run": "optim.warmup_steps is 9, more than the 4 steps",
        "an unknown loss": "there is no loss 'ipoo'; did you mean ipo?",
        "an output folder below a file": "taken is a file",
        "a tokenizer that is another": "whose tokenizer is another one",
        "a file that is not there": "did you mean held_out.jsonl?",
        "broken JSON": "pairs.jsonl:13",
        "a missing field": "pairs.jsonl:5",
        "a number for a text": "pairs.jsonl:6",
        "margins on some rows only": "pairs.jsonl:3",
        "a pair of twice the same": "their chosen and rejected completions are the same tokens",
    },
    imitation: {
        "no stop token in the loss": "no row trains a stop token",
        "a row without an answer": "chats.jsonl:7",
        "two tokens that begin a text": "begins with two '<|endoftext|>'",
        "too many rows cut": "data.max_cut_share allows 1.0%",
        "too little memory": "training needs about",
    },
    reinforcement: {
        "a missing label": "cannot judge 1 prompts",
        "an unknown engine": "there is no engine 'locall'; did you mean local?",
        "a group of one": "rollout.group_size is 1",
        "completions beyond the model's positions": "the longest sequence has 5,0",
        "an output folder that holds the model": "the folder of model.path",
    },
    labels: {
        "quantised weights without an adapter": "model.quantization is given, but weights of 4 bits",
        "frozen weights that there are not": "'no_such_weight', which matches no parameter",
        "labels out of balance": "10 desirable and 2 undesirable completions weigh 5 to 1",
        "a section without use": "reward is given, but kto has no use for it",
        "a batch of nothing": "train.batch_size must be at least 1",
    },
}


def test_at_least_twenty_faults_are_planted():
    assert sum(map(len, PLANTED.values())) >= 20


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_all_planted_faults_are_found_in_one_pass(plant, desk: Desk, capsys):
    assert cli.main(plant(desk)) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert {fault: text for fault, text in PLANTED[plant].items() if text not in said} == {}, said


def test_a_sound_configuration_is_shown_and_passes(desk: Desk, capsys):
    rows = [{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}] * 4
    sound = {"method": "sft", "model": {"path": str(desk.model)}, "output_dir": str(desk.folder / "run")}
    assert cli.main(desk.config(**sound, data={"train": desk.rows("chats.jsonl", rows)})) == 0
    said = capsys.readouterr().out
    assert "«2<|im_end|>" in said and "100.0% of the rows train a stop token" in said
    assert "error" not in said and "warning" not in said and "nothing stands in the way" in said
    assert not (desk.folder / "run").exists()


def test_warnings_alone_do_not_keep_a_run_from_beginning(desk: Desk, capsys):
    rows = [{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}] * 4
    sound = {"method": "sft", "model": {"path": str(desk.model)}, "output_dir": str(desk.folder / "run")}
    small = {"backend": {"memory_gb": 0.01}}
    assert cli.main(desk.config(**sound, **small, data={"train": desk.rows("chats.jsonl", rows)})) == 0
    assert "1 warning" in capsys.readouterr().out


def test_what_is_wrong_stands_at_the_end(desk: Desk, capsys):
    rows = [{"prompt": "1+1", "response": "2"}] * 4
    broken = {"method": "sft", "model": {"path": str(desk.model)}, "output_dir": str(desk.folder / "run")}
    wrong = {"loss": {"use": "sftt"}, "backend": {"memory_gb": 0.01}}
    assert cli.main(desk.config(**broken, **wrong, data={"train": desk.rows("rows.jsonl", rows)})) == 2
    said = capsys.readouterr().out
    data, error = said.index("rows as the model sees them"), said.index("1 error")
    assert data < error < said.index("sftt") < said.index("not ready to train")


def test_training_begins_with_the_same_examination(desk: Desk, capsys):
    path = preferences(desk)[1]
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # Wrong settings are refused by themselves; what comes after them is told together.
    config |= {"optim": {}, "loss": {}, "reference": {"path": str(desk.other)}}
    Path(path).write_text(json.dumps(config), encoding="utf-8")
    assert cli.main(["dpo", path]) == 2
    said = capsys.readouterr().err
    found = ("taken is a file", "whose tokenizer is another one", "held_out.jsonl", "pairs.jsonl:13", "pairs.jsonl:5")
    assert [text for text in found if text not in said] == [] and "SeveralErrors: 4 things" in said
