"""Held-out prompts of a run, in one set or several: read and checked beforehand, sampled all at once, scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.config.data import DataConfig
from whet.config.evaluation import EvalConfig, EvalSetConfig
from whet.config.run import RunConfig
from whet.data.prompts import Prompts, prepare_prompts
from whet.engines.protocol import Engine
from whet.errors import Gathering, naming
from whet.rewards.registry import build_scorer
from whet.rewards.score import RewardScorer
from whet.rollout.evaluation import PromptEvaluation, evaluate_prompts, evaluation_sampling
from whet.rollout.group import gather_or_cancel
from whet.rollout.protocols import EnvFactory
from whet.types import Episode, Prompt

logger = logging.getLogger(__name__)

EVAL_SEED = 1_000_003
"""Added to the run's seed, so that evaluation does not sample what training samples."""


@dataclass(frozen=True)
class HeldOut:
    """One set of held-out prompts: how often and how each is answered, and what judges the answers."""

    name: str | None
    """None for `data.eval`."""
    prompts: Prompts
    settings: EvalConfig | EvalSetConfig
    scorer: RewardScorer

    @property
    def chosen(self) -> list[Prompt]:
        """The prompts that are evaluated on."""
        return list(self.prompts.prompts[: self.settings.max_prompts])

    @property
    def label(self) -> str:
        return "held-out" if self.name is None else f"held-out {self.name}"


def read_sets(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    scorer: RewardScorer | None,
    errors: Gathering,
    tools: list[dict[str, Any]] | None = None,
) -> list[HeldOut]:
    """The sets of `eval.sets`. What is wrong with one goes to `errors`, under its name, and it is left out.

    `scorer` is that of the run, for sets without a reward of their own; None if it could not be made. `tools` are
    shown by prompts without any of their own.
    """
    found = []
    for name in config.eval.sets:
        settings = config.eval.of_set(name)
        # Data and reward are looked at both, whatever is wrong with the other.
        with errors.going_on(), naming(f"eval.sets.{name}"), Gathering.of(None) as own:
            prompts, judge = None, scorer
            with own.going_on():
                data = data_of_set(config.data, settings)
                prompts = prepare_prompts(data, settings.path, tokenizer, what=name, tools=tools, errors=own)
                logger.info("held-out data %s: %s", name, prompts.report)
            with own.going_on():
                if settings.reward is not None:
                    judge = build_scorer(settings.reward, run=config)
                if prompts is not None and judge is not None:
                    judge.check(prompts)
            if prompts is not None and judge is not None:
                found.append(HeldOut(name, prompts, settings, judge))
    return found


def data_of_set(data: DataConfig, settings: EvalSetConfig) -> DataConfig:
    """How the rows of a set are read: as those of training, but for what the set says itself."""
    names = ("columns", "chat", "system", "prompt_template", "max_prompt_length")
    own = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return data.model_copy(update=own)


async def evaluate_sets(
    sets: Sequence[HeldOut],
    engine: Engine,
    env: EnvFactory,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
) -> tuple[dict[str, float], tuple[Episode, ...]]:
    """Sample all sets at once, so that the engine is never idle for the last answers of one, and score them.

    Returns metrics, `eval/reward` for the unnamed set and `eval/<set>/reward` for the others, and a few episodes
    of each. Errors are those of `evaluate_prompts`, with the name of the set.
    """

    async def one(held: HeldOut) -> PromptEvaluation:
        with naming("evaluation" if held.name is None else f"evaluation on {held.name}"):
            return await evaluate_prompts(
                held.chosen,
                engine,
                env,
                held.scorer,
                evaluation_sampling(config.rollout, held.settings, stop_token_ids),
                num_samples=held.settings.num_samples or config.eval.num_samples,
                seed=config.seed + EVAL_SEED,
                tokenizer=tokenizer,
                name=held.name,
                timeout_s=config.engine.timeout_s,
            )

    results = await gather_or_cancel(one(held) for held in sets)
    metrics = {
        f"eval/{'' if held.name is None else f'{held.name}/'}{name}": value
        for held, result in zip(sets, results, strict=True)
        for name, value in result.metrics.items()
    }
    return metrics, tuple(episode for result in results for episode in result.transcripts)
