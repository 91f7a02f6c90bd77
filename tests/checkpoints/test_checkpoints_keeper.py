"""What a keeper tells of the checkpoint that a run goes on from."""

from whet.checkpoints.folder import RUN_FILE
from whet.checkpoints.save import write
from whet.config.loader import dump
from whet.config.run import RunConfig
from whet.keeper import STATE_FILE, Keeper


def test_only_settings_that_change_what_is_learned_are_told(tmp_path):
    told = {
        "method": "sft",
        "model": {"path": "tiny"},
        "data": {"train": "a.jsonl"},
        "output_dir": str(tmp_path / "run"),
    }
    spread = {
        "backend": {"use": "fsdp", "context_parallel": 2, "max_tokens_per_device": 99},
        "cluster": {"num_processes": 2, "address": "auto"},
        "engine": {"num_engines": 2, "start_timeout_s": 9.0, "publish": {"by": "file"}},
        "log": {"every_steps": 3},
        "optim": {"lr": 0.5},
    }
    before = RunConfig.model_validate({**told, **spread})
    write(tmp_path / "run", 1, lambda folder: (folder / STATE_FILE).write_text('{"method": "sft"}'))
    (tmp_path / "run" / RUN_FILE).write_text(dump(before))
    now = {**told, "optim": {"lr": 0.25}, "backend": {"precision": "bf16"}, "engine": {"use": "vllm"}}
    assert sorted(Keeper(RunConfig.model_validate(now)).changes()) == [
        "backend.precision: auto -> bf16",
        "engine.use: local -> vllm",
        "optim.lr: 0.5 -> 0.25",
    ]
