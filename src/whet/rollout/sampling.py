"""The source of reinforcement learning: prompts in, scored groups of completions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from whet.config.rollout import RolloutConfig
from whet.engines.protocol import Engine
from whet.errors import DataError, EngineError
from whet.rollout.group import Group, GroupPlayer, Rollout
from whet.rollout.protocols import EnvFactory, Scorer, StateDict
from whet.rollout.statistics import rollout_metrics
from whet.types import Prompt, Sampling, Unit


class PromptSource(Protocol):
    """Where prompts come from; `data.source.PromptRows` is one."""

    async def take(self, n: int) -> list[Prompt]:
        """The next prompts, at most `n` and at least one."""
        ...

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def sampling_of(config: RolloutConfig, stop_token_ids: Sequence[int] = ()) -> Sampling:
    """How a rollout samples; `stop_token_ids` are the model's own, added to those of the configuration."""
    return Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=tuple(config.stop),
        stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, *stop_token_ids))),
    )


class RolloutSource:
    """Samples a group for each prompt and gives it out as a unit. Implements `rollout.protocols.Source`.

    A group's id is `g` and its number since the start of the run, so it is the same after a resume,
    and so is what it samples: seeds depend on `seed`, the group id and the index only.
    """

    def __init__(
        self,
        prompts: PromptSource,
        engine: Engine,
        env: EnvFactory,
        scorer: Scorer,
        config: RolloutConfig,
        *,
        tokenizer: Any,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        timeout_s: float = 600.0,
    ) -> None:
        self._prompts = prompts
        self._engine = engine
        self._scorer = scorer
        self._group_size = config.group_size
        sampling = sampling_of(config, stop_token_ids)
        self._player = GroupPlayer(engine, env, scorer, sampling, tokenizer=tokenizer, seed=seed, timeout_s=timeout_s)
        self._num_groups = 0
        self.rollout: Rollout | None = None
        """What the last `take` played, failed and aborted episodes included."""
        self.stats: dict[str, float] = {}
        """Metrics of the last `take`."""

    async def take(self, n: int) -> list[Unit]:
        """Groups for the next `n` prompts, wrapping around the data set as often as needed.

        Failed and aborted episodes are left out of their groups, and a group without any other is
        left out of the result; `stats` counts both.
        Raises DataError without prompts, EngineError if the engine fails or aborts everything, and
        RewardError if no episode got a reward.
        """
        prompts = await self._next_prompts(n)
        numbered = [(f"g{self._num_groups + position}", prompt) for position, prompt in enumerate(prompts)]
        self._num_groups += len(prompts)
        self.rollout = await self._player.play(numbered, self._group_size)
        self._scorer.report_failures(self.rollout.episodes)
        self._scorer.report_uniform(self.rollout.episodes)
        self.stats = rollout_metrics(self.rollout)
        units = [unit for group in self.rollout.groups if (unit := to_unit(group)) is not None]
        if not units:
            raise EngineError(
                f"the engine aborted all {len(self.rollout.episodes)} completions of this step, so nothing can be "
                f"trained; see why it was paused or told to abort"
            )
        return units

    async def publish(self, snapshot: Any) -> None:
        """Hand new weights to the engine; they are in use when the call returns."""
        await self._engine.update_weights(snapshot)

    def state_dict(self) -> StateDict:
        return {"prompts": self._prompts.state_dict(), "num_groups": self._num_groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._num_groups = state["num_groups"]

    async def _next_prompts(self, n: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < n:
            window = await self._prompts.take(n - len(prompts))
            if not window:
                raise DataError("there is no prompt to sample from; look at data.train and data.max_prompt_length")
            prompts.extend(window)
        return prompts


def to_unit(group: Group) -> Unit | None:
    """The scored members of a group as a unit, or None if there is none."""
    samples = tuple(episode.to_sample() for episode in group.episodes if episode.reward is not None)
    return Unit(group.id, samples) if samples else None
