"""Settings of the loop: how long, how many rows per step, when to save, what to log, how to debug."""

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
    rollouts: Literal[False, True, "jsonl", "parquet"] = False
    """Reinforcement learning: write what each step sampled to `output_dir/rollouts`, one line per completion with its
    tokens, logprobs, masks and rewards; true is `jsonl`. Takes about 30 bytes per token, a tenth of that in Parquet,
    so it is off unless asked for."""
    keep_rollouts: int | None = Field(default=None, ge=1)
    """Keep the rollouts of the newest N steps. All are kept when not given."""


class DebugConfig(Config):
    """One half of reinforcement learning without the other."""

    rollout_only: bool = False
    """Sample, score and write down the rollouts of each step, and train nothing: no optimizer and no reference are
    loaded. What it writes can be trained on with `train_only`."""
    train_only: str | None = None
    """Train on the rollouts in this folder, of a run with `log.rollouts`, and sample nothing: with the same settings
    the weights become those of that run, to the bit on a CPU. The prompts are not read."""
