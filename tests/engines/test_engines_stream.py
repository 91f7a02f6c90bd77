"""Tokens as they are sampled: the same as in one piece, at once, and no longer than somebody reads them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from transformers import AutoModelForCausalLM

from whet.engines.local.engine import LocalEngine
from whet.errors import EngineError
from whet.types import Sampling

PROMPT = list(b"What is two and two?")


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


def sampling(max_tokens: int = 12, **options) -> Sampling:
    return Sampling(max_tokens=max_tokens, seed=3, **options)


async def pieces(engine: LocalEngine, how: Sampling) -> list:
    return [piece async for piece in engine.stream(PROMPT, how)]


async def test_the_pieces_are_the_completion(model):
    whole = await LocalEngine(model).generate(PROMPT, sampling())
    told = await pieces(LocalEngine(model), sampling())
    assert [t for piece in told for t in piece.tokens] == whole.tokens
    assert [x for piece in told for x in piece.logprobs] == whole.logprobs
    assert [piece.finish_reason for piece in told] == [None] * (len(told) - 1) + ["length"]
    assert len(told) > 8 and all(piece.tokens for piece in told)


async def test_a_token_is_told_before_the_next_ones_are_sampled(model):
    engine, ahead = LocalEngine(model), []
    count = 0
    async for piece in engine.stream(PROMPT, sampling(20)):
        count += len(piece.tokens)
        ahead.append(engine.stats()["generated_tokens"] - count)
    assert max(ahead) <= 1


async def test_who_reads_slowly_gets_larger_pieces_and_loses_nothing(model):
    engine, tokens = LocalEngine(model), []
    whole = await LocalEngine(model).generate(PROMPT, sampling())
    async for piece in engine.stream(PROMPT, sampling()):
        tokens += piece.tokens
        for _ in range(6):
            await asyncio.sleep(0)
    assert tokens == whole.tokens


async def test_a_stream_that_is_left_stops_at_that_token_and_costs_nothing_more(model):
    engine = LocalEngine(model)
    other = asyncio.create_task(engine.generate([7], sampling(30)))
    async with aclosing(engine.stream(PROMPT, sampling(500))) as stream:
        async for _ in stream:
            if engine.stats()["generated_tokens"] > 8:
                break
    assert engine.health()["active"] == 1
    before = engine.stats()["generated_tokens"]
    completion = await other
    assert engine.stats()["generated_tokens"] - before <= len(completion.tokens)
    assert engine.health()["active"] == 0


async def test_cancelling_at_any_token_frees_the_row_and_nothing_more_is_sampled(model):
    for after in (1, 3, 7):
        engine = LocalEngine(model)
        task = asyncio.create_task(engine.generate(PROMPT, sampling(500)))
        while engine.stats()["generated_tokens"] < after:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        sampled = engine.stats()["generated_tokens"]
        assert sampled <= after + 2  # a first step samples two
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.stats()["generated_tokens"] == sampled
        assert engine.health() == {"status": "ok", "version": 0, "active": 0, "waiting": 0}


async def test_abort_ends_a_stream_with_what_there_is(model):
    engine, told = LocalEngine(model), []
    async for piece in engine.stream(PROMPT, sampling(500)):
        told.append(piece)
        if len(told) == 3:
            await engine.abort()
    assert told[-1].finish_reason == "abort"
    assert len(told) == 4


async def test_a_stream_that_takes_too_long_or_fails_says_so(model):
    engine = LocalEngine(model, timeout_s=0.05)
    await engine.pause()
    with pytest.raises(EngineError, match=r"within 0.05 s: it waited for one of 64 rows"):
        await pieces(engine, sampling())
    await engine.resume()
    engine._forward.decode = None
    with pytest.raises(EngineError, match="failed while generating: TypeError"):
        await pieces(engine, sampling())
    with pytest.raises(EngineError, match="max_tokens is 0"):
        await pieces(engine, sampling(0))
