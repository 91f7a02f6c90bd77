"""Which rewards judge the answers to a prompt: those of the run, or the one that its row asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from whet.errors import ConfigError
from whet.rewards.score import NamedReward
from whet.types import Prompt

OWN, TYPE = "custom_rm_path", "rm_type"
"""What a row's metadata may hold: the path of a function of its own, or the name of a built-in reward."""


class RewardChoice:
    """For each prompt, the rewards of the run with one of them replaced where its row says so.

    A row's `custom_rm_path` takes the place of the reward at `own_at`. Its `rm_type` takes that of the one at
    `type_at`, which is None where the run's rewards are functions of its user: they come before it.
    `build(setting, wanted, position)` makes what a row asks for, once.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        build: Callable[[str, str, int], NamedReward],
        *,
        own_at: int = 0,
        type_at: int | None = None,
    ) -> None:
        self._rewards, self._build = tuple(rewards), build
        self._own_at, self._type_at = own_at, type_at
        self._chosen: dict[tuple[str, str], tuple[NamedReward, ...] | ConfigError] = {}

    def __call__(self, prompt: Prompt) -> tuple[NamedReward, ...]:
        """Raises ConfigError, a ValueError, for a reward that is not there or cannot be made."""
        for setting, position in ((OWN, self._own_at), (TYPE, self._type_at)):
            wanted = prompt.metadata.get(setting)
            if wanted is not None and position is not None:
                return self._with(setting, wanted, position)
        return self._rewards

    def _with(self, setting: str, wanted: Any, position: int) -> tuple[NamedReward, ...]:
        if not isinstance(wanted, str) or not wanted.strip():
            raise ConfigError(f"metadata.{setting} is {wanted!r:.80}, expected the name of a reward")
        key = setting, wanted.strip()
        if key not in self._chosen:
            try:
                reward = self._build(*key, position)
                self._chosen[key] = (*self._rewards[:position], reward, *self._rewards[position + 1 :])
            except ConfigError as error:
                self._chosen[key] = error
        found = self._chosen[key]
        if isinstance(found, ConfigError):
            raise found
        return found
