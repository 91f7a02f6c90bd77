"""Settings of reinforcement learning: sampling, groups, engine, reward, credit."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config, Plugin


class RolloutConfig(Config):
    """What is sampled per step."""

    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts per step of the loop. Each yields a group."""
    group_size: int = Field(default=8, ge=1)
    """Completions per prompt."""
    optimizer_steps: int = Field(default=1, ge=1)
    """Optimizer steps per step of the loop; groups are never torn apart between them."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer's logprobs use the same."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is off."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end a completion, beside the model's end-of-sequence tokens."""
    max_staleness: int = Field(default=0, ge=0, le=0)
    """Optimizer steps by which a sample may be older than the policy it trains. 0 is synchronous, the
    only choice of the embedded engine."""


class EngineConfig(Config):
    """What samples the completions."""

    use: str = "local"
    """`local` (in this process, with the trainer's own weights), or `package.module:Class` of your own."""
    max_concurrent: int = Field(default=64, ge=1)
    """Most completions decoded at a time."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds that one completion may take before the run stops and says so."""


class RewardConfig(Plugin):
    """One reward function and its weight in the sum."""

    weight: float = 1.0
    """Factor of this reward in the sum."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Most seconds for one call."""
    key: str | None = None
    """Which part counts, of a reward that returns several by name; `score`, or their sum, when not given."""
    group: bool | None = None
    """Whether a function of your own judges a whole group at once, `(episodes) -> list of numbers`. Found from the
    name of its parameter when not given."""
    by_type: dict[str, dict] = Field(default_factory=dict)
    """Options of the rewards that rows choose by `rm_type` in their metadata, as in `{code: {memory_mb: 256}}`."""


class KLConfig(Config):
    """Kullback-Leibler penalty towards the reference, as a term of the loss."""

    coef: float = Field(default=0.0, ge=0)
    """Coefficient; at 0 no reference is computed."""
    type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Estimator (http://joschu.net/blog/kl-approx.html). k1 has no useful gradient as a loss and is
    refused here."""
