"""Reinforcement learning on servers that the run starts (a stand-in for SGLang), from its configuration to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metrics_page import undocumented
from runs import column, config_of, metrics, train, write_rows
from server_engines import double_python
from whet.config.loader import from_values
from whet.errors import ConfigError
from whet.types import Episode


def share_of_a(episode: Episode) -> float:
    """How much of a response is the letter a."""
    return episode.response.count("a") / episode.num_sampled


@pytest.fixture
def settings(tmp_path: Path, tiny_qwen: Path) -> dict[str, Any]:
    rows = [{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 4)]
    return {
        **{"model__path": str(tiny_qwen), "data__train": write_rows(tmp_path / "prompts.jsonl", rows)},
        **{"reward": "test_run_servers:share_of_a", "optim__lr": 5e-3, "optim__schedule": "constant"},
        **{"optim__weight_decay": 0.0, "rollout__prompts_per_step": 8, "rollout__group_size": 8},
        **{"rollout__max_tokens": 4, "engine__use": "sglang", "engine__python": double_python(tmp_path)},
        **{"engine__publish": {"verify": "always", "timeout_s": 60}},
    }


def test_a_toy_reward_is_learned_on_a_server(settings, tmp_path: Path):
    train(config_of("grpo", tmp_path / "out", train__steps=40, **settings))
    rewards = column(tmp_path / "out", "rollout/reward")
    assert rewards[0] < 0.1
    assert sum(rewards[-5:]) / 5 > 0.6
    assert max(column(tmp_path / "out", "engine/probe_logprob_diff")) < 1e-4
    assert max(column(tmp_path / "out", "train/train_rollout_logprob_abs_diff")) < 1e-4
    assert undocumented({name for row in metrics(tmp_path / "out") for name in row if "/" in name}) == set()


def test_an_adapter_is_sent_alone_and_a_run_goes_on_with_it(settings, tmp_path: Path):
    """Two engines, one step ahead of the training; the second run begins with the weights of the first."""
    settings |= {
        **{"model__adapter": {"rank": 4}, "rollout__mode": "one_step_off", "engine__num_engines": 2},
        **{"checkpoint__every_steps": 2, "data__eval": settings["data__train"], "eval__every_steps": 2},
    }
    train(config_of("grpo", tmp_path / "out", train__steps=2, **settings))
    run = train(config_of("grpo", tmp_path / "out", train__steps=4, **settings))
    assert run.loop.finished
    rows = metrics(tmp_path / "out")
    published = [row["engine/publish_mb"] for row in rows if "engine/publish_mb" in row]
    assert published and max(published) < 0.2
    assert all(row["engine/alive"] == 2 for row in rows if "engine/alive" in row)
    assert max(row.get("engine/probe_logprob_diff", 0.0) for row in rows) < 1e-4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"use": "vllm", "options": {"seed": 3}}, "engine.options has seed, .* set seed instead"),
        ({"use": "vllm", "options": {"tensor-parallel-size": 3}}, "set engine.tensor_parallel instead"),
        ({"use": "sglang", "options": {"port": 3}}, "whet sets itself when it starts sglang; remove it"),
        ({"use": "vllm", "router": "sglang-router"}, "set engine.use to sglang"),
        ({"use": "sglang", "publish": {"by": "file", "delta": True}}, "complete folders only"),
    ],
)
def test_what_does_not_go_together_is_refused(engine, message):
    with pytest.raises(ConfigError, match=message):
        from_values({"model": {"path": "m"}, "engine": engine}, method="grpo", where="the test")
