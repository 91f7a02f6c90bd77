"""What a feed gives to the loop, once the models are there."""

from __future__ import annotations

from dataclasses import dataclass

from whet.engines.protocol import Engine
from whet.loop import Evaluator
from whet.mix import Mix
from whet.rollout.protocols import Source


@dataclass(frozen=True)
class Connected:
    """A feed that a loop can take from. `evaluate` is None where nothing was held out; `engine` where nothing is
    sampled."""

    source: Source
    evaluate: Evaluator | None
    engine: Engine | None = None
    mix: Mix | None = None
