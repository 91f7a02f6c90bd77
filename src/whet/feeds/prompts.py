"""The feed of reinforcement learning: prompts, what plays and judges them, and the evaluation on held-out ones.

All data is read and checked when the feed is made, before a model is there. `connect` comes after.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from whet.annotate import Running
from whet.config.algorithm_rules import credits_of
from whet.config.run import RunConfig
from whet.data.encode import digest_vocabulary
from whet.data.prepare import prepare
from whet.data.prepared import Prepared
from whet.data.prompts import prepare_prompts
from whet.data.source import PromptRows, RowSource
from whet.engines.protocol import Engine, release
from whet.envs.registry import build_env, check_prompts
from whet.errors import Gathering
from whet.feeds.connected import Connected
from whet.feeds.held_out import HeldOut, evaluate_sets, read_sets
from whet.feeds.parts import read_parts, without_training_data
from whet.mix import Mix
from whet.provenance import trained_with
from whet.rewards.registry import build_scorer
from whet.rewards.score import RewardScorer
from whet.rewards.unjudged import Unjudged
from whet.roles import Policy
from whet.rollout.filters import build_choices
from whet.rollout.generate import build_generate
from whet.rollout.journal import FILE
from whet.rollout.protocols import EnvFactory
from whet.rollout.replay import Replay
from whet.rollout.sampling import RolloutSource
from whet.rollout.supply import resolve_source
from whet.types import Episode

logger = logging.getLogger(__name__)


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
                    self.replay.require_vocabulary(digest_vocabulary(tokenizer))
                    if "remax" in credits_of(config):
                        self.replay.require("baseline_rewards", "credit 'remax'")
                config = self.config = without_training_data(config)
            self.train, self.eval = read_parts(config, tokenizer, partial(prepare_prompts, tools=tools), errors)
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
        # Sampled ahead with a copy, evaluated with the policy; over ranks that is a copy too, which nobody else renews.
        renews = ahead and policy.crew is not None and config.engine.use == "local"
        run = partial(self.evaluate, policy, engine=policy.engine() if ahead else engine, renews=renews)
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
        self, policy: Policy, running: Running | None = None, *, engine: Engine | None = None, renews: bool = False
    ) -> dict[str, float]:
        """Sample the prompts of all held-out sets and score them; metrics are named `eval/…`. With `renews`, the engine
        takes over the policy's weights first."""
        for held in self.held_out:
            held.scorer.load(policy.config.backend)
        engine = engine or policy.engine()
        if renews:
            await engine.update_weights(0)
        metrics, self.transcripts = await evaluate_sets(
            self.held_out,
            engine,
            self.env,
            self.config,
            self.tokenizer,
            policy.stop_token_ids,
        )
        release(engine)  # the weights may change before the next evaluation
        return metrics


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
