"""Settings of other libraries that are passed on to them under their own names."""

from __future__ import annotations

import pytest

from whet.config.loader import from_values, load
from whet.errors import ConfigError

RUN = {"model": "m", "data.train": "p.jsonl", "reward": "math"}


def test_flags_with_a_prefix_become_options_of_what_is_chosen():
    flags = [
        *("--model", "m", "--data.train", "p.jsonl", "--reward", "math"),
        *("--engine.use", "sglang", "--sglang-mem-fraction-static", "0.7", "--sglang-enable-metrics"),
        *("--backend.use", "megatron", "--megatron-recompute-granularity", "full"),
    ]
    config = load("grpo", None, flags).config
    assert config.engine.options == {"mem_fraction_static": 0.7, "enable_metrics": True}
    assert config.backend.options == {"recompute_granularity": "full"}


def test_options_of_another_than_the_chosen_one_are_refused():
    with pytest.raises(ConfigError, match=r"vllm_seed is 1 .*but engine\.use is 'sglang'; set it to vllm"):
        from_values({**RUN, "engine.use": "sglang", "vllm_seed": 1}, method="grpo")
    with pytest.raises(ConfigError, match=r"engine\.options is .*the embedded engine"):
        from_values({**RUN, "vllm_seed": 1}, method="grpo")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cluster.num_processes": 2}, "2 processes train.*the backend local is one process"),
        ({"backend.use": "fsdp", "backend.tensor_parallel": 2}, "1 processes train.*multiple of 2"),
        ({"backend.use": "fsdp", "cluster.num_processes": 2, "backend.expert_parallel": 4}, "expert_parallel is 4"),
        ({"backend.zero_stage": 3}, "the backend local does not have it.*deepspeed"),
        ({"backend.use": "fsdp", "backend.pipeline_parallel": 2}, "does not have it.*megatron"),
        ({"cluster.num_nodes": 2, "backend.use": "fsdp"}, "without cluster.address"),
        ({"engine.num_engines": 2}, "the embedded engine"),
        ({"engine.use": "vllm", "engine.cache": "paged"}, "only the embedded engine has it"),
        ({"engine.use": "vllm", "engine.address": "http://a", "engine.num_engines": 2}, "run already"),
        ({"cluster.colocate": True}, "the embedded engine always shares"),
        ({"cluster.colocate": True, "engine.use": "vllm"}, "engine.sleep is false.*--vllm-gpu-memory-utilization 0.4"),
        ({"cluster.colocate": True, "engine.use": "vllm", "engine.address": "http://a"}, "run where they are"),
        (
            {"cluster.colocate": True, "engine.use": "sglang", "engine.sleep": True, "engine.num_engines": 2},
            "2 x 1 = 2, but with cluster.colocate engines share the 1 GPU",
        ),
        ({"cluster.address": "ray://head:10001"}, "another service of Ray.*ray job submit"),
        ({"cluster.address": "head"}, "give host:port, or auto"),
    ],
)
def test_what_does_not_go_together_is_told(given: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        from_values({**RUN, **given}, method="grpo")


def test_layouts_that_fit_are_accepted():
    config = from_values(
        {**RUN, "backend.use": "fsdp", "backend.tensor_parallel": 2, "cluster.num_processes": 4}, method="grpo"
    ).config
    assert (config.cluster.size, config.backend.model_parallel) == (4, 2)
