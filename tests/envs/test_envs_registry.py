"""Environments are found by name or dotted path, with their options checked first."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.config.base import Plugin
from whet.envs.registry import build_env
from whet.envs.single import SingleTurn
from whet.errors import ConfigError
from whet.types import Prompt

MODULE = """
class Maze:
    def __init__(self, prompt, tokenizer, *, width: int, deep: bool = False):
        self.prompt, self.tokenizer, self.width, self.deep = prompt, tokenizer, width, deep

number = 5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_mazes.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_mazes"


def test_the_built_in_environment_has_a_name():
    assert build_env(Plugin(use="single")) is SingleTurn


def test_an_environment_of_a_user_is_made_with_prompt_tokenizer_and_options(mine: str):
    prompt = Prompt("p", [1], "?")
    env = build_env(Plugin(use=f"{mine}:Maze", width=3))(prompt, "a tokenizer")
    assert (env.prompt, env.tokenizer, env.width, env.deep) == (prompt, "a tokenizer", 3, False)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use": "singel"}, "single"),
        ({"use": "single", "width": 3}, "width"),
        ({"use": "my_mazes:Maze"}, "width"),
        ({"use": "my_mazes:Maze", "width": "wide"}, "width"),
        ({"use": "my_mazes:number"}, "int"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_it(mine: str, settings: dict, told: str):
    with pytest.raises(ConfigError, match="env") as caught:
        build_env(Plugin(**settings))
    assert told in str(caught.value)
