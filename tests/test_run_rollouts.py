"""Runs that over-sample, leave completions for later, or sample ahead: killed at any moment, they lose nothing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from runs import (
    column,
    config_of,
    in_process,
    metrics,
    same_bits,
    saved_weights,
    sums,
    train,
    without_clock,
    write_rows,
)
from whet.compose import compose
from whet.config.run import RunConfig
from whet.data.source import epoch_order
from whet.errors import ConfigError
from whet.rollout.journal import FILE, RolloutJournal

NUM_KILLS = int(os.environ.get("WHET_TEST_KILLS", "4"))
"""Of each mode; more take minutes."""
NUM_PROMPTS, STEPS, PER_STEP = 20, 3 * NUM_KILLS, 4
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "oversampled": {"rollout__oversampling": 6},
    "partial": {
        "rollout__oversampling": 8,
        "rollout__partial": True,
        "rollout__filter": {"use": "nonzero_std"},
        "rollout__max_fetches": 100,
    },
    "one step off": {"rollout__mode": "one_step_off"},
    "async": {"rollout__mode": "async", "rollout__max_staleness": 3},
}
BOUNDS = {"sync": 0, "oversampled": 0, "one step off": 1, "async": 3}


def share_of_a(episode) -> float:
    """The share of small letters in a response: seldom the same twice."""
    return sum(char.islower() for char in episode.response) / max(1, len(episode.response))


@pytest.fixture
def config(tmp_path: Path, tiny_qwen: Path):
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in sums(NUM_PROMPTS)])

    def make(name: str = "out", **settings: Any) -> RunConfig:
        given = {"model__path": str(tiny_qwen), "data__train": rows, "reward": "test_run_rollouts:share_of_a"}
        given |= {"optim__lr": 1e-3, "train__steps": STEPS, "rollout__prompts_per_step": PER_STEP}
        given |= {"rollout__group_size": 3, "rollout__max_tokens": 12, "checkpoint__every_steps": 3}
        return config_of("grpo", tmp_path / name, **{**given, **settings})

    return make


def account(config: RunConfig, *, replaces: bool) -> list[int]:
    """Every group stands in the order of the prompts, in one state; each step took its own. Returns who was taken."""
    journal = RolloutJournal(Path(config.output_dir) / FILE)
    census = journal.census()
    journal.close()
    order = [
        i for epoch in range(1 + len(census) // NUM_PROMPTS) for i in epoch_order(NUM_PROMPTS, seed=0, epoch=epoch)
    ]
    assert [n for n, *_ in census] == list(range(len(census)))
    assert [prompt for _, prompt, *_ in census] == [f"train/{i}" for i in order[: len(census)]]
    steps = [step for _, _, state, step, _ in census if state == "taken"]
    assert {step: steps.count(step) for step in set(steps)} == dict.fromkeys(range(1, STEPS + 1), PER_STEP)
    states = {state for _, _, state, _, _ in census}
    assert states <= ({"taken", "open", "ready", "dropped"} if replaces else {"taken", "open", "ready"})
    return [n for n, _, state, _, _ in census if state == "taken"]


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_sampling_trains_on_groups_within_its_bound(config, mode: str):
    run = train(made := config(**MODES[mode]))
    assert run.loop.progress.optimizer_steps == STEPS
    account(made, replaces=mode == "partial")
    ages = column(Path(made.output_dir), "rollout/staleness_max")
    assert len(ages) == STEPS and max(ages) <= BOUNDS.get(mode, STEPS)
    if mode in ("one step off", "async"):
        assert max(ages) > 0, "something was sampled ahead"
    assert max(column(Path(made.output_dir), "train/train_rollout_logprob_abs_diff")[:1]) < 1e-5


def test_partial_completions_of_a_real_engine_go_on_under_new_weights(config):
    made = config(**{**MODES["partial"], "rollout__max_tokens": 24})
    train(made)
    assert max(column(Path(made.output_dir), "rollout/offpolicy_share")) > 0
    assert sum(column(Path(made.output_dir), "rollout/num_left_over")) > 0


def die_at_a_random_moment(config: RunConfig, after_s: float) -> None:
    run = compose(config)
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    asyncio.run(run.train())


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_at_random_moments_loses_no_group_and_trains_none_twice(config, mode: str):
    rng, made = random.Random(mode), config(**MODES[mode])
    codes: list[int] = []
    while len(codes) < NUM_KILLS and 0 not in codes:
        code, said = in_process(die_at_a_random_moment, made, rng.uniform(0.02, 0.6))
        assert code in (0, -signal.SIGKILL), said
        codes.append(code)
    print(f"{mode}: killed {codes.count(-signal.SIGKILL)} times")
    assert -signal.SIGKILL in codes
    train(made)
    taken = account(made, replaces=mode == "partial")
    ages = column(Path(made.output_dir), "rollout/staleness_max")
    assert max(ages) <= BOUNDS.get(mode, STEPS) and min(ages) >= 0
    if mode == "sync":
        train(undisturbed := config("undisturbed"))
        assert taken == account(undisturbed, replaces=False) == list(range(STEPS * PER_STEP))
        assert same_bits(saved_weights(Path(made.output_dir)), saved_weights(Path(undisturbed.output_dir)))
        lines, expected = (without_clock(metrics(Path(one.output_dir))) for one in (made, undisturbed))
        assert lines == expected


def test_changed_settings_sample_anew_what_no_checkpoint_has_seen(config, caplog):
    stopped = config(**MODES["async"])
    assert in_process(die_at_a_random_moment, stopped, 60.0)[0] == 0
    made = config(**MODES["async"], optim__lr=2e-3, train__steps=STEPS + 3)
    with caplog.at_level("INFO", "whet"):
        train(made)
    assert f"samples after step {STEPS} are made anew, as optim.lr changed" in caplog.text


def test_a_journal_that_is_gone_is_told_and_the_run_goes_on(config, caplog):
    train(made := config(**MODES["oversampled"]))
    (Path(made.output_dir) / FILE).unlink()
    with caplog.at_level("WARNING", "whet"):
        train(config(**MODES["oversampled"], train__steps=STEPS + 1))
    assert "groups that were left over are not sampled on" in caplog.text


class Backwards:
    """Gives the rows from the last to the first, again and again."""

    def __init__(self, rows, *, skip: int = 0) -> None:
        self.rows, self.next, self.skip = rows, 0, skip

    async def take(self, n: int) -> list:
        prompts = self.rows._prompts
        taken = [prompts[-1 - self.skip - (self.next + i) % (len(prompts) - self.skip)] for i in range(n)]
        self.next += n
        return taken

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state) -> None:
        self.next = state["next"]


def test_prompts_may_come_from_a_source_of_the_users(config):
    source = {"use": "test_run_rollouts:Backwards", "skip": 2}
    train(config(rollout__source=source, train__steps=3))
    train(made := config(rollout__source=source, train__steps=4))
    journal = RolloutJournal(Path(made.output_dir) / FILE)
    assert [prompt for _, prompt, *_ in journal.census()] == [f"train/{17 - i}" for i in range(16)]
    journal.close()


def test_a_source_without_its_methods_is_refused(config):
    with pytest.raises(ConfigError, match=r"'test_run_rollouts:nothing'.* no take and no state_dict"):
        compose(config(rollout__source={"use": "test_run_rollouts:nothing"}))


def nothing(rows):
    return object()


def test_the_ratio_may_be_to_the_policy_that_sampled(config, caplog):
    ahead = {"rollout__mode": "one_step_off", "optim__lr": 1e-2, "train__steps": 4}
    found = {}
    for old in ("trainer", "sampler"):
        train(made := config(old, **ahead, rollout__old_logprobs=old))
        found[old] = column(Path(made.output_dir), "train/ppo_kl")
    # One update per step: the trainer's own policy has not moved, that of the engine is one step behind.
    assert all(abs(value) < 1e-6 for value in found["trainer"])
    assert max(abs(value) for value in found["sampler"][1:]) > 1e-4
    assert max(column(Path(made.output_dir), "train/train_rollout_logprob_abs_diff_max")) < 1e-5, "old is the sampler"
    assert "off-policy" not in caplog.text, "an older policy is no fault of the engine"
    with pytest.raises(ConfigError, match=r"correction\.use is 'tis', but with rollout\.old_logprobs sampler"):
        config("neither", rollout__old_logprobs="sampler", correction__use="tis")
