"""The histogram of the scores of a sampling run: all completions, and the best of each prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from whet.view.style import COLOURS, STYLE

_FEW = 12
"""So many different scores are drawn one by one."""
_BINS = 40


def draw_scores(scores: Sequence[float], best: Sequence[float], threshold: float, out_png: Path, *, title: str) -> Path:
    """Draw how many completions, and how many prompts by their best completion, have which score."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        for position, (name, values) in enumerate((("completions", scores), ("prompts, by their best", best))):
            axes = figure.add_subplot(1, 2, position + 1)
            _draw(axes, values, threshold, COLOURS[position])
            axes.set_title(f"{len(values):,} {name}")
        figure.savefig(out_png, dpi=150, format="png")
    return out_png


def _draw(axes: Axes, scores: Sequence[float], threshold: float, colour: str) -> None:
    counts = Counter(scores)
    if len(counts) <= _FEW:
        places = sorted(counts)
        gaps = np.diff(places)
        axes.bar(places, [counts[place] for place in places], 0.7 * (gaps.min() if len(gaps) else 1.0), color=colour)
    else:
        axes.hist(np.asarray(scores), bins=_BINS, color=colour)
    low, high = axes.get_xlim()
    if low <= threshold <= high:  # drawn where it is among the scores, and never makes them small
        axes.axvline(threshold, color="#444444", linewidth=1.0, linestyle="--")
    axes.set_xlabel("score")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
