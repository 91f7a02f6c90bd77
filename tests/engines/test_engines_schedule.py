"""Whatever requests come when, leave when, and are interrupted by: each gets exactly what it would get alone."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from whet.engines.local.engine import LocalEngine
from whet.engines.local.pages import Paging
from whet.types import Completion, Sampling

LONG = b"a longer prompt, of thirty or so tokens"
PROMPTS = [[65], list(b"two"), list(b"two and two"), list(LONG), list(LONG + b" or so"), list(LONG[:25] + b" more")]
SAMPLINGS = [
    Sampling(max_tokens=n, seed=n, temperature=t, top_k=k)
    for n, t, k in [(1, 1.0, 0), (2, 0.0, 0), (5, 1.0, 20), (9, 0.8, 0), (12, 1.0, 0)]
]
KINDS = [(p, s) for p in range(len(PROMPTS)) for s in range(len(SAMPLINGS))]
Action = tuple[str, int]


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


@pytest.fixture(scope="module")
def alone(model) -> dict[tuple[int, int], Completion]:
    engine = LocalEngine(model, max_concurrent=1, prefix_cache_mb=0)

    async def each() -> dict[tuple[int, int], Completion]:
        return {(p, s): await engine.generate(PROMPTS[p], SAMPLINGS[s]) for p, s in KINDS}

    return asyncio.run(each())


submit = st.tuples(st.just("submit"), st.integers(0, len(KINDS) - 1))
group = st.tuples(st.just("group"), st.integers(0, len(PROMPTS) - 1))
wait = st.tuples(st.just("wait"), st.integers(1, 6))
cancel = st.tuples(st.just("cancel"), st.integers(0, 30))
other = st.tuples(st.sampled_from(["pause", "resume", "abort", "publish"]), st.just(0))


async def play(engine: LocalEngine, actions: list[Action]) -> list[tuple[tuple[int, int], asyncio.Task]]:
    tasks: list[tuple[tuple[int, int], asyncio.Task]] = []

    def send(kind: tuple[int, int]) -> None:
        tasks.append((kind, asyncio.create_task(engine.generate(PROMPTS[kind[0]], SAMPLINGS[kind[1]]))))

    for name, value in actions:
        if name == "submit":
            send(KINDS[value])
        elif name == "group":
            for s in range(len(SAMPLINGS)):
                send((value, s))
        elif name == "wait":
            for _ in range(value):
                await asyncio.sleep(0)
        elif name == "cancel" and tasks:
            tasks[value % len(tasks)][1].cancel()
        elif name == "publish":
            await engine.update_weights(engine.version + 1)
        elif name in ("pause", "resume", "abort"):
            await getattr(engine, name)()
    await engine.resume()
    await asyncio.wait_for(asyncio.gather(*(task for _, task in tasks), return_exceptions=True), 60)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(st.one_of(submit, submit, group, wait, wait, cancel, other), min_size=1, max_size=25),
    max_concurrent=st.integers(1, 5),
    prefill_tokens=st.sampled_from([1, 20, 1000]),
    prefix_cache_mb=st.sampled_from([0, 0.05, 100]),
    cache=st.sampled_from(["slots", Paging(page=4), Paging(page=16)]),
)
def test_every_request_gets_what_it_would_get_alone(model, alone, actions, **options):
    engine = LocalEngine(model, **options)
    left: list[int] = []
    free = engine._forward.free
    # Before all memory goes because nobody is left, every page has been given back.
    engine._forward.free = lambda: (left.append(getattr(engine._forward.cache, "num_used", 0)), free())
    for kind, task in asyncio.run(play(engine, actions)):
        if task.cancelled():
            continue
        completion, expected = task.result(), alone[kind]
        length = len(completion.tokens)
        assert completion.tokens == expected.tokens[:length]
        assert completion.logprobs == pytest.approx(expected.logprobs[:length], abs=1e-4)
        assert length == len(expected.tokens) or completion.finish_reason == "abort"
        covered = [i for span in completion.versions for i in range(span.start, span.end)]
        assert covered == list(range(length))
        assert sorted(span.version for span in completion.versions) == [span.version for span in completion.versions]
    health = engine.health()
    assert (health["active"], health["waiting"]) == (0, 0)
    assert not engine._prompts
    assert not any(left)
    assert not engine._forward.cache._layers
