"""The feed of the offline methods: rows of a data set, and the losses on those held out.

All data is read and checked when the feed is made, before a model is there. `connect` comes after.
"""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from whet.annotate import Running
from whet.config.run import RunConfig
from whet.data import cache
from whet.data.prepare import prepare
from whet.data.source import RowSource
from whet.engines.protocol import Engine
from whet.errors import Gathering
from whet.evaluate import ROWS_PER_BATCH, evaluate_rows
from whet.feeds.connected import Connected
from whet.feeds.parts import read_parts
from whet.methods import Task
from whet.precompute import computed_once
from whet.roles import Policy
from whet.rollout.protocols import Source
from whet.rollout.resampled import ResampledRows
from whet.rollout.sampling import sampling_of


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
            self.train, self.eval = read_parts(config, tokenizer, partial(prepare, task=task), errors)

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
