"""Units grow into arrays: what is too long is cut, dropped or refused, and counted."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whet.data.encode import Encoded
from whet.data.problems import Malformed
from whet.data.shapes import Task
from whet.data.units import Draft
from whet.errors import DataError

_INTEGERS = ("sample_ends", "unit_ends", "rows", "sources", "places", "prompts", "cut", "full_lengths")


@dataclass(slots=True)
class Builder:
    """Grows the arrays unit by unit. `counts` are of the units left out, by why."""

    task: Task
    max_length: int
    policy: str
    counts: Counter[str] = field(default_factory=Counter)
    first_identical: tuple[int, int] | None = None
    tokens: list[np.ndarray] = field(default_factory=list)
    mask: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0
    integers: dict[str, array] = field(default_factory=lambda: {name: array("q") for name in _INTEGERS})
    labels: array = field(default_factory=lambda: array("f"))
    margins: array = field(default_factory=lambda: array("f"))

    def add(self, source: int, place: int, draft: Draft) -> None:
        """Add a unit of the row at `place` of a source.

        Raises Malformed when it trains nothing, or is too long and `error` is the policy.
        """
        longest = max(len(sample.tokens) for sample in draft.samples)
        trained = [sample.mask.any() for sample in draft.samples]
        if not any(trained) or (draft.labels and not all(trained)):
            text = f"no token of the row is trained ({longest} tokens); give it an answer or remove the row"
            raise Malformed("nothing to train", text)
        too_long = longest > self.max_length
        if too_long and self.policy == "error":
            text = f"the row has {longest:,} tokens, but data.max_length is {self.max_length:,}"
            raise Malformed("too long", f"{text}; raise it, shorten the row, or set data.on_too_long")
        kept = [sample for sample in map(self._cut, draft.samples) if sample.mask.any()]
        # A unit that is judged is nothing without one of its sides.
        lost = not kept or (bool(draft.labels) and len(kept) < len(draft.samples))
        if too_long and (self.policy == "drop" or lost):
            self.integers["full_lengths"].append(longest)
            self.counts["dropped"] += 1
            self.counts["untrained"] += self.policy != "drop"
            return
        draft = Draft(tuple(kept), draft.prompt, draft.labels, draft.margin)
        if draft.identical:
            self.skip(source, place, longest)
            return
        self._append(source, place, draft, longest, too_long)

    def skip(self, source: int, place: int, longest: int) -> None:
        """Count a row that holds the same completion twice."""
        self.integers["full_lengths"].append(longest)
        self.counts["identical"] += 1
        self.first_identical = self.first_identical or (source, place)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of all units, as `Arrays` has them. Raises DataError when no unit is left."""
        if not self.tokens:
            raise DataError(self._nothing_left())
        columns: dict[str, np.ndarray] = {
            name: np.array(column, dtype=np.int64) for name, column in self.integers.items()
        }
        columns["cut"] = columns["cut"].astype(np.bool_)
        if self.labels:
            columns["labels"] = np.array(self.labels, dtype=np.float32)
        if len(self.margins) == len(self.integers["unit_ends"]):
            columns["margins"] = np.array(self.margins, dtype=np.float32)
        return {"tokens": np.concatenate(self.tokens), "mask": np.concatenate(self.mask), **columns}

    def notes(self) -> dict[str, Any]:
        """What became of the units that are not in the arrays."""
        names = ("dropped", "untrained", "identical")
        return {**{name: self.counts[name] for name in names}, "first_identical": self.first_identical}

    def _cut(self, sample: Encoded) -> Encoded:
        if len(sample.tokens) <= self.max_length:
            return sample
        tokens, mask = sample.tokens[: self.max_length], sample.mask[: self.max_length]
        if self.task == "reward":
            # A reward model reads its score off the token that ends the answer, so that one stays.
            answered = mask[:-1].any()
            tokens, mask = np.append(tokens[:-1], sample.tokens[-1]), np.append(mask[:-1], answered)
        return Encoded(tokens, mask, sample.prompt)

    def _append(self, source: int, place: int, draft: Draft, longest: int, cut: bool) -> None:
        for sample in draft.samples:
            self.tokens.append(sample.tokens)
            self.mask.append(sample.mask)
            self.num_tokens += len(sample.tokens)
            self.integers["sample_ends"].append(self.num_tokens)
        self.labels.extend(draft.labels)
        if draft.margin is not None:
            self.margins.append(draft.margin)
        values = {"unit_ends": len(self.integers["sample_ends"]), "rows": len(self.integers["full_lengths"])}
        values |= {"sources": source, "places": place, "cut": cut, "full_lengths": longest, "prompts": draft.prompt}
        for name, value in values.items():
            self.integers[name].append(value)

    def _nothing_left(self) -> str:
        dropped, identical = self.counts["dropped"], self.counts["identical"]
        if not dropped:
            return (
                f"none of {identical:,} pairs is left: in each, chosen and rejected are the same tokens; give them "
                f"completions that differ"
            )
        same = f", or the same completion twice ({identical:,})" if identical else ""
        shortest = min(self.integers["full_lengths"])
        return (
            f"none of {dropped + identical:,} rows is left: all are longer than data.max_length ({self.max_length:,} "
            f"tokens), and dropped or left with nothing to train{same}; the shortest has {shortest:,}; raise it"
        )
