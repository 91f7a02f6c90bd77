"""Weights on their way to a server: what arrives, what it is called, and what is said when it does not arrive."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from pathlib import Path

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model

from server_engines import Place, Trainer, engine_of
from whet.errors import EngineError
from whet.served import _scales
from whet.types import Sampling
from whet.weights.checkpoint_names import Naming, adapter_parameters, as_checkpoint
from whet.weights.files import PREFIX
from whet.weights.snapshot import Snapshot
from whet.weights.stamp import stamp

PROMPT = list(b"What is it?")


@pytest.fixture
def trainer(sglang_server: Place) -> Trainer:
    return Trainer(sglang_server.model)


@pytest.fixture
async def make(sglang_server: Place, trainer: Trainer, tmp_path: Path):
    """Engines on the one server, which has the trainer's weights to begin with, and is left with them."""
    made = []

    async def make(told=None, **settings):
        publish = {"verify": "always", **settings.pop("publish", {})}
        engine = engine_of(
            "sglang", trainer, tmp_path, told=told, address=sglang_server.address, publish=publish, **settings
        )
        made.append(engine)
        await engine.update_weights(trainer.snapshot(0))
        return engine

    yield make
    for engine in made:
        await engine.close()


def difference(trainer: Trainer, completion) -> float:
    expected = trainer.expected((*PROMPT, *completion.tokens), len(completion.tokens))
    return max(abs(a - b) for a, b in zip(expected, completion.logprobs, strict=True))


@pytest.mark.parametrize("by", ["file", "broadcast"])
async def test_a_server_computes_with_what_was_published(make, trainer, by):
    engine = await make(publish={"by": by, "bucket_mb": 1})
    for version in (1, 2):
        trainer.change(seed=version)
        await engine.update_weights(trainer.snapshot(version))
        completion = await engine.generate(PROMPT, Sampling(max_tokens=6, seed=1, ignore_eos=True))
        assert difference(trainer, completion) < 1e-4
        assert [(span.version, span.start, span.end) for span in completion.versions] == [(version, 0, 6)]
    told = engine.metrics()
    assert told["engine/probe_logprob_diff"] < 1e-4
    assert told["engine/publish_mb"] == pytest.approx(sum(w.numel() * 4 for _, w in trainer.tensors()) / 2**20)
    assert 0 < told["engine/publish_s"] < 30


async def test_only_what_has_changed_is_broadcast_to_a_server_that_reads_no_differences(make, trainer):
    engine = await make(publish={"delta": True})
    await engine.update_weights(trainer.snapshot(1))
    engine.metrics()
    weight = next(weight for name, weight in trainer.model.named_parameters() if "layers.1" in name)
    with torch.no_grad():
        weight.mul_(1.5)
    await engine.update_weights(trainer.snapshot(2))
    sent = engine.metrics()["engine/publish_mb"]
    assert sent == pytest.approx(weight.numel() * 4 / 2**20)
    completion = await engine.generate(PROMPT, Sampling(max_tokens=6, seed=1, ignore_eos=True))
    assert difference(trainer, completion) < 1e-4


async def test_requests_in_flight_go_on_and_tell_which_policy_sampled_what(make, trainer):
    engine = await make()
    tasks = [
        asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=400, seed=i, ignore_eos=True), prefix_key="g"))
        for i in range(4)
    ]
    while engine.health()["active"] < 4:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    trainer.change(seed=5)
    await engine.update_weights(trainer.snapshot(5))
    for completion in await asyncio.gather(*tasks):
        assert len(completion.tokens) == len(completion.logprobs) == 400
        assert [span.version for span in completion.versions] == [0, 5]
        assert (completion.versions[0].end, completion.versions[1].end) == (completion.versions[1].start, 400)


async def test_a_server_that_keeps_its_old_weights_is_noticed(make, trainer, sglang_server):
    engine = await make()
    httpx2.post(f"{sglang_server.address}/test/deaf", json={"deaf": True}, trust_env=False)
    try:
        trainer.change(seed=3)
        with pytest.raises(EngineError, match=r"version 1 without an error and answers as before, to the last digit"):
            await engine.update_weights(trainer.snapshot(1))
    finally:
        httpx2.post(f"{sglang_server.address}/test/deaf", json={"deaf": False}, trust_env=False)
    await engine.update_weights(trainer.snapshot(2))
    assert engine.metrics()["engine/probe_logprob_diff"] < 1e-4


async def test_weights_that_somebody_else_has_published_are_noticed(make, trainer, sglang_server):
    engine = await make()
    body = {"new_version": "someone's", "abort_all_requests": False}
    httpx2.post(f"{sglang_server.address}/update_weight_version", json=body, trust_env=False)
    with pytest.raises(EngineError, match=r"version \"someone's\", which this run has not published"):
        await engine.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True))


async def test_a_server_whose_weights_are_not_those_at_the_start_is_noticed(trainer, sglang_server, tmp_path):
    trainer.change(seed=9)
    engine = engine_of("sglang", trainer, tmp_path, address=sglang_server.address)
    try:
        with pytest.raises(EngineError, match="computes something else"):
            await engine.generate(PROMPT, Sampling(max_tokens=2))
    finally:
        await engine.close()


