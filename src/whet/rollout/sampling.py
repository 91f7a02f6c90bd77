"""The source of reinforcement learning: prompts in, scored groups of completions out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whet.config.rollout import RolloutConfig
from whet.engines.protocol import Engine, release
from whet.errors import EngineError
from whet.rollout.collect import Collector
from whet.rollout.filters import Choices, build_choices
from whet.rollout.group import Group, GroupPlayer, Rollout
from whet.rollout.journal import RolloutJournal
from whet.rollout.protocols import EnvFactory, Scorer, StateDict
from whet.rollout.statistics import PrefixHits, age_metrics, rollout_metrics
from whet.rollout.supply import PromptSource, Supply
from whet.types import Episode, Prompt, Sample, Sampling, Unit

logger = logging.getLogger(__name__)


def sampling_of(config: RolloutConfig, stop_token_ids: Sequence[int] = ()) -> Sampling:
    """How a rollout samples; `stop_token_ids` are the model's own, added to those of the configuration."""
    return Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=tuple(config.stop),
        stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, *stop_token_ids))),
    )


class RolloutSource:
    """Samples a group for each prompt and gives it out as a unit. Implements `rollout.protocols.Source`.

    A group's id is `g` and its number since the start of the run, so it is the same after a resume, and so is what
    it samples: seeds depend on `seed`, the group id and the index only. What was sampled lies in a journal, from the
    prompt to the step that consumed it: after a resume, steps that had been sampled already are taken from there, and
    what was left over goes on. `journal` is its file, in memory if None; `made_with` what samples follow from,
    setting by setting. `choices` are the filters of the run, made of `config` if not given. `baseline` asks for a
    greedy episode beside every group.

    Without over-sampling, filter, or sampling ahead, an interrupted step is sampled again as a whole: the engine then
    decodes the same rows together, and gives the same bits.
    """

    def __init__(
        self,
        prompts: PromptSource,
        engine: Engine,
        env: EnvFactory,
        scorer: Scorer,
        config: RolloutConfig,
        *,
        tokenizer: Any,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        timeout_s: float = 600.0,
        journal: Path | None = None,
        made_with: Mapping[str, str] | None = None,
        baseline: bool = False,
        choices: Choices | None = None,
    ) -> None:
        self._prompts, self._engine, self._scorer, self._config = prompts, engine, scorer, config
        self._group_size, self._baseline = config.group_size, baseline
        self._path, self._made_with = journal, dict(made_with or {})
        self._player = GroupPlayer(
            engine,
            env,
            scorer,
            sampling_of(config, stop_token_ids),
            tokenizer=tokenizer,
            seed=seed,
            timeout_s=timeout_s,
            retries=config.retries,
        )
        self._prefixes = PrefixHits(engine)
        self._choices = choices or build_choices(config)
        self._collecting: Collector | None = None
        self._ahead: asyncio.Task[list[Group]] | None = None
        self._restored: Mapping[str, Any] | None = None
        self._step = self._version = self._engine_version = self._num_per_step = 0
        self._started = time.monotonic()
        self.rollout: Rollout | None = None
        """What the last `take` gave out, failed and aborted episodes included."""
        self.stats: dict[str, float] = {}
        """Metrics of the last `take`."""

    async def take(self, n: int) -> list[Unit]:
        """Groups for the next `n` prompts, wrapping around the data set as often as needed.

        Failed and aborted episodes are left out of their groups, and a group without any other is
        left out of the result; `stats` counts both.
        Raises DataError without prompts, EngineError if the engine fails or aborts everything, and
        RewardError if no episode got a reward.
        """
        collector, step = self._collector(), self._step + 1
        if self._config.mode == "sync":  # in other modes sampling went on since the last step
            self._started = time.monotonic()
            self._prefixes.restart()
        groups = self._journal.of_step(step, self._begin)
        if not groups:
            groups = await self._next(collector, n, step)
            self._journal.taken(step, groups)
        self._step = step
        self.rollout = self._measured(groups)
        settled, counts = collector.report()
        self._report(settled)
        self.stats = rollout_metrics(self.rollout) | {f"rollout/{name}": value for name, value in counts.items()}
        self.stats |= age_metrics(groups, self._version) | self._prefixes.metrics()
        self.stats |= getattr(self._engine, "metrics", dict)()
        if self._config.mode == "one_step_off" and self._journal.last_step() == step:  # the next is not there already
            await self._update_engine()
            self._ahead = asyncio.create_task(collector.collect(n, step + 1))
        removed = self._choices.remove(groups)
        if len(removed) == len(self.rollout.episodes):
            logger.warning(
                "rollout.sample_filter removed all %d samples of step %d: it trains nothing", len(removed), step
            )
        units = [unit for group in groups if (unit := self._unit(group, removed)) is not None]
        if not units:
            raise EngineError(
                f"the engine aborted all {len(self.rollout.episodes)} completions of this step, so nothing can be "
                f"trained; see why it was paused or told to abort"
            )
        return units

    async def publish(self, snapshot: int) -> None:
        """The policy has new weights, of this version. They are in use when the call returns; one step off, when what
        is being sampled ahead is there."""
        self._version = snapshot
        if self._config.mode != "one_step_off":
            await self._update_engine()
        if self._collecting is not None:
            await self._collecting.expire(snapshot)
            if self._config.mode == "async" and self._num_per_step:
                await self._collecting.allow(self._capacity(self._num_per_step))

    async def close(self) -> None:
        """Stop sampling; the journal keeps what is under way."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)
            self._ahead = None
        if self._collecting is not None:
            self._restored = self.state_dict()
            await self._collecting.stop()
            self._journal.close()
            self._collecting = None

    def state_dict(self) -> StateDict:
        supply = self._collecting.supply if self._collecting is not None else None
        if supply is None and self._restored is not None:
            return dict(self._restored)
        return {
            "prompts": self._prompts.state_dict(),
            "num_groups": supply.num_groups if supply is not None else 0,
            "step": self._step,
            "version": self._version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._restored = state
        self._step, self._version = state["step"], state["version"]

    def checkpointed(self) -> None:
        """What has been consumed so far is in a checkpoint. Who goes back further samples anew."""
        if self._collecting is not None:
            self._journal.forget(self._step)

    # --- one step -----------------------------------------------------------------------------------------

    async def _next(self, collector: Collector, n: int, step: int) -> list[Group]:
        if self._config.mode == "async":
            await self._update_engine()
            self._num_per_step = n
            return await collector.take_ready(n, step, self._version, self._capacity(n))
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            groups = await ahead
            await self._update_engine()
            return groups
        await self._update_engine()
        groups = await collector.collect(n, step)
        if self._config.mode == "sync":
            release(self._engine)
        return groups

    async def _update_engine(self) -> None:
        if self._engine_version != self._version:
            await self._engine.update_weights(self._version)
            self._engine_version = self._version

    def _capacity(self, n: int) -> int:
        """Groups in flight and ready: those of this step, and of as many steps ahead as may still be trained."""
        staleness = self._config.staleness
        assert staleness is not None, "asynchronous sampling has a bound"
        return n * (1 + staleness // self._config.updates_per_step)

    def _begin(self, name: str, prompt: Prompt, step: int) -> Group:
        return self._player.begin(name, prompt, self._group_size, baseline=self._baseline, step=step)

    def _measured(self, groups: Sequence[Group]) -> Rollout:
        """The groups, with the time that it took to have them."""
        started, self._started = self._started, time.monotonic()
        sampled = max(0.0, self._player.last_end - started)
        return Rollout(tuple(groups), generation_s=sampled, total_s=self._started - started)

    def _report(self, settled: Sequence[Group]) -> None:
        episodes = [episode for group in settled for episode in group.members]
        self._scorer.report_failures(episodes)
        if episodes:
            assert self.rollout is not None, "there is a rollout to report on"
            self._scorer.report_uniform(self.rollout.episodes)

    def _unit(self, group: Group, removed: set[tuple[str, int]]) -> Unit | None:
        """The scored members of a group as a unit, or None if there is none."""
        before = self._version if self._config.mask_offpolicy else None
        samples = [
            _masked(episode, before=before, removed=(group.id, place) in removed)
            for place, episode in enumerate(group.episodes)
            if episode.reward is not None
        ]
        if group.baseline is None:
            return Unit(group.id, tuple(samples)) if samples else None
        if group.baseline.reward is None or not samples:
            return None
        return Unit(group.id, tuple(samples), columns={"baseline_rewards": group.baseline.reward})

    # --- going on -----------------------------------------------------------------------------------------

    def _collector(self) -> Collector:
        """Opens the journal with the first step: before, a run leaves what is on the disk alone."""
        if self._collecting is None:
            self._journal = RolloutJournal(self._path)
            supply = Supply(self._prompts, self._begin, self._choices.order, self._journal)
            config = self._config
            plain = config.mode == "sync" and config.filter is None and config.oversampling is None
            self._collecting = Collector(
                supply,
                self._player,
                self._engine,
                self._journal,
                self._choices.rejects,
                config,
                replaces=not plain,
                notes=not plain,
            )
            self._go_on(self._collecting, plain)
            self._started = time.monotonic()
        return self._collecting

    def _go_on(self, collector: Collector, plain: bool) -> None:
        """Take up what the journal holds beside the checkpoint; without a checkpoint, begin anew."""
        journal, supply, state = self._journal, collector.supply, self._restored
        if state is None:
            journal.begin(self._made_with)
            return
        self._restored = None
        known, num_groups = journal.settings(), state["num_groups"]
        supply.num_groups = num_groups
        if journal.position()[0] < max(1, num_groups):
            if num_groups:
                logger.warning("%s is not there: groups that were left over are not sampled on", self._path)
            journal.begin(self._made_with)
            return
        names = [name for name in {**known, **self._made_with} if known.get(name) != self._made_with.get(name)]
        if names or journal.last_forgotten() > self._step:
            why = f"{', '.join(names)} changed" if names else "a later checkpoint was passed over"
            logger.info("samples after step %d are made anew, as %s", self._step, why)
            journal.go_back(self._step, num_groups, self._made_with)
        else:
            if plain:
                journal.restart_unfinished()
            supply.num_groups, position = journal.position()
            if position is not None:
                self._prompts.load_state_dict(position)
            if (last := journal.last_step()) > self._step:
                logger.info(
                    "steps %d to %d were sampled already and are taken from %s", self._step + 1, last, self._path
                )
        supply.left = journal.in_state("open", self._begin)
        collector.ready = journal.in_state("ready", self._begin)


def _masked(episode: Episode, *, before: int | None, removed: bool) -> Sample:
    """The episode as a sample; what earlier policies than `before` sampled, or all of it, is not trained."""
    sample = episode.to_sample()
    if removed:
        return replace(sample, loss_mask=(False,) * len(sample.loss_mask))
    if before is None:
        return sample
    mask = list(sample.loss_mask)
    for span in episode.versions:
        if span.version < before:
            mask[span.start : span.end] = [False] * (span.end - span.start)
    return replace(sample, loss_mask=tuple(mask))
