"""What every engine does, whatever it is made of: claims for test files that bring a fixture `engine`.

The engine serves the model in the folder `served`, stops at END, takes a version to publish, and decodes four requests
at a time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.engines.protocol import Engine
from whet.errors import EngineError
from whet.types import Completion, Sampling

PROMPTS = [list(b"The first of them"), list(b"a"), list(b"Another prompt, and a somewhat longer one")]
END = 257
"""The token that the engines under test take for the end of a sequence."""


@pytest.fixture(scope="module")
def reference(served: Path):
    return AutoModelForCausalLM.from_pretrained(served).eval()


def logits_of(reference, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens]), use_cache=False).logits[0]


async def gathered(engine: Engine, *requests: tuple[list[int], Sampling]) -> list[Completion]:
    return await asyncio.gather(
        *(engine.generate(tokens, sampling, prefix_key="group") for tokens, sampling in requests)
    )


def well_formed(completion: Completion, sampling: Sampling) -> bool:
    spans = [i for span in completion.versions for i in range(span.start, span.end)]
    return (
        len(completion.tokens) == len(completion.logprobs) <= sampling.max_tokens
        and all(logprob <= 1e-6 for logprob in completion.logprobs)
        and spans == list(range(len(completion.tokens)))
        and completion.finish_reason in ("stop", "length", "abort")
    )


async def test_logprobs_are_the_models(engine, reference):
    asked = [(tokens, Sampling(max_tokens=8, temperature=0.8, seed=i)) for i, tokens in enumerate(PROMPTS)]
    for (tokens, sampling), completion in zip(asked, await gathered(engine, *asked), strict=True):
        assert well_formed(completion, sampling)
        logits = logits_of(reference, [*tokens, *completion.tokens])[len(tokens) - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4


async def test_greedy_takes_the_likeliest(engine, reference):
    asked = [(tokens, Sampling(max_tokens=6, temperature=0, ignore_eos=True)) for tokens in PROMPTS]
    for (tokens, _), completion in zip(asked, await gathered(engine, *asked), strict=True):
        expected = logits_of(reference, [*tokens, *completion.tokens])[len(tokens) - 1 : -1].argmax(-1)
        assert list(completion.tokens) == expected.tolist()
        assert completion.finish_reason == "length"


async def test_a_seed_reproduces_and_another_one_differs(engine):
    one, other = Sampling(max_tokens=12, seed=1), Sampling(max_tokens=12, seed=2)
    first, second, third = await gathered(engine, (PROMPTS[0], one), (PROMPTS[0], one), (PROMPTS[0], other))
    assert list(first.tokens) == list(second.tokens) != list(third.tokens)
    assert list((await engine.generate(PROMPTS[0], one)).tokens) == list(first.tokens)


async def test_max_tokens_are_not_exceeded(engine):
    asked = [(PROMPTS[i % 3], Sampling(max_tokens=1 + i, seed=i, ignore_eos=True)) for i in range(9)]
    for (_, sampling), completion in zip(asked, await gathered(engine, *asked), strict=True):
        assert len(completion.tokens) == sampling.max_tokens
        assert completion.finish_reason == "length"


async def test_a_stop_token_ends_a_completion_and_belongs_to_it(engine):
    free = await engine.generate(PROMPTS[0], Sampling(max_tokens=10, seed=5, ignore_eos=True))
    stop = free.tokens[4]
    stopped = await engine.generate(PROMPTS[0], Sampling(max_tokens=10, seed=5, stop_token_ids=(stop,)))
    assert list(stopped.tokens) == list(free.tokens[: list(free.tokens).index(stop) + 1])
    assert stopped.finish_reason == "stop"


async def test_a_stop_string_ends_a_completion(engine, served):
    tokenizer = AutoTokenizer.from_pretrained(served)
    free = await engine.generate(PROMPTS[0], Sampling(max_tokens=40, seed=6, ignore_eos=True))
    # The first letter or digit that is sampled: alone it is a text of its own.
    end = next(i for i, token in enumerate(free.tokens) if token < 128 and chr(token).isalnum())
    stop = chr(free.tokens[end])
    stopped = await engine.generate(PROMPTS[0], Sampling(max_tokens=40, seed=6, ignore_eos=True, stop=(stop,)))
    assert list(stopped.tokens) == list(free.tokens[: end + 1])
    assert tokenizer.decode(stopped.tokens).endswith(stop)
    assert stopped.finish_reason == "stop"


async def test_top_k_one_is_greedy(engine):
    greedy = await engine.generate(PROMPTS[2], Sampling(max_tokens=6, temperature=0, ignore_eos=True))
    cut = await engine.generate(PROMPTS[2], Sampling(max_tokens=6, top_k=1, seed=3, ignore_eos=True))
    assert list(cut.tokens) == list(greedy.tokens)


async def test_abort_ends_everything_with_what_it_has(engine):
    sampling = Sampling(max_tokens=3000, ignore_eos=True)
    tasks = [asyncio.create_task(engine.generate(PROMPTS[i % 3], sampling)) for i in range(6)]
    await asyncio.sleep(0.05)
    await engine.abort()
    for completion in await asyncio.wait_for(asyncio.gather(*tasks), 30):
        assert completion.finish_reason == "abort"
        assert well_formed(completion, sampling)
    assert (await engine.generate(PROMPTS[0], Sampling(max_tokens=2, ignore_eos=True))).finish_reason == "length"


async def test_nothing_is_sampled_between_pause_and_resume(engine):
    await engine.pause()
    assert engine.health()["status"] == "paused"
    task = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(max_tokens=2)))
    await asyncio.sleep(0.05)
    assert not task.done()
    await engine.resume()
    assert len((await asyncio.wait_for(task, 30)).tokens) == 2


async def test_completions_carry_the_version_that_sampled_them(engine):
    await engine.update_weights(7)
    completion = await engine.generate(PROMPTS[0], Sampling(max_tokens=3, ignore_eos=True))
    assert [(s.version, s.start, s.end) for s in completion.versions] == [(7, 0, 3)]
    assert engine.health()["version"] == 7


async def test_a_cancelled_request_leaves_the_others_alone(engine):
    sampling = Sampling(max_tokens=20, seed=1, ignore_eos=True)
    alone = await engine.generate(PROMPTS[0], sampling)
    tasks = [asyncio.create_task(engine.generate(PROMPTS[0], sampling)) for _ in range(6)]
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    tasks[5].cancel()
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    assert all(list(done[i].tokens) == list(alone.tokens) for i in (0, 2, 3, 4))


@pytest.mark.parametrize(
    ("tokens", "sampling"),
    [([], Sampling()), ([1], Sampling(max_tokens=0)), ([1, 2], Sampling(max_tokens=5000)), ([1], Sampling(top_p=0.0))],
)
async def test_a_request_that_cannot_be_served_is_an_engine_error(engine, tokens, sampling):
    with pytest.raises(EngineError):
        await engine.generate(tokens, sampling)


async def test_a_closed_engine_says_so(engine):
    await engine.close()
    assert engine.health()["status"] == "closed"
    with pytest.raises(EngineError):
        await engine.generate(PROMPTS[0], Sampling())
