"""Pages of keys and values: taken when written, shared until written, given back at once; the kernel over them."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engines_forward import gemma2, gpt_oss, mistral, teacher_forced, worst_difference
from test_engines_local import own_logprobs
from transformers import AutoModelForCausalLM

from whet.engines.local.choice import paging_for, why_not
from whet.engines.local.engine import LocalEngine
from whet.engines.local.forward import Forward
from whet.engines.local.paged import paged_kernel
from whet.engines.local.pages import SCRATCH, PagedCache, Paging
from whet.errors import EngineError
from whet.types import Sampling

PAGE, ROWS = 4, 5
PROMPT = list(b"What is two and two?")


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


def empty() -> PagedCache:
    return PagedCache(ROWS, None, paging=Paging(page=PAGE))


def write(cache: PagedCache, slot: int, start: int, end: int, mark: float) -> None:
    """Write `mark` as the keys, and its double as the values, of two layers at positions of a slot."""
    cache.ready([slot], [start], np.array([end]))
    pages, offsets = cache.places(np.full(end - start, slot), np.arange(start, end))
    for layer in range(2):
        keys, values = cache.layer(layer, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 5))
        with torch.inference_mode():
            keys[pages, offsets], values[pages, offsets] = mark, 2 * mark


def marks(cache: PagedCache, slot: int, length: int) -> list[float]:
    """What was written at each position of a slot, which all heads and layers agree on."""
    found = cache.read(slot, length)
    first = found[0][0][0, :, 0]
    for keys, values in found.values():
        assert keys.shape == (2, length, 3) and values.shape == (2, length, 5)
        assert (keys == first[:, None]).all() and (values == 2 * first[:, None]).all()
    return first.tolist()


def test_a_row_takes_pages_as_it_grows_and_gives_them_back_at_once():
    cache = empty()
    write(cache, 1, 0, 4, 1.0)
    assert cache.num_used == 1
    write(cache, 1, 4, 5, 2.0)
    assert cache.num_used == 2
    assert marks(cache, 1, 5) == [1, 1, 1, 1, 2]
    cache.drop(1, 4)  # what lies behind the first page
    assert cache.num_used == 1 and marks(cache, 1, 4) == [1] * 4
    cache.drop(1)
    assert cache.num_used == 0 and not cache.table.any()


def test_a_copy_shares_pages_until_one_of_the_rows_writes():
    cache = empty()
    write(cache, 0, 0, 6, 1.0)
    for slot in (1, 2):
        cache.copy(0, slot, 6)
    assert cache.num_used == 2  # three rows of two pages, each page held three times
    write(cache, 1, 6, 7, 2.0)
    assert cache.num_used == 3  # the first page is still everyone's
    write(cache, 0, 6, 7, 3.0)
    write(cache, 2, 6, 7, 4.0)  # the last of them keeps the page
    assert cache.num_used == 4
    assert [marks(cache, slot, 7)[-1] for slot in range(3)] == [3, 2, 4]
    assert all(marks(cache, slot, 6) == [1] * 6 for slot in range(3))
    cache.drop(0)
    assert cache.num_used == 3 and marks(cache, 2, 7) == [1] * 6 + [4]


def test_rows_that_write_to_a_shared_page_in_one_step_each_have_their_own():
    cache = empty()
    write(cache, 0, 0, 2, 1.0)
    for slot in (1, 2):
        cache.copy(0, slot, 2)
    cache.ready(np.arange(3), np.full(3, 2), np.full(3, 3))
    assert len(set(cache.table[:3, 0].tolist())) == cache.num_used == 3
    assert all(marks(cache, slot, 2) == [1, 1] for slot in range(3))


def test_moving_a_row_moves_no_keys():
    cache = empty()
    write(cache, 0, 0, 3, 1.0)
    write(cache, 3, 0, 9, 2.0)
    pages = cache.table[3].tolist()
    cache.move(3, 0, 9)
    assert cache.table[0].tolist() == pages and not cache.table[3].any()
    assert cache.num_used == 3 and marks(cache, 0, 9) == [2] * 9


def test_what_was_read_is_a_copy_and_can_be_written_elsewhere():
    cache = empty()
    write(cache, 0, 0, 7, 1.0)
    kept = cache.read(0, 7)
    write(cache, 0, 0, 7, 5.0)
    cache.drop(0)
    write(cache, 4, 0, 2, 9.0)
    cache.write(4, kept, 6)
    assert marks(cache, 4, 6) == [1] * 6 and cache.num_used == 2
    assert cache.num_bytes(7) == 2 * 7 * 2 * (3 + 5) * 4
    cache.clear()
    assert cache.num_used == 0 and not cache.tensors


def test_the_pool_never_holds_more_than_all_rows_together_can():
    cache = PagedCache(2, 3 * PAGE, paging=Paging(page=PAGE))
    for length in range(1, 3 * PAGE + 1):
        for slot in range(2):
            write(cache, slot, length - 1, length, 1.0)
    assert len(cache.tensors[0]) == 1 + 2 * 3


steps = st.tuples(
    st.sampled_from(["write", "copy", "move", "drop", "keep", "load"]), st.integers(0, ROWS - 1), st.integers(0, 9)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=30))
def test_each_row_holds_what_a_list_of_its_own_would(actions):
    cache, expected, kept = empty(), [[] for _ in range(ROWS)], None
    for mark, (name, slot, n) in enumerate(actions, start=1):
        own, other = expected[slot], n % ROWS
        if name == "write" and n:
            start = len(own) if n % 2 else len(own) // 2  # goes on, or over what is there already
            write(cache, slot, start, start + n, mark)
            expected[slot] = [*own[:start], *[float(mark)] * n, *own[start + n :]]
        elif name == "copy" and slot != other and (length := min(n, len(own))):
            cache.copy(slot, other, length)
            expected[other] = own[:length]
        elif name == "move" and slot != other:
            cache.move(slot, other, len(own))
            expected[other], expected[slot] = own, []
        elif name == "drop":
            cache.drop(slot, length := min(n, len(own)))
            expected[slot] = own[:length]
        elif name == "keep" and own:
            kept = cache.read(slot, len(own)), list(own)
        elif name == "load" and kept is not None and (length := min(n, len(kept[1]))):
            cache.write(slot, kept[0], length)
            expected[slot] = kept[1][:length]
        held = cache.table[cache.table != SCRATCH]
        assert len(set(held.tolist())) == cache.num_used <= sum(-(-len(row) // PAGE) for row in expected)
        assert all(marks(cache, row, len(own)) == own for row, own in enumerate(expected) if own)
    for slot in range(ROWS):
        cache.drop(slot)
    assert cache.num_used == 0


async def test_the_members_of_a_group_hold_the_pages_of_their_prompt_together(model):
    engine = LocalEngine(model, cache=Paging(page=PAGE))
    used: list[int] = []
    step = engine._step
    engine._step = lambda: (step(), used.append(engine._forward.cache.num_used))
    asked = Sampling(max_tokens=4, ignore_eos=True)
    group = await asyncio.gather(*(engine.generate(PROMPT, asked) for _ in range(8)))
    # Five whole pages of the prompt, and a page of their own for each of the eight; then all are given back.
    assert len(PROMPT) == 5 * PAGE and used == [5 + 8, 5 + 8, 0]
    assert all((torch.tensor(c.logprobs) - own_logprobs(model, PROMPT, c)).abs().max() < 1e-5 for c in group)


async def test_a_row_that_is_handed_on_keeps_the_pages_of_its_prompt_alone(model):
    engine = LocalEngine(model, max_concurrent=1, prefix_cache_mb=0, cache=Paging(page=PAGE))
    used: list[int] = []
    step = engine._step
    engine._step = lambda: (step(), used.append(engine._forward.cache.num_used))
    await asyncio.gather(*(engine.generate(PROMPT, Sampling(max_tokens=n, ignore_eos=True)) for n in (12, 3)))
    # Eleven tokens are written behind the five pages of the prompt; the second request begins after these again.
    assert used == [6, 6, 6, 6, 7, 7, 7, 7, 8, 8, 5, 6, 0]


def test_pages_and_slots_give_the_same_logprobs(model):
    rng = np.random.default_rng(0)
    rows, prompts = [rng.integers(0, 256, size=n) for n in (40, 31, 9)], [5, 4, 3]
    made = (Forward(model.eval(), max_rows=3, paging=paging) for paging in (None, Paging(), Paging(page=PAGE)))
    slots, *paged = (teacher_forced(forward, rows, prompts) for forward in made)
    for found in paged:
        assert max(float((a - b).abs().max()) for a, b in zip(slots, found, strict=True)) < 1e-5


# --- the kernel ---------------------------------------------------------------------------------------


def varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table):
    """What `varlen_attn` documents, by loops: rows of queries, the last of which sees all keys of its row."""
    assert cu_k is None and enable_gqa and query.is_contiguous() and block_table.is_contiguous()
    assert cu_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert len(cu_q) == len(seqused_k) + 1 == len(block_table) + 1
    out, groups = torch.empty_like(query), query.shape[1] // key.shape[2]
    for row, (a, b) in enumerate(zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)):
        length = int(seqused_k[row])
        assert b - a <= max_q and length <= max_k <= block_table.shape[1] * key.shape[1]
        k, v = (pool[block_table[row].long()].flatten(0, 1)[:length] for pool in (key, value))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * (query.shape[-1] ** -0.5 if scale is None else scale)
        left, right = window_size
        ahead = torch.arange(length) - (torch.arange(b - a)[:, None] + length - (b - a))
        scores = scores.masked_fill((ahead > right) | ((left >= 0) & (-ahead > left)), float("-inf"))
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


@pytest.fixture
def any_type(monkeypatch):
    monkeypatch.setattr("whet.engines.local.paged.HALF", (torch.float32,))


@pytest.mark.parametrize("make", [mistral, gemma2, gpt_oss])
def test_the_kernel_gives_the_models_own_logprobs_or_is_passed_over(make, any_type):
    calls: list[int] = []

    def counted(*args, **options):
        calls.append(1)
        return varlen(*args, **options)

    assert worst_difference(make(), [(3, 20), (17, 12), (1, 9)], Paging(counted, PAGE)) < 1e-4
    assert bool(calls) == (make is mistral)  # the others ask for soft caps and sinks


async def test_turns_go_on_from_pages_through_the_kernel(model, any_type):
    engine = LocalEngine(model, cache=Paging(varlen, 8))
    tokens = PROMPT
    for turn in range(3):
        done = await engine.generate(tokens, Sampling(max_tokens=6, seed=turn, ignore_eos=True))
        assert (torch.tensor(done.logprobs) - own_logprobs(model, tokens, done)).abs().max() < 1e-5
        tokens = [*tokens, *done.tokens, *b" <tool> "]
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + 2 * (len(b" <tool> ") + 1)


def test_a_kernel_is_taken_only_if_its_numbers_are_right(model, any_type):
    def wrong(*args, **options):
        return 1.1 * varlen(*args, **options)

    def ignoring(*args, window_size, **options):
        return varlen(*args, window_size=(-1, 0), **options)

    def failing(*args, **options):
        raise RuntimeError("no kernel image")

    assert why_not(model, None, varlen) is None and why_not(mistral(), None, varlen) is None
    assert "no attention over pages" in why_not(model, None, None)
    assert "numbers differ" in why_not(model, None, wrong) and "numbers differ" in why_not(mistral(), None, ignoring)
    assert "RuntimeError: no kernel image" in why_not(model, None, failing)
    assert all("soft cap, sinks" in why_not(make(), None, varlen) for make in (gemma2, gpt_oss))


def test_a_kernel_of_sixteen_bits_does_not_serve_others(model):
    assert "not of 16 bits" in why_not(model, None, varlen)


def test_on_a_cpu_pages_must_be_asked_for(model, caplog):
    assert paging_for("auto", model, None) is None and paging_for("slots", model, None) is None
    with caplog.at_level(logging.INFO, "whet"):
        assert paging_for("paged", model, None) == Paging(kernel=None)
    assert "copied to attend to them: this is not a GPU" in caplog.text
    assert isinstance(LocalEngine(model, cache="paged")._forward.cache, PagedCache)
    with pytest.raises(EngineError, match="cache is 'pages', expected one of auto, slots, paged"):
        LocalEngine(model, cache="pages")


@pytest.mark.gpu
@pytest.mark.skipif(paged_kernel() is None, reason="this PyTorch has no attention over pages")
async def test_pages_on_a_gpu_give_the_models_own_logprobs(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen).cuda()
    assert why_not(model, torch.bfloat16, paged_kernel()) is None
    engine = LocalEngine(model, autocast=torch.bfloat16, max_concurrent=6)
    assert isinstance(engine._forward.cache, PagedCache) and engine._forward.cache.kernel is not None
    asked = Sampling(max_tokens=300, ignore_eos=True)
    for completion in await asyncio.gather(*(engine.generate(PROMPT, asked) for _ in range(9))):
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + completion.tokens], device="cuda"), use_cache=False).logits[0]
        own = logits.float().log_softmax(-1)[len(PROMPT) - 1 : -1].cpu()
        own = own.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (torch.tensor(completion.logprobs) - own).abs().max() < 0.2
    assert engine._forward.graphs is not None and engine._forward.graphs.works
