"""Selection: which completions of a prompt become rows, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from whet.config.sample import SampleConfig
from whet.sample.journal import Completed


@dataclass(frozen=True, slots=True)
class Selection:
    """What is taken of one group: single completions, or pairs of a better and a worse one.

    `dropped` counts the others by reason: taken and dropped together are all of the group.
    """

    taken: tuple[tuple[Completed, ...], ...]
    dropped: Counter[str]


def select(group: Sequence[Completed], config: SampleConfig) -> Selection:
    """Choose among the completions of one prompt.

    Better is a higher score; of equal ones, the one with the lower index. A text that occurs more than once counts
    once, at its lowest index.
    """
    dropped: Counter[str] = Counter()
    usable = list(_usable(group, config, dropped))
    ranked = sorted(usable, key=lambda one: (-_score(one), one.index))
    if config.select == "pairs":
        return _pairs(ranked, config, dropped)
    if config.select == "labels":
        return Selection(tuple((one,) for one in usable), dropped)
    good = [one for one in ranked if config.min_score is None or _score(one) >= config.min_score]
    dropped.update({"score below min_score": len(ranked) - len(good)})
    taken = good[: config.keep] if config.select == "best" else sorted(good, key=lambda one: one.index)
    dropped.update({"not among the best": len(good) - len(taken)})
    return Selection(tuple((one,) for one in taken), +dropped)


def passes(one: Completed, config: SampleConfig) -> bool:
    """Whether the score of a completion reaches the threshold."""
    return one.score is not None and one.score >= config.threshold


def _usable(group: Sequence[Completed], config: SampleConfig, dropped: Counter[str]) -> Iterator[Completed]:
    """The completions that may become rows, by index."""
    seen: set[str] = set()
    for one in sorted(group, key=lambda one: one.index):
        if one.score is None:
            dropped["failed"] += 1
        elif not one.response.strip():
            dropped["empty"] += 1
        elif one.status == "truncated" and not config.keep_truncated:
            dropped["truncated"] += 1
        elif one.response in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(one.response)
            yield one


def _pairs(ranked: Sequence[Completed], config: SampleConfig, dropped: Counter[str]) -> Selection:
    """The best against the worst, the second best against the second worst, and so on; each is used once."""
    pairs: list[tuple[Completed, Completed]] = []
    reason = "not among the best and worst"
    most = min(config.keep, len(ranked) // 2)
    for better, worse in zip(ranked[:most], reversed(ranked), strict=False):
        gap = _score(better) - _score(worse)
        if gap <= 0 or gap < config.min_gap:
            reason = "scores too near" if config.min_gap else "equal scores"
            break
        if config.min_score is not None and _score(better) < config.min_score:
            reason = "score below min_score"
            break
        pairs.append((better, worse))
    if len(ranked) == 1:
        reason = "nothing to compare with"
    dropped.update({reason: len(ranked) - 2 * len(pairs)})
    return Selection(tuple(pairs), +dropped)


def _score(one: Completed) -> float:
    assert one.score is not None, "completions without a score are dropped before"
    return one.score
