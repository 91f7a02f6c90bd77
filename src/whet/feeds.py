"""What feeds a run: rows to learn from, or prompts to sample from; and how it is evaluated.

A feed reads and checks all its data when it is made, before a model is there. `connect` comes after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from whet.backends.protocol import Backend
from whet.config.run import RunConfig
from whet.data.prepare import prepare
from whet.data.prompts import prepare_prompts
from whet.data.source import PromptRows, RowSource
from whet.engines.protocol import Engine
from whet.envs.registry import build_env
from whet.errors import ConfigError
from whet.evaluate import evaluate_rows
from whet.loop import Evaluator
from whet.methods import Method
from whet.rewards.registry import build_scorer
from whet.rollout.evaluation import evaluate_prompts, evaluation_sampling
from whet.rollout.protocols import Source
from whet.rollout.sampling import RolloutSource
from whet.types import Episode

logger = logging.getLogger(__name__)

EVAL_SEED = 1_000_003
"""Added to the run's seed, so that evaluation does not sample what training samples."""


@dataclass(frozen=True)
class Connected:
    """A feed that a loop can take from. `evaluate` is None where nothing was held out."""

    source: Source
    evaluate: Evaluator | None


class RowFeed:
    """Rows of a data set, for the offline methods."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer = config, tokenizer
        self.train, self.eval = _read(config, tokenizer, prepare)

    def __len__(self) -> int:
        return len(self.train)

    def connect(self, method: Method, policy: Backend, engine: Engine | None, stops: Sequence[int]) -> Connected:
        """The source over the rows, and the losses on the held-out ones."""
        config = self.config
        _check_stop(self.train, stops, self.tokenizer)
        source = RowSource(self.train, seed=config.seed, shuffle=config.data.shuffle)

        async def evaluate() -> dict[str, float]:
            assert self.eval is not None
            return evaluate_rows(policy, self.eval, method, config, per_batch=config.eval.batch_size or 64)

        return Connected(source, evaluate if self.eval is not None else None)


class PromptFeed:
    """Prompts, what is made of them, and how it is judged, for the on-line methods."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer = config, tokenizer
        self.scorer = build_scorer(config.reward)
        self.env = build_env(config.env)
        self.train, self.eval = _read(config, tokenizer, prepare_prompts)
        self.transcripts: tuple[Episode, ...] = ()
        """A few episodes of the last evaluation."""

    def __len__(self) -> int:
        return len(self.train)

    def connect(self, method: Method, policy: Backend, engine: Engine | None, stops: Sequence[int]) -> Connected:
        """The source that samples from the engine, and the evaluation on held-out prompts."""
        assert engine is not None, "prompts need an engine"
        config = self.config
        source = RolloutSource(
            PromptRows(self.train, seed=config.seed, shuffle=config.data.shuffle),
            engine,
            self.env,
            self.scorer,
            config.rollout,
            tokenizer=self.tokenizer,
            seed=config.seed,
            stop_token_ids=stops,
            timeout_s=config.engine.timeout_s,
        )

        async def evaluate() -> dict[str, float]:
            return await self.evaluate(engine, stops)

        return Connected(source, evaluate if self.eval is not None else None)

    async def evaluate(self, engine: Engine, stops: Sequence[int]) -> dict[str, float]:
        """Sample the held-out prompts and score them; metrics are named `eval/…`."""
        config = self.config
        assert self.eval is not None
        result = await evaluate_prompts(
            [self.eval[i] for i in range(min(len(self.eval), config.eval.max_prompts or len(self.eval)))],
            engine,
            self.env,
            self.scorer,
            evaluation_sampling(config.rollout, config.eval, stops),
            num_samples=config.eval.num_samples,
            seed=config.seed + EVAL_SEED,
            tokenizer=self.tokenizer,
            timeout_s=config.engine.timeout_s,
        )
        self.transcripts = result.transcripts
        return {f"eval/{name}": value for name, value in result.metrics.items()}


def _read(config: RunConfig, tokenizer: PreTrainedTokenizerBase, read: Callable):
    """(training, held-out or None), each reported."""
    data = config.data
    if data.train is None:
        raise ConfigError("data.train is not set; name a file of training data")
    train = read(data, data.train, tokenizer, what="train")
    held = None
    if data.eval is not None:
        held = read(data, data.eval, tokenizer, what="eval")
    elif data.eval_share:
        train, held = train.hold_out(data.eval_share, config.seed)
    logger.info("training data: %s", train.report)
    if held is not None:
        logger.info("held-out data: %s", held.report)
    elif config.eval.every_steps or config.eval.every_epochs:
        raise ConfigError("eval.every_steps or eval.every_epochs is set, but there is no held-out data; set data.eval or data.eval_share")
    return train, held


def _check_stop(rows, stop_token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """A model whose stop token is never trained goes on for ever; say so before it is trained."""
    if stop_token_ids and rows.share_training_one_of(stop_token_ids) == 0:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(int(i))) for i in stop_token_ids)
        logger.warning(
            "no row trains a stop token (%s): the model will not learn to end its answers. Does the chat template "
            "end the assistant's turn with another token?",
            names,
        )
