"""A policy that searches in the middle of its answer reads what a real server finds, and is trained on none of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from runs import column, config_of, train, write_rows
from whet.config.base import Plugin
from whet.envs.registry import build_env
from whet.envs.retriever import Index, Server, read_corpus
from whet.envs.search import INVALID, Search
from whet.errors import ConfigError
from whet.rewards.exact import ExactReward
from whet.rollout.episode import Play, response_decoder
from whet.types import Completion, Episode, Prompt, Sampling

Chat = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def server(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """BM25 over the questions and solutions of GSM8K."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(path, [{"title": row["question"], "text": row["answer"]} for row in rows[:500]])
    with Server(Index(read_corpus(path)), port=0) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


async def play(search: Search, tokenizer: PreTrainedTokenizerFast, *said: str, label: str = "72") -> Episode:
    """The episode in which the policy says this; what ends with a stop text ends there, all else with its turn."""
    left = list(said)

    class Scripted:
        async def generate(self, tokens, sampling, *, prefix_key=None) -> Completion:
            text = left.pop(0)
            new = tokenizer.encode(text, add_special_tokens=False)
            new += [] if text.endswith(sampling.stop) else [tokenizer.eos_token_id]
            return Completion(new, [-1.0] * len(new), "stop")

    prompt = Prompt("p", tokenizer.encode("Q", add_special_tokens=False), "Q", label)
    episode = Episode(prompt, "g", 0)
    engine: Any = Scripted()
    settings = {"seed": 0, "decode": response_decoder(tokenizer), "timeout_s": 20.0}
    return await Play(episode, search(prompt, tokenizer)).run(engine, Sampling(max_tokens=2000), **settings)


async def test_a_search_is_answered_and_an_answer_ends_the_episode(server: Server, chat: Chat):
    tokenizer = chat("tiny")
    said = "<think>who?</think><search> Natalia sold clips </search>", "So <answer> 72 </answer>"
    episode = await play(Search(url=server.url, top_k=1), tokenizer, *said, "never said")
    first, middle, last = episode.response.partition("\n\n<information>Doc 1: Natalia sold clips to 48 of her friends")
    assert first == said[0] and middle
    assert last.endswith("#### 72\n</information>\n\nSo <answer> 72 </answer>")
    sampled = [token for token, trained in zip(episode.tokens, episode.loss_mask, strict=True) if trained]
    assert tokenizer.decode(sampled) == "".join(said)
    assert episode.info == {"num_turns": 2.0, "num_searches": 1.0, "num_invalid_turns": 0.0}
    assert ExactReward(within="answer")(episode) == 1.0


async def test_several_documents_are_numbered_and_cut(server: Server, chat: Chat):
    search = Search(url=server.url, top_k=3, max_characters=60)
    episode = await play(search, chat("tiny"), "<search>apples</search>", "<answer>1</answer>")
    information = episode.response.partition("<information>")[2].partition("</information>")[0]
    assert information.startswith("Doc 1: ") and len(information) == 60
    assert ExactReward(within="answer")(episode) == 0.0


async def test_an_invalid_turn_is_told_how_it_should_be(server: Server, chat: Chat):
    search = Search(url=server.url)
    episode = await play(search, chat("tiny"), "well</search>", "<search> </search>", "<answer>72</answer>")
    assert episode.response.count(INVALID) == 2
    assert episode.info == {"num_turns": 3.0, "num_searches": 0.0, "num_invalid_turns": 2.0}


async def test_a_turn_that_the_policy_ended_is_the_last(server: Server, chat: Chat):
    episode = await play(Search(url=server.url), chat("tiny"), "I give up", "never said")
    assert (episode.status, episode.response) == ("completed", "I give up")


async def test_turns_and_tokens_are_limited(server: Server, chat: Chat):
    asked = ["<search>apples</search>"] * 9
    episode = await play(Search(url=server.url, max_turns=2, max_output_tokens=9000), chat("tiny"), *asked)
    assert (episode.info["num_turns"], episode.response.count("<information>")) == (2.0, 1)
    episode = await play(Search(url=server.url, max_turns=9, max_output_tokens=10), chat("tiny"), *asked)
    assert "<information>" not in episode.response


async def test_a_search_that_fails_costs_the_episode(chat: Chat):
    search = Search(url="http://127.0.0.1:9/retrieve", retries=0)
    episode = await play(search, chat("tiny"), "<search>apples</search>")
    assert episode.status == "failed"
    assert "the search server at http://127.0.0.1:9/retrieve gave no answer in 1 requests" in (episode.error or "")


def test_a_whole_run_searches(server: Server, tmp_path: Path, tiny_qwen: Path):
    """A model that knows nothing is given the words by its stop texts: what it says is random, the server is real."""
    rows = [{"prompt": f"<search>apples {i}", "label": "1"} for i in range(4)]
    config = config_of(
        "grpo",
        tmp_path / "out",
        model__path=str(tiny_qwen),
        data__train=write_rows(tmp_path / "rows.jsonl", rows),
        env={"use": f"{__name__}:Eager", "url": server.url},
        reward=[{"use": "exact", "within": "answer"}, {"use": "random"}],
        train__steps=2,
        rollout__prompts_per_step=2,
        rollout__group_size=2,
        rollout__max_tokens=24,
    )
    run = train(config)
    assert run.loop.global_step == 2
    assert all(number > 0 for number in column(tmp_path / "out", "rollout/env/num_searches"))


class Eager(Search):
    """Takes whatever was sampled for a query, up to the first e, as a random model would never close a tag."""

    def __call__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> Any:
        made: Any = super().__call__(prompt, tokenizer)
        step = made.step
        closing = tokenizer.encode("<search>apples</search>", add_special_tokens=False)

        async def search_first(completion: Completion) -> Any:
            logprobs = [-1.0] * len(closing)
            return await step(Completion(closing, logprobs, "stop"))

        made.stop, made.step = ("e",), search_first
        return made


# --- what is refused at the start -------------------------------------------------------------------------


@pytest.fixture
def odd_server() -> Iterator[str]:
    class Odd(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b'{"answers": []}' if self.path == "/odd" else b"not here"
            self.send_response(200 if self.path == "/odd" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


@pytest.mark.parametrize(
    ("path", "told"),
    [("/odd", r"the answer is \{'answers': \[\]\}, expected"), ("/none", "HTTP Error 404.*not here")],
)
def test_a_server_that_answers_otherwise_is_refused(path: str, told: str, odd_server: str, chat: Chat):
    with pytest.raises(ConfigError, match=told):
        build_env(Plugin(use="search", url=odd_server + path), chat("tiny"))


def test_no_server_is_refused_with_how_to_start_one(chat: Chat):
    with pytest.raises(ConfigError, match=r"env\.url is 'http://127\.0\.0\.1:9'.*python -m whet\.envs\.retriever"):
        build_env(Plugin(use="search", url="http://127.0.0.1:9"), chat("tiny"))
    with pytest.raises(ConfigError, match=r"env\.url is 'localhost'"):
        build_env(Plugin(use="search", url="localhost"))
