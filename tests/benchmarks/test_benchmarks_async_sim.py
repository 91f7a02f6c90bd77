"""The simulated scheduler: its limits by hand, and a bound that nothing exceeds."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.async_sim import distribution, main, simulate
from whet.config.rollout import RolloutConfig


def constant(seconds: float):
    return lambda: seconds


@pytest.mark.parametrize(("generation", "training"), [(60.0, 40.0), (40.0, 60.0), (50.0, 50.0)])
def test_the_limits_of_constant_times(generation: float, training: float):
    times = constant(generation), constant(training)
    sync = simulate(RolloutConfig(prompts_per_step=8), *times, steps=100, slots=8)
    assert sync.step_s == generation + training
    assert set(sync.ages) == {0}
    ahead = simulate(RolloutConfig(prompts_per_step=8, mode="one_step_off"), *times, steps=100, slots=8)
    # The first step waits for its generation; from then on the slower half is never idle.
    assert ahead.seconds == generation + 99 * max(generation, training) + training
    assert set(ahead.ages[:8]) == {0} and set(ahead.ages[8:]) == {1}
    async_ = simulate(RolloutConfig(prompts_per_step=8, mode="async", max_staleness=4), *times, steps=200, slots=8)
    assert async_.step_s == pytest.approx(max(generation, training), rel=0.02)


def test_where_some_answers_are_long_sampling_across_steps_hides_them():
    def run(**settings):
        draws = distribution("lognormal:50,1.0", 1), constant(10.0)
        return simulate(RolloutConfig(prompts_per_step=16, **settings), *draws, steps=400, slots=16)

    sync, off, async_ = run(), run(mode="one_step_off"), run(mode="async", max_staleness=8)
    assert sync.step_s > off.step_s > async_.step_s
    # A slot that is never idle samples a group in 50 s, and a step takes one from each; the longest, which have
    # grown too old, are begun anew.
    assert async_.step_s == pytest.approx(50, rel=0.15)
    assert sync.step_s > 120  # the longest of sixteen


def test_slots_bound_what_is_sampled_at_a_time():
    two_by_two = simulate(RolloutConfig(prompts_per_step=4), constant(10.0), constant(0.0), steps=5, slots=2)
    assert two_by_two.step_s == 20.0
    assert two_by_two.engine_s == 100.0


def test_over_sampling_waits_for_the_fastest():
    times = iter([10.0, 1.0, 2.0, 30.0])
    config = RolloutConfig(prompts_per_step=2, oversampling=4)
    assert simulate(config, lambda: next(times), constant(0.0), steps=1, slots=4).seconds == 2.0


@pytest.mark.parametrize("stale", ["refresh", "drop"])
def test_nothing_older_than_the_bound_is_ever_trained(stale):
    rng = random.Random(0)
    for seed in range(150):
        updates, prompts = rng.randint(1, 4), rng.randint(1, 6)
        bound = rng.randint(updates, 4 * updates)
        config = RolloutConfig(
            prompts_per_step=prompts, optimizer_steps=min(updates, prompts), num_ppo_epochs=1, mode="async", stale=stale
        ).model_copy(update={"max_staleness": bound})
        draws = distribution("lognormal:20,1.5", seed), distribution("exponential:10", seed)
        found = simulate(config, *draws, steps=40, slots=rng.randint(1, 12))
        assert len(found.ages) == 40 * prompts
        assert min(found.ages) >= 0 and max(found.ages) <= bound


def test_stale_groups_are_counted_and_come_back_or_do_not():
    config = RolloutConfig(prompts_per_step=2, mode="async", max_staleness=1)
    found = simulate(config, distribution("lognormal:20,1.5", 0), constant(5.0), steps=100, slots=4)
    assert found.num_stale > 0
    assert max(found.ages) == 1


def test_a_table_compares_the_modes(capsys):
    main(["--steps", "50", "--prompts", "4", "--slots", "4", "--staleness", "2", "--updates", "2"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["sync", "one_step_off", "async,"]
    assert " 1.00x" in out.splitlines()[2] and "async, 4 old" in out
    with pytest.raises(SystemExit, match="is no distribution"):
        distribution("normal:1", 0)
