"""What feeds a run: rows to learn from, or prompts to sample from; and how it is evaluated.

A feed reads and checks all its data when it is made, before a model is there. `connect` comes after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.annotate import Running
from whet.config.algorithm_rules import credits_of
from whet.config.run import RunConfig
from whet.data import cache
from whet.data.prepare import prepare
from whet.data.prepared import Prepared
from whet.data.prompts import prepare_prompts
from whet.data.source import PromptRows, RowSource
from whet.engines.protocol import Engine
from whet.envs.registry import build_env, check_prompts
from whet.errors import ConfigError, Gathering
from whet.evaluate import ROWS_PER_BATCH, evaluate_rows
from whet.held_out import HeldOut, evaluate_sets, read_sets
from whet.loop import Evaluator
from whet.methods import Task
from whet.mix import Mix
from whet.precompute import computed_once
from whet.provenance import trained_with
from whet.rewards.registry import build_scorer
from whet.rewards.score import RewardScorer
from whet.rewards.unjudged import Unjudged
from whet.roles import Policy
from whet.rollout.filters import build_choices
from whet.rollout.generate import build_generate
from whet.rollout.journal import FILE
from whet.rollout.protocols import EnvFactory, Source
from whet.rollout.replay import Replay
from whet.rollout.resampled import ResampledRows
from whet.rollout.sampling import RolloutSource, sampling_of
from whet.rollout.supply import resolve_source
from whet.types import Episode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connected:
    """A feed that a loop can take from. `evaluate` is None where nothing was held out; `engine` where nothing is
    sampled."""

    source: Source
    evaluate: Evaluator | None
    engine: Engine | None = None
    mix: Mix | None = None


class RowFeed:
    """Rows of a data set, for the offline methods; `task` says what they are."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        task: Task = "sft",
        errors: Gathering | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        with Gathering.of(errors) as errors:
            self.train, self.eval = _read(config, tokenizer, partial(prepare, task=task), errors)

    def __len__(self) -> int:
        return len(self.train) if self.train is not None else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model will see."""
        return max((part.longest_sample for part in (self.train, self.eval) if part is not None), default=0)

    @property
    def remedy(self) -> str:
        """What makes the longest sequence shorter."""
        return f"lower data.max_length (now {self.config.data.max_length:,})"

    def walk(self) -> RowSource:
        """The rows in the order of training, from the beginning."""
        assert self.train is not None, "there are no rows to walk over"
        return RowSource(self.train, seed=self.config.seed, shuffle=self.config.data.shuffle)

    def connect(self, policy: Policy) -> Connected:
        """The source over the rows, and the losses on the held-out ones.

        What frozen models say of the rows is computed now where it is to be computed once.
        """
        self._compute_once(policy)
        source: Source = self.walk()
        engine = None
        if policy.resamples:
            source, engine = self._resampled(source, policy)
        return Connected(source, partial(self.evaluate, policy) if self.eval is not None else None, engine)

    def _compute_once(self, policy: Policy) -> None:
        data = self.config.data
        root = cache.root_of(data.cache_dir)
        for stage, role in policy.computed_once:
            model = policy.backends[role]
            known = {"role": role, "key": policy.content(role), "root": root, "max_gb": data.cache_gb}
            read = partial(computed_once, stage=stage, model=model, **known)
            self.train, self.eval = (None if part is None else read(part) for part in (self.train, self.eval))
            policy.release(role)

    def _resampled(self, source: Source, policy: Policy) -> tuple[Source, Engine | None]:
        config, lmbda = self.config, policy.lmbda
        student = policy.engine() if lmbda > 0 else None
        teacher = policy.engine("teacher") if config.distill.seq_kd and lmbda < 1 else None
        sampling = sampling_of(config.rollout, policy.stop_token_ids)
        limits = {"seed": config.seed, "timeout_s": config.engine.timeout_s}
        return ResampledRows(source, sampling, student=student, teacher=teacher, lmbda=lmbda, **limits), student

    async def evaluate(self, policy: Policy, running: Running | None = None) -> dict[str, float]:
        """The losses on the held-out rows; metrics are named `eval/…`."""
        per_batch = self.config.eval.batch_size or ROWS_PER_BATCH
        return evaluate_rows(
            policy.backends, self.eval, policy.method, self.config, per_batch=per_batch, running=running
        )


class PromptFeed:
    """Prompts, what is made of them, and how it is judged, for the on-line methods."""

    scorer: RewardScorer | Unjudged
    env: EnvFactory

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, errors: Gathering | None = None):
        self.config, self.tokenizer = config, tokenizer
        with Gathering.of(errors) as errors:
            self.env, tools = build_env(None), None
            with errors.going_on():
                self.env = build_player(config, tokenizer)
                tools = getattr(self.env, "tools", None)
            self.replay = None
            if config.debug.train_only is not None:
                with errors.going_on():
                    self.replay = Replay(Path(config.debug.train_only).expanduser())
                config = self.config = without_training_data(config)
            self.train, self.eval = _read(config, tokenizer, partial(prepare_prompts, tools=tools), errors)
            self.mixed = _read_mix(config, tokenizer, errors)
            with errors.going_on():
                self.choices = build_choices(config.rollout, config)
            with errors.going_on():
                self._source = resolve_source(config.rollout.source)
            scorer = None
            # What is replayed has its rewards.
            if config.reward is not None or config.debug.train_only is None:
                with errors.going_on():
                    # Only where a teacher gives all the credit there may be no reward: the rules see to it.
                    opd_alone = config.reward is None and credits_of(config) == ("opd",)
                    scorer = self.scorer = Unjudged() if opd_alone else build_scorer(config.reward, run=config)
                    for part in (self.train, self.eval):
                        if part is not None:
                            self.scorer.check(part)
            self.held_out = read_sets(config, tokenizer, scorer, errors, tools)
            if self.eval is not None and scorer is not None:
                self.held_out.insert(0, HeldOut(None, self.eval, config.eval, scorer))
            for part in (self.train, self.eval, *(held.prompts for held in self.held_out if held.name is not None)):
                if part is not None:
                    with errors.going_on():
                        check_prompts(self.env, part)
        self.transcripts: tuple[Episode, ...] = ()
        """A few episodes of the last evaluation."""

    def __len__(self) -> int:
        if self.replay is not None:
            return self.replay.num_prompts
        return len(self.train) if self.train is not None else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model may see: a prompt, what is sampled, and what the environment
        says at the most; or a row of the mixture."""
        sampled, injected = self.config.rollout.max_tokens, getattr(self.env, "max_injected", 0)
        trained = 0 if self.train is None else self.train.longest_prompt + sampled + injected
        if self.replay is not None:
            trained = self.replay.longest
        evaluated = (one.prompts.longest_prompt + (one.settings.max_tokens or sampled) for one in self.held_out)
        rows = self.mixed.longest_sample if self.mixed is not None else 0
        return max(trained, rows, *(length + injected for length in evaluated))

    @property
    def remedy(self) -> str:
        """What makes the longest sequence shorter."""
        said = ", env.max_output_tokens" if hasattr(self.env, "max_injected") else ""
        return f"lower data.max_prompt_length, rollout.max_tokens{said} or eval.max_tokens"

    def walk(self) -> PromptRows | Replay:
        """The prompts in the order of training, from the beginning, or what was sampled from them before."""
        if self.replay is not None:
            return self.replay
        return self._prompt_rows()

    def _prompt_rows(self) -> PromptRows:
        assert self.train is not None, "there are no prompts to walk over"
        return PromptRows(self.train, seed=self.config.seed, shuffle=self.config.data.shuffle)

    def connect(self, policy: Policy) -> Connected:
        """The source that samples from the engine, and the evaluation on held-out prompts."""
        if self.replay is not None:
            return self._replayed(policy)
        self.scorer.load(policy.config.backend)
        config = self.config
        # While one step trains, another is sampled: from weights of its own, which stand still.
        ahead = config.rollout.mode != "sync"
        engine = policy.engine(own_weights=ahead)
        assert self.train is not None, "there are no prompts to sample from"
        source = RolloutSource(
            self._source(self._prompt_rows()),
            engine,
            self.env,
            self.scorer,
            config.rollout,
            tokenizer=self.tokenizer,
            seed=config.seed,
            stop_token_ids=policy.stop_token_ids,
            timeout_s=config.engine.timeout_s,
            journal=Path(config.output_dir).absolute() / FILE,
            made_with=trained_with(config, self.train.prompts),
            baseline=any("baseline_rewards" in stage.rule.reads for stage in policy.method.credit),
            choices=self.choices,
        )
        run = partial(self.evaluate, policy, engine=policy.engine() if ahead else engine)
        return Connected(source, run if self.held_out else None, engine, self._mix())

    def _replayed(self, policy: Policy) -> Connected:
        """The rollouts of an earlier run; an engine only where something is evaluated."""
        assert self.replay is not None, "there is nothing to replay"
        if not self.held_out:
            return Connected(self.replay, None, mix=self._mix())
        engine = self.replay.engine = policy.engine()
        return Connected(self.replay, partial(self.evaluate, policy, engine=engine), engine, self._mix())

    def _mix(self) -> Mix | None:
        if self.mixed is None:
            return None
        return Mix(RowSource(self.mixed, seed=self.config.seed, shuffle=self.config.data.shuffle), self.config.mix)

    async def evaluate(
        self, policy: Policy, running: Running | None = None, *, engine: Engine | None = None
    ) -> dict[str, float]:
        """Sample the prompts of all held-out sets and score them; metrics are named `eval/…`."""
        for held in self.held_out:
            held.scorer.load(policy.config.backend)
        metrics, self.transcripts = await evaluate_sets(
            self.held_out,
            engine or policy.engine(),
            self.env,
            self.config,
            self.tokenizer,
            policy.stop_token_ids,
        )
        return metrics


