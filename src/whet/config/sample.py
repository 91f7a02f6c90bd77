"""Settings of rejection sampling: which completions become rows, and what is done with them."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class SampleConfig(Config):
    """Which of the sampled completions become rows of training data. What is sampled is set under `rollout`.

    None of these changes what is sampled: another choice is made anew from the journal.
    """

    select: Literal["best", "pairs", "labels", "all"] = "best"
    """`best`: the best completions of each prompt, to imitate. `pairs`: the best against the worst, to prefer.
    `labels`: every completion with whether its score reaches `threshold`. `all`: every completion, to imitate."""
    keep: int = Field(default=1, ge=1)
    """Most rows of one prompt, for `best` (the best, the second best, ...) and `pairs` (the best against the
    worst, the second best against the second worst, ...)."""
    min_score: float | None = None
    """Least score of a completion to imitate or to prefer, for `best`, `pairs` and `all`."""
    min_gap: float = Field(default=0.0, ge=0)
    """Least difference of the scores of a pair; completions with the same score never make one."""
    threshold: float = 1.0
    """Score from which on a completion passes: the label of `labels`, and the pass rate of the report."""
    keep_truncated: bool = False
    """Let completions that were cut off at `rollout.max_tokens` become rows, as if they had ended there."""
    output: str | None = None
    """File of the rows, JSON Lines; `rows.jsonl` in `output_dir` when not given."""
    then: str | None = None
    """Configuration of a training run that goes on with the rows, as its `data.train`."""
