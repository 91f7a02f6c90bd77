"""The page about metrics as patterns that names of metrics are held against."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented() -> list[re.Pattern[str]]:
    """One pattern for each metric in a table of the page; `_max` after a comma shares the beginning before it."""
    patterns = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        stem = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            if name.startswith(("_", "…")):
                name = re.sub(r"_(mean|median|max|min)$", "", stem) + name.lstrip("…")
            stem = stem if "<" in name else name
            patterns.append(re.compile(re.sub(r"<[a-z]+>", r"[\\w@/-]+", name)))
    return patterns


def undocumented(names: set[str]) -> set[str]:
    """The metrics that the page does not know; those of a set are known by their name without it."""
    patterns = documented()
    return {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}
