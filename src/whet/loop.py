"""The one training loop: take units, annotate, give credit, update, publish; for every method the same."""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from whet.annotate import RewardMean, Running
from whet.backends.optimizer import learning_rate
from whet.backends.protocol import Backend, shares_prefixes
from whet.batch import Batch, collate
from whet.config.evaluation_rules import default_metric, metric_mode
from whet.config.optim import OptimConfig
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.log import RunLog
from whet.methods import Method
from whet.mix import Mix
from whet.rollout.protocols import Source
from whet.sanity import moved_before_the_first_update
from whet.schedule import Schedule
from whet.speed import StepClock
from whet.tally import reduction, weight_keys
from whet.types import Unit

logger = logging.getLogger(__name__)

LOGPROB_ALARM = 0.05
"""Mean difference between the sampler's and the trainer's logprobs above which a run warns: beyond rounding."""

Evaluator = Callable[[Running], Awaitable[dict[str, float]]]
"""Metrics named `eval/…` of the policy as it is, given the running means of the run."""


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    optimizer_steps: int = 0
    num_tokens: int = 0
    best: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    stopped_early: bool = False
    last_eval: dict[str, float] = field(default_factory=dict)
    running: dict[str, list[float]] = field(default_factory=dict)
    """Running means of the method's annotations."""


class Saver(Protocol):
    """Keeps the state of a loop on disk."""

    def save(self, loop: Loop, *, best: bool) -> None: ...


