"""What is said of files whose columns fit no shape, or the shape of another method."""

from __future__ import annotations

import pytest

from whet.data.recognise import NAMES, SHAPES, recognise
from whet.data.shapes import Task
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
    message = refusal("preference", "problem", "winner", "loser")
    assert message.endswith("as in {prompt: problem, chosen: winner, rejected: loser}")


def test_nothing_to_guess_by_leaves_placeholders():
    assert refusal("preference", "a").endswith("{prompt: your_prompt_column, chosen: your_chosen_column, "
                                               "rejected: your_rejected_column}")  # fmt: skip


@pytest.mark.parametrize("task", ["preference", "reward", "unpaired"])
@pytest.mark.parametrize("name", ["question", "Input"])
def test_a_prompt_of_another_name_is_never_left_out_silently(task: Task, name: str):
    message = refusal(task, "system", name, "chosen", "rejected")
    assert message == (
        f"rows.jsonl has '{name}' beside chosen and rejected: map it with data.columns {{prompt: {name}}}, or, where "
        f"both begin with the prompt, say {{chosen: chosen, rejected: rejected}}"
    )
    found = ("system", name, "chosen", "rejected")
    assert recognise(found, {"prompt": name}, SHAPES[task], "").required == ("prompt", "chosen", "rejected")
    both = {"chosen": "chosen", "rejected": "rejected"}
    assert recognise(found, both, SHAPES[task], "").required == ("chosen", "rejected")


def test_a_label_makes_the_shape_of_a_judged_completion():
    assert recognise(["prompt", "completion", "label"], {}, SHAPES["sft"], "").required == ("prompt", "completion")
    assert recognise(["prompt", "completion", "label"], {}, SHAPES["unpaired"], "").required[-1] == "label"


def test_names_of_all_tasks_may_be_mapped():
    assert {"chosen", "rejected", "margin", "label", "kto_tag", "completion", "prompt", "messages"} <= set(NAMES)
    # One that only another task knows is left alone: the same section may serve several.
    assert recognise(["text"], {"margin": "gap"}, SHAPES["sft"], "").required == ("text",)
