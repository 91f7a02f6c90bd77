"""The environment `search`: the policy asks a search engine in the middle of its answer, as in Search-R1."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from whet.envs.insert import Inserter
from whet.errors import ConfigError
from whet.rewards.endpoint import Endpoint, checked_url
from whet.rollout.episode import response_decoder
from whet.rollout.protocols import Observation, Turn
from whet.types import Completion, Prompt

PROBE_S = 10.0
"""Most seconds that the server may take to answer the first question, before a model is loaded."""
QUERY = re.compile(r"<search>(.*?)</search>", re.DOTALL)
ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)
INVALID = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)


class Search:
    """Makes the environment of each episode.

    url: a server that takes `{"queries": [...], "topk": k, "return_scores": true}` and gives
    `{"result": [[{"document": {"contents": ...}, "score": ...}, ...]]}`, as `python -m whet.envs.retriever` does.
    top_k: documents for a query. max_turns: completions of an episode at most; a search in the last is not made.
    timeout_s, retries: of one request. max_characters: what is kept of the documents for one query.
    max_output_tokens: tokens that answers may add to an episode, which ends where one more would add more.
    Source: Jin et al. 2025 (arXiv:2503.09516).
    """

    def __init__(
        self,
        *,
        url: str,
        top_k: Annotated[int, Field(ge=1)] = 3,
        max_turns: Annotated[int, Field(ge=1)] = 4,
        timeout_s: Annotated[float, Field(gt=0)] = 10.0,
        retries: Annotated[int, Field(ge=0)] = 3,
        max_characters: Annotated[int, Field(ge=1)] = 2000,
        max_output_tokens: Annotated[int, Field(ge=1)] = 2048,
    ) -> None:
        self.url = checked_url(url, "env.url")
        self.top_k, self.max_turns, self.max_characters = top_k, max_turns, max_characters
        self.max_injected = max_output_tokens
        self._insert: Inserter | None = None
        self._endpoint = Endpoint(self.url, who="the search server", request_timeout_s=timeout_s, retries=retries)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        """Ask the server something. Raises ConfigError where none answers as it should."""
        body = json.dumps(self._question("a")).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PROBE_S) as response:
                texts_of(json.load(response))
        except (OSError, ValueError) as error:
            told = error.read(200).decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise ConfigError(
                f"env.url is {self.url!r}, and what was asked there for a try came to nothing: {error} {told}".strip()
                + "; start a server, as in python -m whet.envs.retriever corpus.jsonl, or correct the URL"
            ) from error

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> SearchEpisode:
        if self._insert is None or self._insert.tokenizer is not tokenizer:
            self._insert = Inserter(tokenizer)
        return SearchEpisode(self, self._insert)

    async def find(self, query: str) -> str:
        """What the documents for a query say. Raises RewardError without an answer."""
        response = await self._endpoint.post(self._question(query))
        texts = texts_of(response.json())
        told = "".join(f"Doc {position}: {text.strip()}\n" for position, text in enumerate(texts, 1))
        return told[: self.max_characters]

    def _question(self, query: str) -> dict[str, Any]:
        return {"queries": [query], "topk": self.top_k, "return_scores": True}


class SearchEpisode:
    """One episode: `<search>` is answered with `<information>`, and `<answer>` is the end.

    A completion that has neither, and did not end the policy's turn, is told how it should be.
    """

    stop = ("</search>", "</answer>")

    def __init__(self, search: Search, insert: Inserter) -> None:
        self._search, self._insert = search, insert
        self._decode, self._closing = response_decoder(insert.tokenizer), frozenset(insert.tokenizer.all_special_ids)
        self._num_turns = self._num_searches = self._num_invalid = self._num_injected = 0

    async def reset(self) -> Observation:
        return Observation()

    async def step(self, completion: Completion) -> Turn:
        self._num_turns += 1
        text = self._decode(completion.tokens)
        queries = [query.strip() for query in QUERY.findall(text)]
        ended = completion.tokens[-1] in self._closing
        if ANSWER.search(text) or (ended and not queries) or self._num_turns >= self._search.max_turns:
            return Turn(done=True)
        if queries and queries[-1]:
            self._num_searches += 1
            found = self._insert.harmless(await self._search.find(queries[-1]))
            said = f"\n\n<information>{found}</information>\n\n"
        else:
            self._num_invalid += 1
            said = INVALID
        tokens = self._insert.tokens(said)
        self._num_injected += len(tokens)
        return Turn(False, Observation(tokens)) if self._num_injected <= self._search.max_injected else Turn(done=True)

    def info(self) -> dict[str, float]:
        counts = {"num_turns": self._num_turns, "num_searches": self._num_searches}
        return {**counts, "num_invalid_turns": self._num_invalid}


def texts_of(answer: Any) -> list[str]:
    """The documents of the first query in a server's answer. Raises ValueError for another form."""
    try:
        return [str(found.get("document", found)["contents"]) for found in answer["result"][0]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is {answer!r:.120}, expected {{'result': [[{{'document': ...}}]]}}") from error