def without_training_data(config: RunConfig) -> RunConfig:
    """The configuration of those who do not read what is trained on."""
    return config.model_copy(update={"data": config.data.model_copy(update={"train": None})})


def _read_mix(config: RunConfig, tokenizer: PreTrainedTokenizerBase, errors: Gathering) -> Prepared | None:
    """The rows of the mixture, rendered as those of sft would be; None where there are none."""
    if config.mix.data is None:
        return None
    data = config.data.model_copy(update={"max_length": config.mix.max_length})
    found = None
    with errors.going_on():
        found = prepare(data, config.mix.data, tokenizer, what="mix", errors=errors, task="sft")
        logger.info("mixed data: %s", found.report)
    return found


def build_player(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> EnvFactory:
    """What plays the episodes: the environment, or the function of `rollout.generate`. Raises ConfigError."""
    if config.rollout.generate is None:
        return build_env(config.env, tokenizer, config.data.template_kwargs)
    return build_generate(config.rollout.generate, config)


def _read(config: RunConfig, tokenizer: PreTrainedTokenizerBase, read: Callable, errors: Gathering):
    """(training data, held-out data), None for what is not there or cannot be read, each reported."""
    data, settings = config.data, config.eval
    found: dict[str, Any] = {"train": None, "eval": None}
    for what, paths in (("train", data.train), ("eval", data.eval)):
        if paths is not None:
            with errors.going_on():
                found[what] = read(data, paths, tokenizer, what=what, errors=errors)
    train, held = found["train"], found["eval"]
    if train is not None and data.eval_share:
        with errors.going_on():
            train, held = train.hold_out(data.eval_share, config.seed)
    for name, part in (("training", train), ("held-out", held)):
        if part is not None:
            logger.info("%s data: %s", name, part.report)
    is_asked = settings.every_steps or settings.every_epochs or settings.at_start
    if is_asked and data.eval is None and not data.eval_share and not settings.sets:
        text = "an evaluation is asked for, but there is no held-out data; set data.eval or data.eval_share"
        with errors.going_on():
            raise ConfigError(text)
    return train, held
