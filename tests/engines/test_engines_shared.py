"""A prompt that rows share is read once for all of them, and the attention is what each row's own would be."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from whet.engines.local.contexts import attend_masked, hiding
from whet.engines.local.engine import LocalEngine
from whet.engines.local.shared import SharedPrompts, Sharers
from whet.types import Sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_over_prompt_and_rest_is_attention_over_both(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    heads, queries, length, width = 2, 3, 100, 16
    keys, values = (torch.randn(14, heads, 128, width, generator=generator, dtype=dtype) for _ in range(2))
    rows = {70: ([0, 1, 2], [8, 10, 11]), 64: ([4, 6],), 80: ([5],), 20: ([7, 9],)}
    sharers = [Sharers(np.array(one), length) for length, groups in rows.items() for one in groups]
    for group in sharers:
        for held in (keys, values):
            held[group.rows, :, : group.length] = held[group.rows[0], :, : group.length].clone()
    positions = np.array([70, 90, 99, 3, 64, 80, 77, 30, 71, 20, 90, 75])
    query = torch.randn(12, heads, queries, width, generator=generator, dtype=dtype) * 3
    mask = hiding(torch.from_numpy(positions), length, None, dtype)[:, None, None]
    shared = SharedPrompts(sharers, positions + 1)
    assert [(one.start, one.stop) for one, _ in shared.alone] == [(3, 4), (5, 6), (7, 8), (9, 10)]
    assert [bunch.shape for bunch in shared.bunches] == [(2, 3), (1, 2)]
    ours = shared.attend(query, keys, values, mask, 0.3)
    theirs = attend_masked(query, keys[:12, :, :length], values[:12, :, :length], mask, 0.3)
    assert (ours - theirs).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)


async def test_completions_of_long_prompts_have_the_models_own_logprobs_as_groups_shrink(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    engine = LocalEngine(model, max_concurrent=16)
    prompts = [[(7 * i + 3 * j) % 250 for j in range(70 + i)] for i in range(2)]
    asked = [(prompts[i % 2], Sampling(max_tokens=2 + i, seed=i, ignore_eos=True)) for i in range(9)]
    found = await asyncio.gather(*(engine.generate(tokens, sampling) for tokens, sampling in asked))
    for (tokens, _), completion in zip(asked, found, strict=True):
        whole = torch.tensor([[*tokens, *completion.tokens]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
        own = logits.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (own - torch.tensor(completion.logprobs)).abs().max() < 1e-5
