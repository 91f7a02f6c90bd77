"""The requests being decoded, row by row: their state in arrays, so that a step costs no work per row in Python."""

from __future__ import annotations

import numpy as np

from whet.engines.local.request import Request
from whet.engines.local.sampler import Draws, stream_key, uniforms
from whet.types import FinishReason


class Rows:
    """Rows [0, len) are occupied; a row that ends is replaced by the last one.

    `position` is where the row's last token stands, whose keys and values are not in the cache yet;
    `count` is the number of tokens sampled.
    """

    def __init__(self, max_rows: int):
        self.requests: list[Request] = []
        self.token = np.zeros(max_rows, dtype=np.int64)
        self.position = np.zeros(max_rows, dtype=np.int64)
        self.count = np.zeros(max_rows, dtype=np.int64)
        self.max_tokens = np.zeros(max_rows, dtype=np.int64)
        self.temperature = np.zeros(max_rows, dtype=np.float32)
        self.top_p = np.zeros(max_rows, dtype=np.float64)
        self.top_k = np.zeros(max_rows, dtype=np.int64)
        self.key = np.zeros(max_rows, dtype=np.uint64)
        self.stops = np.full((max_rows, 1), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        """Put a request whose prompt is in the cache, or about to be, into the next free row."""
        request.row = len(self.requests)
        self.requests.append(request)
        self._fill(request)

    def hand_over(self, row: int, request: Request) -> None:
        """Give a row, with the prompt that its slot holds, to another request with the same prompt."""
        self.requests[row].row = -1
        request.row = row
        self.requests[row] = request
        self._fill(request)

    def remove(self, row: int) -> int | None:
        """Free a row. Returns the row whose slot must now be copied to `row`, if there is one."""
        self.requests[row].row = -1
        last = self.requests.pop()
        if last.row < 0:
            return None
        moved, last.row = last.row, row
        self.requests[row] = last
        for array in self._arrays():
            array[row] = array[moved]
        return moved

    def clear(self) -> None:
        for request in self.requests:
            request.row = -1
        self.requests.clear()

    def fresh(self) -> np.ndarray:
        """Rows that have no token yet."""
        return np.flatnonzero(self.count[: len(self)] == 0)

    def draws(self, rows: np.ndarray) -> Draws:
        """How these rows draw their next token."""
        uniform = uniforms(self.key[rows], self.count[rows])
        return Draws(self.temperature[rows], self.top_p[rows], self.top_k[rows], uniform)

    def record(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[Request, FinishReason]]:
        """Append one token to each of these rows. Returns the requests that end with it, and why."""
        self.token[rows] = tokens
        self.position[rows] += 1
        self.count[rows] += 1
        stopped = (tokens[:, None] == self.stops[rows]).any(1)
        full = self.count[rows] >= self.max_tokens[rows]
        requests = [self.requests[row] for row in rows.tolist()]
        for i, (request, token, logprob) in enumerate(zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)):
            request.output.append(token)
            request.logprobs.append(logprob)
            if request.progress is not None:
                request.progress.set()
            if request.stop_text is not None and not stopped[i]:
                stopped[i] = request.stop_text.ends(request.output)
        return [(requests[i], "stop" if stopped[i] else "length") for i in np.flatnonzero(stopped | full).tolist()]

    def _fill(self, request: Request) -> None:
        row, sampling = request.row, request.sampling
        self.token[row] = request.tokens[-1]
        self.position[row] = len(request.tokens) - 1
        self.count[row] = 0
        self.max_tokens[row] = sampling.max_tokens
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.top_k[row] = sampling.top_k
        self.key[row] = stream_key(sampling.seed)
        stops = sorted(request.stop_token_ids)
        if (missing := len(stops) - self.stops.shape[1]) > 0:
            self.stops = np.pad(self.stops, ((0, 0), (0, missing)), constant_values=-1)
        self.stops[row] = -1
        self.stops[row, : len(stops)] = stops

    def _arrays(self) -> tuple[np.ndarray, ...]:
        sampling = (self.temperature, self.top_p, self.top_k, self.key, self.stops)
        return self.token, self.position, self.count, self.max_tokens, *sampling
