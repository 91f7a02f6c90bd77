"""Where training takes its units and prompts from: an endless, shuffled, resumable walk over a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whet.data.prepared import Prepared
from whet.errors import CheckpointError
from whet.types import Prompt, Unit


def epoch_order(size: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """[size] int64: which row stands where in an epoch; it follows from the arguments alone.

    Sorts the raw output of PCG64, which numpy keeps the same between its versions (as it does not
    the methods that shuffle).
    """
    if not shuffle:
        return np.arange(size)
    return np.argsort(np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size), kind="stable")


class _Walk:
    """A position in the endless sequence of epochs over `size` rows."""

    def __init__(self, size: int, fingerprint: str, *, seed: int, shuffle: bool) -> None:
        assert size > 0, "a data set has at least one row"
        self._fixed = {"size": size, "fingerprint": fingerprint, "seed": seed, "shuffle": shuffle}
        self._seek(0, 0)

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    @property
    def position(self) -> int:
        """Rows taken since the epoch began; less than `len(self)`."""
        return self._position

    def __len__(self) -> int:
        """Rows per epoch."""
        return int(self._fixed["size"])

    def state_dict(self) -> dict[str, Any]:
        """Where the walk is and what it walks over; goes into JSON."""
        return {"epoch": self._epoch, "position": self._position, **self._fixed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises CheckpointError when it was taken over other data or in another order: going on would
        skip some rows and repeat others.
        """
        names = {"size": "number of rows", "seed": "seed", "shuffle": "data.shuffle", "fingerprint": "content"}
        for name, meaning in names.items():
            if state.get(name) != self._fixed[name]:
                raise CheckpointError(
                    f"the checkpoint was made with other data: its {meaning} is {state.get(name)!r}, now it is "
                    f"{self._fixed[name]!r}; restore the data and its settings, or start anew with checkpoint.resume "
                    f"false and another output_dir"
                )
        self._seek(state["epoch"], state["position"])

    def _seek(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        seed, shuffle = int(self._fixed["seed"]), bool(self._fixed["shuffle"])
        self._order = epoch_order(len(self), seed=seed, epoch=epoch, shuffle=shuffle)

    def _window(self, n: int) -> list[int]:
        """The next `n` rows, or as many as the epoch has left."""
        assert n > 0, f"take({n}) takes nothing"
        chosen = self._order[self._position : self._position + n].tolist()
        self._position += len(chosen)
        if self._position == len(self):
            self._seek(self._epoch + 1, 0)
        return chosen


class RowSource(_Walk):
    """Units of a data set, in an order that follows from seed and epoch. The last window of an epoch may be short."""

    def __init__(self, prepared: Prepared, *, seed: int, shuffle: bool = True) -> None:
        super().__init__(len(prepared), prepared.fingerprint, seed=seed, shuffle=shuffle)
        self._prepared = prepared

    async def take(self, n: int) -> list[Unit]:
        """The next `n` units, or fewer where the epoch ends: a window never straddles two epochs."""
        return [self._prepared[i] for i in self._window(n)]

    async def publish(self, version: int) -> None:
        """Rows do not depend on the policy."""


class PromptRows(_Walk):
    """Prompts of a data set, in an order that follows from seed and epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        super().__init__(len(prompts), _fingerprint(prompts), seed=seed, shuffle=shuffle)
        self._prompts = prompts

    async def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, from as many epochs as that takes."""
        taken: list[Prompt] = []
        while len(taken) < n:
            taken += [self._prompts[i] for i in self._window(n - len(taken))]
        return taken


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id} {prompt.tokens} {prompt.label!r}\n".encode())
    return digest.hexdigest()
