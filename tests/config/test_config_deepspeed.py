"""The backend deepspeed: what it is told, and what does not go with it."""

import pytest

from whet.config.backend import BackendConfig
from whet.config.deepspeed import settings
from whet.config.loader import from_values
from whet.errors import ConfigError


def load(**sections):
    base = {"method": "sft", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
    backend = {"use": "deepspeed", **sections.pop("backend", {})}
    return from_values({**base, **sections, "backend": backend}).config


QLORA = {"path": "m", "adapter": {"rank": 4}, "quantization": {"bits": 4}}
REFUSED = {
    "QLoRA with ZeRO-3": (
        {"model": QLORA, "backend": {"zero_stage": 3}},
        r"backend\.zero_stage is 3, .* model\.quantization cannot be divided: set backend\.zero_stage to 2 .*in 4 bits"
        r".* or remove model\.quantization and hold them in model\.dtype bfloat16",
    ),
    "weights offloaded that are not divided": (
        {"backend": {"offload": "all"}},
        r"backend\.offload is 'all', but with backend\.zero_stage 2 .* set backend\.zero_stage to 3",
    ),
    "fp16": ({"backend": {"precision": "fp16"}}, r"backend\.precision is 'fp16', which .* does not train in; use bf16"),
    "float16 weights": ({"model": {"path": "m", "dtype": "float16"}}, r"model\.dtype is 'float16', which the backend"),
    "an option that whet sets": (
        {"backend": {"options": {"zero_optimization": {"stage": 3}}}},
        r"backend\.options has zero_optimization\.stage, but whet sets it itself, by backend\.zero_stage; remove it",
    ),
    "a section that whet sets": (
        {"backend": {"options": {"optimizer": {"type": "Adam"}}}},
        r"backend\.options has optimizer\.type, but whet sets it itself, by optim; remove it",
    ),
    "another kind of parallelism": (
        {"backend": {"options": {"sequence_parallel_size": 2}}},
        r"has sequence_parallel_size, which is DeepSpeed's Ulysses; set backend\.use to fsdp and backend\.context_para",
    ),
    "matrices divided": ({"backend": {"tensor_parallel": 2}}, r"backend\.tensor_parallel is 2, but the backend deepsp"),
}


@pytest.mark.parametrize("sections,said", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused_with_the_way_out(sections, said):
    sections.setdefault("cluster", {"num_processes": 2})
    with pytest.raises(ConfigError, match=said):
        load(**sections)


def test_what_goes_together_is_accepted():
    load(model=QLORA, backend={"zero_stage": 2})
    load(backend={"zero_stage": 3, "offload": "all"})
    load(backend={"options": {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}})


def test_a_stage_belongs_to_deepspeed_alone():
    with pytest.raises(ConfigError, match=r"backend\.zero_stage is 3, but the backend fsdp does not have it"):
        load(backend={"use": "fsdp", "zero_stage": 3})


def test_deepspeeds_settings_are_ours_and_the_options_beside_them():
    options = {
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": True}},
        "prescale": 1,
    }
    config = BackendConfig(use="deepspeed", zero_stage=3, offload="all", options=options)
    told = settings(config, max_grad_norm=0.5, in_bf16=True)
    zero = told.pop("zero_optimization")
    assert zero == {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"pin_memory": True, "device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert (told["gradient_clipping"], told["bf16"], told["prescale"]) == (0.5, {"enabled": True}, 1)
    assert told["managed_gradient_accumulation"] is False
    assert settings(BackendConfig(), max_grad_norm=None, in_bf16=False)["gradient_clipping"] == 0.0
