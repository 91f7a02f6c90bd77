"""How much faster sampling ahead makes a run, from given times of generation and training; no model, only events.

    python -m benchmarks.async_sim --generation lognormal:60,0.8 --training 40 --prompts 32 --staleness 1 2 4

The scheduler is that of `whet.rollout`: in mode `sync` a step samples, then trains; `one_step_off` samples the next
step meanwhile; `async` keeps as many groups in flight or ready as may still be trained, n (1 + staleness / updates),
gives out the oldest, and samples what has grown too old again, or leaves it out. An engine samples `slots` groups at a
time, each at its own pace.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from whet.config.rollout import RolloutConfig

Draw = Callable[[], float]
"""Seconds, anew with each call."""


@dataclass
class Result:
    """What became of a simulated run."""

    seconds: float = 0.0
    num_steps: int = 0
    engine_s: float = 0.0
    """Seconds of slots that sampled what was trained, over all slots."""
    training_s: float = 0.0
    ages: list[int] = field(default_factory=list)
    """Of every group that was trained, in optimizer steps."""
    num_stale: int = 0
    """Groups that were too old."""

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps


@dataclass(eq=False)
class Group:
    """A group: its number, and when and by which policy it was begun."""

    number: int
    version: int | None = None
    seconds: float = 0.0


class Engine:
    """Samples so many groups at a time; the others wait in line."""

    def __init__(self, slots: int, generation: Draw) -> None:
        self.slots, self.generation = slots, generation
        self.waiting: deque[Group] = deque()
        self.running: list[tuple[float, int, Group]] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, groups: Sequence[Group], now: float, version: int) -> None:
        """Put groups in line, and begin those for which there is a slot."""
        self.waiting.extend(groups)
        while self.waiting and len(self.running) < self.slots:
            group = self.waiting.popleft()
            group.version, group.seconds = version, self.generation()
            heapq.heappush(self.running, (now + group.seconds, group.number, group))

    def next_end(self) -> float:
        return self.running[0][0] if self.running else math.inf

    def finish(self, version: int) -> tuple[float, Group]:
        """The group that ends first, and when; another takes its slot."""
        now, _, group = heapq.heappop(self.running)
        self.submit([], now, version)
        return now, group

    def remove(self, stale: Callable[[Group], bool], now: float, version: int) -> list[Group]:
        """End what is stale."""
        gone = [group for _, _, group in self.running if stale(group)]
        self.running = [one for one in self.running if one[2] not in gone]
        heapq.heapify(self.running)
        self.submit([], now, version)
        return gone

    def clear(self) -> None:
        self.waiting.clear()
        self.running.clear()


class Simulation:
    """One run, step by step; see the head of this file."""

    def __init__(self, config: RolloutConfig, generation: Draw, training: Draw, *, slots: int) -> None:
        self.config, self.training = config, training
        self.engine = Engine(slots, generation)
        self.result = Result()
        self.now = 0.0
        self.version = self.engine_version = 0
        self.ready: list[Group] = []
        self.left: deque[Group] = deque()
        self.num_groups = self.capacity = 0

    def run(self, steps: int) -> Result:
        """The result of so many steps."""
        n, slots = self.config.prompts_per_step, self.engine.slots
        ahead: list[Group] | None = None
        for step in range(1, steps + 1):
            if self.config.mode == "async":
                groups = self._take_ready(n)
            else:
                groups = ahead if ahead is not None else self._collect(n, until=None)
                self.engine_version = self.version
            self.result.ages += [self.version - (group.version or 0) for group in groups]
            self.result.engine_s += sum(group.seconds for group in groups) / slots
            seconds = self.training()
            self.result.training_s += seconds
            trained = self.now + seconds
            if self.config.mode == "one_step_off" and step < steps:
                ahead = self._collect(n, until=trained)
            else:
                self._sample_until(trained)
            self._publish()
        self.result.seconds, self.result.num_steps = self.now, steps
        return self.result

    def _collect(self, n: int, until: float | None) -> list[Group]:
        """`n` groups; the rest is aborted and begun anew later. The clock goes on to `until` if that is later."""
        fetch = max(n, self.config.oversampling or 0)
        while len(self.ready) < n:
            if len(self.ready) + len(self.engine) < n:
                self.engine.submit(list(self._next(fetch)), self.now, self.engine_version)
            self.now, group = self.engine.finish(self.engine_version)
            self.ready.append(group)
        taken = sorted(self.ready, key=lambda group: group.number)[:n]
        over = [*self.engine.waiting, *(group for _, _, group in self.engine.running), *self.ready]
        self.left.extend(sorted((g for g in over if g not in taken), key=lambda group: group.number))
        self.engine.clear()
        self.ready = []
        self.now = max(self.now, until or 0.0)
        return taken

    def _take_ready(self, n: int) -> list[Group]:
        self._expire()
        self.capacity = self._full_capacity()
        while len(self.ready) < n:
            self._fill()
            self._finish_one()
        taken = sorted(self.ready, key=lambda group: group.number)[:n]
        self.ready = [group for group in self.ready if group not in taken]
        self.capacity -= n  # until the next policy is there
        return taken

    def _sample_until(self, end: float) -> None:
        """What the engine does while a step trains; nothing in mode sync, where it is empty."""
        while self.engine.next_end() <= end:
            self._finish_one()
        self.now = end

    def _finish_one(self) -> None:
        self.now, group = self.engine.finish(self.version)
        self.ready.append(group)
        self._fill()

    def _publish(self) -> None:
        self.version += self.config.updates_per_step
        if self.config.mode != "one_step_off":
            self.engine_version = self.version
        if self.config.mode == "async":
            self._expire()
            self.capacity = self._full_capacity()
            self._fill()

    def _expire(self) -> None:
        bound = self.config.staleness
        assert bound is not None, "a simulated run has a bound"

        def stale(group: Group) -> bool:
            return group.version is not None and self.version - group.version > bound

        gone = [group for group in self.ready if stale(group)]
        self.ready = [group for group in self.ready if group not in gone]
        gone += self.engine.remove(stale, self.now, self.version)
        self.result.num_stale += len(gone)
        if self.config.stale == "refresh":
            for group in gone:
                group.version = None
            self.left.extend(gone)

    def _full_capacity(self) -> int:
        staleness = self.config.staleness
        assert staleness is not None, "a simulated run has a bound"
        return self.config.prompts_per_step * (1 + staleness // self.config.updates_per_step)

    def _fill(self) -> None:
        room = self.capacity - len(self.ready) - len(self.engine)
        if room > 0:
            self.engine.submit(list(self._next(room)), self.now, self.version)

    def _next(self, count: int) -> Iterator[Group]:
        """What was left over, then new ones."""
        for _ in range(count):
            if self.left:
                yield self.left.popleft()
            else:
                self.num_groups += 1
                yield Group(self.num_groups)


def simulate(config: RolloutConfig, generation: Draw, training: Draw, *, steps: int, slots: int) -> Result:
    """Run `steps` steps under the settings of `rollout`."""
    return Simulation(config, generation, training, slots=slots).run(steps)


def distribution(text: str, seed: int) -> Draw:
    """`40` is always 40 s; `uniform:20,60`; `exponential:40` by its mean; `lognormal:40,0.8` by mean and sigma."""
    kind, _, numbers = text.rpartition(":")
    values = [float(number) for number in numbers.split(",")]
    rng = random.Random(seed)
    draws: dict[str, Callable[..., Draw]] = {
        "": lambda seconds: lambda: seconds,
        "uniform": lambda low, high: lambda: rng.uniform(low, high),
        "exponential": lambda mean: lambda: rng.expovariate(1 / mean),
        "lognormal": lambda mean, sigma: lambda: rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma),
    }
    try:
        return draws[kind](*values)
    except (KeyError, TypeError):
        raise SystemExit(f"{text!r} is no distribution: {distribution.__doc__}") from None


def table(options: argparse.Namespace) -> str:
    """The modes against each other, with the same draws."""
    base = {"prompts_per_step": options.prompts, "optimizer_steps": options.updates}
    cases = {"sync": RolloutConfig(**base), "one_step_off": RolloutConfig(mode="one_step_off", **base)}
    for steps in options.staleness:
        bound = steps * options.updates
        cases[f"async, {bound} old"] = RolloutConfig(mode="async", max_staleness=bound, stale=options.stale, **base)
    lines = [
        f"{options.prompts} groups per step, {options.slots} at a time; generation {options.generation} s, training "
        f"{options.training} s; {options.steps} steps",
        f"{'':16} {'s/step':>9} {'speed-up':>9} {'engine':>8} {'trainer':>8} {'age':>6} {'oldest':>7} {'stale':>7}",
    ]
    sync = None
    for name, config in cases.items():
        draws = distribution(options.generation, options.seed), distribution(options.training, options.seed + 1)
        found = simulate(config, *draws, steps=options.steps, slots=options.slots)
        sync = sync or found.step_s
        age, busy = sum(found.ages) / len(found.ages), found.engine_s / found.seconds
        lines.append(
            f"{name:16} {found.step_s:9.1f} {sync / found.step_s:8.2f}x {busy:8.0%} "
            f"{found.training_s / found.seconds:8.0%} {age:6.2f} {max(found.ages):7} {found.num_stale:7}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.async_sim", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--generation", default="lognormal:60,0.8", help="seconds of a group")
    parser.add_argument("--training", default="40", help="seconds of a step, publishing included")
    parser.add_argument("--prompts", type=int, default=32, help="groups per step")
    parser.add_argument("--slots", type=int, default=32, help="groups that are sampled at a time")
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps per step")
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2, 4], help="bounds, in steps")
    parser.add_argument("--stale", choices=("refresh", "drop"), default="refresh")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    print(table(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
