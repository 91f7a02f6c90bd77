"""Arrangements of a run weighed against one another: what fits, and which of these is the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from whet.check.memory import Estimate
from whet.config.run import RunConfig
from whet.hardware import Machines
from whet.methods import Method
from whet.plan.arrangement import Arrangement, arrangement_of, others
from whet.plan.load import Lengths, Load, load_of
from whet.plan.memory import of_sampling, of_training
from whet.plan.models import Models, models_of
from whet.plan.speed import Speed, speed_of
from whet.recipe import method_of


@dataclass(frozen=True)
class Outcome:
    """What an arrangement takes: of a device that trains, of one that only samples, and in seconds."""

    how: Arrangement
    training: Estimate
    sampling: Estimate | None
    speed: Speed | None
    missing: int = 0
    """Devices that it needs beyond those that there are."""

    @property
    def fits(self) -> bool:
        return not self.missing and self.training.fits and (self.sampling is None or self.sampling.fits)

    @property
    def excess(self) -> float:
        """Bytes that its fullest device has too little; below 0 where there is room."""
        estimates = [one for one in (self.training, self.sampling) if one is not None]
        return max(one.peak.total - (one.available or float("inf")) for one in estimates)


@dataclass(frozen=True)
class Planned:
    """A run to be planned, and the machines for it; None for this machine's CPU."""

    config: RunConfig
    machines: Machines | None
    lengths: Lengths | None = None

    @cached_property
    def method(self) -> Method:
        return method_of(self.config)

    @cached_property
    def models(self) -> Models:
        return models_of(self.config, self.method)

    @cached_property
    def load(self) -> Load:
        return load_of(self.config, self.method, self.lengths)

    @cached_property
    def configured(self) -> Outcome:
        """What the configuration says, as it is."""
        return self.weigh(arrangement_of(self.config, samples=self.load.samples))

    @cached_property
    def candidates(self) -> list[Outcome]:
        """All other arrangements over the machines, at most one that does not fit (the one that lacks least)."""
        if self.machines is None:
            return []
        return self._weighed(others(self.configured.how, self.models.policy, self.machines, samples=self.load.samples))

    @property
    def best(self) -> Outcome | None:
        """The fastest that fits; of those that take about as long, the one that divides least."""
        fitting = [one for one in self.candidates if one.fits and one.speed is not None]
        return min(fitting, key=_cost, default=None)

    @property
    def nearest(self) -> Outcome:
        """What lacks least, where nothing fits."""
        return min([self.configured, *self.candidates], key=lambda one: (one.missing, one.excess))

    def weigh(self, how: Arrangement) -> Outcome:
        """Memory and time of one arrangement."""
        config, machines, load = self.config, self.machines, self.load
        training = of_training(config, self.method, self.models, how, load, machines)
        if machines is None:
            return Outcome(how, training, None, None)
        apart = how.engines and not how.colocate
        sampling = of_sampling(config, self.models, how, load, machines) if apart else None
        speed = speed_of(config, self.method, self.models, how, load, machines)
        return Outcome(how, training, sampling, speed, max(0, how.total - machines.devices))

    def _weighed(self, arrangements: Iterable[Arrangement]) -> list[Outcome]:
        """Outcomes, of one division without and with recomputation, or more offloading, only what may be needed."""
        found: list[Outcome] = []
        enough: set[Arrangement] = set()
        for how in arrangements:
            lighter = replace(how, offload="none", checkpointing=self.configured.how.checkpointing)
            if how != lighter and lighter in enough:
                continue  # it would fit as well, and take longer
            found.append(self.configured if how == self.configured.how else self.weigh(how))
            if found[-1].fits:
                enough.add(how)
        return found


def _cost(one: Outcome) -> tuple[float, int]:
    """Seconds to two digits, which is more than they are worth; then how much is divided."""
    assert one.speed is not None, "only what has been timed is compared"
    how = one.how
    parts = how.tensor * how.context * how.pipeline * how.expert * how.engine_tensor
    return float(f"{one.speed.step_s:.2g}"), parts + (how.offload != "none") + how.checkpointing
