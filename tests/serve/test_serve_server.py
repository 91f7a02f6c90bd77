"""OpenAI's own client talks to the server: chats, completions, streams, tools, errors, and hanging up."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.engines.local.engine import LocalEngine
from whet.errors import ConfigError
from whet.serve.server import Server
from whet.types import Sampling

ASKED = [{"role": "user", "content": "What is two and two?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
END = 258
"""<|im_end|>"""


@pytest.fixture(scope="module")
def model(tiny_qwen):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen)


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen):
    return AutoTokenizer.from_pretrained(tiny_qwen)


@pytest.fixture
def engine(model, tokenizer) -> LocalEngine:
    return LocalEngine(model, tokenizer, stop_token_ids=[END], max_concurrent=8, timeout_s=30)


@pytest.fixture
async def server(engine, tokenizer) -> AsyncIterator[Server]:
    async with Server(engine, tokenizer, name="tiny", port=0) as server:
        yield server


@pytest.fixture
async def client(server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


class Says:
    """Makes the model say a text, whoever asks, by writing its logits."""

    def __init__(self, engine: LocalEngine, text: str):
        self.tokens, self.said = [*text.encode(), END], 0
        engine._forward.logits = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), 260), -50.0)
        logits[:, self.tokens[self.said % len(self.tokens)]] = 50.0
        self.said += 1
        return logits


async def test_a_chat_is_what_the_engine_samples(client, engine, tokenizer):
    got = await client.chat.completions.create(
        model="tiny",
        messages=ASKED,
        max_completion_tokens=12,
        seed=5,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    expected = await engine.generate(prompt, Sampling(max_tokens=12, seed=5, ignore_eos=True))
    choice = got.choices[0]
    assert choice.token_ids == list(expected.tokens)
    assert got.prompt_token_ids == prompt
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-5)
    assert choice.message.content == tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert (choice.finish_reason, got.model, got.object) == ("length", "tiny", "chat.completion")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt), 12)
    assert choice.weight_versions == [{"version": 0, "start": 0, "end": 12}]


async def test_completions_take_texts_and_token_ids_several_of_each(client, engine, tokenizer):
    options = {"model": "tiny", "max_tokens": 6, "seed": 1, "logprobs": 0, "extra_body": {"return_token_ids": True}}
    texts = await client.completions.create(prompt=["two and", "three"], n=2, **options)
    ids = await client.completions.create(prompt=[list(b"two and"), list(b"three")], n=2, **options)
    assert [c.token_ids for c in texts.choices] == [c.token_ids for c in ids.choices]
    assert [c.index for c in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].token_ids != texts.choices[1].token_ids
    assert texts.usage.prompt_tokens == len(b"two and") + len(b"three")
    first = await engine.generate(list(b"three"), Sampling(max_tokens=6, seed=1))
    assert texts.choices[2].token_ids == list(first.tokens)
    assert texts.choices[2].prompt_token_ids == list(b"three")
    assert texts.choices[2].logprobs.token_logprobs == pytest.approx(first.logprobs, abs=1e-5)
    one = await client.completions.create(prompt=list(b"three"), **options)
    assert [c.token_ids for c in one.choices] == [list(first.tokens)]


async def test_a_stream_tells_the_same_in_pieces_and_the_usage_at_the_end(client):
    options = {"model": "tiny", "messages": ASKED, "max_tokens": 15, "seed": 2, "n": 2, "logprobs": True}
    extra = {"return_token_ids": True, "ignore_eos": True}
    whole = await client.chat.completions.create(**options, extra_body=extra)
    stream = await client.chat.completions.create(
        **options, extra_body=extra, stream=True, stream_options={"include_usage": True}
    )
    texts, tokens, logprobs, reasons, usage = ["", ""], [[], []], [[], []], [None, None], None
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.token_ids
            logprobs[choice.index] += [one.logprob for one in choice.logprobs.content]
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.token_ids for choice in whole.choices]
    for i, choice in enumerate(whole.choices):
        assert logprobs[i] == pytest.approx([one.logprob for one in choice.logprobs.content], abs=1e-5)
    assert reasons == ["length", "length"]
    assert usage == whole.usage
    assert len(chunks) > 10


async def test_a_stop_text_ends_the_text_and_is_not_told(client, engine):
    for stop, expected in (("; ", "one two"), (["three", " ;"], "one two; "), (None, "one two; three")):
        Says(engine, "one two; three")
        got = await client.completions.create(model="tiny", prompt="Count", max_tokens=30, stop=stop)
        assert got.choices[0].text == expected
        Says(engine, "one two; three")
        stream = await client.completions.create(model="tiny", prompt="Count", max_tokens=30, stop=stop, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks) == expected
        assert got.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"


async def test_a_character_of_several_tokens_comes_whole(client, engine):
    Says(engine, "naïve 茶")
    stream = await client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=30, stream=True)
    pieces = [chunk.choices[0].delta.content async for chunk in stream]
    assert "".join(pieces) == "naïve 茶"
    assert "茶" in pieces and not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_of_a_tool_is_told_as_one_and_goes_back_by_the_template(client, engine, tokenizer, stream):
    Says(engine, 'Let me see.<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call>')
    options = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "max_tokens": 120}
    if stream:
        chunks = [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]
        message, reason = chunks[-1].choices[0].delta, chunks[-1].choices[0].finish_reason
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        got = await client.chat.completions.create(**options)
        message, reason = got.choices[0].message, got.choices[0].finish_reason
        content = message.content
    (call,) = message.tool_calls
    assert (content, reason) == ("Let me see.", "tool_calls")
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "add", {"a": 2, "b": 2})
    call_message = {"role": "assistant", "content": content, "tool_calls": [call.model_dump(exclude={"index"})]}
    told = [*ASKED, call_message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    Says(engine, "Four.")
    extra = {"return_token_ids": True}
    after = await client.chat.completions.create(
        model="tiny", messages=told, tools=[TOOL], max_tokens=20, extra_body=extra
    )
    prompt = tokenizer.decode(after.prompt_token_ids)
    assert '"arguments": {"a": 2, "b": 2}' in prompt and "Adds." in prompt
    assert after.choices[0].message.content == "Four."
    assert after.choices[0].message.tool_calls is None


async def test_a_call_that_cannot_be_read_stays_text_and_no_tools_no_calls(client, engine):
    broken = '<tool_call>{"name": "add", "arguments": {"a": 2,</tool_call>'
    Says(engine, broken)
    got = await client.chat.completions.create(model="tiny", messages=ASKED, tools=[TOOL], max_tokens=90)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (broken, "stop")
    fine = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    for extra in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        Says(engine, fine)
        got = await client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=90, **extra)
        assert got.choices[0].message.content == fine and got.choices[0].message.tool_calls is None


async def test_parts_of_text_are_one_text(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "two and two?"}]
    asked = [ASKED, [{"role": "user", "content": parts}]]
    got = [
        await client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, seed=1)
        for messages in asked
    ]
    assert got[0].choices[0].message.content == got[1].choices[0].message.content


async def test_many_clients_at_once_get_what_each_gets_alone(client, engine):
    def ask(i: int):
        return client.completions.create(
            model="tiny", prompt=f"Number {i}", max_tokens=4 + i % 7, seed=i, temperature=1
        )

    together = await asyncio.gather(*(ask(i) for i in range(30)))
    alone = [await ask(i) for i in range(30)]
    assert [c.choices[0].text for c in together] == [c.choices[0].text for c in alone]
    assert engine.stats()["steps"] < 30 * 10  # they were decoded together


async def test_greedy_and_bounds_of_the_model(client, engine):
    greedy = [await client.completions.create(model="tiny", prompt="a", temperature=0, max_tokens=9) for _ in range(2)]
    assert greedy[0].choices[0].text == greedy[1].choices[0].text
    drawn = [await client.completions.create(model="tiny", prompt="a", max_tokens=9) for _ in range(2)]
    assert drawn[0].choices[0].text != drawn[1].choices[0].text  # no seed: another one each time
    assert drawn[0].usage.completion_tokens == 9
    assert (await client.completions.create(model="tiny", prompt="a")).usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("options", "kind", "param", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model", "model is 'gpt', but this server has 'tiny'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "temperature is '-1'"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4096}, openai.BadRequestError, None, "4096 positions"),
        ({"n": 0}, openai.BadRequestError, "n", "n is '0'"),
        ({"stop": [""]}, openai.BadRequestError, "stop", "stop is"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty", "leave it out"),
        ({"extra_body": {"guided": 1}}, openai.BadRequestError, "guided", "guided is 1, which this server does not do"),
        ({"logprobs": True, "top_logprobs": 3}, openai.BadRequestError, "top_logprobs", "only the logprobs of sampled"),
        ({"tool_choice": "required", "tools": [TOOL]}, openai.BadRequestError, "tool_choice", "cannot be forced"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
        ({"messages": [{"content": "x"}]}, openai.BadRequestError, "messages", "messages[0] has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            openai.BadRequestError,
            "messages",
            "only parts of type text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]},
            openai.BadRequestError,
            "messages",
            "messages[0] has tool_calls 5, expected a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages",
            "only parts of type text",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused_in_openais_form(client, options, kind, param, message):
    with pytest.raises(kind) as refused:
        await client.chat.completions.create(**{"model": "tiny", "messages": ASKED, **options})
    assert refused.value.param == param
    assert message in refused.value.body["message"]
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "give text or token ids"),
        ({"prompt": [5, 900]}, "token 900, but the model's vocabulary has 260"),
        ({"prompt": "a", "logprobs": 4}, "only the logprobs of sampled"),
        ({"prompt": "a", "echo": True}, "echo is True"),
    ],
)
async def test_completions_that_cannot_be_done_are_refused(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        await client.completions.create(**{"model": "tiny", **options})


async def test_neutral_values_are_taken(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "user": "me", "response_format": {"type": "text"}}
    got = await client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, **neutral)
    assert got.usage.completion_tokens <= 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_takes_its_request_out_of_the_engine(client, engine, stream):
    async def ask() -> None:
        options = {"max_tokens": 4000, "n": 3, "extra_body": {"ignore_eos": True}}
        got = await client.completions.create(model="tiny", prompt="a", stream=stream, **options)
        if stream:
            async for _ in got:
                pass

    task = asyncio.create_task(ask())
    while engine.stats()["generated_tokens"] < 9:
        await asyncio.sleep(0.005)
    assert engine.health()["active"] == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(5):
        while engine.health()["active"]:
            await asyncio.sleep(0.005)
    assert engine.health()["waiting"] == 0
    assert engine.stats()["generated_tokens"] < 3 * 1000


async def test_a_failure_while_sampling_is_told(client, engine):
    engine._forward.decode = None
    with pytest.raises(openai.InternalServerError, match="failed while generating"):
        await client.completions.create(model="tiny", prompt="a", max_tokens=5)
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match="failed while generating"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_half_of_a_surrogate_pair_is_refused(path, server):
    text = {"prompt": "\ud800"} if path == "completions" else {"messages": [{"role": "user", "content": "\ud800"}]}
    status, answer = await asyncio.to_thread(posted, f"{server.url}/{path}", json.dumps(text).encode())
    assert status == 400 and "surrogates not allowed" in answer["error"]["message"]


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, monkeypatch):
    monkeypatch.setattr("whet.serve.app.MAX_BODY", 1000)
    for length, expected in ((1100, 413), (800, 200)):
        body = json.dumps({"prompt": "a" * length, "max_tokens": 1}).encode()
        status, answer = await asyncio.to_thread(posted, f"{server.url}/completions", body)
        assert status == expected
    body = json.dumps({"prompt": "a" * 1100}).encode()
    _, answer = await asyncio.to_thread(posted, f"{server.url}/completions", body)
    assert "the body has more than 1000 bytes" in answer["error"]["message"]


def posted(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and answer to what no client of OpenAI's would send."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


async def test_a_full_server_refuses_at_once(engine, tokenizer):
    async with (
        Server(engine, tokenizer, name="tiny", port=0, max_requests=2) as server,
        openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=20) as client,
    ):
        await engine.pause()
        tasks = [asyncio.create_task(client.completions.create(model="tiny", prompt="a")) for _ in range(2)]
        while engine.health()["waiting"] < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(openai.RateLimitError, match="2 requests are in flight"):
            await client.completions.create(model="tiny", prompt="a")
        await engine.resume()
        assert all(got.choices for got in await asyncio.gather(*tasks))
        with pytest.raises(openai.BadRequestError, match="are 4 completions, but this server takes 2"):
            await client.completions.create(model="tiny", prompt=["a", "b"], n=2)


async def test_models_health_and_other_paths(client, engine):
    assert [model.id for model in (await client.models.list()).data] == ["tiny"]
    root = str(client.base_url).removesuffix("/v1/")
    http = client._client
    assert (await http.get(f"{root}/health")).json()["status"] == "ok"
    lost = await http.get(f"{root}/v2/chat")
    assert lost.status_code == 404 and "/v1/chat/completions" in lost.json()["error"]["message"]
    assert (await http.post(f"{root}/v1/completions", content=b"{")).status_code == 400
    assert (await http.get(f"{root}/health", headers={"host": "evil.example"})).status_code == 400
    await engine.close()
    assert (await http.get(f"{root}/health")).status_code == 503
    with pytest.raises(openai.InternalServerError, match="closed"):
        await client.completions.create(model="tiny", prompt="a")


async def test_another_host_needs_a_key_and_the_key_is_asked_for(engine, tokenizer):
    with pytest.raises(ConfigError, match="others can reach the server; give an API key"):
        Server(engine, tokenizer, host="0.0.0.0")
    async with Server(engine, tokenizer, name="tiny", host="0.0.0.0", port=0, api_key="secret") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for key, allowed in (("secret", True), ("wrong", False)):
            async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=20) as client:
                if allowed:
                    assert (await client.models.list()).data
                else:
                    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                        await client.completions.create(model="tiny", prompt="a")


async def test_a_port_that_is_taken_is_an_error_before_anything_is_served(server, engine, tokenizer):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {server.port}"):
        await Server(engine, tokenizer, port=server.port).start()


async def test_it_serves_beside_a_trainer_that_changes_the_weights(tiny_qwen, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    engine = LocalEngine(model, tokenizer, max_concurrent=4)
    extra = {"return_token_ids": True}
    async with (
        Server(engine, tokenizer, name="policy", port=0) as server,
        openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=20) as client,
    ):
        task = asyncio.create_task(
            client.completions.create(model="policy", prompt="a", max_tokens=60, extra_body=extra)
        )
        while engine.stats()["generated_tokens"] < 5:
            await asyncio.sleep(0)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
        await engine.update_weights(3)
        spans = (await task).choices[0].weight_versions
    assert [span["version"] for span in spans] == [0, 3]
    assert spans[0]["end"] == spans[1]["start"] and spans[1]["end"] == 60
