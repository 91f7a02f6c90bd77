"""The embedded engine: batching, sharing, stopping, interrupting and failing."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.engines.local.engine import LocalEngine
from whet.engines.local.pages import Paging
from whet.errors import EngineError
from whet.types import Completion, Sampling, VersionSpan

PROMPT = list(b"What is two and two?")


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen):
    return AutoTokenizer.from_pretrained(tiny_qwen)


CACHES = {"slots": "slots", "pages": Paging(page=4)}


@pytest.fixture(params=CACHES)
def engine_for(request):
    """Makes an engine over either cache; with pages of four positions, so that every prompt takes several."""

    def make(model, tokenizer=None, **options) -> LocalEngine:
        return LocalEngine(model, tokenizer, cache=CACHES[request.param], **options)

    return make


def prompts(count: int, *, seed: int = 0, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


async def together(engine: LocalEngine, requests: list[tuple[list[int], Sampling]]) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(tokens, sampling) for tokens, sampling in requests))


def own_logprobs(model, tokens: list[int], completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([tokens + list(completion.tokens)]), use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)[len(tokens) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]


class Gate:
    """A head that lets a set number of tokens through, then tells the event loop to stop and look."""

    def __init__(self, engine: LocalEngine, after: int):
        self.engine, self.after, self.calls, self.reached = engine, after, 0, asyncio.Event()
        self.step = engine._step
        engine._step = self

    def __call__(self) -> None:
        self.step()
        self.calls += 1
        if self.calls == self.after:
            self.reached.set()
            self.engine._paused = True


@pytest.mark.parametrize("family", ["tiny_qwen", "tiny_llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_logprobs_equal_the_models_own_forward(family, temperature, request, engine_for):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(family))
    engine = engine_for(model, max_concurrent=3)
    asked = [(p, Sampling(max_tokens=5 + i, temperature=temperature, seed=i)) for i, p in enumerate(prompts(6))]
    for (tokens, _), completion in zip(asked, await together(engine, asked), strict=True):
        expected = own_logprobs(model, tokens, completion, temperature or 1.0)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5


async def test_greedy_equals_transformers_generate(model, engine_for):
    engine = engine_for(model)
    asked = [(p, Sampling(max_tokens=12, temperature=0, ignore_eos=True)) for p in prompts(5)]
    for (tokens, _), completion in zip(asked, await together(engine, asked), strict=True):
        expected = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(completion.tokens) == expected[0, len(tokens) :].tolist()
        assert completion.finish_reason == "length"


async def test_the_prompt_of_a_group_is_computed_once(model, engine_for):
    engine = engine_for(model)
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        group = await together(engine, [(PROMPT, Sampling(max_tokens=4, seed=i)) for i in range(8)])
    finally:
        hook.remove()
    # One forward over the prompt; then three over one new token per row.
    assert seen == [len(PROMPT), 1, 1, 1]
    assert engine.stats()["prefill_tokens"] == len(PROMPT)
    assert engine.stats()["prefill_tokens_saved"] == 7 * len(PROMPT)
    assert len({tuple(completion.tokens) for completion in group}) == 8
    for completion in group:
        expected = own_logprobs(model, PROMPT, completion)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("max_concurrent", [1, 3])
async def test_the_prompt_is_computed_once_even_if_the_group_does_not_fit(model, max_concurrent, engine_for):
    engine = engine_for(model, max_concurrent=max_concurrent)
    asked = [(PROMPT, Sampling(max_tokens=1 + 2 * i, seed=i)) for i in range(7)]
    group = await together(engine, [*asked, (PROMPT[:5], Sampling(max_tokens=3))])
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + 5
    for (tokens, _), completion in zip(asked, group, strict=False):
        expected = own_logprobs(model, tokens, completion)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5


async def test_a_row_that_is_handed_on_and_moved_in_one_step_keeps_its_whole_prompt(model, engine_for):
    engine = engine_for(model, max_concurrent=2)
    # Both rows end together; the third request takes over the second row, which then moves to the first.
    asked = [(list(b"other"), Sampling(max_tokens=2)), *((PROMPT, Sampling(max_tokens=n, seed=n)) for n in (2, 6))]
    last = (await together(engine, asked))[-1]
    assert engine.stats()["prefill_tokens"] == len(PROMPT) + 5
    assert (torch.tensor(last.logprobs) - own_logprobs(model, PROMPT, last)).abs().max() < 1e-5


async def test_a_request_that_comes_later_takes_the_prompt_from_a_row_that_holds_it(model, engine_for):
    engine = engine_for(model)
    gate = Gate(engine, after=3)
    first = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=9, seed=1)))
    await gate.reached.wait()
    second = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=9, seed=2)))
    await asyncio.sleep(0)
    await engine.resume()
    late = await second
    await first
    assert engine.stats()["prefill_tokens"] == len(PROMPT)
    assert (torch.tensor(late.logprobs) - own_logprobs(model, PROMPT, late)).abs().max() < 1e-5


@pytest.mark.parametrize("max_concurrent", [1, 2, 5, 64])
async def test_seeds_reproduce_whatever_else_is_in_flight(model, max_concurrent, engine_for):
    sampling = [Sampling(max_tokens=10, seed=i, top_p=0.9 if i % 2 else 1.0, top_k=50 * (i % 3)) for i in range(6)]
    asked = list(zip(prompts(6), sampling, strict=True))
    alone = [await engine_for(model).generate(tokens, s) for tokens, s in asked]
    others = [(p, Sampling(max_tokens=3 + i, seed=100 + i)) for i, p in enumerate(prompts(4, seed=1))]
    mixed = await together(engine_for(model, max_concurrent=max_concurrent), [*others, *reversed(asked)])
    assert [c.tokens for c in reversed(mixed[len(others) :])] == [c.tokens for c in alone]


async def test_different_seeds_differ_and_no_prompt_is_needed_to_tell_them_apart(model, engine_for):
    group = await together(engine_for(model), [([7], Sampling(max_tokens=6, seed=i)) for i in range(20)])
    assert len({tuple(completion.tokens) for completion in group}) == 20


async def test_samples_follow_the_models_distribution(model, engine_for):
    engine = engine_for(model, max_concurrent=512)
    group = await together(engine, [(PROMPT, Sampling(max_tokens=1, seed=i, temperature=0.3)) for i in range(2000)])
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=260) / 2000
    with torch.inference_mode():
        expected = (model(torch.tensor([PROMPT])).logits[0, -1] / 0.3).softmax(-1)
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()


async def test_a_stop_token_ends_a_completion_and_belongs_to_it(model, engine_for):
    free = await engine_for(model).generate(PROMPT, Sampling(max_tokens=20, seed=3))
    stop = free.tokens[7]
    cut = free.tokens.index(stop) + 1
    by_sampling = await engine_for(model).generate(PROMPT, Sampling(max_tokens=20, seed=3, stop_token_ids=(stop,)))
    by_model = await engine_for(model, stop_token_ids=[stop, 259]).generate(PROMPT, Sampling(max_tokens=20, seed=3))
    for completion in (by_sampling, by_model):
        assert completion.tokens == free.tokens[:cut]
        assert len(completion.logprobs) == cut
        assert completion.finish_reason == "stop"


async def test_ignore_eos_passes_over_the_models_stop_tokens_but_not_over_the_requests_own(model, engine_for):
    free = await engine_for(model).generate(PROMPT, Sampling(max_tokens=20, seed=3))
    engine = engine_for(model, stop_token_ids=[free.tokens[2]])
    on = await engine.generate(PROMPT, Sampling(max_tokens=20, seed=3, ignore_eos=True))
    assert on.tokens == free.tokens
    asked = Sampling(max_tokens=20, seed=3, ignore_eos=True, stop_token_ids=(free.tokens[5],))
    assert (await engine.generate(PROMPT, asked)).tokens == free.tokens[: free.tokens.index(free.tokens[5]) + 1]


async def test_stop_tokens_of_a_request_do_not_outlive_it_in_its_row(model, engine_for):
    free = await engine_for(model).generate(PROMPT, Sampling(max_tokens=20, seed=3))
    engine = engine_for(model, max_concurrent=1)
    await engine.generate(PROMPT, Sampling(max_tokens=20, seed=3, stop_token_ids=tuple(free.tokens[:5])))
    assert (await engine.generate(PROMPT, Sampling(max_tokens=20, seed=3))).tokens == free.tokens


async def test_the_last_allowed_token_may_be_a_stop_token(model, engine_for):
    free = await engine_for(model).generate(PROMPT, Sampling(max_tokens=1, seed=3))
    completion = await engine_for(model, stop_token_ids=free.tokens).generate(PROMPT, Sampling(max_tokens=1, seed=3))
    assert (free.finish_reason, completion.finish_reason) == ("length", "stop")


class Scripted:
    """Makes the model say a given text by writing its logits."""

    def __init__(self, engine: LocalEngine, tokens: list[int]):
        self.tokens, self.said = tokens, 0
        engine._forward.logits = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), 260), -50.0)
        logits[:, self.tokens[self.said]] = 50.0
        self.said += 1
        return logits


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three", ("two",), "one two"),  # a byte per token: the string crosses borders
        ("one two three", ("zwei", "e t"), "one t"),
        ("naïve café 茶 tea", ("茶",), "naïve café 茶"),  # three tokens for one character
        ("naïve café", ("é",), "naïve café"),  # its second byte; the same first byte in ï does not stop
        ("aab", ("ab",), "aab"),
    ],
)
async def test_a_stop_string_ends_a_completion_across_tokens_and_bytes(model, tokenizer, text, stop, kept, engine_for):
    engine = engine_for(model, tokenizer)
    Scripted(engine, list(text.encode() + b" and so on for ever"))
    completion = await engine.generate([1], Sampling(max_tokens=25, stop=stop))
    assert bytes(completion.tokens).decode() == kept
    assert completion.finish_reason == "stop"


async def test_a_stop_string_in_the_prompt_does_not_count(model, tokenizer, engine_for):
    engine = engine_for(model, tokenizer)
    Scripted(engine, list(b"two lines\nor more"))
    completion = await engine.generate(list(b"line\nand t"), Sampling(max_tokens=20, stop=("\n", "tt")))
    assert bytes(completion.tokens) == b"two lines\n"


async def test_more_requests_than_rows_with_ragged_lengths_all_get_their_own(model, engine_for):
    engine = engine_for(model, max_concurrent=4, prefill_tokens=40)
    asked = [(p, Sampling(max_tokens=1 + (7 * i) % 13, seed=i)) for i, p in enumerate(prompts(25))]
    for (tokens, sampling), completion in zip(asked, await together(engine, asked), strict=True):
        assert len(completion.tokens) == sampling.max_tokens
        expected = own_logprobs(model, tokens, completion)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5
    assert engine.stats()["generated_tokens"] == sum(s.max_tokens for _, s in asked)
    assert engine.health() == {"status": "ok", "version": 0, "active": 0, "waiting": 0}


async def test_a_row_that_has_ended_costs_nothing(model, engine_for):
    engine = engine_for(model)
    sizes: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    try:
        await together(engine, [(p, Sampling(max_tokens=n)) for p, n in zip(prompts(4), (2, 5, 3, 5), strict=True)])
    finally:
        hook.remove()
    assert sizes == [1, 4, 3, 2, 2]  # the packed prompts, then the rows that are left


async def test_abort_returns_what_there_is(model, engine_for):
    engine = engine_for(model, max_concurrent=2)
    gate = Gate(engine, after=4)
    tasks = [asyncio.create_task(engine.generate(p, Sampling(max_tokens=50, seed=i))) for i, p in enumerate(prompts(3))]
    await gate.reached.wait()
    await engine.abort()
    done = await asyncio.gather(*tasks)
    assert [c.finish_reason for c in done] == ["abort"] * 3
    # The first step samples from the prompt and decodes once, the others once each; the third never had a row.
    assert [len(c.tokens) for c in done] == [len(c.logprobs) for c in done] == [5, 5, 0]
    assert done[2].versions == ()
    assert engine.health()["active"] == engine.health()["waiting"] == 0


async def test_an_aborted_completion_can_be_continued(model, engine_for):
    whole = await engine_for(model).generate(PROMPT, Sampling(max_tokens=12, temperature=0))
    engine = engine_for(model)
    gate = Gate(engine, after=3)
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=12, temperature=0)))
    await gate.reached.wait()
    await engine.abort()
    part = await task
    await engine.resume()
    left = 12 - len(part.tokens)
    rest = await engine.generate([*PROMPT, *part.tokens], Sampling(max_tokens=left, temperature=0))
    assert [*part.tokens, *rest.tokens] == list(whole.tokens)


async def test_pause_holds_tokens_back_until_resume(model, engine_for):
    engine = engine_for(model)
    await engine.pause()
    assert engine.health()["status"] == "paused"
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=3)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.stats()["steps"] == 0
    await engine.resume()
    assert len((await task).tokens) == 3


async def test_completions_tell_which_version_sampled_which_tokens(model, engine_for):
    engine = engine_for(model, version=4)
    gate = Gate(engine, after=2)
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=6)))
    await gate.reached.wait()
    await engine.update_weights(5)
    await engine.update_weights(6)
    await engine.resume()
    # Three tokens from two steps, then the version that was there for no token leaves no span.
    assert (await task).versions == (VersionSpan(4, 0, 3), VersionSpan(6, 3, 6))
    assert (await engine.generate(PROMPT, Sampling(max_tokens=2))).versions == (VersionSpan(6, 0, 2),)


@pytest.mark.parametrize(("old_tokens", "new_tokens"), [(20, 5), (6, 12)])
async def test_new_weights_are_used_at_once_and_no_old_prompt_is_shared(tiny_qwen, old_tokens, new_tokens, engine_for):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = engine_for(model)
    gate = Gate(engine, after=2)
    old = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=old_tokens)))
    await gate.reached.wait()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    await engine.update_weights(1)
    new = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=new_tokens, seed=1)))
    await asyncio.sleep(0)
    await engine.resume()
    completion = await new
    assert (torch.tensor(completion.logprobs) - own_logprobs(model, PROMPT, completion)).abs().max() < 1e-5
    assert len((await old).tokens) == old_tokens
    assert engine.stats()["prefill_tokens"] == 2 * len(PROMPT)


async def test_a_request_that_has_just_taken_over_a_row_samples_from_the_new_weights(tiny_qwen, engine_for):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = engine_for(model, max_concurrent=1)
    gate = Gate(engine, after=1)
    tasks = [asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=n, seed=n))) for n in (2, 4)]
    await gate.reached.wait()  # the first has ended, the second holds its row and has no token
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    await engine.update_weights(1)
    await engine.resume()
    await tasks[0]
    completion = await tasks[1]
    assert completion.versions == (VersionSpan(1, 0, 4),)
    assert (torch.tensor(completion.logprobs) - own_logprobs(model, PROMPT, completion)).abs().max() < 1e-5


async def test_a_failure_in_a_step_reaches_everyone_and_the_next_request_is_served(model, engine_for):
    engine = engine_for(model, max_concurrent=2)
    decode, calls = engine._forward.decode, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")
        return decode(*arguments)

    engine._forward.decode = broken
    tasks = [engine.generate(p, Sampling(max_tokens=9)) for p in prompts(4)]
    failures = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert all(isinstance(f, EngineError) and "out of memory, say" in str(f) for f in failures)
    assert isinstance(failures[0].__cause__, RuntimeError)
    assert not model.training or model.config._attn_implementation != "whet"
    assert len((await engine.generate(PROMPT, Sampling(max_tokens=2))).tokens) == 2


async def test_logits_that_are_not_finite_are_an_error(tiny_qwen, engine_for):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = engine_for(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        await engine.generate(PROMPT, Sampling(max_tokens=2))


async def test_a_cancelled_request_frees_its_row(model, engine_for):
    engine = engine_for(model, max_concurrent=2)
    gate = Gate(engine, after=2)
    asked = [(p, Sampling(max_tokens=8, seed=i)) for i, p in enumerate(prompts(3))]
    tasks = [asyncio.create_task(engine.generate(*a)) for a in asked]
    await gate.reached.wait()
    assert engine.health() == {"status": "paused", "version": 0, "active": 2, "waiting": 1}
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert engine.health()["active"] == 1
    await engine.resume()
    # The row that moved into the freed slot, and the request that waited, are not disturbed.
    for (tokens, _), task in zip(asked[1:], tasks[1:], strict=True):
        completion = await task
        assert (torch.tensor(completion.logprobs) - own_logprobs(model, tokens, completion)).abs().max() < 1e-5


async def test_a_request_cancelled_while_it_waits_is_forgotten(model, engine_for):
    engine = engine_for(model)
    await engine.pause()
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=8)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.health()["waiting"] == 0


async def test_a_completion_that_takes_too_long_is_an_error_that_says_what_it_waited_for(model, engine_for):
    engine = engine_for(model, timeout_s=0.05)
    await engine.pause()
    with pytest.raises(EngineError, match=r"within 0.05 s: it waited for one of 64 rows.*the engine is paused"):
        await engine.generate(PROMPT, Sampling(max_tokens=8))
    assert engine.health()["waiting"] == 0
    await engine.resume()
    gate = Gate(engine, after=1)
    with pytest.raises(EngineError, match="2 of at most 8 tokens were sampled"):
        await engine.generate(PROMPT, Sampling(max_tokens=8))
    assert gate.reached.is_set()
    assert engine.health()["active"] == 0


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ([], Sampling(), "no tokens"),
        ([5, 260], Sampling(), "token 260, but the model's vocabulary has 260"),
        ([-1], Sampling(), "token -1"),
        ([1] * 4000, Sampling(max_tokens=97), "4000 tokens and max_tokens is 97, together more than the 4096"),
        ([1], Sampling(max_tokens=0), "max_tokens is 0"),
        ([1], Sampling(temperature=-1), "temperature -1"),
        ([1], Sampling(top_p=0), "top_p 0"),
        ([1], Sampling(stop=("x",)), "tokenizer"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused(model, tokens, sampling, message, engine_for):
    with pytest.raises(EngineError, match=message):
        await engine_for(model).generate(tokens, sampling)


async def test_a_closed_engine_ends_what_is_in_flight_and_serves_nothing_more(model, engine_for):
    engine = engine_for(model)
    gate = Gate(engine, after=1)
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=8)))
    await gate.reached.wait()
    await engine.close()
    assert (await task).finish_reason == "abort"
    assert engine.health()["status"] == "closed"
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(PROMPT, Sampling())


def test_an_engine_serves_several_event_loops_one_after_another(model, engine_for):
    engine = engine_for(model, prefix_cache_mb=0)  # or the last bits differ
    runs = [asyncio.run(together(engine, [(PROMPT, Sampling(max_tokens=4, seed=1))])) for _ in range(2)]
    assert runs[0] == runs[1]

    async def leave_in_the_middle() -> None:
        gate = Gate(engine, after=2)
        task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=50)))
        await gate.reached.wait()
        engine._step = gate.step
        engine._paused = False
        engine._drive()
        del task

    asyncio.run(leave_in_the_middle())
    assert engine.health()["active"] == 0
    assert asyncio.run(together(engine, [(PROMPT, Sampling(max_tokens=4, seed=1))])) == runs[0]


def test_requests_left_on_a_loop_that_was_closed_are_dropped(model, engine_for):
    engine = engine_for(model)
    loop = asyncio.new_event_loop()
    gate = Gate(engine, after=2)
    task = loop.create_task(engine.generate(PROMPT, Sampling(max_tokens=50)))
    loop.run_until_complete(gate.reached.wait())
    engine._step = gate.step
    engine._paused = False
    loop.close()
    task._log_destroy_pending = False
    assert engine.health()["active"] == 1
    done = asyncio.run(together(engine, [(PROMPT, Sampling(max_tokens=4, seed=1))]))
    assert len(done[0].tokens) == 4
    assert engine.health()["active"] == 0
    task.get_coro().close()


async def test_other_coroutines_run_between_steps_and_find_the_model_as_they_left_it(tiny_qwen, engine_for):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen).train()
    engine = engine_for(model)
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=6)))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
        assert model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model(torch.tensor([PROMPT]), use_cache=False).logits.sum().backward()
    assert turns >= 5


async def test_the_memory_is_free_while_nothing_is_generated(model, engine_for):
    engine = engine_for(model)
    await engine.generate(PROMPT, Sampling(max_tokens=2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert not engine._forward.cache._layers


async def test_one_token_in_and_one_token_out(model, engine_for):
    engine = engine_for(model)
    completion = await engine.generate([65], Sampling(max_tokens=1, temperature=0))
    with torch.inference_mode():
        logprobs = model(torch.tensor([[65]])).logits[0, -1].log_softmax(-1)
    assert completion.tokens == [int(logprobs.argmax())]
    assert completion.logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-5)


async def test_an_adapter_is_part_of_what_generates(tiny_qwen, engine_for):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen), config).train()
    completion = await engine_for(model).generate(PROMPT, Sampling(max_tokens=6))
    assert model.training
    assert (torch.tensor(completion.logprobs) - own_logprobs(model, PROMPT, completion)).abs().max() < 1e-5
