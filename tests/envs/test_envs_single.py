"""The default environment: one turn and no words of its own."""

from __future__ import annotations

from whet.envs.registry import build_env
from whet.envs.single import SingleTurn
from whet.rollout.protocols import Observation, Turn
from whet.types import Completion, Prompt


async def test_it_adds_nothing_and_ends_with_the_first_completion():
    env = SingleTurn(Prompt("p", [1], "?"), None)
    assert await env.reset() == Observation(())
    assert await env.step(Completion([5], [-1.0], "stop")) == Turn(done=True)


def test_it_is_the_environment_of_a_run_that_names_none():
    assert build_env(None) is SingleTurn
