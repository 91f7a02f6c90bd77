"""Losses by name: what they declare, and create_loss."""

from __future__ import annotations

import inspect

import pytest
import torch

from whet.columns import COLUMNS
from whet.losses import LOSSES, Loss, create_loss, loss
from whet.tensor.logprobs import EXTRAS


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_declares_what_it_needs(name: str):
    function = LOSSES[name]
    assert isinstance(function, Loss)
    outputs = function.outputs.union(*function.outputs_if.values())
    assert outputs <= EXTRAS | {"logprobs", "log_sum_sq_probs", "values", "scores"}
    assert function.reads <= set(COLUMNS)
    options = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(function.outputs_if) <= options


def test_create_loss_binds_options_and_asks_for_what_they_need(batch_of):
    bound = create_loss("sft", label_smoothing=0.5)
    assert isinstance(bound, Loss) and "mean_logprobs" in bound.outputs
    assert "mean_logprobs" not in create_loss("sft").outputs
    out = {name: torch.tensor([0, -1.0]) for name in bound.outputs} | {"mean_logprobs": torch.tensor([0, -3.0])}
    assert bound(out, batch_of(1))[0].tolist() == [0, 2]  # .5 * 1 + .5 * 3


@pytest.mark.parametrize(
    ("kind", "per"), [("sft", "token"), ("pairwise", "pair"), ("policy", "token"), ("value", "token"), ("kd", "token")]
)
def test_create_loss_knows_kinds(kind: str, per: str):
    assert create_loss(kind).per == per


def test_create_loss_takes_names_too():
    assert create_loss("dft").outputs == LOSSES["dft"].outputs


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sfT", {}, "unknown loss; choose one of"),
        ("sft", {"smoothing": 0.1}, r"unknown options \['smoothing'\]; sft has \['label_smoothing'\]"),
        ("dft", {"x": 1}, "dft has none"),
        ("kd", {"alpha": 0.5}, r"unknown options \['alpha'\]; gkd has \['beta', 'temperature', 'hard'\]"),
    ],
)
def test_create_loss_says_what_is_wrong(kind: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_loss(kind, **options)


def test_a_loss_of_ones_own_is_a_decorated_function():
    @loss(reads=("advantages",), per="sequence", outputs_if={"cap": ("entropy",)})
    def mine(out, batch, *, cap: float = 0.0):
        return out["logprobs"], {}

    assert isinstance(mine, Loss)
    assert (mine.outputs, mine.reads, mine.per) == ({"logprobs"}, {"advantages"}, "sequence")
    assert mine.outputs_if == {"cap": {"entropy"}}