class Loop:
    """Everything that a training run is made of, and the loop over it.

    `backends` are by role; the method says which of them are trained, `policy` before all. `mix` adds rows to the
    optimizer steps of the policy. `callbacks` are called with the loop after every step.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        source: Source,
        backends: Mapping[str, Backend],
        schedule: Schedule,
        *,
        evaluate: Evaluator | None = None,
        saver: Saver | None = None,
        progress: Progress | None = None,
        mix: Mix | None = None,
    ) -> None:
        self.config, self.method, self.source, self.backends = config, method, source, backends
        self.schedule, self.evaluate, self.saver = schedule, evaluate, saver
        self.progress, self.mix = progress or Progress(), mix
        self.callbacks: list[Callable[[Loop], None]] = []
        self.policy = backends["policy"]
        self._stop_requested = False
        self._is_checked = method.source != "prompts"
        self._prefix = "train/" if method.source == "prompts" else ""

    @property
    def global_step(self) -> int:
        """Steps done since the start of the run, earlier sessions of it included."""
        return self.progress.step

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.schedule.last_step or self.progress.stopped_early

    def request_stop(self) -> None:
        """End after the step that is running, with a checkpoint."""
        self._stop_requested = True

    async def run(self, log: RunLog) -> Progress:
        """Train to the end of the schedule, an early stop, or a requested one, and log what is measured."""
        self.log = log
        try:
            if self.config.eval.at_start and self.progress.step == 0:
                self.progress.best = None  # a run that goes on from here was measured before, and is again
                if await self._evaluate() and self.saver and self.config.checkpoint.best:
                    self.saver.save(self, best=True)  # or there would be nothing to end with, were it never better
            elif self.config.eval.metric and self.evaluate is not None:
                # To learn at the end that there is no such metric would be late.
                self._metric(await self.evaluate(self.progress.running))
            while not self.finished and not self._stop_requested:
                await self._turn()
        finally:
            if (close := getattr(self.source, "close", None)) is not None:
                await close()
        return self.progress

    async def _turn(self) -> None:
        """One step, and what is due after it."""
        metrics = await self.train_step()
        step = self.progress.step
        self.log.log(step, metrics)
        try:
            improved = self.schedule.evaluates_after(step) and await self._evaluate()
            for callback in self.callbacks:
                callback(self)
        except Exception:
            if self.saver:  # what was trained is whole; it must not go with what came after
                self.saver.save(self, best=False)
            raise
        if self.saver and self._saves_now(improved):
            self.saver.save(self, best=improved)

    def _saves_now(self, improved: bool) -> bool:
        if self._stop_requested and not self.finished:
            return True  # or what was trained since the last checkpoint would be lost
        best = improved and self.config.checkpoint.best
        early = self.progress.stopped_early and self.schedule.saves
        return self.schedule.saves_after(self.progress.step) or best or early

    async def train_step(self) -> dict[str, float]:
        """One turn of the loop; returns what was measured."""
        clock = StepClock(self.backends)
        units = await self.source.take(self.schedule.units_per_step)
        clock.taken()
        beside = await self._rows_beside(len(units))
        # Sampling ahead goes on in this thread while another trains.
        learn = partial(self._learn, units, beside)
        batch, metrics = await asyncio.to_thread(learn) if self._overlaps else learn()
        clock.trained()
        self.progress.step += 1
        self.progress.num_tokens += batch.num_tokens
        await self.source.publish(self.progress.optimizer_steps)
        speed = clock.metrics(batch.num_tokens)
        metrics = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        self._alarm(metrics)
        return {
            **metrics,
            "num_tokens": self.progress.num_tokens,
            "epoch": self.progress.step / self.schedule.steps_per_epoch,
            **getattr(self.source, "stats", {}),
            **speed,
        }

    @property
    def _overlaps(self) -> bool:
        """Whether the next steps are sampled while this one is trained."""
        return self.method.source == "prompts" and self.config.rollout.mode != "sync"

    def _learn(self, units: Sequence[Unit], rows: Sequence[Batch]) -> tuple[Batch, dict[str, float]]:
        batch = self.prepare(collate(units, share_prefixes=shares_prefixes(self.policy)))
        return batch, self._update(batch, rows)

    def prepare(self, batch: Batch) -> Batch:
        """Annotations and credit, as the method says."""
        return annotated(batch, self.method, self.backends, self.progress.running)

    async def _rows_beside(self, num_units: int) -> list[Batch]:
        """The rows of the mixture, one batch for each optimizer step of this one."""
        if self.mix is None or self._critic_alone:
            return []
        steps = min(self.schedule.optimizer_steps, num_units) * self.schedule.ppo_epochs
        return await self.mix.take(steps, share_prefixes=shares_prefixes(self.policy))

    @property
    def _critic_alone(self) -> bool:
        """Whether the critic is still warming up, and the policy is left as it is."""
        return "critic" in self.method.trains and self.progress.step < self.config.critic.warmup_steps

    def _update(self, batch: Batch, rows: Sequence[Batch] = ()) -> dict[str, float]:
        """The optimizer steps of one turn: every trained model on every minibatch, as often as the schedule says."""
        parts = []
        minibatches = batch.split(min(self.schedule.optimizer_steps, batch.num_units))
        beside = iter(rows)
        for minibatch in minibatches * self.schedule.ppo_epochs:
            minibatch = weighed(minibatch, self.method, self.config)
            metrics = {} if self._critic_alone else self._update_policy(minibatch, next(beside, None))
            for role in self.method.trains[1:]:
                metrics |= self._update_role(role, minibatch)
            parts.append(metrics)
            self.progress.optimizer_steps += 1
            self._follow(minibatch, metrics)
        return {**_combined(parts), "masked_sequences": int((batch.num_trained == 0).sum())}

    def _update_policy(self, minibatch: Batch, rows: Batch | None) -> dict[str, float]:
        metrics = self.policy.forward_backward(minibatch, self.method.terms_of("policy"))
        self._check_first(metrics)
        if self.method.source == "prompts":  # the loss without penalties and rows
            metrics["pg_loss"] = metrics.get(f"{self.method.terms[0].name}_loss", metrics["loss"])
        if rows is not None:
            assert self.mix is not None, "rows come from a mixture"
            with self.policy.at_temperature(1.0):  # the sampling temperature is no matter of rows
                learned = self.policy.forward_backward(rows, [self.mix.term])
            metrics["loss"] += learned["loss"]
            learned["loss"] /= self.mix.term.coef  # the cross-entropy itself, as sft reports it
            metrics |= {f"sft_{name}": value for name, value in learned.items()}
        lr = self._learning_rate(self.config.optim)
        return {**metrics, **self.policy.optim_step(lr), "learning_rate": lr}

    def _update_role(self, role: str, minibatch: Batch) -> dict[str, float]:
        """One optimizer step of a model beside the policy; metrics begin with its role."""
        backend, lr = self.backends[role], self._learning_rate(self.config.critic.optim(self.config.optim))
        metrics = backend.forward_backward(minibatch, self.method.terms_of(role))
        metrics |= {**backend.optim_step(lr), "learning_rate": lr}
        return {f"{role}_{name}": value for name, value in metrics.items()}

    def _check_first(self, metrics: Mapping[str, float]) -> None:
        """Warn where the policy seems to have moved before the first update of this process."""
        if self._is_checked:
            return
        self._is_checked = True
        if self.config.engine.use == "local" and self.policy.describe().get("precision") == "float32":
            is_new = self.progress.optimizer_steps == 0 and self.config.reference.path is None
            for text in moved_before_the_first_update(metrics, is_new=is_new):
                logger.warning("%s", text)

    def _follow(self, batch: Batch, metrics: Mapping[str, float]) -> None:
        """What comes after an optimizer step: running means, and a reference that follows the policy."""
        for stage in self.method.annotate:
            if isinstance(stage, RewardMean):
                stage.observe(batch, metrics, self.progress.running)
        every = self.config.reference.sync_steps
        if every is not None and self.progress.optimizer_steps % every == 0:
            self.backends["reference"].move_towards(self.policy, self.config.reference.sync_alpha)

    def _learning_rate(self, optim: OptimConfig) -> float:
        return learning_rate(optim, self.progress.optimizer_steps, self.schedule.total_updates)

    def _alarm(self, metrics: Mapping[str, float]) -> None:
        difference = metrics.get("train/train_rollout_logprob_abs_diff", 0.0)
        is_old = getattr(self.source, "stats", {}).get("rollout/offpolicy_share", 0.0) > 0  # then they do differ
        if difference > LOGPROB_ALARM and not is_old:
            logger.warning(
                "step %d: the sampler's and the trainer's logprobs differ by %.3g on average; the samples are "
                "off-policy. Is the engine's precision, temperature or weight version another than the trainer's?",
                self.progress.step,
                difference,
            )

    async def _evaluate(self) -> bool:
        """Evaluate, log, and keep count of the best. Returns whether this was an improvement."""
        if self.evaluate is None:
            return False
        metrics = await self.evaluate(self.progress.running)
        self.log.log(self.progress.step, metrics)
        self.progress.last_eval = metrics
        return self._judge(metrics)

    def _judge(self, metrics: Mapping[str, float]) -> bool:
        settings, progress = self.config.eval, self.progress
        name, value = self._metric(metrics)
        sign = -1 if (settings.mode or metric_mode(name, settings.sets)) == "min" else 1
        improved = progress.best is None or sign * (value - progress.best) > settings.min_delta
        if improved and math.isfinite(value):
            progress.best, progress.best_step, progress.evaluations_without_improvement = value, progress.step, 0
            return True
        progress.evaluations_without_improvement += 1
        if settings.patience and progress.evaluations_without_improvement >= settings.patience:
            progress.stopped_early = True
            best = "any number" if progress.best is None else f"{progress.best:.6g} (step {progress.best_step})"
            self.log.message(
                f"stopped early after step {progress.step}: {name} has not improved on {best} in "
                f"{settings.patience} evaluations"
            )
        return False

    def _metric(self, metrics: Mapping[str, float]) -> tuple[str, float]:
        """Name and value of what makes a checkpoint the best one. Raises ConfigError where it is not measured."""
        name = self.config.eval.metric or default_metric(self.config, samples=self.method.source == "prompts")
        if name not in metrics:
            raise ConfigError(f"eval.metric is {name!r}, but the evaluation measures {', '.join(sorted(metrics))}")
        return name, metrics[name]


def annotated(batch: Batch, method: Method, models: Mapping[str, Backend], running: Running) -> Batch:
    """The global batch with the columns of the method's annotations and credit rules."""
    for stage in method.annotate:
        batch = stage(batch, models, running)
    for stage in method.credit:
        batch = stage.rule(batch, **stage.options)
    return batch


def weighed(batch: Batch, method: Method, config: RunConfig) -> Batch:
    """The global batch of one optimizer step with the weights that the terms and their metrics need."""
    longest = config.rollout.max_tokens if method.source == "prompts" else config.data.max_length
    return batch.weighed(weight_keys(method.terms), max_length=longest)


def _combined(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: means, or what their names say. One that did not apply in a step
    does not count there."""
    columns: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            columns.setdefault(name, []).append(value)
    reduce = {"max": max, "min": min, "mean": statistics.fmean}
    return {name: reduce[reduction(name)](values) for name, values in columns.items()}
