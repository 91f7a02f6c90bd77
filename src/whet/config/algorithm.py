"""Settings of what is made of rewards: KL penalty, shaping, correction, critic, mixture; and defaults by method."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from whet.config.base import Config
from whet.config.optim import OptimConfig


class KLConfig(Config):
    """Kullback-Leibler penalty towards the reference, as a term of the loss or taken from the reward."""

    coef: float = Field(default=0.0, ge=0)
    """Coefficient; at 0 no reference is computed."""
    where: Literal["loss", "reward"] = "loss"
    """`loss` adds a term to the loss; `reward` takes the penalty of each token from the reward before credit is
    given. The default is `reward` for `ppo`, `reinforce++`, `reinforce++-baseline`, `rloo` and `remax`."""
    type: Literal["k1", "k2", "k3", "low_var_kl"] | None = None
    """Estimator (http://joschu.net/blog/kl-approx.html); k3 in the loss and k1 in the reward when not given. k1 has no
    useful gradient as a loss and is refused there."""
    unbiased: bool = False
    """Multiply the term of the loss by the ratio of the policy to the one that sampled (arXiv:2512.02556)."""

    @property
    def estimator(self) -> Literal["k1", "k2", "k3", "low_var_kl"]:
        """The estimator, given or not."""
        return self.type or ("k1" if self.where == "reward" else "k3")


class ShapingConfig(Config):
    """What is done to the rewards of a step before credit is given, in this order: transform, scale, clip, overlong."""

    transform: str | None = None
    """A function of your own over the global batch, `package.module:function`: `(rewards, batch) -> rewards`."""
    scale: float = 1.0
    """Factor of every reward."""
    clip: float | None = Field(default=None, gt=0)
    """Bound rewards to [-clip, clip]."""
    overlong_buffer: float | None = Field(default=None, gt=0)
    """Soft punishment of long completions (DAPO, arXiv:2503.14476, eq. 13): over the last so many tokens before
    `rollout.max_tokens` the reward falls linearly by `overlong_coef`. Below 1 it is a share of `rollout.max_tokens`.
    The default is 0.2 for `dapo`."""
    overlong_coef: float = Field(default=1.0, gt=0)
    """By how much the reward of the longest completion falls."""
    mask_truncated: bool = False
    """Do not train completions that were cut off at `rollout.max_tokens`; their rewards still count in their group."""
    whiten: bool | None = None
    """Whiten advantages over the global batch. When not given, the credit rule decides: `gae` and both
    `reinforce_plus_plus` are whitened."""


class CorrectionConfig(Config):
    """Correction for samples whose engine finds them less or more likely than the trainer does, by their ratio u."""

    use: Literal["tis", "icepop", "mis"] | None = None
    """`tis` bounds u to [low, high] and multiplies the policy loss by it; `icepop` and `mis` multiply by u inside and
    by 0 outside, `icepop` per token."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """`token`: u of each token; `sequence`: their product; `geometric`: their geometric mean."""
    low: float | None = Field(default=None, ge=0)
    """Lower limit; 0 for `tis` and 0.5 for the others when not given."""
    high: float | None = Field(default=None, gt=0)
    """Upper limit; 2 for `tis` and `mis`, 5 for `icepop` when not given."""
    veto: float | None = Field(default=None, gt=0, lt=1)
    """Leave out sequences that hold a token whose u is below this, such as 1e-4."""
    opsm: float | None = Field(default=None, ge=0)
    """Leave out tokens with a negative advantage in sequences that the policy has moved away from: those whose mean of
    old - new logprobs is above this (arXiv:2512.02556)."""

    @property
    def limits(self) -> tuple[float, float]:
        """Lower and upper limit, given or not."""
        low = self.low if self.low is not None else (0.0 if self.use == "tis" else 0.5)
        return low, self.high if self.high is not None else (5.0 if self.use == "icepop" else 2.0)


class CriticConfig(Config):
    """The model that says which reward is to be expected, for credit `gae`."""

    path: str | None = None
    """Folder or hub name of the model that it begins as; `model.path` when not given. A reward model brings its head
    along."""
    shared: bool = False
    """A head on the policy's own backbone in place of a model of its own."""
    coef: float = Field(default=0.1, gt=0)
    """Factor of the critic's loss beside the policy's, where it is `shared`."""
    value_clip: float = Field(default=0.2, gt=0)
    """How far values may move from those before the step without being held back."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; `optim.lr` when not given. All else is as `optim` says."""
    max_grad_norm: float | None = Field(default=None, ge=0)
    """Clip the gradient's global norm to this, 0 turns it off; `optim.max_grad_norm` when not given."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of the loop in which the critic alone is trained."""

    def optim(self, of_policy: OptimConfig) -> OptimConfig:
        """How a critic of its own is trained: as the policy is, unless told otherwise."""
        given = {"lr": self.lr, "max_grad_norm": self.max_grad_norm}
        return of_policy.model_copy(update={name: value for name, value in given.items() if value is not None})


class MixConfig(Config):
    """Rows that are learned as in supervised fine-tuning, in the same optimizer steps."""

    data: str | list[str] | None = None
    """Path of the rows, or several; the mixture is off when not given. They are rendered as `data` says."""
    coef: float = Field(default=0.1, gt=0)
    """Factor of their cross-entropy (the mean over their tokens) beside the policy's loss."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per optimizer step."""
    max_length: int = Field(default=2048, ge=2)
    """Longest row in tokens; what is done about longer ones is up to `data.on_too_long`."""


METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dapo": {"shaping.overlong_buffer": 0.2, "rollout.filter": {"use": "nonzero_std"}},
    "rloo": {"kl.where": "reward"},
    "reinforce++": {"kl.where": "reward", "rollout.group_size": 1},
    "reinforce++-baseline": {"kl.where": "reward"},
    "remax": {"kl.where": "reward", "rollout.group_size": 1},
    "ppo": {"kl.where": "reward", "rollout.group_size": 1, "rollout.num_ppo_epochs": 4},
}
"""Settings that a method has of its own where they are not written, by dotted path."""


def with_method_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration with those settings of the method in place that were not written."""
    filled = dict(values)
    for path, value in METHOD_DEFAULTS.get(str(values.get("method")), {}).items():
        section, _, name = path.partition(".")
        written = filled.get(section, {})
        if isinstance(written, Config):
            if name not in written.model_fields_set:
                filled[section] = written.model_copy(update={name: value})
        elif isinstance(written, dict) and name not in written:
            filled[section] = {**written, name: value}
    return filled
