"""The HTTP side: what is asked where, and how errors are told."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from whet.engines.local.engine import LocalEngine
from whet.errors import EngineError
from whet.serve.answering import Answering
from whet.serve.conversation import Conversations, encoded
from whet.serve.refusal import Refusal
from whet.serve.replies import Reply
from whet.serve.requests import ChatRequest, CompletionRequest

MAX_BODY = 8 * 2**20
"""Most bytes of a request: several times the text that the longest contexts hold."""


class Service:
    """What the endpoints do, over one engine."""

    def __init__(self, engine: LocalEngine, tokenizer: PreTrainedTokenizerBase, name: str, max_requests: int):
        self.engine, self.tokenizer, self.name, self.max_requests = engine, tokenizer, name, max_requests
        self.conversations = Conversations(tokenizer)

    async def models(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "whet"}
        return {"object": "list", "data": [{**model, "max_model_len": self.engine.max_length}]}

    async def health(self) -> Response:
        health = self.engine.health()
        return JSONResponse(health, status_code=503 if health["status"] == "closed" else 200)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check(body)
        tools = body.shown_tools()
        tokens = self.conversations.tokens(body.messages, tools, body.chat_template_kwargs)
        return await self._answer(body, [tokens], request, is_chat=True, with_tools=tools is not None)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self._check(body)
        prompts = [encoded(self.tokenizer, p, "prompt") if isinstance(p, str) else p for p in body.prompts()]
        return await self._answer(body, prompts, request, is_chat=False, with_tools=False)

    def _check(self, body: ChatRequest | CompletionRequest) -> None:
        if body.model not in (None, self.name):
            text = f"model is {body.model!r}, but this server has {self.name!r}"
            raise Refusal(404, text, param="model", code="model_not_found")
        body.refuse_unknown()
        if self.engine.health()["status"] == "closed":
            raise Refusal(503, "the engine is closed")
        self._make_room(1)

    def _make_room(self, asked: int) -> None:
        """Raise Refusal where so many completions more would be too many."""
        if asked > self.max_requests:
            text = f"prompts times n are {asked} completions, but this server takes {self.max_requests} at a time"
            raise Refusal(400, text)
        health = self.engine.health()
        if health["active"] + health["waiting"] + asked > self.max_requests:
            text = f"{self.max_requests} requests are in flight, as many as this server takes; try again later"
            raise Refusal(429, text, code="rate_limit_exceeded")

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        request: Request,
        *,
        is_chat: bool,
        with_tools: bool,
    ) -> Response:
        self._make_room(len(prompts) * body.n)
        reply = Reply(self.name, self.tokenizer, is_chat, body.wants_logprobs(), body.return_token_ids, prompts)
        room = max(1, (self.engine.max_length or 2**20) - max(map(len, prompts)))
        answering = Answering(self.engine, self.conversations, reply, body.samplings(room), with_tools)
        try:
            for one in answering.asked:
                self.engine.validate(*one)
        except EngineError as error:
            raise Refusal(400, str(error)) from error
        if not body.stream:
            return await _unless_gone(request, answering.whole())
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _until_gone(request, answering.events(usage=usage))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class Bounded:
    """Refuses bodies that are too large before they are held, read as JSON, and tokenised in the engine's loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0

        async def counted() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > MAX_BODY:
                # FastAPI makes a 400 of any other exception while it reads.
                raise HTTPException(413, f"the body has more than {MAX_BODY} bytes; ask for less at a time")
            return message

        await self.app(scope, counted, send)


def make_app(service: Service, *, api_key: str | None, hosts: list[str]) -> FastAPI:
    """The application: its routes, who may call it, and its errors in OpenAI's form."""
    app = FastAPI(title="whet", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", service.health)
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/completions", service.complete, methods=["POST"])
    # A web page that a browser shows could otherwise reach a server on loopback under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(Bounded)
    if api_key is not None:
        app.middleware("http")(_only_with(api_key))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return JSONResponse(error.body(), status_code=error.status)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refused(_, _named(error))

    async def failed(_: Request, error: Exception) -> Response:
        return await refused(_, Refusal(500, str(error)))

    async def not_here(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{_.method} {_.url.path}: {error.detail}"
        if error.status_code in (404, 405):
            text += "; there are /v1/chat/completions, /v1/completions, /v1/models"
        return await refused(_, Refusal(error.status_code, text))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(EngineError, failed)
    app.add_exception_handler(HTTPException, not_here)
    return app


def _only_with(api_key: str) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.path != "/health" and not hmac.compare_digest(given.encode(), api_key.encode()):
            refusal = Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
            return JSONResponse(refusal.body(), status_code=401)
        return await call_next(request)

    return guard


def _named(error: RequestValidationError) -> Refusal:
    """The first violation, by the name of its parameter."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not place:
        return Refusal(400, f"the body is not the JSON object that is expected: {first['msg']}")
    value = "" if first["type"] == "missing" else f" is {str(first['input'])[:80]!r}"
    return Refusal(400, f"{place[0]}{value}: {first['msg']}", param=place[0])


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, answer: Awaitable[dict[str, Any]]) -> Response:
    """The answer, or nothing if the client hangs up before: then it is cancelled."""
    working, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(working.result()) if working.done() else Response(status_code=499)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(request: Request, events: Any) -> AsyncIterator[str]:
    """The events as long as the client reads them."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        async with aclosing(events):
            while not gone.done():
                coming = asyncio.ensure_future(anext(events, None))
                try:
                    await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.gather(coming, return_exceptions=True)
                if coming.cancelled() or (event := coming.result()) is None:
                    return
                yield event
    finally:
        gone.cancel()
