"""The reward `model`: the score of a reward model, which has a tokenizer and a chat template of its own."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from whet.config.backend import BackendConfig
from whet.config.data import DataConfig
from whet.config.model import ModelConfig
from whet.errors import ConfigError, DataError, ModelError
from whet.scorer import RewardModel, check_reward_model
from whet.types import Episode

Waiting = tuple[Episode, asyncio.Future[float]]


class ModelReward:
    """Scores prompt and response as text under the reward model's own template, on the run's device.

    Calls that arrive in the same turn of the event loop are scored together, the answers of a group in one tree.
    A group that is scored whole gets the same bits whatever else is scored beside it.
    """

    def __init__(
        self,
        *,
        path: Annotated[str, Field(description="Folder of the reward model, or its name on the hub.")],
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        chat: Literal["auto", "always", "never"] = "auto",
        system: str | None = None,
        prompt_template: str | None = None,
        response_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._model = ModelConfig(
            path=path, dtype=dtype, chat_template=chat_template, trust_remote_code=trust_remote_code
        )
        try:
            self._data = DataConfig(
                chat=chat,
                system=system,
                prompt_template=prompt_template,
                response_template=response_template,
                template_kwargs=template_kwargs or {},
            )
        except ValidationError as error:
            raise ConfigError(f"reward model: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        try:
            check_reward_model(self._model)
        except ModelError as error:  # the settings of a reward model go by other names than the policy's
            raise ModelError(str(error).replace("model.path", "reward.path")) from error
        self._scorer: RewardModel | None = None
        self._waiting: list[Waiting] = []

    def load(self, backend: BackendConfig) -> None:
        """Load the reward model on the device, and in the precision, of a run. A second call does nothing."""
        if self._scorer is None:
            # Each group is computed on its own, so that its bits do not depend on who else is scored.
            alone = backend.model_copy(update={"micro_batch_size": 1, "activation_checkpointing": False})
            self._scorer = RewardModel.load(self._model, data=self._data, backend=alone)

    async def __call__(self, episode: Episode) -> float:
        """The score. Raises DataError for an episode that cannot be rendered or is too long for the model."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[float] = loop.create_future()
        self._waiting.append((episode, answer))
        if len(self._waiting) == 1:
            loop.call_soon(self._score_waiting)
        return await answer

    def _score_waiting(self) -> None:
        """Score everything that has been asked for and is still waited for, and answer all of it."""
        waiting, self._waiting = self._waiting, []
        groups: dict[str, list[tuple[tuple[int, ...], asyncio.Future[float]]]] = {}
        try:
            self.load(BackendConfig())
            assert self._scorer is not None
            for episode, answer in waiting:
                if answer.done():
                    continue
                try:
                    tokens = self._scorer.tokens((episode.prompt.content, episode.response))
                except DataError as error:
                    answer.set_exception(error)
                else:
                    groups.setdefault(episode.group, []).append((tokens, answer))
            scores = self._scorer.score_groups([[tokens for tokens, _ in group] for group in groups.values()])
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, answer in waiting:
                if not answer.done():
                    answer.set_exception(error)
            return
        for group, values in zip(groups.values(), scores, strict=True):
            for (_, answer), value in zip(group, values, strict=True):
                answer.set_result(value)
