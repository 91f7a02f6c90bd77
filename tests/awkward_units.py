"""Units on which whatever cuts up a batch, or shares prefixes, is likely to stumble."""

from __future__ import annotations

import random

from whet.types import Sample, Unit


def awkward_units() -> list[Unit]:
    """Eight units: an agent's tree four segments deep, groups with a prompt in common, rows alone, rows of which
    nothing is trained, twins, and a row that is the beginning of another."""
    draw = random.Random(0)

    def text(count: int) -> list[int]:
        return [draw.randrange(256) for _ in range(count)]

    def sample(*parts: tuple[list[int], bool]) -> Sample:
        """Parts one after the other, each trained or not; logprobs of the sampler lie around minus one."""
        tokens = [token for part, _ in parts for token in part]
        mask = [trained for part, trained in parts for _ in part]
        sampler = [draw.uniform(-2, 0) if trained else 0.0 for trained in mask]
        return Sample(tokens, mask, sampler, draw.choice([0.0, 0.0, 0.5, 1.0]))

    def rows(*samples: Sample) -> tuple[Sample, ...]:
        return samples

    prompt, turn, tool, answer = (text(n) for n in (30, 20, 17, 25))
    trunk = [(prompt, False), (turn, True), (tool, False)]
    deep = rows(
        sample(*trunk, (answer, True), (text(6), True)),
        sample(*trunk, (answer, True), (text(1), True)),
        sample(*trunk, (text(11), True)),
        sample(*trunk[:2], (text(3), False), (text(9), True)),
        sample((prompt, False), (text(14), True)),
    )
    group = text(24)
    masked = sample((group, False), (text(7), False))
    twin = (text(20), True)
    return [
        Unit("agent", deep),
        Unit("group", rows(*(sample((group, False), (text(n), True)) for n in (5, 12, 8, 1)))),
        Unit("masked member", rows(masked, *(sample((group, False), (text(n), True)) for n in (9, 4)))),
        Unit("alone", rows(sample((text(40), False), (text(30), True)))),
        Unit("nothing trained", rows(sample((text(19), False)), sample((text(5), False)))),
        Unit("twins", rows(sample(twin), sample(twin), sample(twin, (text(6), True)))),
        Unit("short", rows(sample((text(2), True)))),
        Unit("one token", rows(sample((text(1), True)), sample((text(3), False), (text(2), True)))),
    ]
