"""Which checkpoint a run goes on from."""

import logging
import shutil

import pytest

from whet.checkpoints.resume import choose, newest, verify
from whet.checkpoints.save import MARKER, write
from whet.errors import CheckpointError


@pytest.fixture
def root(tmp_path):
    for step in (5, 20, 100):
        write(tmp_path / "run", step, lambda folder: (folder / "weights").write_text("0123456789"))
    return tmp_path / "run"


def damage(folder, kind):
    weights = folder / "weights"
    match kind:
        case "marker":
            (folder / MARKER).unlink()
        case "marker cut":
            (folder / MARKER).write_text('{"step": 100, "fi')
        case "missing":
            weights.unlink()
        case "short":
            weights.write_text("012345678")
        case "bit":
            weights.write_text("0123456788")


SAID = {
    "marker": f"no {MARKER}",
    "marker cut": f"{MARKER} cannot be read",
    "missing": "weights is missing",
    "short": "9 bytes, expected 10",
    "bit": "checksum differs",
}


def test_newest_goes_by_number(root, tmp_path):
    assert newest(root) == root / "checkpoint-100"
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path) is None


@pytest.mark.parametrize("kind", SAID)
def test_damaged_checkpoints_are_passed_over_by_name(root, kind, caplog):
    damage(root / "checkpoint-100", kind)
    with caplog.at_level(logging.WARNING, logger="whet"):
        assert newest(root) == root / "checkpoint-20"
    assert "checkpoint-100" in caplog.text
    assert SAID[kind] in caplog.text
    with pytest.raises(CheckpointError, match=SAID[kind]):
        verify(root / "checkpoint-100")
    with pytest.raises(CheckpointError, match=SAID[kind]):
        choose(str(root / "checkpoint-100"), root)


def test_verify_returns_the_step_wherever_the_folder_was_put(root, tmp_path):
    assert verify(root / "checkpoint-20") == 20
    shutil.copytree(root / "checkpoint-20", tmp_path / "kept")
    assert verify(tmp_path / "kept") == 20


def test_auto_takes_the_newest_or_starts_afresh(root, tmp_path):
    assert choose("auto", root) == root / "checkpoint-100"
    assert choose("auto", tmp_path / "new") is None


def test_true_insists(root, tmp_path):
    assert choose(True, root) == root / "checkpoint-100"
    with pytest.raises(CheckpointError, match=r"has no checkpoint; .*checkpoint\.resume: auto"):
        choose(True, tmp_path / "new")


def test_false_refuses_a_folder_that_has_one(root, tmp_path):
    assert choose(False, tmp_path / "new") is None
    with pytest.raises(CheckpointError, match=r"has checkpoint-100.*new folder"):
        choose(False, root)


@pytest.mark.parametrize("resume", ["auto", True])
def test_nothing_is_started_afresh_over_damaged_checkpoints(root, resume):
    for folder in root.iterdir():
        damage(folder, "marker")
    with pytest.raises(CheckpointError, match="checkpoint-5, checkpoint-20, checkpoint-100, none of which is complete"):
        choose(resume, root)


def test_path_is_taken_from_anywhere(root, tmp_path):
    assert choose(str(root / "checkpoint-5"), tmp_path / "other") == root / "checkpoint-5"


def test_path_that_is_none_is_refused_with_what_there_is(root):
    with pytest.raises(CheckpointError, match=r"no folder .*checkpoint-7; .*has checkpoint-5, checkpoint-20"):
        choose(str(root / "checkpoint-7"), root)
    with pytest.raises(CheckpointError, match=r"holds checkpoints but is none; give .*checkpoint-100"):
        choose(str(root), root)
