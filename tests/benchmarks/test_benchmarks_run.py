"""The cases: every command line names scripts, options and assets that there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import assets
from benchmarks.run import CASES, ROOT, commands


@pytest.mark.parametrize("name", CASES)
def test_a_case_names_scripts_options_and_assets_that_there_are(name):
    case, made = CASES[name], assets.__doc__ or ""
    for command in commands(case, Path("/assets"), Path("/peer")).values():
        _, _, module, *arguments = command
        script = (ROOT / f"{module.replace('.', '/')}.py").read_text() + (ROOT / "benchmarks/measure.py").read_text()
        for argument in arguments:
            if argument.startswith("--"):
                assert f'"{argument}"' in script, f"{module} has no {argument}"
            elif argument.startswith("/assets/"):
                assert re.search(rf"\b{re.escape(argument.removeprefix('/assets/'))}\b", made), f"no {argument} is made"


@pytest.mark.parametrize("name", CASES)
def test_goals_are_about_peers_of_the_case_and_memory_is_better_when_lower(name):
    case = CASES[name]
    assert case.goals.keys() <= case.peers.keys()
    assert case.lower == (case.metric == "peak_mb")


def test_a_precomputed_reference_is_compared_with_a_precomputed_one():
    lines = commands(CASES["dpo-precomputed"], Path("/assets"), Path("/peer"))
    precomputed = {name: "--precompute" in line for name, line in lines.items()}
    assert precomputed == {"whet": True, "trl precomputed": True, "trl on line": False}
