"""Everything that is wrong with the rows of a data set, told at once."""

from __future__ import annotations

from collections import Counter

from whet.errors import DataError

SHOWN = 10


class Malformed(Exception):
    """One row cannot be used: `kind` to count by, and a text that names field, value and remedy."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Problems:
    """Collects what is wrong with rows; `raise_any` reports the first few and how many there are of each kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._shown: list[str] = []

    def __len__(self) -> int:
        return self.kinds.total()

    def add(self, kind: str, text: str) -> None:
        """`text` names the file and line first, then the field, its value, what was expected, the remedy."""
        self.kinds[kind] += 1
        if len(self._shown) < SHOWN:
            self._shown.append(text)

    def raise_any(self) -> None:
        """Raise DataError when anything was added."""
        if len(self) == 1:
            raise DataError(self._shown[0])
        if self.kinds:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
            more = [f"... and {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []
            lines = [f"{len(self):,} rows cannot be used ({kinds}):", *self._shown, *more]
            raise DataError("\n  ".join(lines))
