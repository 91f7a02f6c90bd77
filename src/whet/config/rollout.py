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
    num_ppo_epochs: int = Field(default=1, ge=1)
    """Times that a step goes over its completions; each time makes `optimizer_steps` steps."""
    mode: Literal["sync", "one_step_off", "async"] = "sync"
    """`sync` samples, then trains. `one_step_off` samples the next step while this one is trained. `async` keeps
    sampling across steps and takes new weights at once, within `max_staleness`. The last two keep a second copy of
    the weights."""
    max_staleness: int | None = Field(default=None, ge=0)
    """Optimizer steps by which the oldest token of a group may be older than the policy that a step begins with.
    Given by the mode but for `async`, where the default is twice those of one step, and `partial`, which has no
    limit unless one is given."""
    stale: Literal["refresh", "drop"] = "refresh"
    """What becomes of a group that is too old: its prompt is sampled again (`refresh`) or left out (`drop`)."""
    oversampling: int | None = Field(default=None, ge=1)
    """Prompts that are sampled at a time, at least `prompts_per_step`; sampling stops, and the rest is aborted, as soon
    as `prompts_per_step` groups are kept."""
    filter: Plugin | None = None
    """Which groups are kept, judged as each is completed: `nonzero_std`, or a function of your own,
    `(args, samples) -> bool`."""
    max_fetches: int = Field(default=20, ge=1)
    """Times that a step may ask for more prompts because groups were rejected before the run stops and says so."""
    partial: bool = False
    """Keep what aborted completions have so far, and go on with them in a later step."""
    old_logprobs: Literal["trainer", "sampler"] | None = None
    """Which policy the ratio of the loss is to: the trainer's as it stands before a step's first update, or the one
    that sampled, by the engine's own logprobs. They are the same unless groups are older than a step: with `partial`
    and in modes other than `sync` the default is `sampler`, unless `correction.use` accounts for the difference."""
    mask_offpolicy: bool = False
    """Do not train tokens that were sampled in an earlier step (with `partial`)."""
    buffer: Plugin | None = None
    """In which order left-over groups are sampled on: `pop_first`, or a function of your own,
    `(args, rollout_id, buffer, num_samples) -> groups`."""
    sample_filter: Plugin | None = None
    """A function of your own over the kept groups of a step, `(args, groups)`, which sets `remove_sample` on samples
    that are not to be trained."""
    retries: int = Field(default=0, ge=0)
    """Times that an episode which failed is played again."""
    source: Plugin | None = None
    """Where prompts come from in place of the shuffled rows of `data.train`: a class called with them."""
    generate: Plugin | None = None
    """A function of your own that plays an episode, in place of environment and engine."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one step of the loop."""
        return self.optimizer_steps * self.num_ppo_epochs

    @property
    def staleness(self) -> int | None:
        """The bound on the age of what is trained on, in optimizer steps; None where `partial` sets none."""
        if self.max_staleness is not None or self.partial:
            return self.max_staleness
        return {"sync": 0, "one_step_off": self.updates_per_step, "async": 2 * self.updates_per_step}[self.mode]

    @property
    def trains_older(self) -> bool:
        """Whether what is trained on may have been sampled by an older policy."""
        return self.mode != "sync" or self.partial


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
