"""An engine over its own copy of the weights: it follows what is trained, and neither disturbs the other."""

from __future__ import annotations

import asyncio

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from whet.backends.device import Arithmetic
from whet.backends.local import LocalBackend
from whet.batch import collate
from whet.config.backend import BackendConfig
from whet.config.optim import OptimConfig
from whet.engines.local.engine import LocalEngine
from whet.engines.local.weights import num_bytes, own_copy
from whet.errors import EngineError
from whet.losses import LOSSES
from whet.methods import Term
from whet.types import Completion, Sample, Sampling, Unit, VersionSpan

SFT = [Term("sft", LOSSES["sft"], "token")]
PROMPTS = [list(b"What is two and two?"), list(b"And three?"), list(b"Say a number between one and ten.")]
STEPS = 6


def plain(folder) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder) -> nn.Module:
    """Under an adapter with dropout: training draws random numbers, and most weights never change."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    return get_peft_model(plain(folder), config)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trained(model).items()}


def engine_over(model: nn.Module, **options) -> LocalEngine:
    """Without what is kept of earlier requests, which changes the last bits."""
    return LocalEngine(own_copy(model), max_concurrent=4, prefix_cache_mb=0, **options)


def engine_beside(model: nn.Module, **options) -> LocalEngine:
    return engine_over(model, weights_from=model, **options)


def change(model: nn.Module, by: float = 1.1) -> None:
    with torch.no_grad():
        for weight in trained(model).values():
            weight.mul_(by)


async def completions(engine: LocalEngine, rounds: int = 1) -> list[Completion]:
    asked = [(p, Sampling(max_tokens=12, seed=i, ignore_eos=True)) for i in range(4) for p in PROMPTS]
    done: list[Completion] = []
    for _ in range(rounds):
        done += await asyncio.gather(*(engine.generate(*request) for request in asked))
    return done


def train(model: nn.Module, arithmetic: Arithmetic) -> list[float]:
    """A few optimizer steps; returns the losses."""
    backend = LocalBackend(model, None, BackendConfig(), arithmetic, optim=OptimConfig(), attention="tree")
    rows = [Sample([*prompt, *range(40 + i)], [True] * (len(prompt) + 40 + i)) for i, prompt in enumerate(PROMPTS)]
    batch = collate([Unit(str(i), (row, row)) for i, row in enumerate(rows)]).weighed(["token"])
    torch.manual_seed(1)  # dropout
    losses = []
    for _ in range(STEPS):
        losses.append(backend.forward_backward(batch, SFT)["loss"])
        backend.forward(batch, {"logprobs"})  # in between, as a rollout's old logprobs are
        backend.optim_step(1e-3)
    return losses


@pytest.mark.parametrize("make", [plain, adapted])
async def test_what_is_trained_arrives_with_update_weights_and_not_before(tiny_qwen, make):
    model = make(tiny_qwen).eval()
    engine = engine_beside(model)
    before = await completions(engine)
    change(model)
    assert await completions(engine) == before
    await engine.update_weights(1)
    after = await completions(engine)
    assert after != before
    assert after == await completions(engine_over(model, version=1))
    assert {span.version for c in after for span in c.versions} == {1}


async def test_only_what_is_trained_is_copied(tiny_qwen):
    model = adapted(tiny_qwen)
    engine = engine_beside(model)
    frozen = next(weight for weight in model.parameters() if not weight.requires_grad)
    with torch.no_grad():
        frozen.zero_()
    await engine.update_weights(1)
    own = dict(engine._forward.model.named_parameters())
    assert len(trained(model)) < len(own)
    assert all(weight.abs().sum() > 0 for name, weight in own.items() if name.endswith("embed_tokens.weight"))


async def test_a_request_in_flight_goes_on_with_the_new_weights_and_tells_from_where(tiny_qwen):
    model = plain(tiny_qwen)
    engine = engine_beside(model)
    task = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(max_tokens=20, ignore_eos=True)))
    while engine.stats()["generated_tokens"] < 6:
        await asyncio.sleep(0)
    change(model)
    await engine.update_weights(7)
    completion = await task
    first, second = completion.versions
    assert (first.version, second) == (0, VersionSpan(7, first.end, 20))
    assert first.end >= 6


def test_the_copy_takes_its_own_memory_and_trains_nothing(tiny_qwen):
    model = adapted(tiny_qwen).train()
    own = own_copy(model)
    assert not any(weight.requires_grad for weight in own.parameters())
    assert not any(module.training for module in own.modules())
    assert trained(model) and model.training
    mine = {weight.data_ptr() for weight in model.parameters()}
    assert not mine & {weight.data_ptr() for weight in own.parameters()}
    assert num_bytes(own) == num_bytes(model) >= 4 * sum(weight.numel() for weight in model.parameters())


def test_an_engine_that_cannot_follow_is_refused(tiny_qwen, tiny_llama):
    model = plain(tiny_qwen)
    with pytest.raises(EngineError, match=r"shares model\.embed_tokens\.weight"):
        LocalEngine(model, weights_from=model)
    with pytest.raises(EngineError, match=r"q_norm\.weight is \(\d+,\) where it is trained and missing in the engine"):
        LocalEngine(plain(tiny_llama), weights_from=model)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [plain, adapted])
def test_training_and_sampling_at_once_give_what_each_gives_alone(tiny_qwen, make, autocast):
    """Losses, weights and completions are bit-equal: no state of one thread reaches the other."""
    arithmetic = Arithmetic(torch.device("cpu"), autocast, "highest")
    alone, together = make(tiny_qwen), make(tiny_qwen)
    sampled_alone = asyncio.run(completions(engine_beside(alone, autocast=autocast)))
    losses_alone = train(alone, arithmetic)

    async def both() -> tuple[list[float], list[list[Completion]], list[Completion]]:
        engine, rounds = engine_beside(together, autocast=autocast), []
        training = asyncio.create_task(asyncio.to_thread(train, together, arithmetic))
        while not training.done():
            rounds.append(await completions(engine))
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        losses = await training
        await engine.update_weights(1)
        return losses, rounds, await completions(engine)

    losses, rounds, updated = asyncio.run(both())
    assert len(rounds) >= 2, "sampling did not overlap with training"
    assert losses == losses_alone
    assert all(torch.equal(weight, copied(together)[name]) for name, weight in copied(alone).items())
    assert all(done == sampled_alone for done in rounds)
    fresh = engine_over(together, autocast=autocast, version=1)
    assert updated == asyncio.run(completions(fresh))
