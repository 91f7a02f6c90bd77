"""Settings of the loop: how long, how many rows per step, when to evaluate, save and log."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class TrainConfig(Config):
    """How long to train, and on how much per step."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data. Ignored when `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the loop; takes precedence over `epochs`."""
    batch_size: int = Field(default=8, ge=1)
    """Units (rows, pairs; for reinforcement learning see `rollout`) per accumulation."""
    accumulation: int = Field(default=1, ge=1)
    """A step takes `batch_size` x `accumulation` units. The result does not depend on how they are
    cut into micro-batches, so the product is all that matters."""


class EvalConfig(Config):
    """When and how to evaluate during training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every N steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Evaluate every N epochs."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    batch_size: int | None = Field(default=None, ge=1)
    """Units per evaluation batch; 64 when not given. The result does not depend on it, but for losses that hold
    the rows of a batch against one another (`kto`, `aot`, `aot_unpaired`)."""
    metric: str | None = None
    """What makes a checkpoint the best one, as in `eval/loss`. The default is `eval/loss`, or
    `eval/reward` for reinforcement learning. When given, an evaluation before the first step makes sure that it
    is measured."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more of `metric` is better; found from its name when not given."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many evaluations without improvement."""
    min_delta: float = Field(default=0.0, ge=0)
    """The least change that counts as an improvement."""
    num_samples: int = Field(default=1, ge=1)
    """Reinforcement learning: completions per held-out prompt."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Reinforcement learning: evaluate on the first N held-out prompts."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Reinforcement learning: longest completion; `rollout.max_tokens` when not given."""
    temperature: float | None = Field(default=None, ge=0)
    """Reinforcement learning: sampling temperature; `rollout.temperature` when not given."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Reinforcement learning: nucleus sampling; `rollout.top_p` when not given."""


class CheckpointConfig(Config):
    """When to save, what to keep, where to go on from."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every N steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Save every N epochs."""
    keep: int | None = Field(default=None, ge=1)
    """Keep the newest N checkpoints; the best one is kept as well."""
    best: bool = False
    """Keep the checkpoint with the best evaluation, and end with its weights."""
    resume: str | bool = "auto"
    """`auto` goes on from the newest complete checkpoint in `output_dir` if there is one; true insists
    on it; false refuses an `output_dir` that has one; a path goes on from that checkpoint."""


class LogConfig(Config):
    """What a run tells while it runs. `metrics.jsonl` is always written."""

    every_steps: int = Field(default=1, ge=1)
    """Log metrics every N steps."""
    tensorboard: bool = True
    """Write TensorBoard event files under `output_dir/tensorboard`."""
    progress: bool = True
    """Show a progress bar."""
