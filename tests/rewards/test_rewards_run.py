"""Rewards within a whole run: chosen by row, over groups, written for slime, refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import config_of, train, write_rows
from whet.compose import compose
from whet.errors import WhetError

MODULE = """
SEEN = []

async def of_slime(args, samples, **kwargs):
    assert len(samples) == args.n_samples_per_prompt == args.rollout.group_size
    SEEN.append([sample.group_index for sample in samples])
    return [sample.response.count("a") / args.rollout_max_response_len for sample in samples]
"""


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the configuration of a short run over these rows."""
    monkeypatch.chdir(tmp_path)

    def make(rows: list[dict[str, Any]], **settings: Any):
        data = write_rows(tmp_path / "prompts.jsonl", rows)
        given = {"rollout__prompts_per_step": 2, "rollout__group_size": 3, "rollout__max_tokens": 6, **settings}
        return config_of("grpo", tmp_path / "run", model=str(tiny_qwen), data__train=data, train__steps=2, **given)

    return make


def metrics(tmp_path: Path) -> list[dict[str, float]]:
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_reward_of_slimes_judges_groups_of_a_run(config, tmp_path: Path):
    (tmp_path / "groups_of_slime.py").write_text(MODULE, encoding="utf-8")
    rows = [{"prompt": "say a:"}, {"prompt": "and again:"}]
    train(config(rows, reward={"use": "groups_of_slime:of_slime"}))
    import groups_of_slime  # type: ignore[import-not-found]

    assert sorted(groups_of_slime.SEEN) == [[f"g{number}"] * 3 for number in range(4)]
    assert all("rollout/reward/of_slime" in one for one in metrics(tmp_path) if "rollout/reward" in one)


def test_rows_choose_their_rewards_within_a_run(config, tmp_path: Path):
    rows = [{"prompt": "say a:", "label": "a", "metadata": {"rm_type": "f1"}}, {"prompt": "2+2=", "label": 4}]
    train(config(rows, reward={"use": "math"}))
    logged = [one for one in metrics(tmp_path) if "rollout/reward" in one]
    assert logged and all({"rollout/reward/f1", "rollout/reward/math"} <= set(one) for one in logged)


def test_a_row_that_asks_for_what_is_not_there_ends_the_run_before_it_begins(config, tmp_path: Path):
    rows = [{"prompt": "2+2=", "label": 4}, {"prompt": "3+3=", "label": 6, "metadata": {"rm_type": "maths"}}]
    with pytest.raises(WhetError, match=r"prompt train/1 .*there is no reward 'maths'.*math"):
        compose(config(rows, reward={"use": "math"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
