"""What a step of a run is made of, where its data need not be there: how many units, how long."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whet.check.examine import Examined, sizes_of
from whet.check.rehearsal import Micro
from whet.check.work import SHORT, Work
from whet.config.rules import REINFORCES
from whet.config.run import RunConfig
from whet.data.prepared import Prepared
from whet.methods import Method
from whet.roles import resamples

PAIRED = ("preference", "reward")
"""Tasks whose losses compare the rows of a unit."""
PROMPT_SHARE = 0.25
"""Of a row whose lengths are not known, what is its prompt."""
MEAN_SHARE = 0.5
"""Mean length over longest length, where only the longest is known."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and of completions: in the mean, and at most."""

    prompt: int
    response: int
    longest_prompt: int
    longest_response: int


@dataclass(frozen=True)
class Load:
    """A step: `units` of `rows` sequences each, which share their prompt if `shares`. `samples`: they are sampled."""

    lengths: Lengths
    units: int
    rows: int
    updates: int
    epochs: int
    shares: bool
    samples: bool
    paired: bool = False
    """Rows of a unit are compared by the loss, and stay together."""

    @property
    def longest_row(self) -> int:
        """Tokens of one sequence that is as long as it may be."""
        return self.lengths.longest_prompt + self.lengths.longest_response

    @property
    def tokens(self) -> float:
        """Tokens that the model runs on in a step, in the mean."""
        return self.units * self._tokens(self.lengths.prompt, self.lengths.response)

    @property
    def pairs(self) -> float:
        """Pairs of a token and one it sees, in the mean of a step (see flops.pairs)."""
        prompt, response = self.lengths.prompt, self.lengths.response
        own = prompt * (prompt + 1) / 2 * (1 if self.shares else self.rows)
        return self.units * (own + self.rows * (response * prompt + response * (response + 1) / 2))

    @property
    def sequences(self) -> int:
        return self.units * self.rows

    @property
    def looks(self) -> float:
        """Tokens at which the head is read in a step."""
        return float(self.sequences * self.lengths.response)

    @property
    def longest_unit(self) -> int:
        """Tokens of a unit all of whose sequences are as long as they may be."""
        return self._tokens(self.lengths.longest_prompt, self.lengths.longest_response)

    def micro(self, config: RunConfig, *, data: int = 1, context: int = 1) -> Micro:
        """The largest micro-batch, of one of `data` shares of a step, before `context` devices share its tokens.

        A unit that is longer is cut between its rows, but for pairs (see `Batch.refined`); a row never is.
        """
        backend, part = config.backend, max(1.0, self.units / self.updates / data) * self.longest_unit
        room = backend.max_tokens_per_device * context
        longest = self.longest_unit if self.paired else min(self.longest_unit, max(room, self.longest_row))
        if backend.micro_batch_size is not None:
            room = min(room, backend.micro_batch_size * longest)
        tokens = int(max(self.longest_row if not self.paired else longest, min(room, part)))
        share = self.rows * self.lengths.longest_response / max(1, self.longest_unit)
        return Micro(tokens, max(1, int(tokens * min(1.0, share))), part > tokens, self.longest_unit < SHORT)

    def work(self, config: RunConfig, *, samples: bool) -> Work:
        """The same for the estimate of a run on one device, which may sample as well."""
        decoded = min(config.engine.max_concurrent, self.sequences) if samples else 0
        longest = self.longest_row if samples else 0
        return Work(int(self.units * self.longest_unit / self.updates), self.micro(config), decoded, longest)

    def _tokens(self, prompt: int, response: int) -> int:
        return prompt * (1 if self.shares else self.rows) + self.rows * response


def load_of(config: RunConfig, method: Method, lengths: Lengths | None = None) -> Load:
    """The load of a run, by what its configuration says of lengths where they are not given."""
    sampled = method.source == "prompts"
    again = not sampled and resamples(config, method)
    rows = config.rollout.group_size if config.method in REINFORCES else 2 if method.task in PAIRED else 1
    return Load(
        lengths=lengths or assumed(config, method),
        units=config.rollout.prompts_per_step if sampled else config.train.batch_size * config.train.accumulation,
        rows=rows,
        updates=config.rollout.optimizer_steps if sampled else 1,
        epochs=config.rollout.num_ppo_epochs if sampled else 1,
        shares=config.model.attention in ("auto", "tree"),
        samples=sampled or again,
        paired=method.task in PAIRED,
    )


def assumed(config: RunConfig, method: Method) -> Lengths:
    """Lengths where nothing is known but limits: the mean is half of the longest."""
    if method.source == "prompts":
        prompt, response = config.data.max_prompt_length or 512, config.rollout.max_tokens
    else:
        prompt = int(config.data.max_length * PROMPT_SHARE)
        response = config.data.max_length - prompt
    return Lengths(max(1, int(prompt * MEAN_SHARE)), max(1, int(response * MEAN_SHARE)), prompt, response)


def measured(found: Examined) -> Lengths | None:
    """Lengths of the data of a run that has been examined; of what is still to be sampled, the limits tell."""
    part, method = getattr(found.feed, "train", None), found.method
    if part is None or method is None:
        return None
    known = assumed(found.config, method)
    if not isinstance(part, Prepared):
        prompts = [len(prompt.tokens) for prompt in part.prompts]
        return replace(known, prompt=max(1, sum(prompts) // len(prompts)), longest_prompt=max(prompts))
    units = sizes_of(part, found.config)
    rows = 2 if method.task in ("preference", "reward") else 1
    responses, prompts = units.trained / rows, units.tokens - units.trained
    mean = int(max(1, prompts.mean())), int(max(1, responses.mean()))
    return Lengths(*mean, int(max(1, prompts.max())), int(max(1, responses.max())))
