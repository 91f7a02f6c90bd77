"""Plugins: names and dotted paths become objects, keyword-only parameters become checked options."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from whet.config.plugin import options_of, resolve, validated_options
from whet.errors import ConfigError

if TYPE_CHECKING:
    from nowhere import Episode

BUILTINS: dict[str, object] = {"math": "the math reward", "exact": "the exact reward"}


def find(use: str) -> object:
    return resolve(use, BUILTINS, what="reward", where="reward.use (run.yaml, line 4)")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module into the working directory, where the interpreter itself does not look."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(name: str, code: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code), encoding="utf-8")

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_builtin_is_found_by_name():
    assert find("math") == "the math reward"


def test_modules_of_the_working_directory_are_found_both_ways(module):
    module("my_rewards_a.py", "class Graders:\n    exact = 'graded'\ndef exact(): ...\n")
    assert find("my_rewards_a:exact") is find("my_rewards_a.exact")
    assert find("my_rewards_a:Graders.exact") == find("my_rewards_a.Graders.exact") == "graded"


def test_modules_in_folders_and_their_own_imports_are_found(module):
    module("my_package_a/rewards.py", "from my_sibling_a import grade as exact\n")
    module("my_sibling_a.py", "grade = 'sibling'\n")
    assert find("my_package_a.rewards:exact") == find("my_package_a.rewards.exact") == "sibling"


def test_the_import_path_is_left_as_it_was(module, tmp_path: Path):
    module("my_rewards_b.py", "exact = 1\n")
    before = list(sys.path)
    find("my_rewards_b:exact")
    with pytest.raises(ConfigError):
        find("my_rewards_b:wrong")
    assert sys.path == before and str(tmp_path) not in sys.path


def test_an_installed_module_is_found():
    assert find("os.path:join") is find("os.path.join") is __import__("os").path.join


@pytest.mark.parametrize(
    "use,message",
    [
        ("maths", r"reward.use \(run.yaml, line 4\): there is no reward 'maths'; did you mean math\?"),
        ("nothing like it", r"'nothing like it'. Built in: exact, math. Your own is written package.module:attribute"),
        ("", r"there is no reward ''"),
        (":", r"there is no reward ':'"),
        ("a::b", r"there is no reward 'a::b'"),
        ("nowhere_at_all:exact", r"reward 'nowhere_at_all:exact' needs a module 'nowhere_at_all', and there is none"),
        ("nowhere_at_all.exact", r"reward 'nowhere_at_all.exact' needs a module 'nowhere_at_all', and there is none"),
        ("my_rewards_c:exakt", r"my_rewards_c has no 'exakt'; did you mean exact\?"),
        ("my_rewards_c.exakt", r"my_rewards_c has no 'exakt'; did you mean exact\?"),
        ("my_broken_a:exact", r"importing my_broken_a failed: ModuleNotFoundError: No module named 'not_installed'"),
        ("my_broken_b.exact", r"importing my_broken_b failed: ZeroDivisionError"),
        ("my_broken_c.exact", r"importing my_broken_c failed: SyntaxError"),
    ],
)
def test_what_cannot_be_found_is_refused_with_the_reason(module, use: str, message: str):
    module("my_rewards_c.py", "exact = 1\n")
    module("my_broken_a.py", "import not_installed\n")
    module("my_broken_b.py", "1 / 0\n")
    module("my_broken_c.py", "def exact(:\n")
    with pytest.raises(ConfigError, match=message):
        find(use)


def capped(
    out: Episode,
    batch: object,
    *,
    cap: Annotated[float, Field(gt=0, description="Upper bound.")] = 5.0,
    kind: Literal["hard", "soft"] = "hard",
    names: list[str] | None = None,
    count: int,
) -> None: ...


class Grader:
    """A class whose options are those of its constructor."""

    def __init__(self, *, limit: int = 3) -> None: ...

    def __call__(self, episode: Episode, *, scale: float = 1.0) -> float:
        return scale


def options(fn: Any, **given: object) -> dict[str, Any]:
    return validated_options(fn, given, where="loss capped (run.yaml, line 7)")


def test_keyword_only_parameters_become_a_frozen_schema_with_their_metadata():
    schema = options_of(capped)
    assert issubclass(schema, BaseModel) and list(schema.model_fields) == ["cap", "kind", "names", "count"]
    assert schema.model_json_schema()["properties"]["cap"] == {
        "default": 5.0,
        "description": "Upper bound.",
        "exclusiveMinimum": 0,
        "title": "Cap",
        "type": "number",
    }
    checked = schema.model_validate({"count": 1})
    with pytest.raises(ValidationError):
        checked.cap = 1.0  # type: ignore[attr-defined]


def test_options_come_back_with_defaults_and_numbers_read_from_text():
    assert options(capped, cap="1e-6", count=2) == {"cap": 1e-6, "kind": "hard", "names": None, "count": 2}


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(ConfigError) as raised:
        options(capped, cap=-1, kint="soft", kind="sort", names=[1])
    lines = str(raised.value).splitlines()
    where, known = "  - loss capped (run.yaml, line 7): ", " (options: cap, kind, names, count)"
    assert lines == [
        "5 problems in the configuration:",
        f"{where}cap must be greater than 0, got -1{known}",
        f"{where}kind must be one of hard or soft, got 'sort'; did you mean soft?{known}",
        f"{where}names must be a list of texts or null, got [1]{known}",
        f"{where}count is missing{known}",
        f"{where}kint is not an option (value 'soft'); did you mean kind?{known}",
    ]


def test_true_is_no_number_and_infinity_is_none():
    with pytest.raises(ConfigError, match=r"count must be a whole number, got true"):
        options(capped, count=True)
    with pytest.raises(ConfigError, match=r"cap must be a finite number, got inf"):
        options(capped, count=1, cap=float("inf"))


def test_a_limit_that_has_no_words_of_ours_keeps_those_of_pydantic():
    def named(out, *, name: Annotated[str, Field(min_length=2)] = "ab"): ...

    with pytest.raises(ConfigError, match=r"name: string should have at least 2 characters, got 'a'"):
        options(named, name="a")


def test_classes_objects_and_partials_have_options():
    assert options(Grader, limit=5) == {"limit": 5}
    assert options(Grader(), scale="0.5") == {"scale": 0.5}
    assert options(partial(capped, count=3), cap=2)["count"] == 3


def test_a_function_that_takes_any_option_gets_any():
    def anything(out: object, *, known: int = 1, **more: object) -> None: ...

    assert options(anything, other="x") == {"known": 1, "other": "x"}
    assert options(lambda out: None) == {}


def test_options_without_a_type_and_with_a_type_of_ours_are_taken_as_they_are():
    def loose(out, *, this, grader: Grader | None = None): ...

    grader = Grader()
    assert options(loose, this=[1], grader=grader) == {"this": [1], "grader": grader}


def test_a_signature_that_cannot_be_read_is_refused():
    def unknown(out, *, episode: Episode = None): ...

    with pytest.raises(ConfigError, match=r"options of unknown cannot be read from its signature: name 'Episode'"):
        options(unknown)
