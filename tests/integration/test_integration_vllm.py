"""Real vLLM servers: rewards rise, weights arrive, what keeps its weights is noticed, and deaths are survived."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from runs import column, config_of, train, write_rows
from server_engines import Place, Trainer, engine_of
from whet.compose import Run, compose
from whet.errors import EngineError
from whet.types import Episode, Sampling, VersionSpan
from whet.weights.snapshot import Snapshot

PROMPT = list(b"What is it?")


def share_of_a(episode: Episode) -> float:
    """How much of a response is the letter a."""
    return episode.response.count("a") / episode.num_sampled


async def until(holds, limit_s: float = 120.0) -> float:
    """Seconds until something holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, "it does not come to hold"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture
def settings(tmp_path: Path, served_model: Path, vllm: str) -> dict[str, Any]:
    rows = [{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 4)]
    return {
        **{"model__path": str(served_model), "data__train": write_rows(tmp_path / "prompts.jsonl", rows)},
        **{"reward": "test_integration_vllm:share_of_a", "optim__lr": 5e-3, "optim__schedule": "constant"},
        **{"optim__weight_decay": 0.0, "rollout__prompts_per_step": 8, "rollout__group_size": 8},
        **{"rollout__max_tokens": 4, "engine__use": "vllm", "engine__python": vllm},
        **{"engine__publish": {"verify": "always", "timeout_s": 60}, "engine__health_interval_s": 0.5},
    }


def difference(trainer: Trainer, completion: Any, temperature: float = 1.0) -> float:
    """How far logprobs are from the trainer's own."""
    tokens, count = (*PROMPT, *completion.tokens), len(completion.tokens)
    with torch.no_grad():
        logits = trainer.model(torch.tensor([tokens]), use_cache=False).logits[0, -count - 1 : -1] / temperature
    own = logits.log_softmax(-1).gather(1, torch.tensor(tokens[-count:])[:, None])[:, 0]
    return (own - torch.tensor(completion.logprobs)).abs().max().item()


# --- Whole runs -------------------------------------------------------------------------------------------


def test_a_toy_reward_is_learned_on_a_server_that_the_run_starts(settings, tmp_path: Path):
    train(config_of("grpo", tmp_path / "out", train__steps=60, **settings))
    rewards = column(tmp_path / "out", "rollout/reward")
    assert rewards[0] < 0.1
    assert sum(rewards[-5:]) / 5 > 0.8
    # Every publish was checked, by what the server computes and by the checksums of what it holds.
    assert max(column(tmp_path / "out", "engine/probe_logprob_diff")) < 1e-4
    assert max(column(tmp_path / "out", "train/train_rollout_logprob_abs_diff")) < 1e-4
    assert (tmp_path / "out" / "engines" / "vllm-0.log").is_file()


def test_a_server_killed_in_the_middle_of_a_rollout_costs_nothing_but_time(settings, tmp_path: Path):
    run = compose(config_of("grpo", tmp_path / "out", train__steps=4, **{**settings, "rollout__max_tokens": 200}))

    async def both() -> Run:
        training = asyncio.create_task(run.train())
        server = run.policy.servers["policy"]._fleet.servers[0]
        await until(lambda: (server.version == 2 and server.active) or training.done())
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGKILL)
        await training
        return run

    asyncio.run(both())
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [one["rollout/num_episodes"] for one in steps] == [64] * 4
    assert all(one["rollout/num_failed"] == one["rollout/num_aborted"] == 0 for one in steps)
    assert max(one["train/train_rollout_logprob_abs_diff"] for one in steps) < 1e-4
    last = steps[-1]
    assert last["engine/num_deaths"] == last["engine/num_restarts"] == 1
    assert 0 < last["engine/down_s"] < 600


# --- What a server that is there already is asked ---------------------------------------------------------


async def test_logprobs_are_those_before_the_distribution_is_cut(vllm_server: Place, tmp_path: Path):
    trainer = Trainer(vllm_server.model)
    engine = engine_of("vllm", trainer, tmp_path, address=vllm_server.address)
    try:
        await engine.update_weights(trainer.snapshot(0))
        for cut in ({"top_p": 0.5}, {"top_k": 5}, {"top_p": 0.7, "top_k": 9}):
            sampling = Sampling(max_tokens=12, temperature=0.7, seed=1, ignore_eos=True, **cut)
            assert difference(trainer, await engine.generate(PROMPT, sampling), 0.7) < 1e-4
    finally:
        await engine.close()


@pytest.mark.parametrize(
    "publish", [{"by": "file"}, {"by": "broadcast", "bucket_mb": 1}, {"by": "file", "delta": True}], ids=str
)
async def test_every_way_of_publishing_arrives(vllm_server: Place, tmp_path: Path, publish):
    trainer = Trainer(vllm_server.model)
    told = {"verify": "always", **publish}
    engine = engine_of("vllm", trainer, tmp_path, address=vllm_server.address, publish=told)
    sizes = []
    try:
        for version, names in ((1, ""), (2, ""), (3, "layers.1.mlp"), (4, "none")):
            trainer.change(seed=version, names=lambda name, part=names: part in name)
            await engine.update_weights(trainer.snapshot(version))
            completion = await engine.generate(PROMPT, Sampling(max_tokens=6, seed=1, ignore_eos=True))
            assert difference(trainer, completion) < 1e-4
            assert completion.versions == (VersionSpan(version, 0, 6),)
            metrics = engine.metrics()
            assert metrics["engine/groups_checked"] == 4
            sizes.append(metrics["engine/publish_mb"])
    finally:
        await engine.close()
    if "delta" in publish:
        assert sizes[1] < sizes[0] * 1.1
        assert sizes[2] < sizes[0] / 3
        assert sizes[3] == 0


