"""Rows with completions sampled anew, by the policy or the teacher: the data of on-policy and sequence distillation."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from whet.engines.protocol import Engine
from whet.errors import EngineError
from whet.rollout.protocols import Source, StateDict
from whet.rollout.seeds import derive_seed
from whet.types import Completion, Sample, Sampling, Unit


class ResampledRows:
    """The units of another source, in some steps with their completion replaced. Implements `rollout.protocols.Source`.

    In a share `lmbda` of the steps `student` samples it; in the others `teacher` does, where there is one, and the
    rows stay as they are otherwise. Which step is which, and what is sampled, follows from `seed` and the number of
    the step alone. A prompt is what stands before the last stretch of trained tokens. Source: GKD, arXiv:2306.13649.
    """

    def __init__(
        self,
        rows: Source,
        sampling: Sampling,
        *,
        student: Engine | None,
        teacher: Engine | None,
        lmbda: float,
        seed: int,
        timeout_s: float,
    ) -> None:
        self._rows, self._sampling, self._seed, self._timeout_s = rows, sampling, seed, timeout_s
        self._engines = {"student": student, "teacher": teacher}
        self._lmbda = lmbda
        self._step = 0
        self.stats: dict[str, float] = {}
        """Metrics of the last step."""

    async def take(self, n: int) -> list[Unit]:
        """The next units. Raises EngineError when sampling fails or takes longer than its limit."""
        units = await self._rows.take(n)
        on_policy = random.Random(derive_seed(self._seed, "lmbda", self._step)).random() < self._lmbda
        who = "student" if on_policy else "teacher"
        self._step += 1
        self.stats = {"rollout/on_policy": float(on_policy)}
        engine = self._engines[who]
        if engine is None:
            return units
        prompts = [_prompt(unit.samples[0]) for unit in units]
        completions = await self._sample(who, engine, units, prompts)
        self.stats |= {
            "rollout/response_length_mean": statistics.fmean(len(c.tokens) for c in completions),
            "rollout/truncated_ratio": statistics.fmean(c.finish_reason == "length" for c in completions),
        }
        return [_completed(u, p, c) for u, p, c in zip(units, prompts, completions, strict=True)]

    async def _sample(
        self, who: str, engine: Engine, units: Sequence[Unit], prompts: Sequence[Sequence[int]]
    ) -> list[Completion]:
        sampled = (
            engine.generate(prompt, replace(self._sampling, seed=derive_seed(self._seed, unit.id, self._step)))
            for unit, prompt in zip(units, prompts, strict=True)
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.gather(*sampled)
        except TimeoutError:
            raise EngineError(
                f"the {who} has not finished {len(units)} completions of up to {self._sampling.max_tokens} tokens in "
                f"{self._timeout_s:g} s; raise engine.timeout_s, or lower rollout.max_tokens or train.batch_size"
            ) from None

    async def publish(self, version: int) -> None:
        """The policy has new weights."""
        if self._engines["student"] is not None:
            await self._engines["student"].update_weights(version)
        await self._rows.publish(version)

    def state_dict(self) -> StateDict:
        return {"step": self._step, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self._rows.load_state_dict(state["rows"])


def _prompt(sample: Sample) -> Sequence[int]:
    """What stands before the last stretch of trained tokens."""
    end = next((i for i in range(len(sample.loss_mask), 0, -1) if sample.loss_mask[i - 1]), 0)
    begin = next((i for i in range(end, 0, -1) if not sample.loss_mask[i - 1]), 0)
    return sample.tokens[:begin]


def _completed(unit: Unit, prompt: Sequence[int], completion: Completion) -> Unit:
    """The prompt with its new completion, of which every token is trained."""
    tokens = (*prompt, *completion.tokens)
    mask = (False,) * len(prompt) + (True,) * len(completion.tokens)
    return replace(unit, samples=(Sample(tokens, mask),))
