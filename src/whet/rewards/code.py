"""The reward `code`: 1 for a program that passes its unit tests, run in a sandbox, else 0."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from whet.rewards.sandbox.pool import Isolation, Limits, shared_sandbox
from whet.rewards.unit_tests import UnitTests, unit_tests
from whet.types import Episode, Prompt

_FENCED = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*(?:```|~~~)", re.M | re.S)
_PYTHON = ("", "python", "python3", "py")


class CodeReward:
    """Runs the last fenced block of Python in a response (the whole response without one) against the label.

    The label holds the tests: `{inputs, outputs}` of whole programs, with `fn_name` of a function; or assertions, as
    a list or as text (see `unit_tests`). What is expected stays outside of the sandbox; only values come out of it.
    `answer_timeout_s` bounds all tests of one answer together.
    """

    def __init__(
        self,
        *,
        answer_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for all tests of an answer.")] = 10.0,
        memory_mb: Annotated[int, Field(ge=64, description="Most memory of a program, in MiB.")] = 512,
        partial: Annotated[bool, Field(description="The share of tests that pass, in place of 0.")] = False,
        isolation: Annotated[Isolation, Field(description="Of the sandbox; `none` is for trusted models.")] = "auto",
    ) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._memory_bytes = memory_mb << 20
        self._partial = partial
        self._sandbox = shared_sandbox(isolation)
        self.max_concurrent = self._sandbox.num_servers

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose label holds no tests."""
        unit_tests(prompt.label)

    async def __call__(self, episode: Episode) -> float:
        """Raises ValueError for a label without tests, RewardError if the sandbox does not start."""
        tests = unit_tests(episode.prompt.label)
        program = program_in(episode.response)
        passed = await self._passed(program, tests) if program.strip() else 0
        return passed / len(tests) if self._partial else float(passed == len(tests))

    async def _passed(self, program: str, tests: UnitTests) -> int:
        """How many tests a program passes; without `partial`, those before the first that it does not."""
        if tests.calls:
            run = await self._sandbox.call(program, [call.asked for call in tests.calls], self._limits(0.0))
            results = [*run.results, *[LookupError("not finished")] * len(tests.calls)]
            return sum(call.holds(value) for call, value in zip(tests.calls, results, strict=False))
        passed, spent = 0, 0.0
        for case in tests.cases:
            if spent >= self._answer_timeout_s:
                break
            run = await self._sandbox.run(program, case.stdin, self._limits(spent))
            spent += run.wall_s
            right = run.ended == "exit 0" and case.holds(run.output)
            passed += right
            if not right and (not self._partial or run.ended == "lost"):
                break
        return passed

    def _limits(self, spent_s: float) -> Limits:
        return Limits(self._answer_timeout_s - spent_s, self._memory_bytes)


def program_in(response: str) -> str:
    """The program in a response: after any thinking, its last fenced block of Python, else all of it."""
    answer = response.rpartition("</think>")[2]
    blocks = [code for language, code in _FENCED.findall(answer) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else answer