async def test_a_folder_that_was_rewritten_after_the_trainer_read_it_is_named(
    sglang_python, tiny_qwen, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("whet.engines.servers.engine.TELL_S", 0.2)
    caplog.set_level(logging.INFO, logger="whet")
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen, folder)
    trainer, read = Trainer(folder), stamp(folder)
    same = trainer.model.state_dict()["model.norm.weight"].clone()
    trainer.change(seed=4, scale=0.2)
    trainer.model.save_pretrained(folder)
    trainer.model = Trainer(tiny_qwen).model
    assert torch.equal(trainer.model.state_dict()["model.norm.weight"], same)
    for known, says in (
        (read, f"the files of {folder} have changed since the trainer read them: is another run writing there"),
        (stamp(folder), "see, in this order, whether another run has rewritten .*dtype.*extension of its own: use sgl"),
    ):
        engine = engine_of("sglang", trainer, tmp_path, told={"read": known}, python=sglang_python)
        try:
            with pytest.raises(EngineError, match=f"has read {folder} without an error and computes something.*{says}"):
                await engine.generate(PROMPT, Sampling(max_tokens=2))
        finally:
            await engine.close()
    log = tmp_path / "engines" / "sglang-0.log"
    began = caplog.messages.index(f"starting 1 sglang engine(s); log {log}; at most 600 s (engine.start_timeout_s)")
    assert re.fullmatch(r"still starting \(\d+ s\)", caplog.messages[began + 1])
    told = len(caplog.messages)
    await asyncio.sleep(0.5)
    assert len(caplog.messages) == told


async def test_what_is_published_at_the_start_where_the_folder_is_not_the_policy(trainer, sglang_server, tmp_path):
    trainer.change(seed=9)
    engine = engine_of(
        "sglang", trainer, tmp_path, address=sglang_server.address, told={"holds_current": lambda: False}
    )
    try:
        assert difference(trainer, await engine.generate(PROMPT, Sampling(max_tokens=4, ignore_eos=True))) < 1e-4
    finally:
        await engine.close()


async def test_files_go_when_others_take_their_place_and_at_the_end(make, trainer, tmp_path):
    engine = await make(publish={"folder": str(tmp_path / "here")})
    await engine.update_weights(trainer.snapshot(1))
    (place,) = (tmp_path / "here").glob(f"{PREFIX}*")
    assert [folder.name for folder in place.iterdir()] == ["v1"]
    await engine.close()
    assert not place.exists()


async def test_an_adapter_is_sent_alone_or_merged(sglang_server, tmp_path, make):
    trainer = Trainer(sglang_server.model)
    await make()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    trainer.model = get_peft_model(trainer.model, lora).eval()
    naming = Naming(trainer.model.get_base_model(), _scales(trainer.model))

    def snapshot(version: int) -> Snapshot:
        return Snapshot(
            version,
            lambda: as_checkpoint(trainer.tensors(), naming),
            lambda: adapter_parameters(trainer.tensors()),
        )

    import json

    config = json.dumps(
        trainer.model.peft_config["default"].to_dict(),
        default=lambda one: sorted(one) if isinstance(one, set) else str(one),
    )
    sizes = {}
    for how, told in (("alone", {"adapter": config, "adapter_rank": 4}), ("merged", {})):
        engine = engine_of(
            "sglang",
            trainer,
            tmp_path,
            address=sglang_server.address,
            publish={"verify": "always"},
            told={"snapshot": snapshot, "holds_current": lambda: False, **told},
        )
        try:
            completion = await engine.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True))
            assert difference(trainer, completion) < 1e-4
            trainer.change(seed=1, names=lambda name: "lora_" in name)
            await engine.update_weights(snapshot(3))
            completion = await engine.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True))
            assert difference(trainer, completion) < 1e-4
            assert [span.version for span in completion.versions] == [3]
            sizes[how] = engine.metrics()["engine/publish_mb"]
        finally:
            await engine.close()
    assert sizes["alone"] < sizes["merged"] / 4


async def test_memory_is_given_up_and_taken_back_with_the_next_request(make, trainer, sglang_server):
    engine = await make(sleep=True)
    engine.release()
    released = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
    assert httpx2.post(f"{sglang_server.address}/generate", json=released, trust_env=False).status_code == 500
    completion = await engine.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True))
    assert difference(trainer, completion) < 1e-4
    engine.release()
    trainer.change(seed=2)
    await engine.update_weights(trainer.snapshot(1))
    assert difference(trainer, await engine.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True))) < 1e-4


async def test_a_completion_that_takes_too_long_says_where_it_was(make):
    engine = await make(timeout_s=0.5)
    with pytest.raises(
        EngineError, match=r"within 0\.5 s: \d+ of at most 3000 tokens .* sglang engine 0 .* works on it"
    ):
        await engine.generate(PROMPT, Sampling(max_tokens=3000, ignore_eos=True))
    await engine.pause()
    with pytest.raises(EngineError, match=r"0 of at most 3 tokens were sampled, it waited for a server with room"):
        await engine.generate(PROMPT, Sampling(max_tokens=3, ignore_eos=True))
    await engine.resume()
