"""Checkpoints are whole or not there: under SIGKILL, a full disk, and pruning."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whet.checkpoints import save
from whet.checkpoints.resume import newest, verify
from whet.checkpoints.save import MARKER, checkpoints, prune, publish, write
from whet.errors import CheckpointError

SOURCE = str(Path(save.__file__).parents[2])

# A run that writes checkpoint 1, replaces it, and writes and prunes further ones. With a number as
# second argument it kills itself at that event of the file system.
RUN = """
import os, signal, sys
from pathlib import Path
from whet.checkpoints.save import prune, write

root, moment = Path(sys.argv[1]), int(sys.argv[2])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
count = 0

def hook(event, arguments):
    global count
    if event in EVENTS and str(root) in str(arguments[0]):
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

def fill(content):
    def write_files(folder):
        (folder / "part").mkdir()
        for name in ("weights", "part/state"):
            with (folder / name).open("wb") as file:
                for _ in range(64):
                    file.write(content * 4096)
    return write_files

sys.addaudithook(hook)
print("ready", flush=True)
for step, content in [(1, b"a"), (1, b"b"), (2, b"c"), (3, b"d")] if moment else [(s // 2, b"x") for s in range(9999)]:
    print("writing", step, flush=True)
    write(root, step, fill(content))
    print("written", step, flush=True)
    prune(root, 2)
print("events", count, flush=True)
"""


def start(root, moment):
    environment = {**os.environ, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, str(root), str(moment)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


def last_written(output):
    return max((int(line.split()[1]) for line in output.splitlines() if line.startswith("written")), default=None)


def check_after_the_kill(root, output):
    """All that was said to be written is there, whole, and the next run can go on and leaves no rubbish."""
    written = last_written(output)
    found = newest(root)
    if written is not None:
        assert found is not None
        assert verify(found) >= written
        assert (found / "weights").stat().st_size == 64 * 4096
    for folder in checkpoints(root):
        assert (folder / MARKER).is_file(), f"{folder.name} carries its name and is not complete"
    write(root, 99_999, lambda folder: (folder / "weights").write_text("next"))
    assert newest(root).name == "checkpoint-99999"
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
    if found is not None:
        verify(found)


def test_kill_at_every_event_of_the_file_system_leaves_a_whole_checkpoint(tmp_path):
    complete = start(tmp_path / "whole", 10**9).communicate()[0]
    events = int(complete.splitlines()[-1].split()[1])
    assert events > 50
    # Every event of one replacement and the prune after it, and a sample of the others.
    moments = sorted({*range(1, events + 1, 4), *range(events // 4, events // 2)})
    running = []
    for moment in moments:
        running.append((moment, tmp_path / str(moment), start(tmp_path / str(moment), moment)))
        if len(running) == 4 or moment == moments[-1]:
            for _, root, process in running:
                output = process.communicate()[0]
                assert process.returncode == -signal.SIGKILL
                if root.is_dir():
                    check_after_the_kill(root, output)
            running = []


def test_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    delays = random.Random(0)
    for attempt in range(20):
        root = tmp_path / str(attempt)
        process = start(root, 0)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delays.uniform(0.0, 0.06))
        process.kill()
        check_after_the_kill(root, process.communicate()[0]) if root.is_dir() else process.communicate()


def fill_with(text):
    return lambda folder: (folder / "weights").write_text(text)


def test_marker_names_every_file_with_size_and_checksum(tmp_path):
    folder = write(tmp_path / "run", 7, fill_with("hello"))
    assert folder == tmp_path / "run" / "checkpoint-7"
    marker = json.loads((folder / MARKER).read_text())
    # printf hello | b2sum -l 128
    assert marker == {"step": 7, "files": {"weights": {"bytes": 5, "blake2b": "46fb7408d4f285228f4af516ea25851b"}}}


def test_existing_checkpoint_is_replaced(tmp_path):
    write(tmp_path, 1, lambda folder: [(folder / name).write_text("old") for name in ("weights", "extra")])
    write(tmp_path, 1, fill_with("new"))
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", MARKER, "weights"]


def on_a_full_disk(folder):
    (folder / "weights").write_text("half")
    with open("/dev/full", "w") as file:
        file.write("x" * 10)


def without_permission(folder):
    (folder / "weights").write_text("half")
    raise PermissionError(13, "Permission denied", str(folder / "state"))


@pytest.mark.parametrize(
    ("fill", "remedy"), [(on_a_full_disk, "free some space"), (without_permission, "make the folder writable")]
)
def test_disk_error_leaves_the_old_checkpoint_and_nothing_else(tmp_path, fill, remedy):
    write(tmp_path, 1, fill_with("old"))
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=f"checkpoint {step} could not be written.*{remedy}"):
            write(tmp_path, step, fill)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
        verify(tmp_path / "checkpoint-1")
        assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old"


def test_full_disk_under_safetensors_is_recognised(tmp_path):
    def fill(folder):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match="free some space"):
        write(tmp_path, 1, fill)


def test_failure_while_taking_the_name_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    write(tmp_path, 1, fill_with("old"))
    rename = Path.rename

    def refuse(path, target):
        if ".tmp-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path, 1, fill_with("new"))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old"


def test_errors_of_our_own_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, 1, lambda folder: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1, lambda folder: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="output_dir"):
        write(tmp_path / "run", 1, fill_with("x"))


def test_drafts_of_living_processes_are_left_alone(tmp_path):
    living = tmp_path / f".checkpoint-5.tmp-{os.getppid()}"
    dead = tmp_path / ".checkpoint-5.tmp-999999999"
    for folder in (living, dead):
        folder.mkdir()
    write(tmp_path, 1, fill_with("x"))
    assert living.is_dir()
    assert not dead.exists()


def test_reading_does_not_disturb_a_write_in_the_same_process(tmp_path):
    write(tmp_path, 1, fill_with("old"))

    def fill(folder):
        (folder / "weights").write_text("new")
        assert newest(tmp_path).name == "checkpoint-1"
        write(tmp_path, 3, fill_with("other"))
        assert folder.is_dir()

    write(tmp_path, 2, fill)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def names(root):
    return [folder.name for folder in checkpoints(root)]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 10, 1, 30, 4):
        write(tmp_path, step, fill_with(str(step)))
    assert prune(tmp_path, None) == []
    removed = prune(tmp_path, 2, protect=[tmp_path / "checkpoint-2"])
    assert [folder.name for folder in removed] == ["checkpoint-1", "checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-10", "checkpoint-30"]
    for folder in checkpoints(tmp_path):
        verify(folder)


def test_prune_knows_the_best_by_any_path(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step, fill_with("x"))
    monkeypatch.chdir(tmp_path)
    prune(".", 1, protect=[tmp_path / "checkpoint-1"])
    assert names(".") == ["checkpoint-1", "checkpoint-3"]
    prune(tmp_path, 1, protect=[Path("checkpoint-1")])
    assert names(".") == ["checkpoint-1", "checkpoint-3"]


def test_prune_does_not_touch_what_has_no_marker(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for step in (2, 3):
        write(tmp_path, step, fill_with("x"))
    prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_half_removed_checkpoint_does_not_carry_its_name(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step, fill_with("x"))

    def fail(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(save.shutil, "rmtree", fail)
    with pytest.raises(CheckpointError, match="checkpoint-1 cannot be removed"):
        prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_published_folder_within_replaces_one_file_by_file(tmp_path: Path):
    def fill(folder: Path, *names: str) -> None:
        (folder / "critic").mkdir()
        for name in names:
            (folder / name).write_text(name)

    publish(tmp_path, lambda folder: fill(folder, "a", "critic/model.safetensors", "critic/config.json"))
    (tmp_path / "critic" / "notes.txt").write_text("mine")
    publish(tmp_path, lambda folder: fill(folder, "a", "critic/value_head.safetensors"))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["a", "critic/config.json", "critic/notes.txt", "critic/value_head.safetensors"]
