"""Settings of evaluation: when, on which data, how held-out prompts are sampled, and what counts as better."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from whet.config.base import Config
from whet.config.data import holds_its_place
from whet.config.rollout import RewardConfig

_TAKEN = ("reward", "reward_std")
"""What follows `eval/` in metrics of `data.eval`, with a slash after it."""


class EvalSetConfig(Config):
    """One of several sets of held-out prompts. What is not given is what `eval`, or else the rollout, has."""

    path: str | list[str]
    """File of prompts, or several, read as one."""
    num_samples: int | None = Field(default=None, ge=1)
    """Completions per prompt; `eval.num_samples` when not given."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Evaluate on the first N prompts; `eval.max_prompts` when not given."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longer prompts are dropped and counted; `data.max_prompt_length` when not given."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion; `eval.max_tokens` when not given."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; `eval.temperature` when not given."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling; `eval.top_p` when not given."""
    top_k: int | None = Field(default=None, ge=0)
    """Sample among the k likeliest tokens, 0 is off; `eval.top_k` when not given."""
    reward: RewardConfig | list[RewardConfig] | None = None
    """What judges its answers; the reward of the run when not given."""
    columns: dict[str, str] | None = None
    """Our name of a column -> its name in the file; `data.columns` when not given."""
    chat: Literal["auto", "always", "never"] | None = None
    """Use of the chat template; `data.chat` when not given."""
    system: str | None = None
    """System message; `data.system` when not given."""
    prompt_template: str | None = None
    """Text around a plain prompt, with `{prompt}` where it goes; `data.prompt_template` when not given."""

    @field_validator("prompt_template")
    @classmethod
    def _holds_its_place(cls, template: str | None, info: ValidationInfo) -> str | None:
        return holds_its_place(template, "prompt")


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
    """What makes a checkpoint the best one, as in `eval/loss` or `eval/aime/pass@1`. The default is `eval/loss`, or
    `eval/reward` for reinforcement learning: without `data.eval`, that of the first of `sets`. When given, an
    evaluation before the first step makes sure that it is measured."""
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
    top_k: int | None = Field(default=None, ge=0)
    """Reinforcement learning: sample among the k likeliest tokens, 0 is off; `rollout.top_k` when not given."""
    sets: dict[str, EvalSetConfig] = Field(default_factory=dict)
    """Reinforcement learning: further sets of held-out prompts by name, as in `{aime: {path: aime.jsonl, num_samples:
    16}}`, evaluated together with `data.eval`. Metrics of a set are named after it: `eval/aime/reward`."""

    @field_validator("sets")
    @classmethod
    def _have_plain_names(cls, sets: Mapping[str, Any]) -> Mapping[str, Any]:
        """Names of sets are parts of settings and of metrics."""
        for name in sets:
            if not re.fullmatch(r"\w+", name) or name in _TAKEN:
                raise ValueError(
                    f"{name!r} cannot be the name of a set; use letters, digits and underscores, and not "
                    f"{' or '.join(_TAKEN)}"
                )
        return sets

    def of_set(self, name: str) -> EvalSetConfig:
        """The settings of a set, with what it leaves to `eval` filled in."""
        one = self.sets[name]
        inherited = ("num_samples", "max_prompts", "max_tokens", "temperature", "top_p", "top_k")
        return one.model_copy(update={key: getattr(self, key) for key in inherited if getattr(one, key) is None})
