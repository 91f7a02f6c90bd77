"""The configuration of a whole run."""

from typing import Any, Literal

from pydantic import Field, model_validator

from whet.config.algorithm import (
    CorrectionConfig,
    CriticConfig,
    KLConfig,
    MixConfig,
    ShapingConfig,
    with_method_defaults,
)
from whet.config.backend import BackendConfig
from whet.config.base import Config, Plugin
from whet.config.cluster import ClusterConfig
from whet.config.data import DataConfig
from whet.config.engine import EngineConfig
from whet.config.evaluation import EvalConfig
from whet.config.model import ModelConfig
from whet.config.optim import OptimConfig
from whet.config.roles import DistillConfig, ReferenceConfig
from whet.config.rollout import RewardConfig, RolloutConfig
from whet.config.sample import SampleConfig
from whet.config.train import CheckpointConfig, DebugConfig, LogConfig, TrainConfig


class LossConfig(Plugin):
    """One term of the loss. Keys beside these are options of the loss function itself."""

    coef: float = 1.0
    """Factor of this term."""
    weight: Literal["token", "sequence", "fixed_length", "row", "pair"] | None = None
    """How values become one number over the global batch: the mean over trained tokens (`token`), over
    sequences of their token means (`sequence`), the sum over tokens divided by sequences times the
    longest allowed completion (`fixed_length`), or the mean over rows (`row`) or pairs (`pair`). The default is the
    method's for its own loss, and `token` for any other loss over tokens."""
    on: Literal["all", "chosen"] = "all"
    """Which sequences count: all, or those that are chosen or desirable."""


class RunConfig(Config):
    """A run: one method, one model, one data set."""

    method: str = "sft"
    """What to do: `sft`; `reward`; preference optimisation by `dpo`, `simpo`, `cpo`, `cpo-simpo`, `orpo`, `apo` on
    pairs, or `kto`, `bco` on labelled completions; distillation by `gkd`, `distill`; reinforcement learning by `grpo`,
    `dr-grpo`, `dapo`, `rloo`, `reinforce++`, `reinforce++-baseline`, `remax`, `gspo`, `cispo`, `sapo`, `ppo`, `opd`;
    `sample` makes rows of the best of several completions.
    The command line sets it from the command."""
    output_dir: str = "runs/default"
    """Folder for checkpoints, metrics and the final model."""
    seed: int = Field(default=0, ge=0)
    """Seed of data order, sampling, and new weights."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    backend: BackendConfig = BackendConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    loss: dict = Field(default_factory=dict)
    """Settings of the method's own loss term, as in `{use: dft}` or `{clip_high: 0.28}`."""
    terms: list[LossConfig] | None = None
    """The terms of the loss, in place of the method's own."""
    credit: Plugin | list[Plugin] | None = None
    """How rewards become advantages, in place of the method's own, as in `{use: rloo}`. Of several, each sees the
    advantages of the one before: `[{use: grpo}, {use: opd}]` adds what a teacher says."""
    shaping: ShapingConfig = ShapingConfig()
    kl: KLConfig = KLConfig()
    correction: CorrectionConfig = CorrectionConfig()
    critic: CriticConfig = CriticConfig()
    mix: MixConfig = MixConfig()
    entropy_coef: float = 0.0
    """Coefficient of an entropy bonus."""
    nll_coef: float | None = Field(default=None, ge=0)
    """Coefficient of the cross-entropy of the chosen completions beside a preference loss (the alpha of RPO and CPO).
    The default is 1 for `cpo`, `cpo-simpo` and `orpo`, and 0 for the others."""
    reference: ReferenceConfig = ReferenceConfig()
    """The frozen model that preference losses, and the KL penalty, hold the policy against."""
    distill: DistillConfig = DistillConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    env: Plugin | None = None
    """The environment that completions are played in; one turn when not given."""
    reward: RewardConfig | list[RewardConfig] | None = None
    """Reward function, or several whose weighted sum is the reward."""
    sample: SampleConfig = SampleConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        return with_method_defaults(values) if isinstance(values, dict) else values
