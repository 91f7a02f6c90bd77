"""Launch scripts are read, never run: variables and arrays are put in, and every word knows its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.errors import ConfigError
from whet.migrate.shell import Script, command_with, flags_of, read_script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def read(text: str) -> Script:
        Path("run.sh").write_text(text, encoding="utf-8")
        return read_script("run.sh")

    return read


def last(script: Script) -> list[str]:
    return [word.text for word in script.commands[-1]]


@pytest.mark.parametrize(
    "text,words",
    [
        ("run a b", ["run", "a", "b"]),
        ("run 'a b' \"c d\"", ["run", "a b", "c d"]),
        ("run a'b'\"c\"", ["run", "abc"]),
        ("run a \\\n  b", ["run", "a", "b"]),
        ("run a # b", ["run", "a"]),
        ("run a#b", ["run", "a#b"]),
        ("run ''", ["run", ""]),
        ("run a\\ b", ["run", "a b"]),
        ('run "a \\"b\\" \\$c"', ["run", 'a "b" $c']),
        ("A=1\nrun $A ${A}2 \"$A\" '$A'", ["run", "1", "12", "1", "$A"]),
        ("A='x y'\nrun $A", ["run", "x", "y"]),
        ("A='x y'\nrun \"$A\" p${A}q", ["run", "x y", "px", "yq"]),
        ("A=\nrun $A end", ["run", "end"]),
        ('A=\nrun "$A" end', ["run", "", "end"]),
        ("A=1\nA+=2\nrun $A", ["run", "12"]),
        ("A=1\nA=2\nrun $A", ["run", "2"]),
        ("A=1 B=2 run x\nrun $A$B", ["run", "12"]),
        ("export A=1\nrun $A", ["run", "1"]),
        ("run ${A:-7} ${B:-$C}${D-}", ["run", "7", "${C}"]),
        ("run ${1:-8} ${A:=4}", ["run", "8", "4"]),
        ("A=(1 2\n 3)\nrun ${A[@]}", ["run", "1", "2", "3"]),
        ('A=(1)\nA+=(2)\nrun "${A[@]}"', ["run", "1", "2"]),
        ("A=(1)\nA += ( 2 )\nrun ${A[@]}", ["run", "1", "2"]),
        ("A=(a 'b c' # why\n #d\n)\nrun ${A[*]}", ["run", "a", "b c"]),
        ("A=(1)\nB=(${A[@]} 2)\nrun ${B[@]}", ["run", "1", "2"]),
        ("A=(1 2)\nrun $A ${B[@]} x", ["run", "1", "x"]),
        ("A=()\nrun ${A[@]} x", ["run", "x"]),
        ("run a | tee b", ["tee", "b"]),
        ("run a && run b; run c", ["run", "c"]),
        ("run --a 1 2>&1 | tee log", ["tee", "log"]),
        ("run --a 1 > log 2>&1", ["run", "--a", "1"]),
        ("run --a 1 &>> log", ["run", "--a", "1"]),
        ("cat > f <<'EOF'\ndon't (\nEOF\nrun x", ["run", "x"]),
        ("if [ 1 ]; then run a; fi", ["run", "a"]),
    ],
)
def test_words_are_those_that_bash_would_make(script, text: str, words: list[str]):
    assert last(script(text)) == words


def test_what_the_script_takes_from_elsewhere_is_known_as_such(script):
    read = script('N=$(nproc)\nBASE=${ROOT}/m\nrun $N "$BASE" `date` ok')
    assert [word.unknown for word in read.commands[-1]] == [(), ("$(nproc)",), ("${ROOT}",), ("$(date)",), ()]
    assert last(read)[2] == "${ROOT}/m"


def test_nothing_is_run(script, tmp_path: Path):
    script(f"touch {tmp_path / 'made'}\nA=$(touch {tmp_path / 'made'})\nrun `touch {tmp_path / 'made'}` $A")
    assert not (tmp_path / "made").exists()


def test_every_word_knows_where_it_was_written(script):
    read = script("ARGS=(\n  --lr 1\n\n  --seed 2\n)\nrun --last \\\n  3 ${ARGS[@]}\n")
    assert [(word.text, word.line) for word in read.commands[-1]] == [
        *(("run", 6), ("--last", 6), ("3", 7)),
        *(("--lr", 2), ("1", 2), ("--seed", 4), ("2", 4)),
    ]
    assert read.commands[-1][0].source == "run.sh, line 6"


def test_a_text_over_several_lines_is_one_word_and_lines_go_on_behind_it(script):
    read = script('A="{\n  \\"a\\": 1\n}"\nrun "$A" x\n')
    assert last(read) == ["run", '{\n  "a": 1\n}', "x"]
    assert read.commands[-1][0].line == 4


def test_files_that_are_sourced_are_read_and_those_not_there_are_told(script, tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.sh").write_text("MODEL=(--layers 2)\n")
    read = script(
        'DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"\n'
        'source "${DIR}/models/tiny.sh"\n. models/big.sh\nrun ${MODEL[@]}\n'
    )
    assert last(read) == ["run", "--layers", "2"]
    assert read.commands[-1][1].source == "models/tiny.sh, line 1"
    assert read.missing == ["models/big.sh (run.sh, line 3)"]


def test_a_folder_above_the_scripts_own_is_found(script, tmp_path: Path):
    (tmp_path / "args.sh").write_text("A=(x)\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "run.sh").write_text(
        'D=$(dirname "$0")/..\nsource "$(dirname "$0")/../args.sh"\nrun ${A[@]}\n'
    )
    assert [word.text for word in read_script("jobs/run.sh").commands[-1]] == ["run", "x"]


def test_a_script_that_sources_itself_ends(script):
    assert last(script(". run.sh\nrun a")) == ["run", "a"]


def test_lines_of_conditions_are_kept(script):
    read = script("if [ $A ]; then\n  B=1\nelse\n  B=2\nfi\nfor i in 1 2; do\n run $B\ndone\n")
    assert read.branches == [1, 6]
    assert last(read) == ["run", "2"]


@pytest.mark.parametrize(
    "text,message",
    [
        ("run a\nA=(1\n  2\n", "run.sh, line 2: the parenthesis is never closed"),
        ("run a\n\nrun 'b\n", "run.sh, line 3: a quote or bracket in this word is never closed"),
        ('run "b\n', "run.sh, line 1: a quote"),
        ("run $(b\n", "run.sh, line 1: a quote"),
        ("run ${b\n", "run.sh, line 1: a quote"),
    ],
)
def test_what_is_never_closed_is_told_with_its_line(script, text: str, message: str):
    with pytest.raises(ConfigError) as raised:
        script(text)
    assert message in str(raised.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.sh: No such file"):
        read_script(str(tmp_path / "none.sh"))
    (tmp_path / "bytes.sh").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_script(str(tmp_path / "bytes.sh"))


def test_flags_hold_the_words_behind_them(script):
    command = script("run x --a 1 2 --b --c=3 --a-b 4 ... --b 5").commands[-1]
    flags, loose = flags_of(command)
    assert {name: [word.text for word in words[1:]] for name, words in flags.items()} == {
        "a": ["1", "2"],
        "b": ["5"],
        "c": ["3"],
        "a_b": ["4"],
    }
    assert [word.text for word in loose] == ["run", "x"]


def test_the_last_command_with_a_name_is_found_by_the_end_of_its_path(script):
    read = script("python old/train.py 1\npython new/train.py 2\necho done")
    found = command_with(read, ["train.py"])
    assert found is not None and found[0][found[1] + 1].text == "2"
    assert command_with(read, ["other.py"]) is None
