"""Mixtures of losses: options go where they belong, and what cannot be mixed is told."""

from __future__ import annotations

import inspect

import pytest

from whet.config.mixture import OPTIONS, OWN, expand, strangers
from whet.losses import LOSSES
from whet.methods import METHODS


def test_the_options_known_here_are_those_of_the_losses():
    for name, function in LOSSES.items():
        parameters = inspect.signature(function).parameters.values()
        if name in OPTIONS:
            assert OPTIONS[name] == {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}, name
    assert set(LOSSES) - set(OPTIONS) == {"kl", "entropy_bonus", "value"}  # terms that have settings of their own


def test_without_a_list_nothing_changes():
    values = {"loss": {"use": "ipo", "beta": 0.1}}
    assert expand(values) == [] and values == {"loss": {"use": "ipo", "beta": 0.1}}


def test_a_list_of_one_is_the_loss_itself():
    values = {"loss": {"use": ["ipo"], "coef": [0.5], "beta": 0.1}}
    assert expand(values) == [] and values == {"loss": {"use": "ipo", "coef": 0.5, "beta": 0.1}}


def test_one_coefficient_goes_with_the_methods_own_loss():
    values = {"loss": {"coef": [0.5]}}
    assert expand(values) == [] and values == {"loss": {"coef": 0.5}}


def test_without_coefficients_all_count_once():
    values = {"loss": {"use": ["sigmoid", "hinge"], "beta": 0.2}}
    assert expand(values) == []
    assert values == {
        "terms": [{"use": "sigmoid", "coef": 1.0, "beta": 0.2}, {"use": "hinge", "coef": 1.0, "beta": 0.2}]
    }


def test_an_option_goes_to_those_that_have_it_and_to_losses_of_ones_own():
    values = {"loss": {"use": ["sigmoid", "my.losses:mine", "sppo_hard"], "label_smoothing": 0.1}}
    assert expand(values) == []
    assert [sorted(term) for term in values["terms"]] == [
        ["coef", "label_smoothing", "use"],
        ["coef", "label_smoothing", "use"],
        ["coef", "use"],
    ]


@pytest.mark.parametrize(
    "values,message",
    [
        ({"loss": {"use": ["sigmoid", "sft"], "coef": [1.0]}}, "but there are 2 losses"),
        ({"loss": {"use": ["sigmoid", 3]}}, "a mixture is a list of names"),
        ({"loss": {"use": ["sigmoid", "ipo"], "coef": [1.0, True]}}, "true is not a number"),
        ({"loss": {"use": ["sft", "nll"]}}, "names no preference loss"),
        ({"loss": {"use": []}}, "names no preference loss"),
        ({"loss": {"use": ["sigmoid", "sft"]}, "nll_coef": 0.5}, "say the same; keep one"),
        ({"loss": {"use": ["sigmoid", "ipo"]}, "terms": [{"use": "hinge"}]}, "both given; keep one"),
        ({"loss": {"use": ["ipo", "hinge"], "label_smoothing": 0.1}}, "ipo or hinge has no such option"),
        ({"loss": {"coef": [0.5, 0.5]}}, "but there are 1 losses"),
    ],
)
def test_what_cannot_be_mixed_is_told_and_left_as_it_is(values: dict, message: str):
    before = repr(values)
    problems = expand(values)
    assert len(problems) == 1 and message in problems[0]
    assert repr(values) == before


def test_the_own_losses_known_here_are_those_of_the_methods():
    assert {name: OWN[name] for name in METHODS} == {name: method.terms[0].name for name, method in METHODS.items()}


def test_options_that_no_loss_has_are_strangers():
    assert strangers({"use": "ipo", "beta": 0.1, "label_smoothing": 0.1, "coef": 1}, "dpo") == ["label_smoothing"]
    assert strangers({"use": ["ipo", "sigmoid"], "label_smoothing": 0.1, "tau": 1}, "dpo") == ["tau"]
    assert strangers({"use": ["ipo", "sft"], "label_smoothing": 0.1}, "dpo") == ["label_smoothing"]
    assert strangers({"beta": 0.1, "gamma": 1.0}, "cpo") == ["gamma"]
    assert strangers({"use": "mine:loss", "anything": 1}, "dpo") == []
