"""The report of a sampling run: how good the completions are, and what became of each of them."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.config.sample import SampleConfig
from whet.sample.journal import Completed
from whet.sample.select import Selection, passes

MOST_FAILURES = 10
"""Kinds of failures that are told; the others are summed up."""


@dataclass
class Tally:
    """Counts group by group; holds a number per completion and nothing more."""

    config: SampleConfig
    scores: array = field(default_factory=lambda: array("d"))
    best: array = field(default_factory=lambda: array("d"))
    """The best score of each prompt that has one."""
    rewards: dict[str, array] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, group: Sequence[Completed], selection: Selection) -> None:
        """Take note of one group and of what was selected of it."""
        passed = [passes(one, self.config) for one in group]
        self.counts.update(
            prompts=1,
            completions=len(group),
            passed=sum(passed),
            solved=any(passed),
            truncated=sum(one.status == "truncated" for one in group),
            tokens=sum(one.num_tokens for one in group),
            rows=len(selection.taken),
            used=bool(selection.taken),
            kept=sum(map(len, selection.taken)),
        )
        self.dropped.update(selection.dropped)
        self.failures.update(one.error or "no reason given" for one in group if one.score is None)
        scores = [one.score for one in group if one.score is not None]
        self.scores.extend(scores)
        if scores:
            self.best.append(max(scores))
        for one in group:
            for name, value in one.rewards.items():
                self.rewards.setdefault(name, array("d")).append(value)

    def report(self) -> dict[str, Any]:
        """Everything in one mapping, for JSON. The same completions give the same report."""
        counts, scored = self.counts, len(self.scores)
        told = dict(self.failures.most_common(MOST_FAILURES))
        rest = self.failures.total() - sum(told.values())
        return {
            "prompts": counts["prompts"],
            "completions": counts["completions"],
            "scored": scored,
            "failed": counts["completions"] - scored,
            "failures": {**told, **({"others": rest} if rest else {})},
            "threshold": self.config.threshold,
            "pass_rate": counts["passed"] / scored if scored else None,
            "solved": counts["solved"] / counts["prompts"] if counts["prompts"] else None,
            "score": _spread(self.scores),
            "best_score_mean": statistics.fmean(self.best) if self.best else None,
            "rewards": {name: statistics.fmean(values) for name, values in sorted(self.rewards.items())},
            "truncated": counts["truncated"] / counts["completions"] if counts["completions"] else None,
            "tokens_mean": counts["tokens"] / counts["completions"] if counts["completions"] else None,
            "select": self.config.select,
            "rows": counts["rows"],
            "prompts_with_rows": counts["used"],
            "kept": counts["kept"],
            "dropped": dict(sorted(self.dropped.items())),
        }


def in_lines(report: dict[str, Any]) -> list[str]:
    """The report as a table, one line each."""
    spread, size = report["score"], report["completions"] / max(1, report["prompts"])
    lines = [
        ("prompts", f"{report['prompts']:,}"),
        ("completions", f"{report['completions']:,} ({report['failed']:,} failed)"),
        ("pass rate", f"{_share(report['pass_rate'])} of the completions score {report['threshold']:g} or more"),
        ("solved", f"{_share(report['solved'])} of the prompts have such a completion"),
        ("score", f"mean {spread['mean']:.4g}, from {spread['min']:.4g} to {spread['max']:.4g}" if spread else "none"),
        (f"best of {size:g}", f"mean {report['best_score_mean']:.4g}" if spread else "none"),
        ("truncated", f"{_share(report['truncated'])} of the completions"),
        ("rows", f"{report['rows']:,} ({report['select']}), of {report['prompts_with_rows']:,} prompts"),
        ("kept", f"{report['kept']:,} completions"),
        *((f"dropped, {reason}", f"{count:,}") for reason, count in report["dropped"].items()),
    ]
    if len(report["rewards"]) > 1:
        lines[6:6] = [(f"reward {name}", f"mean {mean:.4g}") for name, mean in report["rewards"].items()]
    return [f"{name:38} {value}" for name, value in lines]


def _spread(scores: Sequence[float]) -> dict[str, float] | None:
    if not scores:
        return None
    return {
        "mean": statistics.fmean(scores),
        "std": statistics.pstdev(scores),
        "min": min(scores),
        "median": statistics.median(scores),
        "max": max(scores),
    }


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
