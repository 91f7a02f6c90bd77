"""How long the parts of a step took, and what was computed meanwhile."""

from __future__ import annotations

import time
from collections.abc import Mapping

from whet.backends.protocol import Backend


class StepClock:
    """Started with a step, told when its units are there and when it is trained, asked at its end."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = {id(backend): backend for backend in backends.values()}  # one may have two roles
        self._flops = self._computed()
        self._start = self._taken = self._trained = time.perf_counter()

    def taken(self) -> None:
        """The units are there."""
        self._taken = time.perf_counter()

    def trained(self) -> None:
        """The weights are new; they are about to be published."""
        self._trained = time.perf_counter()

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """Metrics `perf/…` of the step that ends now, over `num_tokens` logical tokens.

        `tflops` is what the models computed (shared prefixes once, recomputation aside) from the units on until they
        were trained; `mfu` its share of what the device can reach, where that is known.
        """
        end = time.perf_counter()
        # A clock may not have moved for something this short.
        training, step = (max(seconds, 1e-9) for seconds in (self._trained - self._taken, end - self._start))
        flops = (self._computed() - self._flops) / training
        peak = next((found for b in self._backends.values() if (found := getattr(b, "peak_flops", None))), None)
        return {
            "perf/train_tokens_per_s": num_tokens / training,
            "perf/tokens_per_s": num_tokens / step,
            "perf/wait_ratio": (self._taken - self._start) / step,
            "perf/publish_s": end - self._trained,
            "perf/step_s": end - self._start,
            **({"perf/tflops": flops / 1e12} if flops else {}),
            **({"perf/mfu": flops / peak} if flops and peak else {}),
        }

    def _computed(self) -> float:
        return sum(getattr(backend, "flops", 0.0) for backend in self._backends.values())