async def test_weights_that_change_beneath_requests_are_told_apart(vllm_server: Place, tmp_path: Path):
    trainer = Trainer(vllm_server.model)
    engine = engine_of("vllm", trainer, tmp_path, address=vllm_server.address)
    try:
        await engine.update_weights(trainer.snapshot(1))
        sampling = Sampling(max_tokens=400, seed=1, ignore_eos=True)
        tasks = [asyncio.create_task(engine.generate(PROMPT, sampling, prefix_key="g")) for _ in range(4)]
        await until(lambda: engine.health()["active"] == 4)
        await asyncio.sleep(0.5)
        trainer.change(seed=1)
        await engine.update_weights(trainer.snapshot(2))
        for completion in await asyncio.gather(*tasks):
            assert [span.version for span in completion.versions] == [1, 2]
            assert len(completion.tokens) == completion.versions[-1].end == 400
        # A prompt that comes now is computed anew, though its tokens are known.
        assert difference(trainer, await engine.generate(PROMPT, Sampling(max_tokens=4, ignore_eos=True))) < 1e-4
    finally:
        await engine.close()


async def test_a_server_that_stands_still_is_left(vllm_server: Place, vllm: str, tmp_path: Path):
    """Stopped as a whole, and only what computes behind its front: both are noticed within their limit."""
    trainer = Trainer(vllm_server.model)
    engine = engine_of("vllm", trainer, tmp_path, address=vllm_server.address, health_interval_s=0.5, timeout_s=200)
    assert vllm_server.process is not None
    pid = vllm_server.process.pid
    try:
        await engine.update_weights(trainer.snapshot(0))
        server = engine._fleet.servers[0]
        for stopped in ([-pid], children_of(pid)):
            task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=3000, ignore_eos=True)))
            await until(lambda: engine.health()["active"] == 1)
            for one in stopped:
                os.kill(one, signal.SIGSTOP)
            try:
                assert await until(lambda: server.state == "down") < 30
            finally:
                for one in stopped:
                    os.kill(one, signal.SIGCONT)
            assert len((await task).tokens) == 3000  # it is there again, and goes on
    finally:
        await engine.close()


def children_of(pid: int) -> list[int]:
    """Every process that a process has started, and that those have."""
    found = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [deeper for one in found for deeper in children_of(one)]


async def test_an_adapter_is_taken_alone(vllm: str, served_model: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    from whet.weights.checkpoint_names import adapter_parameters

    trainer = Trainer(served_model)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    trainer.model = get_peft_model(trainer.model, lora).eval()
    settings = trainer.model.peft_config["default"].to_dict()
    config = json.dumps(settings, default=lambda one: sorted(one) if isinstance(one, set) else str(one))

    def snapshot(version: int) -> Snapshot:
        return Snapshot(version, trainer.tensors, lambda: adapter_parameters(trainer.tensors()))

    engine = engine_of(
        "vllm",
        trainer,
        tmp_path,
        python=vllm,
        publish={"verify": "always"},
        start_timeout_s=300,
        told={"snapshot": snapshot, "holds_current": lambda: False, "adapter": config, "adapter_rank": 4},
    )
    try:
        for version in (1, 2):
            trainer.change(seed=version, names=lambda name: "lora_" in name)
            await engine.update_weights(snapshot(version))
            completion = await engine.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True))
            assert difference(trainer, completion) < 1e-4
            assert completion.versions == (VersionSpan(version, 0, 5),)
            assert engine.metrics()["engine/publish_mb"] < 0.2
    finally:
        await engine.close()


# --- The build as it comes --------------------------------------------------------------------------------


async def test_a_server_without_the_extension_keeps_its_weights_and_is_noticed(
    vllm: str, served_model: Path, tmp_path: Path
):
    trainer = Trainer(served_model)
    with Place.started("vllm", vllm, served_model, tmp_path, bare=True) as place:
        engine = engine_of("vllm", trainer, tmp_path, address=place.address)
        try:
            trainer.change(seed=1)
            with pytest.raises(EngineError, match=r"without an error and .*--worker-extension-cls whet_worker"):
                await engine.update_weights(trainer.snapshot(1))
        finally:
            await engine.close()
        engine = engine_of("vllm", trainer, tmp_path, address=place.address, publish={"by": "broadcast"})
        try:
            with pytest.raises(EngineError, match=r"engine\.publish\.by: broadcast needs; start it with"):
                await engine.update_weights(trainer.snapshot(1))
        finally:
            await engine.close()
        assert httpx2.get(f"{place.address}/health", trust_env=False).status_code == 200
