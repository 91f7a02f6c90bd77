"""The pairing harness: order of turns, medians, ratios, and what a failed contestant says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.pair import compare, table, take_turns


def say(folder: Path, name: str, seconds: float) -> list[str]:
    """A command that writes its name into a file, chats, and reports."""
    code = (
        f"import json, os; open({str(folder / 'order')!r}, 'a').write({name!r}); print('chat');"
        f"print(json.dumps(dict(cpu_seconds={seconds}, threads=os.environ['OMP_NUM_THREADS'])))"
    )
    return [sys.executable, "-c", code]


def test_contestants_run_in_turns_with_one_thread(tmp_path):
    reports = take_turns({"a": say(tmp_path, "a", 1), "b": say(tmp_path, "b", 2)}, repeats=2)
    assert (tmp_path / "order").read_text() == "abab"
    assert reports["b"] == [{"cpu_seconds": 2, "threads": "1"}] * 2


def test_the_first_is_compared_with_the_others_by_medians():
    reports = {"a": [{"t": 10}, {"t": 90}, {"t": 12}], "b": [{"t": 6}, {"t": 4}, {"t": 1}]}
    assert compare(reports, "t") == {"metric": "t", "medians": {"a": 12, "b": 4}, "ratios": {"b": 3}}
    assert compare(reports, "t", lower=True)["ratios"] == {"b": 0.333}
    lines = table("title", compare(reports, "t"), reports, {"b": 2.5}).splitlines()
    assert lines[3].split() == ["b", "4.0", "1.0–6.0", "3.00x", "2.5x"]


@pytest.mark.parametrize("code", ["raise ValueError('no luck')", "import sys; sys.stderr.write('no luck')"])
def test_a_contestant_without_a_report_ends_the_comparison_with_its_error(code):
    with pytest.raises(SystemExit, match=r"exited \d without a report[\s\S]*no luck"):
        take_turns({"a": [sys.executable, "-c", code]}, repeats=1)


def test_a_ratio_line_is_json():
    reports = {"a": [{"t": 1.5}], "b": [{"t": 3.0}]}
    assert json.loads(json.dumps(compare(reports, "t")))["ratios"] == {"b": 0.5}
