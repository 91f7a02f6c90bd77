"""What the backend megatron cannot do is said of the settings alone."""

from __future__ import annotations

from typing import Any

import pytest

from whet.config.loader import from_values
from whet.errors import ConfigError

BASE = {"model.path": "m", "data.train": "d", "backend.use": "megatron"}


@pytest.mark.parametrize(
    "method,settings,said",
    [
        ("sft", {"model.adapter.rank": 4}, "trains plain weights only"),
        ("sft", {"model.attention": "rows"}, "streams of tokens"),
        ("sft", {"model.freeze.layers": 1}, "trains all weights"),
        ("sft", {"backend.precision": "fp16"}, "use bf16"),
        ("sft", {"backend.sequence_parallel": True}, "raise backend.tensor_parallel"),
        ("distill", {"distill.teacher": "t"}, "the probabilities of all words"),
    ],
)
def test_what_megatron_lacks_is_named_with_a_way_out(method: str, settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        from_values({**BASE, **settings}, method=method, where="the test")


def test_options_pass_through_under_megatrons_names():
    flags = {"backend.options.recompute_granularity": "selective", "backend.tensor_parallel": 2}
    config = from_values({**BASE, **flags, "cluster.num_processes": 2}, method="sft", where="the test").config
    assert config.backend.options == {"recompute_granularity": "selective"}
