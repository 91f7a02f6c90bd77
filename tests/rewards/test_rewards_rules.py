"""Rewards that follow a rule: `deepscaler`, `dapo`, `f1`, `gpqa`, `boxed_…`."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from whet.config.rollout import RewardConfig
from whet.errors import ConfigError
from whet.rewards.deepscaler import DeepScalerReward
from whet.rewards.exact import ExactReward
from whet.rewards.f1 import token_f1
from whet.rewards.gpqa import chosen_letter
from whet.rewards.registry import build_scorer
from whet.types import Episode, Prompt


def an_episode(response: str, label: Any, **metadata: Any) -> Episode:
    return Episode(
        Prompt("p", [1], "?", label=label, metadata=metadata), "g0", 0, response=response, status="completed"
    )


async def reward(use: str, response: str, label: Any, **options: Any) -> float | None:
    episode = an_episode(response, label)
    await build_scorer(RewardConfig(use=use, **options)).score(episode)
    assert episode.status == "completed", episode.error
    return episode.reward


# deepscaler


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"<think>\boxed{5}</think>so it is \boxed{4}", 1.0),
        (r"<think>\boxed{4}</think>so it is \boxed{5}", 0.0),
        (r"<think>a</think>\boxed{5}</think>\boxed{4}", 1.0),
        (r"hm</think> 4", 1.0),
        (r"so it is \boxed{4}", 0.0),
        (r"<think>it is \boxed{4}", 0.0),
        (r"\boxed{4}</think>", 0.0),
    ],
)
async def test_deepscaler_grades_what_follows_the_last_thought(response: str, expected: float):
    assert await reward("deepscaler", response, 4) == expected


async def test_a_whole_batch_without_a_thought_is_warned_of(caplog: pytest.LogCaptureFixture):
    scorer = build_scorer(RewardConfig(use="deepscaler"))

    async def batch(*responses: str) -> str:
        episodes = [an_episode(response, 4) for response in responses]
        for episode in episodes:
            await scorer.score(episode)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "whet"):
            scorer.report_failures(episodes)
        return caplog.text

    assert "not one of 2 responses has </think> in it" in await batch(r"\boxed{4}", "5")
    assert await batch("x</think>4", "5") == ""


async def test_only_the_episodes_that_deepscaler_judged_are_looked_at(caplog: pytest.LogCaptureFixture):
    scorer = build_scorer(RewardConfig(use="deepscaler"))
    other = an_episode("fox", "fox", rm_type="f1")
    await scorer.score(other)
    with caplog.at_level(logging.WARNING, "whet"):
        scorer.report_failures([other])
    assert caplog.text == ""


def test_deepscaler_needs_a_label_like_math():
    with pytest.raises(ValueError, match="label is None"):
        DeepScalerReward().check(Prompt("p", [1], "?"))


# dapo


@pytest.mark.parametrize(
    ("response", "label", "score", "pred"),
    [
        ("so\nAnswer: 4", 4, 1.0, "4"),
        ("Answer: 5\nno,\nAnswer: 4", 4, 1.0, "4"),
        ("Answer: 4\nno,\nAnswer: 5", 4, -1.0, "5"),
        ("Answer: $\\frac{2}{4}$", "1/2", 1.0, "$\\frac{2}{4}$"),
        ("**Answer:** 4", 4, 1.0, "4"),
        ("**Answer: 4**", 4, 1.0, "4"),
        ("Answer: \\boxed{4}", 4, 1.0, "\\boxed{4}"),
        ("answer : 1,000", 1000, 1.0, "1,000"),
        ("Answer:", 4, -1.0, ""),
        ("Answer:\n4", 4, -1.0, ""),
        ("it is 4", 4, -1.0, ""),
        ("Answer: 0", 0, 1.0, "0"),
        ("Answer: 4" + " " * 292, 4, -1.0, ""),
        ("Answer: 4" + " " * 291, 4, 1.0, "4"),
    ],
)
async def test_dapo_grades_the_last_answer_line_of_the_last_300_characters(
    response: str, label: Any, score: float, pred: str
):
    scorer = build_scorer(RewardConfig(use="dapo"))
    episode = an_episode(response, label)
    await scorer.score(episode)
    assert episode.rewards == {"dapo": score, "dapo/score": score, "dapo/acc": (score + 1) / 2}
    given = await scorer.rewards[0].reward(episode)
    assert given == {"score": score, "acc": (score + 1) / 2, "pred": pred}


# f1


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        # 2 shared words of 2 and 3: 2 x 1 x 2/3 / (1 + 2/3) = 0.8
        ("the brown fox", "a quick brown fox", 0.8),
        ("The Brown, Fox!", "brown fox", 1.0),
        ("fox fox", "fox", 2 / 3),
        ("cat", "fox", 0.0),
        ("", "fox", 0.0),
        ("the", "an", 1.0),
        ("", "", 1.0),
    ],
)
def test_f1_counts_shared_words(answer: str, reference: str, f1: float):
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert token_f1(reference, answer) == pytest.approx(f1)


async def test_of_several_labels_the_best_counts():
    assert await reward("f1", "a fox", ["cat", "fox"]) == 1.0
    assert await reward("f1", "0", 0) == 1.0


# gpqa


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is based on A", "A"),
        ("the answer is (B).", "B"),
        ("The answer is B", "B"),
        ("Answer: **C**", "C"),
        ("Answer: option C", "C"),
        ("**Answer: A** and the rest", "A"),
        ("Answer: A because the others fail", "A"),
        ("First I thought the answer is A, but the answer is D.", "D"),
        (r"so \boxed{D}, not A", "D"),
        (r"\boxed{\text{(B)}}", "B"),
        ("The answer is C. 5 meters", "C"),
        ("<think>The answer is A</think> It is D.", "D"),
        ("A proton is heavier. So it is B", "B"),
        ("B", "B"),
        ("(d)", None),
        ("The answer is a matter of taste", None),
        ("Answer: A proton", None),
        ("The answer is B-type", None),
        ("answer is Based", None),
        ("ABCD", None),
        ("The answer is E", None),
        ("I'd say nothing", None),
        ("", None),
    ],
)
def test_the_letter_that_a_response_settles_on_is_found(response: str, letter: str | None):
    assert chosen_letter(response) == letter


async def test_gpqa_compares_letters():
    assert await reward("gpqa", "answer is based on A", "A") == 1.0
    assert await reward("gpqa", "answer is based on A", "B") == 0.0
    assert await reward("gpqa", "Answer: F", "F") == 1.0


async def test_the_label_may_be_the_text_of_a_choice():
    episode = an_episode("Answer: B", "fox", choices=["cat", "fox"])
    await build_scorer(RewardConfig(use="gpqa")).score(episode)
    assert episode.reward == 1.0
    # Of two choices, C is none.
    third = an_episode("Answer: B. (C is no choice) C", "fox", choices=["cat", "fox"])
    await build_scorer(RewardConfig(use="gpqa")).score(third)
    assert third.reward == 1.0


@pytest.mark.parametrize(
    "use,label", [("gpqa", "fox"), ("gpqa", None), ("gpqa", ""), ("f1", None), ("f1", []), ("f1", {})]
)
async def test_a_label_that_cannot_be_compared_fails_the_episode(use: str, label: Any):
    episode = an_episode("B", label)
    await build_scorer(RewardConfig(use=use)).score(episode)
    assert episode.status == "failed" and "the label is" in (episode.error or "")


# boxed_…


@pytest.mark.parametrize(
    ("use", "response", "label", "expected"),
    [
        ("boxed_f1", r"a cat, no: \boxed{the brown fox}", "a quick brown fox", 0.8),
        ("boxed_f1", "the brown fox", "a quick brown fox", 0.0),
        ("boxed_exact", r"\boxed{a} \boxed{ b }", "b", 1.0),
        ("boxed_gpqa", r"Answer: A. \boxed{(B)}", "B", 1.0),
        ("boxed_gpqa", "Answer: B", "B", 0.0),
        ("boxed_math", r"3, then \boxed{\frac{2}{4}}, not 4", "0.5", 1.0),
        ("boxed_math", "it is 4", 4, 0.0),
        ("boxed_math", r"\boxed{}", 0, 0.0),
    ],
)
async def test_boxed_rewards_see_the_last_box_alone(use: str, response: str, label: Any, expected: float):
    assert await reward(use, response, label) == pytest.approx(expected)


async def test_a_box_leaves_the_episode_as_it_was():
    episode = an_episode(r"so \boxed{fox}", "fox")
    await build_scorer(RewardConfig(use="boxed_exact")).score(episode)
    assert episode.response == r"so \boxed{fox}" and episode.rewards == {"boxed_exact": 1.0}


def test_boxed_rewards_check_prompts_and_take_options():
    scorer = build_scorer(RewardConfig(use="boxed_math", ordered=False))
    with pytest.raises(ValueError, match="label is None"):
        scorer.check([Prompt("p", [1], "?")])


@pytest.mark.parametrize(
    ("use", "told"),
    [
        ("boxed_deepscaler", "no box holds"),
        ("boxed_dapo", "no box holds"),
        ("boxed_maths", "did you mean math"),
        ("boxed_", "no built-in reward"),
        ("boxed_my.rewards:f", "built-in"),
    ],
)
def test_what_cannot_be_boxed_is_refused(use: str, told: str):
    with pytest.raises(ConfigError, match=told):
        build_scorer(RewardConfig(use=use))


@pytest.mark.parametrize(
    ("options", "response", "label", "reward"),
    [
        ({}, " fox ", "fox", 1.0),
        ({}, "The fox.", "fox", 0.0),
        ({}, "fox", ["wolf", "fox"], 1.0),
        ({"normalize": True}, "The Fox.", "fox", 1.0),
        ({"within": "answer"}, "fox", "fox", 0.0),
        ({"within": "answer"}, "<answer>wolf</answer> no, <answer>\nfox </answer>.", "fox", 1.0),
        ({"within": "answer"}, "<answer>fox", "fox", 0.0),
        ({"within": "answer", "normalize": True}, "<answer>A fox!</answer>", ["the fox"], 1.0),
    ],
)
def test_exact_compares_what_it_is_told_to(options: dict, response: str, label: object, reward: float):
    judge = ExactReward(**options)
    episode = Episode(Prompt("p", [1], "?", label), "g", 0, response=response)
    assert judge(episode) == reward
    # Of several turns it is the last that counts.
    episode.response, episode.answer = "first <tool> " + response, response
    assert judge(episode) == reward
