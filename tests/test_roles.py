"""The models of a run by role: whose weights an engine samples from."""

from __future__ import annotations

import logging

from transformers import AutoTokenizer

from runs import config_of
from whet.recipe import method_of
from whet.roles import Policy, load_policy


def policy_of(folder, tmp_path) -> Policy:
    settings = {"model__path": str(folder), "data__train": "none.jsonl"}
    config = config_of("sft", tmp_path / "run", **settings)
    return load_policy(config, method_of(config), AutoTokenizer.from_pretrained(folder), train=True)


def test_an_engine_shares_the_policys_weights_unless_it_is_to_have_its_own(tiny_qwen, tmp_path, caplog):
    policy = policy_of(tiny_qwen, tmp_path)
    weights = {weight.data_ptr() for weight in policy.backend.model.parameters()}

    def shared(engine) -> bool:
        return all(weight.data_ptr() in weights for weight in engine._forward.model.parameters())

    assert shared(policy.engine())
    with caplog.at_level(logging.INFO, logger="whet"):
        own = policy.engine(own_weights=True)
    assert not shared(own)
    assert own._following is not None
    assert "samples from a copy of the weights" in caplog.text
