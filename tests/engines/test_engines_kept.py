"""What is kept of requests that have ended: turns go on from there, exactly, and never on old weights."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from test_engines_forward import cohere, gemma2, gpt_oss, granite, mistral
from test_engines_local import own_logprobs
from transformers import AutoModelForCausalLM

from whet.engines.local.cache import SlotCache
from whet.engines.local.engine import LocalEngine
from whet.engines.local.forward import Forward
from whet.engines.local.kept import MIN_REUSED, KeptPrefixes
from whet.engines.local.pages import Paging
from whet.types import Completion, Sampling

PROMPT = list(b"What is two and two? Think, then say it.")
TOOL = list(b" <result> 4 </result> ")
LIKE = torch.zeros(1, 2, 1, 4)


CACHES = pytest.mark.parametrize("cache", ["slots", Paging(page=8)], ids=["slots", "pages"])


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


def exact(model, tokens: list[int], completion: Completion) -> bool:
    expected = own_logprobs(model, tokens, completion)
    return float((torch.tensor(completion.logprobs) - expected).abs().max()) < 1e-5


def sampling(max_tokens: int = 9, seed: int = 0) -> Sampling:
    return Sampling(max_tokens=max_tokens, seed=seed, ignore_eos=True)


async def turns(engine: LocalEngine, model, count: int, seed: int = 0) -> list[tuple[list[int], Completion]]:
    """An episode: prompt, completion, tool output, completion, … as (tokens before, completion)."""
    tokens, played = list(PROMPT), []
    for turn in range(count):
        completion = await engine.generate(tokens, sampling(seed=seed + turn))
        played.append((tokens, completion))
        tokens = [*tokens, *completion.tokens, *TOOL]
    return played


@CACHES
async def test_a_turn_computes_only_what_is_new(model, cache):
    engine = LocalEngine(model, cache=cache)
    played = await turns(engine, model, 4)
    # The last token of a completion is sampled but not computed; the turn after it does that.
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + 3 * (len(TOOL) + 1)
    saved = sum(len(tokens) + len(c.tokens) - 1 for tokens, c in played[:-1])
    assert engine.stats()["prefill_tokens_saved"] == saved
    assert engine.stats()["prefix_hit_rate"] == pytest.approx(saved / sum(len(tokens) for tokens, _ in played))
    assert all(exact(model, *turn) for turn in played)


@CACHES
@pytest.mark.parametrize("make", [gemma2, mistral, cohere, granite, gpt_oss])
async def test_windows_soft_caps_and_sinks_hold_across_turns(make, cache):
    model = make()
    engine = LocalEngine(model, cache=cache)
    played = await turns(engine, model, 3)
    assert engine.stats()["prefill_tokens_saved"] > 0
    for tokens, completion in played:
        expected = own_logprobs(model, tokens, completion)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4


@CACHES
async def test_members_of_a_group_branch_and_each_goes_on_from_its_own(model, cache):
    engine = LocalEngine(model, cache=cache, max_concurrent=3)
    together = await asyncio.gather(*(turns(engine, model, 3, seed=10 * i) for i in range(5)))
    alone = [await turns(LocalEngine(model, prefix_cache_mb=0), model, 3, seed=10 * i) for i in range(5)]
    for played, expected in zip(together, alone, strict=True):
        assert [c.tokens for _, c in played] == [c.tokens for _, c in expected]
        assert all(exact(model, *turn) for turn in played)
    computed = len(PROMPT) + 5 * 2 * (len(TOOL) + 1)
    assert engine.stats()["prefill_tokens"] == computed


@CACHES
async def test_a_request_that_branches_off_in_the_middle_takes_what_it_shares(model, cache):
    engine = LocalEngine(model, cache=cache)
    first = await engine.generate(PROMPT, sampling(20))
    other = [*PROMPT, *first.tokens[:7], *b"but"]
    asked = [(other, sampling(5)), ([*PROMPT, *b"??"], sampling(5)), (PROMPT[:-3], sampling(4)), (PROMPT, sampling(30))]
    for tokens, how in asked:
        before = engine.stats()["prefill_tokens"]
        completion = await engine.generate(tokens, how)
        new = 3 if tokens is other else 2 if len(tokens) > len(PROMPT) else 1  # the last token is looked at
        assert engine.stats()["prefill_tokens"] - before == new
        assert exact(model, tokens, completion)


@CACHES
async def test_several_requests_with_the_same_longer_prompt_compute_its_rest_once(model, cache):
    engine = LocalEngine(model, cache=cache)
    first = await engine.generate(PROMPT, sampling())
    longer = [*PROMPT, *first.tokens, *TOOL]
    group = await asyncio.gather(*(engine.generate(longer, sampling(6, seed=i)) for i in range(4)))
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + len(TOOL) + 1
    assert all(exact(model, longer, completion) for completion in group)


@CACHES
async def test_the_beginning_of_a_prompt_in_flight_is_shared(model, cache):
    engine = LocalEngine(model, prefix_cache_mb=0, cache=cache)
    first = asyncio.create_task(engine.generate(PROMPT, sampling(30)))
    while engine.stats()["generated_tokens"] < 4:
        await asyncio.sleep(0)
    other = [*PROMPT[:25], *b"something else"]
    completion = await engine.generate(other, sampling())
    assert not first.done()
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + len(b"something else")
    assert exact(model, other, completion) and exact(model, PROMPT, await first)


async def test_nothing_computed_by_old_weights_is_reused(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = LocalEngine(model)
    first = await engine.generate(PROMPT, sampling())
    task = asyncio.create_task(engine.generate([1, *PROMPT], sampling(30)))
    while engine.stats()["generated_tokens"] < 14:
        await asyncio.sleep(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    await engine.update_weights(1)
    computed = engine.stats()["prefill_tokens"]
    straddling = await task  # began under the old weights: its keys and values are good for nobody
    for begun in ([*PROMPT, *first.tokens], [1, *PROMPT, *straddling.tokens]):
        tokens = [*begun, *TOOL]
        assert exact(model, tokens, await engine.generate(tokens, sampling()))
        computed += len(tokens)
    assert engine.stats()["prefill_tokens"] == computed


async def test_release_and_close_let_go_of_what_is_kept(model):
    engine = LocalEngine(model)
    for let_go in (engine.release, engine.close):
        first = await engine.generate(PROMPT, sampling())
        kept = engine._prompts.kept
        assert len(kept) == 1 and kept.num_bytes > 0
        done = let_go()
        if done is not None:
            await done
        assert len(kept) == kept.num_bytes == 0
        assert len(first.tokens) == 9


async def test_a_prefix_cache_of_no_size_keeps_nothing(model):
    engine = LocalEngine(model, prefix_cache_mb=0)
    assert all(exact(model, *turn) for turn in await turns(engine, model, 2))
    assert len(engine._prompts.kept) == 0
    assert engine.stats()["prefill_tokens_saved"] == 0


async def test_autocast_keeps_in_its_own_type(model):
    engine = LocalEngine(model, autocast=torch.bfloat16)
    played = await turns(engine, model, 2)
    ((entry, _),) = engine._prompts.kept._entries.items()
    assert {x.dtype for layer in entry.layers.values() for x in layer} == {torch.bfloat16}
    tokens, completion = played[-1]
    expected = own_logprobs(model, tokens, completion)
    assert (torch.tensor(completion.logprobs) - expected).abs().max() < 0.1


@pytest.mark.parametrize("paging", [None, Paging(page=8)], ids=["slots", "pages"])
def test_extending_equals_the_models_own_forward_for_ragged_rests(model, paging):
    forward = Forward(model.eval(), max_rows=4, paging=paging)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, size=n) for n in (30, 17, 9)]
    cuts = [29, 5, 1]
    forward.cache.reserve(4, 30)
    with forward.running():
        forward.prefill([row[:cut] for row, cut in zip(rows, cuts, strict=True)], [[2], [0], [3]])
        hidden = forward.extend([row[cut:] for row, cut in zip(rows, cuts, strict=True)], [2, 0, 3], cuts)
        found = forward.logits(hidden)
    with torch.inference_mode():
        own = torch.stack([model(torch.from_numpy(row)[None], use_cache=False).logits[0, -1] for row in rows])
    assert (found - own).abs().max() < 1e-5


# --- the store alone: 2 heads of 4, keys and values, one layer: 64 bytes per token in float32 ----------


def filled(max_tokens: int) -> KeptPrefixes:
    cache = SlotCache(max_rows=2, max_length=None)
    cache.reserve(2, 100)
    keys, values = cache.layer(0, LIKE, LIKE)
    keys[0], values[0] = 1.0, 2.0
    return KeptPrefixes(cache, max_tokens * 64)


def tokens_from(start: int, length: int = 20) -> np.ndarray:
    return np.arange(start, start + length)


def test_the_least_recently_used_goes_first_and_the_bound_holds():
    kept = filled(60)
    for start in (0, 100, 200):
        kept.keep(tokens_from(start), 0)
    assert (len(kept), kept.num_bytes) == (3, 60 * 64)
    entry, shared = kept.find(tokens_from(0))
    assert shared == 20
    kept.load(entry, 1, 20)  # used: now the second is the oldest
    kept.keep(tokens_from(300), 0)
    assert [kept.find(tokens_from(start))[1] for start in (0, 100, 200, 300)] == [20, 0, 20, 20]
    kept.keep(tokens_from(400, 61), 0)  # larger than the whole bound
    assert len(kept) == 3
    keys, values = kept.cache.layer(0, LIKE, LIKE)
    assert keys[1, :, :20].eq(1).all() and values[1, :, :20].eq(2).all() and keys[1, :, 20:].eq(0).all()


def test_a_longer_entry_takes_the_place_of_its_own_beginning():
    kept = filled(1000)
    kept.keep(tokens_from(0, 20), 0)
    kept.keep(tokens_from(0, 30), 0)
    assert (len(kept), kept.num_bytes) == (1, 30 * 64)
    kept.keep(tokens_from(0, 25), 0)  # contained already
    assert (len(kept), kept.find(tokens_from(0, 40))[1]) == (1, 30)


def test_what_is_too_short_is_not_kept():
    kept = filled(1000)
    kept.keep(tokens_from(0, MIN_REUSED - 1), 0)
    assert len(kept) == 0
    assert kept.find(tokens_from(0, 5)) == (None, 0)
