"""The embedded engine: takes requests, decodes them together, answers each as soon as it ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.engines.local.cache import LENGTH_BLOCK
from whet.engines.local.check import check
from whet.engines.local.choice import paging_for
from whet.engines.local.forward import Forward
from whet.engines.local.pages import Paging
from whet.engines.local.prompts import Prompts
from whet.engines.local.request import Piece, Request, StopText, validate
from whet.engines.local.rows import Rows
from whet.engines.local.sampler import sample
from whet.engines.local.stats import Stats
from whet.engines.local.weights import Following, Weights
from whet.errors import EngineError
from whet.types import Completion, FinishReason, Sampling
from whet.weights.snapshot import Snapshot, version_of


class LocalEngine:
    """Continuous batching in this process, with the trainer's own model object or a copy of it (see
    `engines.protocol.Engine`).

    A step prefills what has joined, then decodes one token for every row. Requests join as soon as a row is
    free and leave at once; what a prompt has in common with requests in flight, or ended before, is not computed
    again, and found by the tokens themselves (`prefix_key` is not needed). Between two steps the event loop
    runs, and the model is in the mode the trainer left it in.

    `stop_token_ids` are the model's end-of-sequence tokens; `tokenizer` is needed for stop strings only.
    `autocast` is the type the trainer computes in, None without autocast. `timeout_s` bounds one completion.
    `prefill_tokens` bounds the prompt tokens of one forward call (a longer prompt goes alone).
    `prefix_cache_mb` bounds the keys and values kept of requests that have ended, for those that go on from there;
    they go when the weights change, and with `release`.
    `packed_weights` holds a second copy of the linear layers on a CPU while sampling, which is faster (see `Packed`).
    `cache` says where keys and values lie: `slots`, `paged`, a `Paging`, or `auto` for what is faster (`paging_for`).
    `weights_from` is the model that is trained, or a stream of its weights, where `model` is a copy of it
    (`weights.own_copy`): what is trained is then copied by `update_weights`, and another thread may train while this
    one samples.
    Raises EngineError if the model cannot be served exactly (see `check`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        stop_token_ids: Sequence[int] = (),
        max_concurrent: int = 64,
        timeout_s: float = 600.0,
        autocast: torch.dtype | None = None,
        prefill_tokens: int = 8192,
        version: int = 0,
        weights_from: nn.Module | Weights | None = None,
        prefix_cache_mb: float = 256.0,
        packed_weights: bool = True,
        cache: str | Paging = "auto",
    ):
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_concurrent = max_concurrent
        self.timeout_s = timeout_s
        self.prefill_tokens = prefill_tokens
        self.version = version
        how = {"packs": packed_weights, "paging": paging_for(cache, model, autocast)}
        self._forward = Forward(model, max_rows=max_concurrent, autocast=autocast, **how)
        self._following = None if weights_from is None else Following(model, weights_from)
        if self._following is not None:
            self._following.update()
        self._vocabulary = len(self._forward.head.weight)
        check(model, self._vocabulary, **how)
        self._rows = Rows(max_concurrent)
        self._waiting: dict[tuple[int, ...], deque[Request]] = {}
        self._prompts = Prompts(self._forward, int(prefix_cache_mb * 2**20))
        self._stats = Stats()
        self._paused = self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: asyncio.Task[None] | None = None

    # --- what callers see -----------------------------------------------------------------------------

    async def generate(self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None) -> Completion:
        """Sample one completion of `tokens`; see `Engine.generate`."""
        request = self._submit(tokens, sampling, prefix_key)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await request.answer
        except TimeoutError as error:
            raise EngineError(self._late(request)) from error
        finally:
            self._give_up(request)

    async def stream(
        self, tokens: Sequence[int], sampling: Sampling, *, prefix_key: str | None = None
    ) -> AsyncGenerator[Piece]:
        """Sample one completion and tell its tokens as they come; the last piece has a finish reason.

        Whoever reads slowly gets larger pieces. Closing the generator takes the request out of the engine.
        Raises EngineError as `generate` does.
        """
        request, told = self._submit(tokens, sampling, prefix_key), 0
        request.progress = progress = asyncio.Event()
        request.answer.add_done_callback(lambda _: progress.set())
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        try:
            while not request.answer.done():
                async with asyncio.timeout_at(deadline):
                    await progress.wait()
                progress.clear()
                if not request.answer.done() and (end := len(request.output)) > told:
                    yield Piece(request.output[told:end], request.logprobs[told:end])
                    told = end
            done = request.answer.result()
            yield Piece(list(done.tokens[told:]), list(done.logprobs[told:]), done.finish_reason)
        except TimeoutError as error:
            raise EngineError(self._late(request)) from error
        finally:
            self._give_up(request)

    async def update_weights(self, snapshot: Snapshot | int) -> None:
        """The weights are the trainer's own and have changed already, or are copied from there now, while nobody
        writes to them: from here on they are those of the snapshot's version, which may be given alone.

        Requests in flight go on with the keys and values that earlier versions computed; prompts that
        come from now on are computed anew.
        """
        if self._following is not None:
            self._following.update()
        self.version = version_of(snapshot)
        self._prompts.clear()
        for request in [self._rows.requests[row] for row in self._rows.fresh()]:
            self._free(request.row)  # took over a row whose prompt is now out of date
            self._waiting.setdefault(request.tokens, deque()).appendleft(request)
        for request in self._rows.requests:
            request.mark(self.version)

    async def pause(self) -> None:
        self._paused = True  # steps do not overlap with other coroutines, so none is under way

    async def resume(self) -> None:
        self._paused = False
        self._drive()

    async def abort(self, prefix_keys: Collection[str] | None = None) -> None:
        chosen = [one for one in self._requests() if prefix_keys is None or one.key in prefix_keys]
        for request in reversed(chosen):  # those that wait first, then rows from the last down: nothing is moved
            self._withdraw(request)
        if not (self._rows or self._waiting):
            self._clear()
        for request in chosen:
            request.finish("abort")

    async def close(self) -> None:
        self._closed = True
        await self.abort()
        self.release()

    def release(self) -> None:
        """Let go of what is kept for later requests: the trainer is about to need the memory."""
        self._prompts.kept.clear()
        self._forward.packed.clear()

    @property
    def max_length(self) -> int | None:
        """Positions of the model: tokens of prompt and completion together at most. None where there is no limit."""
        return self._forward.max_length

    def health(self) -> dict[str, Any]:
        status = "closed" if self._closed else "paused" if self._paused else "ok"
        return {"status": status, "version": self.version, "active": len(self._rows), "waiting": self._num_waiting}

    def stats(self) -> dict[str, float]:
        """Counts and seconds since the engine was made (see `Stats`)."""
        return {**asdict(self._stats), "prefix_hit_rate": self._stats.prefix_hit_rate}

    # --- taking requests in and out -------------------------------------------------------------------

    def _submit(self, tokens: Sequence[int], sampling: Sampling, key: str | None) -> Request:
        request = self._request(tokens, sampling, key)
        self._waiting.setdefault(request.tokens, deque()).append(request)
        self._drive()
        return request

    def _give_up(self, request: Request) -> None:
        """Nobody waits any more; take the request out if it has not ended."""
        if not request.answer.done() or request.answer.cancelled():
            self._withdraw(request)

    def _request(self, tokens: Sequence[int], sampling: Sampling, key: str | None) -> Request:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        tokens = tuple(map(int, tokens))
        self.validate(tokens, sampling)
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed() and (self._rows or self._waiting):
                raise EngineError("the engine is generating for another event loop; use one engine per loop")
            self._clear()  # whoever waited on a loop that is closed is gone
            self._loop, self._driver = loop, None
        stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.stop_token_ids)
        stop_text = StopText(self.tokenizer, sampling.stop) if sampling.stop else None
        return Request(tokens, sampling, stops, stop_text, loop.create_future(), key)

    def validate(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Raises EngineError for a request that cannot be served."""
        validate(tokens, sampling, self._vocabulary, self._forward.max_length, self.tokenizer)

    def _withdraw(self, request: Request) -> None:
        """Take out a request that nobody waits for any more."""
        if request.row >= 0:
            self._leave(request)
        elif (queue := self._waiting.get(request.tokens)) is not None and request in queue:
            queue.remove(request)
            if not queue:
                del self._waiting[request.tokens]

    def _late(self, request: Request) -> str:
        doing = (
            f"{len(request.output)} of at most {request.sampling.max_tokens} tokens were sampled, "
            f"with {len(self._rows)} requests decoded together"
            if request.row >= 0
            else f"it waited for one of {self.max_concurrent} rows, with {self._num_waiting} requests waiting"
        )
        paused = "; the engine is paused" if self._paused else ""
        return (
            f"a completion did not end within {self.timeout_s:g} s: {doing}{paused}. "
            "Raise engine.timeout_s, or lower max_tokens or the number of requests at a time"
        )

    def _requests(self) -> list[Request]:
        """All requests in flight."""
        return [*self._rows.requests, *(request for queue in self._waiting.values() for request in queue)]

    @property
    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _clear(self) -> None:
        self._rows.clear()
        self._waiting.clear()
        self._prompts.forget_slots()
        self._forward.free()

    # --- the loop of steps ----------------------------------------------------------------------------

    def _drive(self) -> None:
        """See to it that a task runs steps while there is work."""
        alive = self._driver is not None and not self._driver.done()
        if not alive and not self._paused and (self._rows or self._waiting):
            self._driver = asyncio.get_running_loop().create_task(self._run_steps(), name="whet local engine")

    async def _run_steps(self) -> None:
        try:
            while True:
                await asyncio.sleep(0)  # others run, and a group that is submitted together is complete
                if self._paused or not (self._rows or self._waiting):
                    break
                self._step()
            if not self._rows and not self._waiting:
                self._forward.free()  # the memory is the trainer's while nothing is generated
                if not self._prompts.kept.max_bytes:  # else more turns are to come; see `release`
                    self._forward.packed.clear()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _fail(self, error: BaseException) -> None:
        """Hand a failure of a step to everyone who waits, and start from nothing with the next request."""
        requests = self._requests()
        self._clear()
        self.release()
        for request in requests:
            if request.answer.done():
                continue
            if isinstance(error, Exception):
                failure = EngineError(f"the embedded engine failed while generating: {type(error).__name__}: {error}")
                failure.__cause__ = error
                request.answer.set_exception(failure)
            else:
                request.answer.cancel()

    def _step(self) -> None:
        start = time.perf_counter()
        with self._forward.running():
            self._join()
            if len(fresh := self._rows.fresh()):
                self._advance(fresh, self._first_logits(fresh))
            if rows := len(self._rows):
                positions = self._rows.position[:rows]
                self._forward.cache.reserve(rows, int(positions.max()) + 1)
                sharers = self._prompts.sharers() if self._forward.reads_once else ()
                hidden = self._forward.decode(self._rows.token[:rows], positions, sharers)
                self._advance(np.arange(rows), self._forward.logits(hidden))
        self._stats.steps += 1
        self._stats.seconds += time.perf_counter() - start

    def _join(self) -> None:
        """Give free rows to waiting requests; compute their prompts, or copy them from where they lie."""
        if not (requests := self._next_requests()):
            return
        self._forward.cache.reserve(len(self._rows) + len(requests), max(map(_room, requests)))
        for request in requests:
            request.mark(self.version)
            self._rows.add(request)
        computed, saved = self._prompts.join(requests)
        self._stats.prefill_tokens += computed
        self._stats.prefill_tokens_saved += saved

    def _next_requests(self) -> list[Request]:
        """Requests for the free rows, in the order their prompts came, all of a prompt together."""
        taken: list[Request] = []
        free, uncomputed = self.max_concurrent - len(self._rows), 0
        while free and self._waiting:
            tokens, queue = next(iter(self._waiting.items()))
            uncomputed += self._prompts.num_uncomputed(tokens)
            if taken and uncomputed > self.prefill_tokens:
                break
            while free and queue:
                taken.append(queue.popleft())
                free -= 1
            if not queue:
                del self._waiting[tokens]
        return taken

    def _first_logits(self, rows: np.ndarray) -> Tensor:
        """Logits after the prompt, for rows without a token. One head call per prompt, not per row."""
        hidden, index = self._prompts.first_hidden([self._rows.requests[row] for row in rows.tolist()])
        return self._forward.logits(hidden)[index]

    def _advance(self, rows: np.ndarray, logits: Tensor) -> None:
        """Sample one token for each of `rows` and answer the requests that end with it."""
        tokens, logprobs = sample(logits, self._rows.draws(rows))
        sampled, likelihood = torch.stack((tokens.double(), logprobs)).cpu().numpy()
        if not np.isfinite(likelihood).all():
            raise EngineError(
                "the model's logits are not finite; the weights hold NaN or infinity, or the precision overflows "
                "(backend.precision)"
            )
        self._stats.generated_tokens += len(rows)
        ended = self._rows.record(rows, sampled.astype(np.int64), likelihood)
        # From the last row down, so that no row is moved that ends too.
        for request, reason in sorted(ended, key=lambda pair: -pair[0].row):
            self._end(request, reason)

    def _end(self, request: Request, reason: FinishReason) -> None:
        self._stats.completions += 1
        self._leave(request)
        request.finish(reason)

    def _leave(self, request: Request) -> None:
        """Give a request's row to one that waits with the same prompt, or free it."""
        row, queue = request.row, self._waiting.get(request.tokens)
        prompt = self._prompts.leave(request, int(self._rows.position[row]))
        if prompt is not None and queue:
            heir = queue.popleft()
            if not queue:
                del self._waiting[request.tokens]
            heir.mark(self.version)
            prompt.holders.append(heir)
            self._rows.hand_over(row, heir)
            self._forward.cache.drop(row, len(heir.tokens))
            self._stats.prefill_tokens_saved += len(heir.tokens)
            return
        self._prompts.drop_unheld(request.tokens)
        self._free(row)

    def _free(self, row: int) -> None:
        """Empty a row, and move the last one there: what it has in the cache, at most up to its last token."""
        self._forward.cache.drop(row)
        if (moved := self._rows.remove(row)) is not None:
            self._forward.cache.move(moved, row, int(self._rows.position[row]) + 1)


def _room(request: Request) -> int:
    """Positions to reserve for a request that joins: its prompt, and what it will sample or a good part of that."""
    return len(request.tokens) + min(request.sampling.max_tokens, LENGTH_BLOCK)
