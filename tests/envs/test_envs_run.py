"""Whole runs in an environment: prompts show tools, counts are logged, and mistakes are told at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import column, config_of, train, write_rows
from whet.compose import compose
from whet.errors import ConfigError, DataError, ModelError, SeveralErrors


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path):
    """A run of two steps with the calculator; settings of the test's own go by keyword."""

    def make(rows: list[dict[str, Any]] | None = None, **settings: Any):
        asked = [{"prompt": [{"role": "user", "content": f"{a}+4="}], "label": str(a + 4)} for a in range(4)]
        base = {
            **{"model__path": str(tiny_qwen), "data__train": write_rows(tmp_path / "rows.jsonl", rows or asked)},
            **{"env": {"use": "tools", "functions": ["calculator"]}, "reward": "random", "train__steps": 2},
            **{"rollout__prompts_per_step": 2, "rollout__group_size": 2, "rollout__max_tokens": 12},
        }
        return config_of("grpo", tmp_path / "out", **{**base, **settings})

    return make


def test_prompts_show_the_tools_and_counts_are_logged(config, tmp_path: Path):
    run = train(config())
    (first, *_) = run.feed.train
    assert [tool["function"]["name"] for tool in first.metadata["tools"]] == ["calculate"]
    text = run.feed.tokenizer.decode(first.tokens)
    assert text.startswith("<|im_start|>system\nYou may call these functions:") and '"name": "calculate"' in text
    assert column(tmp_path / "out", "rollout/env/num_calls") == [0.0, 0.0]


def test_the_tools_of_a_row_go_before_those_of_the_environment(config):
    schema = {"name": "calculate", "description": "Reckons.", "parameters": {"type": "object", "properties": {}}}
    row = {"prompt": [{"role": "user", "content": "1+1="}], "label": "2"}
    run = compose(config([{**row, "tools": [schema]}, row]))
    texts = [run.feed.tokenizer.decode(prompt.tokens) for prompt in run.feed.train]
    assert ["Reckons." in text for text in texts] == [True, False]


@pytest.mark.parametrize(
    ("rows", "settings", "error", "told"),
    [
        (
            [{"prompt": [{"role": "user", "content": "?"}], "label": "1", "tools": [{"name": "look"}]}],
            *({}, DataError, "tools name 'look'"),
        ),
        ([{"prompt": "1+1=", "label": "2"}], {}, DataError, "set data.chat to 'always'"),
        (None, {"model__chat_template": "{{ messages[0].content }}"}, (ModelError, SeveralErrors), "leaves out"),
    ],
)
def test_what_cannot_be_played_is_refused_before_a_model_is_loaded(
    rows, settings, error, told, config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whet.compose.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=told):
        compose(config(rows, **settings))


def test_what_tools_may_say_counts_as_length(config):
    with pytest.raises(ConfigError, match=r"4,096 .*lower .*env\.max_output_tokens"):
        compose(config(env={"use": "tools", "functions": ["calculator"], "max_output_tokens": 4000}))
