"""What is said of files whose columns fit no shape, or the shape of another method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from whet.data.pairs import Pair
from whet.data.problems import Problems
from whet.data.recognise import NAMES, SHAPES, read_items, recognise
from whet.data.rows import parse_sources
from whet.data.shapes import Task, Text, TextPair
from whet.errors import DataError


def refusal(task: Task, *found: str, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        recognise(found, columns or {}, SHAPES[task], "rows.jsonl")
    return str(caught.value)


def test_labelled_completions_are_no_pairs():
    message = refusal("preference", "prompt", "completion", "label")
    assert message.startswith(
        "rows.jsonl has the columns prompt, completion, label: single completions with a label, which kto and bco "
        "read; pairs have chosen and rejected instead; expected prompt + chosen + rejected · "
    )
    assert "which kto and bco read" in refusal("reward", "messages", "kto_tag")


def test_pairs_are_nothing_to_imitate():
    message = refusal("sft", "prompt", "chosen", "rejected")
    assert (
        "pairs of a chosen and a rejected completion, which dpo and its relatives, kto, bco and reward read" in message
    )


@pytest.mark.parametrize("task", ["preference", "reward", "unpaired"])
def test_rows_to_imitate_are_no_judgement(task: Task):
    message = refusal(task, "instruction", "output")
    assert "completions to imitate, which sft reads; a preference has chosen and rejected, or a label" in message


def test_other_names_are_guessed_before_another_method():
    message = refusal("unpaired", "question", "answer", "is_correct")
    assert message.endswith("as in {prompt: question, completion: answer, label: is_correct}")
    # Without its label this could be imitated, too.
    message = refusal("unpaired", "prompt", "completion", "is_correct")
    assert message.endswith("as in {prompt: prompt, completion: completion, label: is_correct}")
    message = refusal("preference", "problem", "winner", "loser")
    assert message.endswith("as in {prompt: problem, chosen: winner, rejected: loser}")


def test_nothing_to_guess_by_leaves_placeholders():
    assert refusal("preference", "a").endswith("{prompt: your_prompt_column, chosen: your_chosen_column, "
                                               "rejected: your_rejected_column}")  # fmt: skip


def read(path: str, task: Task, columns: dict[str, str] | None = None) -> list[Any]:
    return [placed.item for placed in read_items(parse_sources(path), columns or {}, SHAPES[task], Problems())]


@pytest.mark.parametrize("task", ["preference", "reward", "unpaired"])
@pytest.mark.parametrize("name", ["question", "Input"])
def test_a_prompt_of_another_name_is_never_left_out_silently(write_rows: Callable[..., str], task: Task, name: str):
    path = write_rows({"system": "be", name: "q", "chosen": "g", "rejected": "b"})
    with pytest.raises(DataError) as caught:
        read(path, task)
    assert str(caught.value) == (
        f"{path} has '{name}' beside chosen and rejected, which do not begin with it: map it with data.columns "
        f"{{prompt: {name}}}, or, where both hold their prompt, say {{chosen: chosen, rejected: rejected}}"
    )
    assert read(path, task, {"prompt": name}) == [Pair(TextPair("q", "g", "be"), TextPair("q", "b", "be"))]


def test_texts_that_hold_their_prompt_stand_for_themselves(write_rows: Callable[..., str]):
    whole = {"question": "q", "chosen": "q g", "rejected": "q b", "source": "web"}
    assert read(write_rows(whole), "preference") == [Pair(Text("q g"), Text("q b"))]
    both = {"chosen": "chosen", "rejected": "rejected"}
    assert read(write_rows({**whole, "question": "x"}), "preference", both) == [Pair(Text("q g"), Text("q b"))]
    messages = [[{"role": role, "content": "x"} for role in ("user", "assistant")] for _ in range(2)]
    (found,) = read(write_rows({"question": "x", "chosen": messages[0], "rejected": messages[1]}), "preference")
    assert found.chosen.trained_from == 1


def test_a_label_makes_the_shape_of_a_judged_completion():
    assert recognise(["prompt", "completion", "label"], {}, SHAPES["sft"], "").required == ("prompt", "completion")
    assert recognise(["prompt", "completion", "label"], {}, SHAPES["unpaired"], "").required[-1] == "label"


def test_names_of_all_tasks_may_be_mapped():
    assert {"chosen", "rejected", "margin", "label", "kto_tag", "completion", "prompt", "messages"} <= set(NAMES)
    # One that only another task knows is left alone: the same section may serve several.
    assert recognise(["text"], {"margin": "gap"}, SHAPES["sft"], "").required == ("text",)
