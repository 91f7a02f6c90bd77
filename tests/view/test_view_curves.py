"""Curves: which points are drawn where, and what is said when there are none."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from whet.errors import DataError
from whet.view.curves import Panel, draw_curves, running_mean


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved in a test."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def write(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(axes):
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_a_panel_holds_its_metrics_without_the_points_that_are_not_finite(tmp_path, drawn):
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
        {"step": 3, "eval/loss": 2.0},
    ]
    out = draw_curves(write(tmp_path / "a/metrics.jsonl", records), tmp_path / "pictures/curves.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "Loss"
    assert lines_of(axes) == [("loss", [1, 3], [3.0, 1.0]), ("eval/loss", [3], [2.0])]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "eval/loss"]


def test_several_runs_share_a_panel_unless_it_names_one(tmp_path, drawn):
    files = [
        write(tmp_path / "sft/metrics.jsonl", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]),
        write(tmp_path / "grpo/metrics.jsonl", [{"step": 1, "loss": 0.0, "rollout/reward": 0.5}]),
    ]
    panels = [
        Panel("Both", ("loss",)),
        Panel("One", ("loss",), run="sft"),
        Panel("Reward", ("rollout/reward",), percent=True),
        Panel("Nothing", ("train/kl",)),
    ]
    draw_curves(files, tmp_path / "curves.png", panels)
    both, one, reward = drawn[0].axes
    assert [label for label, *_ in lines_of(both)] == ["sft", "grpo"]
    assert [steps for _, steps, _ in lines_of(one)] == [[1, 2]]
    assert one.get_legend() is None
    assert reward.yaxis.get_major_formatter()(0.5) == "50%"


def test_many_points_get_a_running_mean_on_top(tmp_path, drawn):
    records = [{"step": i, "loss": float(i % 2)} for i in range(60)]
    draw_curves(write(tmp_path / "a/metrics.jsonl", records), tmp_path / "curves.png")
    (_, _, raw), (_, _, smooth) = lines_of(drawn[0].axes[0])
    assert max(raw) - min(raw) == 1
    assert max(smooth[3:-3]) - min(smooth[3:-3]) < 0.3


def test_running_mean_by_hand():
    # one neighbour on either side, none at the ends: 4, (4 + 1 + 7) / 3, (1 + 7 + 1) / 3, 1
    assert running_mean([4, 1, 7, 1], span=2) == [4, 4, 3, 1]


def test_running_mean_of_a_line_is_the_line():
    assert running_mean(range(20), span=7) == pytest.approx(range(20))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("oops\n", r"metrics\.jsonl:1: .*oops"), ('{"step": 1, "x": 2}\n', "no points to draw")],
)
def test_what_cannot_be_drawn_is_named(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        draw_curves(path, tmp_path / "curves.png")
