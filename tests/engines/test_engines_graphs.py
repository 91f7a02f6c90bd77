"""Graphs of decoding steps: buckets, what fills them up, and when they must go. On a GPU: the same logprobs."""

from __future__ import annotations

import asyncio

import pytest
import torch
from test_engines_local import own_logprobs, prompts
from transformers import AutoModelForCausalLM

from whet.engines.local.engine import LocalEngine
from whet.engines.local.forward import Forward
from whet.engines.local.graphs import DecodeGraphs
from whet.engines.local.pages import Paging
from whet.types import Completion, Sampling


@pytest.fixture
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


@pytest.fixture
def captured(monkeypatch) -> list[int]:
    """Without a GPU a "graph" runs its step again at every replay, on the buffers that a graph would read."""
    shapes: list[int] = []

    def capture(step):
        hidden = step()
        shapes.append(len(hidden))

        def replay() -> None:
            hidden.copy_(step())

        return replay, hidden

    monkeypatch.setattr("whet.engines.local.graphs.capture", capture)
    return shapes


def with_graphs(forward: Forward) -> DecodeGraphs:
    forward.graphs = DecodeGraphs(forward.call, forward.cache, list(forward.model.parameters()), forward.device)
    return forward.graphs


async def together(engine: LocalEngine, count: int = 11) -> list[tuple[list[int], Completion]]:
    asked = [(p, Sampling(max_tokens=3 + 2 * i, seed=i, ignore_eos=True)) for i, p in enumerate(prompts(count))]
    done = await asyncio.gather(*(engine.generate(*one) for one in asked))
    return [(p, completion) for (p, _), completion in zip(asked, done, strict=True)]


@pytest.mark.parametrize("cache", ["slots", "paged", Paging(page=4)], ids=["slots", "paged", "small pages"])
async def test_rows_that_fill_up_a_bucket_disturb_nobody(model, captured, cache):
    engine = LocalEngine(model, max_concurrent=6, prefix_cache_mb=0, cache=cache)
    with_graphs(engine._forward)
    for tokens, completion in await together(engine):
        assert (torch.tensor(completion.logprobs) - own_logprobs(model, tokens, completion)).abs().max() < 1e-5
    assert set(captured) <= {1, 2, 4, 6}
    if isinstance(cache, str):
        assert len(captured) <= 4  # one graph per bucket, as long as nothing grows


async def test_graphs_go_when_the_cache_grows_or_weights_move(model, captured):
    forward = Forward(model.eval(), max_rows=4)
    graphs = with_graphs(forward)
    forward.cache.reserve(2, 300)
    with forward.running():
        forward.prefill([[1, 2, 3], [4, 5]], [[0], [1]])

        def step() -> None:
            assert forward.decode(torch.tensor([7, 8]).numpy(), torch.tensor([3, 2]).numpy()).shape[0] == 2

        step()
        step()
        assert captured == [2]
        forward.cache.reserve(2, 700)
        step()
        assert captured == [2, 2]
        model.model.norm.weight.data = model.model.norm.weight.data.clone()
        step()
        assert captured == [2, 2, 2]
        forward.free()
        assert not graphs._graphs


async def test_a_model_that_cannot_be_captured_runs_without(model, monkeypatch, caplog):
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("whet.engines.local.graphs.capture", fails)
    engine = LocalEngine(model, max_concurrent=6)
    with_graphs(engine._forward)
    for tokens, completion in await together(engine, 3):
        assert (torch.tensor(completion.logprobs) - own_logprobs(model, tokens, completion)).abs().max() < 1e-5
    assert caplog.text.count("without CUDA graphs") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
async def test_graphs_on_a_gpu_give_the_models_own_logprobs_through_changes_of_weights(model, autocast):
    model = model.cuda()
    engine = LocalEngine(model, max_concurrent=6, autocast=autocast)
    assert engine._forward.graphs is not None
    for version in (1, 2):
        played = await together(engine)
        assert engine._forward.graphs.works
        for tokens, completion in played:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens + completion.tokens], device="cuda"), use_cache=False).logits[0]
            own = logits.float().log_softmax(-1)[len(tokens) - 1 : -1].cpu()
            own = own.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert (torch.tensor(completion.logprobs) - own).abs().max() < (1e-3 if autocast is None else 0.2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        await engine.update_weights(version)
