"""Groups are sampled until enough are kept and no longer; none is lost or trained twice; none is older than allowed."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import virtual
from virtual import run_at_once

from whet.config.base import Plugin
from whet.config.rollout import RolloutConfig
from whet.envs.single import SingleTurn
from whet.errors import CheckpointError, ConfigError, DataError, EngineError, RewardError
from whet.rollout.group import Group
from whet.rollout.journal import RolloutJournal
from whet.rollout.sampling import RolloutSource
from whet.rollout.supply import Supply
from whet.types import Episode, Prompt


def number(group: str) -> int:
    return int(group[1:])


@pytest.fixture
def make_source(tokenizer, listed, tmp_path: Path):
    """Makes a source over a hundred prompts on a timed engine; the keywords are settings of the rollout."""
    numbers = itertools.count()

    def make(
        rng=None, reward=lambda e: e.index, seconds=lambda rng: 1.0, judging=lambda rng: 0.0, fails=0.0, **settings
    ) -> tuple[RolloutSource, virtual.TimedEngine]:
        rng = rng or random.Random(0)
        prompts = listed([Prompt(f"p{i}", [100 + i], f"{i}?") for i in range(100)])
        engine = virtual.TimedEngine(rng, seconds, fails=fails)
        scorer: Any = virtual.Scorer(rng, reward, judging)
        config = RolloutConfig(**{"group_size": 2, "max_tokens": 6, "prompts_per_step": 4, **settings})
        journal = tmp_path / f"{next(numbers)}.sqlite"
        source = RolloutSource(
            prompts, engine, SingleTurn, scorer, config, tokenizer=tokenizer, seed=0, timeout_s=1e6, journal=journal
        )
        return source, engine

    return make


def passing(*passed: bool):
    """Rewards of groups that differ where the group passes, in the order in which groups are begun, again and again."""
    return lambda e: e.index if passed[number(e.group) % len(passed)] else 1.0


OVERSAMPLED = {"filter": Plugin(use="nonzero_std"), "oversampling": 8}


@pytest.mark.parametrize(
    ("passed", "fetches"), [((True,), 1), ((True, False), 1), ((True, False, False, False), 2)], ids=str
)
def test_more_prompts_are_fetched_when_too_few_groups_are_kept_or_in_flight(make_source, passed, fetches):
    source, _ = make_source(reward=passing(*passed), **OVERSAMPLED)
    units = run_at_once(source.take(4))
    assert len(units) == 4 and all(passed[number(unit.id) % len(passed)] for unit in units)
    assert source.stats["rollout/num_fetches"] == fetches
    assert source.state_dict()["num_groups"] == 8 * fetches


def test_rejected_groups_are_counted_by_reason_and_never_come_back(make_source):
    source, _ = make_source(reward=passing(False, True), **OVERSAMPLED)

    async def steps():
        return [await source.take(4) for _ in range(3)], source._journal.census()

    units, census = run_at_once(steps())
    assert source.stats["rollout/dropped/zero_std"] > 0
    taken = [number(unit.id) for step in units for unit in step]
    assert len(set(taken)) == 12 and all(n % 2 for n in taken)
    reasons = {n: reason for n, _, state, _, reason in census if state == "dropped"}
    assert set(reasons.values()) == {"zero_std"} and all(n % 2 == 0 for n in reasons)


def test_sampling_stops_at_once_when_enough_groups_are_kept(make_source):
    source, engine = make_source(oversampling=8)
    # Groups differ in length; what is not among the first four to end is cut off where it is.
    units = run_at_once(source.take(4))
    assert engine.requests == {} and len(units) == 4
    longest = max(sum(sample.loss_mask) for unit in units for sample in unit.samples)
    assert engine.num_tokens <= 16 * longest


def test_a_filter_that_rejects_everything_ends_with_an_error_that_counts(make_source):
    source, _ = make_source(reward=lambda e: 1.0, max_fetches=3, **OVERSAMPLED)
    told = r"only 0 of the 4 groups .* kept of 24 prompts; rejected: 2\d zero_std.*rollout\.max_fetches \(3\)"
    with pytest.raises(RewardError, match=told):
        run_at_once(source.take(4))


def test_a_group_without_any_reward_is_replaced_where_groups_are_chosen(make_source):
    source, _ = make_source(reward=lambda e: None if number(e.group) % 3 == 0 else e.index, **OVERSAMPLED)
    units = run_at_once(source.take(4))
    assert len(units) == 4 and all(number(unit.id) % 3 for unit in units)
    assert source.stats["rollout/dropped/failed"] >= 1


def test_what_is_left_over_without_partial_begins_anew_before_new_prompts(make_source):
    source, _ = make_source(oversampling=8)

    async def steps():
        return [[number(unit.id) for unit in await source.take(4)] for _ in range(4)]

    taken = run_at_once(steps())
    assert len({n for step in taken for n in step}) == 16
    # Nobody overtakes for ever: after four steps the first eight have all been there.
    assert set(range(8)) <= {n for step in taken for n in step}
    assert source.stats["rollout/staleness_max"] == 0


def test_partial_completions_go_on_with_what_they_have(make_source):
    source, _ = make_source(oversampling=8, partial=True)

    async def steps():
        groups = []
        for step in range(1, 6):
            await source.take(4)
            groups += source.rollout.groups
            await source.publish(step)
        return groups

    groups = run_at_once(steps())
    spread = [e for group in groups for e in group.episodes if len({span.version for span in e.versions}) > 1]
    assert spread, "some completion was sampled by two policies"
    for episode in spread:
        begins, ends = [s.start for s in episode.versions], [s.end for s in episode.versions]
        assert begins == [1, *ends[:-1]] and ends[-1] == len(episode.tokens)
        assert [s.version for s in episode.versions] == sorted(s.version for s in episode.versions)
        assert sum(episode.loss_mask) == len(episode.tokens) - 1 <= 6


def test_completed_members_of_an_unfinished_group_are_never_sampled_again(make_source):
    source, engine = make_source(oversampling=8, partial=True)
    asked: Counter[tuple[str, int]] = Counter()
    generate = engine.generate

    async def counted(tokens, sampling, *, prefix_key=None):
        completion = await generate(tokens, sampling, prefix_key=prefix_key)
        asked[prefix_key, len(tokens), completion.finish_reason, sampling.seed] += 1
        return completion

    engine.generate = counted

    async def steps():
        for step in range(1, 7):
            await source.take(4)
            await source.publish(step)

    run_at_once(steps())
    assert max(asked.values()) == 1, "no request was made twice"
    judged = Counter(source._scorer.judged)
    assert max(judged.values()) == 1, "no completion was judged twice"


@pytest.mark.parametrize("mask", [True, False])
def test_tokens_of_earlier_steps_can_be_masked(make_source, mask: bool):
    source, _ = make_source(oversampling=8, partial=True, mask_offpolicy=mask)

    async def steps():
        num_old = 0
        for step in range(1, 6):
            units = {unit.id: unit for unit in await source.take(4)}
            for group in source.rollout.groups:
                for episode, sample in zip(group.episodes, units[group.id].samples, strict=True):
                    old = [s.version < source._version for s in episode.versions for _ in range(s.start, s.end)]
                    assert list(sample.loss_mask) == [False, *(not (mask and one) for one in old)]
                    num_old += sum(old)
            await source.publish(step)
        return num_old

    assert run_at_once(steps()) > 0


def test_left_over_groups_that_are_too_old_begin_anew_or_are_left_out(make_source):
    for stale, state in (("refresh", "open"), ("drop", "dropped")):
        source, _ = make_source(oversampling=8, partial=True, max_staleness=2, stale=stale)

        async def steps(source=source):
            await source.take(4)
            left = [group.id for group in source._collecting.supply.left if group.oldest_version is not None]
            await source.publish(2)
            assert [g.id for g in source._collecting.supply.left if g.oldest_version is not None] == left
            await source.publish(3)
            assert all(group.oldest_version is None for group in source._collecting.supply.left)
            return left, {f"g{n}": found for n, _, found, _, _ in source._journal.census()}

        left, states = run_at_once(steps())
        assert left and {states[group] for group in left} == {state}


def test_the_seeds_own_filter_and_buffer_run_as_they_are_printed(make_source):
    torch_filter = Plugin(use="seed_functions:check_reward_nonzero_std")
    source, _ = make_source(
        reward=passing(True, False), oversampling=8, filter=torch_filter, buffer=Plugin(use="seed_functions:pop_first")
    )
    units = run_at_once(source.take(4))
    assert all(number(unit.id) % 2 == 0 for unit in units)
    assert source.stats["rollout/dropped/check_reward_nonzero_std"] >= 3


def test_a_filter_that_raises_is_told_with_its_name(make_source):
    source, _ = make_source(filter=Plugin(use="seed_functions:broken"))
    with pytest.raises(RewardError, match=r"rollout\.filter 'seed_functions:broken' raised ZeroDivisionError on group"):
        run_at_once(source.take(4))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"filter": Plugin(use="seed_functions:undecided")},
            "rollout.filter 'seed_functions:undecided' raised Runtime",
        ),
        ({"buffer": Plugin(use="seed_functions:junk")}, "rollout.buffer 'seed_functions:junk' raised TypeError on"),
    ],
)
def test_an_answer_that_cannot_be_read_is_told_as_an_error_of_the_function(settings, told, make_source):
    source, _ = make_source(oversampling=8, **settings)

    async def steps():
        await source.take(4)
        await source.take(4)

    with pytest.raises(RewardError, match=told):
        run_at_once(steps())


def test_a_filter_that_nothing_would_await_is_refused(make_source):
    with pytest.raises(ConfigError, match=r"seed_functions:forgetful', which is async; expected a plain function"):
        make_source(filter=Plugin(use="seed_functions:forgetful"))


def test_a_cancellation_from_within_ends_the_step_and_does_not_hang_it(make_source):
    def cancelled(episode):
        raise asyncio.CancelledError("by a library")

    source, _ = make_source(reward=cancelled)
    with pytest.raises(EngineError, match=r"group g\d cancelled itself"):
        run_at_once(source.take(4))


class Odd:
    """A source of prompts that gives whatever it is told to."""

    def __init__(self, given):
        self.given = given

    async def take(self, n):
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    def state_dict(self):
        return {"set": {1}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (OSError("no disk"), r"Odd.take\(2\), raised OSError: no disk"),
        (["text"], r"Odd.take\(2\), gave 'text'; expected from 1 to 2 whet.types.Prompt"),
        ([Prompt("p", [1], "?")] * 3, r"Odd.take\(2\), gave 3 prompts; expected"),
        (None, "there is no prompt to sample from"),
    ],
    ids=["raises", "text", "too many", "none"],
)
async def test_what_a_source_does_wrong_is_told_with_its_name(given, told):
    supply = Supply(Odd(given), lambda *_: pytest.fail("nothing begins"), lambda *_: [], RolloutJournal(None))
    with pytest.raises(DataError, match=told):
        await supply.next(2, 1)


def test_a_position_that_is_no_json_is_told(make_source):
    with pytest.raises(CheckpointError, match="source of prompts cannot be kept as JSON"):
        RolloutJournal(None).fetched([Group("g0", [Episode(Prompt("p", [1], "?"), "g0", 0)])], Odd(None).state_dict())


def test_a_sample_filter_takes_samples_out_of_the_loss_and_leaves_their_rewards(make_source):
    source, _ = make_source(sample_filter=Plugin(use="seed_functions:without_the_first"))
    for unit in run_at_once(source.take(2)):
        assert [any(sample.loss_mask) for sample in unit.samples] == [False, True]
        assert [sample.reward for sample in unit.samples] == [0.0, 1.0]


def test_an_episode_that_fails_is_played_again_as_often_as_allowed(make_source):
    tried: Counter[tuple[str, int]] = Counter()

    def third_time(episode):
        tried[episode.group, episode.index] += 1
        return 1.0 if tried[episode.group, episode.index] == 3 else None

    source, _ = make_source(reward=third_time, retries=2)
    assert [len(unit.samples) for unit in run_at_once(source.take(2))] == [2, 2]
    tried.clear()
    source, _ = make_source(reward=third_time, retries=1)
    with pytest.raises(EngineError):
        run_at_once(source.take(2))


# --- ahead of training -----------------------------------------------------------------------------------


async def play(source: RolloutSource, rng: random.Random, steps: int, updates: int, train_s: float) -> list[list[str]]:
    """Take, train and publish, as the loop does; the ages of what is taken are checked on the way."""
    bound, version, taken = source._config.staleness, source._version, []
    bound = math.inf if bound is None else bound
    for _ in range(steps):
        await source.take(source._config.prompts_per_step)
        groups = source.rollout.groups
        for group in groups:
            assert group.oldest_version is None or version - group.oldest_version <= bound, group.id
            assert all(span.version <= version for e in group.episodes for span in e.versions)
        taken.append([group.id for group in groups])
        await asyncio.sleep(rng.uniform(0, 2 * train_s))
        version += updates
        await source.publish(version)
    await source.close()
    return taken


def test_one_step_off_samples_the_next_step_while_this_one_trains(make_source):
    source, engine = make_source(mode="one_step_off")
    ages = []

    async def steps():
        for step in range(1, 5):
            await source.take(4)
            ages.append({step - 1 - group.oldest_version for group in source.rollout.groups})
            before = engine.num_tokens
            await asyncio.sleep(3.0)  # training
            assert engine.num_tokens > before, "sampling goes on meanwhile"
            await source.publish(step)
        await source.close()

    run_at_once(steps())
    assert ages == [{0}, {1}, {1}, {1}]


def test_asynchronous_sampling_keeps_a_bounded_number_of_groups_in_flight(make_source):
    source, engine = make_source(mode="async", max_staleness=2)
    run_at_once(play(source, random.Random(1), steps=10, updates=1, train_s=3.0))
    assert 4 < engine.most_groups <= 4 * 3


def test_new_weights_reach_requests_in_flight(make_source):
    source, _ = make_source(mode="async", max_staleness=3)

    async def steps():
        spread = 0
        for step in range(1, 9):
            await source.take(4)
            episodes = [episode for group in source.rollout.groups for episode in group.episodes]
            spread += sum(len({span.version for span in episode.versions}) > 1 for episode in episodes)
            await asyncio.sleep(1.0)
            await source.publish(step)
        await source.close()
        return spread

    assert run_at_once(steps()) > 0


@pytest.mark.parametrize("hundred", range(3))
def test_staleness_never_exceeds_its_bound_and_every_group_is_accounted_for(make_source, hundred: int):
    """Random modes, bounds, timings, filters and failures of rewards."""
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        one_random_schedule(make_source, seed)


def one_random_schedule(make_source, seed: int) -> None:
    rng = random.Random(seed)
    mode = rng.choice(["async", "async", "one_step_off", "sync"])
    updates = rng.choice([1, 1, 2])
    settings: dict[str, Any] = {"mode": mode, "optimizer_steps": updates, "prompts_per_step": rng.randrange(2, 5)}
    if mode == "async":
        settings |= {"max_staleness": updates * rng.randrange(1, 4), "stale": rng.choice(["refresh", "drop"])}
    elif rng.random() < 0.5:
        settings["oversampling"] = settings["prompts_per_step"] + rng.randrange(4)
        if settings["oversampling"] > settings["prompts_per_step"] and mode == "sync":
            settings |= {"partial": True, "max_staleness": rng.randrange(4)}
    if rng.random() < 0.5:
        settings["filter"] = Plugin(use="nonzero_std")
    pace, tail = rng.uniform(0.01, 3), rng.random() < 0.3
    source, _ = make_source(
        rng,
        reward=lambda e: rng.choice([0, 1, 1, None]) if rng.random() < 0.9 else e.index,
        seconds=lambda r: r.expovariate(1 / pace) * (20 if tail and r.random() < 0.05 else 1),
        judging=lambda r: r.choice([0.0, 0.0, r.expovariate(1.0), 30.0 if tail else 0.0]),
        max_fetches=500 if "filter" in settings or "oversampling" in settings else 20,
        **settings,
    )
    taken = run_at_once(play(source, rng, steps=8, updates=updates, train_s=rng.uniform(0, 10)))
    account(source, taken, settings)


def account(source: RolloutSource, taken: list[list[str]], settings: dict[str, Any]) -> None:
    """Every group is in one state, in the order of the prompts; what was taken was taken once."""
    journal = RolloutJournal(source._path)
    census = journal.census()
    journal.close()
    assert [n for n, *_ in census] == list(range(len(census)))
    assert [prompt for _, prompt, *_ in census] == [f"p{n % 100}" for n in range(len(census))]
    flat = [number(group) for step in taken for group in step]
    assert len(set(flat)) == len(flat) == sum(map(len, taken))
    states = {n: (state, step) for n, _, state, step, _ in census}
    expected = {number(group): ("taken", step) for step, groups in enumerate(taken, 1) for group in groups}
    assert {n: found for n, found in states.items() if found[0] == "taken"} == expected
    if "filter" not in settings and "oversampling" not in settings and settings.get("stale") != "drop":
        assert all(state in ("open", "ready", "taken") or reason == "failed" for _, _, state, _, reason in census)


@pytest.mark.parametrize("hundred", range(10))
def test_no_schedule_of_failures_aborts_and_slow_rewards_ends_in_a_deadlock(make_source, hundred: int):
    """Whatever happens, a run goes on or ends with an error: it never waits for what cannot come."""
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        one_troubled_schedule(make_source, seed)


def one_troubled_schedule(make_source, seed: int) -> None:
    rng = random.Random(seed)
    mode = rng.choice(["async", "one_step_off", "sync"])
    settings: dict[str, Any] = {"mode": mode, "prompts_per_step": 2, "retries": rng.choice([0, 0, 1])}
    if mode != "async" and rng.random() < 0.6:
        settings |= {"oversampling": rng.randrange(2, 6), "max_fetches": 4}
        settings["partial"] = settings["oversampling"] > 2 and rng.random() < 0.5
    if rng.random() < 0.4:
        settings["filter"] = Plugin(use="nonzero_std")
    source, engine = make_source(
        rng,
        reward=lambda e: rng.choice([0, 1, None]),
        seconds=lambda r: r.expovariate(1.0),
        judging=lambda r: r.choice([0.0, 0.5, 100.0]),
        fails=rng.choice([0.0, 0.0, 0.02]),
        **settings,
    )

    async def meddle():
        while True:
            await asyncio.sleep(rng.expovariate(0.1))
            await engine.abort({f"g{rng.randrange(20)}"})

    async def run():
        meddling = asyncio.create_task(meddle()) if rng.random() < 0.3 else None
        try:
            async with asyncio.timeout(1e5):  # on the clock that jumps: far beyond any that comes
                return await play(source, rng, steps=4, updates=1, train_s=2.0)
        except (EngineError, RewardError):
            await source.close()
        finally:
            if meddling is not None:
                meddling.cancel()

    run_at_once(run())
    assert engine.requests == {}, "nothing is left behind in the engine"


@pytest.mark.parametrize("mode", ["one_step_off", "async"])
def test_after_a_resume_what_was_sampled_is_taken_first_and_then_the_engine_has_the_policys_weights(make_source, mode):
    source, _ = make_source(mode=mode)

    async def steps(source, first, last):
        found = []
        for step in range(first, last + 1):
            await source.take(4)
            found.append([(group.id, group.oldest_version) for group in source.rollout.groups])
            await asyncio.sleep(3.0)
            await source.publish(step)
            if step == 2:
                states.append(source.state_dict())
        await source.close()
        return found

    states: list[dict[str, Any]] = []
    before = run_at_once(steps(source, 1, 6))
    resumed, engine = make_source(mode=mode)
    resumed._path = source._path
    resumed.load_state_dict(states[0])
    after = run_at_once(steps(resumed, 3, 9))
    assert after[:4] == before[2:], "steps 3 to 6 were sampled before the process ended"
    ages = [step - 1 - version for step, groups in enumerate(after, 3) for _, version in groups]
    assert min(ages) >= 0 and max(ages) <= resumed._config.staleness
    assert len({group for step in (*before[:2], *after) for group, _ in step}) == 4 * 9
    assert engine.version >= 8
