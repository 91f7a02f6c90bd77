"""The histogram of scores is a picture, whatever the scores are like."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.view.histogram import draw_scores


@pytest.mark.parametrize(
    "scores",
    [[0.0, 1.0, 1.0], [0.5], [i / 7 for i in range(200)], [-1e9, 1e9], [3.0] * 50],
    ids=["two", "one", "many", "far apart", "all alike"],
)
def test_scores_of_any_kind_are_drawn(tmp_path: Path, scores: list[float]):
    picture = draw_scores(scores, scores[:1], 1.0, tmp_path / "scores.png", title="Scores")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_the_same_scores_give_the_same_picture(tmp_path: Path):
    pictures = [draw_scores([0.1, 0.2], [0.2], 1.0, tmp_path / name, title="Scores") for name in ("a", "b")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
