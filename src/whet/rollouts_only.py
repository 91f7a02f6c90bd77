"""The loop without its training half: sample, score, write down, step after step."""

from __future__ import annotations

import time

from whet.loop import Loop


class SamplingLoop(Loop):
    """Takes units as `Loop` does, and leaves the model as it is. What it took is for others to read."""

    async def train_step(self) -> dict[str, float]:
        """One turn of the loop; returns what was measured of its rollout."""
        started = time.perf_counter()
        units = await self.source.take(self.schedule.units_per_step)
        self.progress.step += 1
        self.progress.num_tokens += sum(len(sample.tokens) for unit in units for sample in unit.samples)
        return {
            "num_tokens": self.progress.num_tokens,
            "epoch": self.progress.step / self.schedule.steps_per_epoch,
            **getattr(self.source, "stats", {}),
            "perf/step_s": time.perf_counter() - started,
        }
