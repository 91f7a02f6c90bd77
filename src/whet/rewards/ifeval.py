"""The reward `ifeval`: 1 for a response that follows all instructions of its row, else 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from whet.rewards.instructions import instructions
from whet.types import Episode, Prompt


class IFEvalReward:
    """Verifies the instructions in `metadata.instruction_id_list` and `metadata.kwargs`, offline.

    `loose` also accepts what follows them without its first line, its last line, or its asterisks: an introduction
    or a closing phrase is no offence then.
    Source: Zhou et al. 2023 (arXiv:2311.07911), section 2.
    """

    def __init__(
        self,
        *,
        mode: Literal["strict", "loose"] = "strict",
        partial: Annotated[bool, Field(description="The share of instructions followed, in place of 0.")] = False,
    ) -> None:
        self._loose, self._partial = mode == "loose", partial

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt whose metadata holds no instructions that can be verified."""
        instructions(prompt.metadata)

    def __call__(self, episode: Episode) -> float:
        response = episode.response.rpartition("</think>")[2]
        texts = list(variants(response)) if self._loose else [response]
        listed = instructions(episode.prompt.metadata)
        followed = sum(any(instruction.followed(text) for text in texts) for instruction in listed)
        return followed / len(listed) if self._partial else float(followed == len(listed))


def variants(response: str) -> Iterator[str]:
    """A response as it is, without its first and its last line, and each of these without asterisks."""
    lines = response.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip()
        yield text
        yield text.replace("*", "")
