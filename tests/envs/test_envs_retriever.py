"""The search server finds what shares words with a query, and tells what it was asked wrongly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whet.envs.retriever import MOST_BYTES, Document, Index, Server, read_corpus
from whet.errors import ConfigError, DataError

DOCUMENTS = [
    Document("1", "Natalia sold clips to her friends in April"),
    Document("2", "Weng earns money by babysitting for friends"),
    Document("3", "Betty saves for a wallet"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(Index(DOCUMENTS), port=0) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


def ask(server: Server, body: Any, path: str = "") -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data), timeout=5) as response:
        return json.load(response)


def test_what_shares_words_is_found_best_first():
    index = Index(DOCUMENTS)
    assert [document.id for document, _ in index.find("clips for friends", 3)] == ["1", "2"]
    scores = [score for _, score in index.find("clips for friends", 3)]
    assert scores[0] > scores[1] > 0
    assert [document.id for document, _ in index.find("clips for friends", 1)] == ["1"]


@pytest.mark.parametrize("query", ["", "the of", "zebra", "?!", "é" * 5])
def test_what_shares_no_word_is_not_found(query: str):
    assert Index(DOCUMENTS).find(query, 3) == []


def test_questions_over_http_are_answered_as_search_r1_expects(server: Server):
    answer = ask(server, {"queries": ["wallet", "zebra"], "topk": 2, "return_scores": True})
    ((best,), nothing) = answer["result"]
    assert best["document"] == {"id": "3", "contents": "Betty saves for a wallet"} and best["score"] > 0
    assert nothing == []
    plain = ask(server, {"queries": ["wallet"]})
    assert plain["result"] == [[{"id": "3", "contents": "Betty saves for a wallet"}]]


def test_it_says_that_it_is_well(server: Server):
    with urllib.request.urlopen(server.url.replace("/retrieve", "/health"), timeout=5) as response:
        assert json.load(response) == {"status": "ok", "num_documents": 3}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        ({"query": "a"}, "expected"),
        ({"queries": "a"}, "expected"),
        ({"queries": ["a"] * 65}, "65 queries at once"),
        ({"queries": ["a"], "topk": 0.5}, "topk is 0.5"),
        ({"queries": ["a"], "topk": 101}, "topk is 101"),
        (b"x" * (MOST_BYTES + 1), "more than"),
    ],
)
def test_a_wrong_question_is_told_so(body: Any, told: str, server: Server):
    with pytest.raises(OSError) as caught:  # of what is too large, the rest is not even read
        ask(server, body)
    if isinstance(caught.value, urllib.error.HTTPError):
        assert caught.value.code == 400
        assert told in json.loads(caught.value.read())["error"]
    assert ask(server, {"queries": ["wallet"]})["result"][0]  # it lives


def test_many_may_ask_at_once(server: Server):
    answers: list[Any] = []
    asking = [threading.Thread(target=lambda: answers.append(ask(server, {"queries": ["wallet"]}))) for _ in range(24)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(answers) == 24 and all(answer["result"][0][0]["id"] == "3" for answer in answers)


def test_a_corpus_is_read_in_both_forms(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"title": "T", "text": "body"}, {"text": "bare"}, {"id": 7, "contents": '"Title"\nthere'}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert read_corpus(path) == [Document("1", "T\nbody"), Document("2", "bare"), Document("7", '"Title"\nthere')]


@pytest.mark.parametrize("line", ["{", "[1]", '{"title": "a"}', '{"text": 3}', "5"])
def test_what_is_no_document_is_named_by_its_line(line: str, tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: .*is no document"):
        read_corpus(path)


def test_a_file_that_is_not_there_and_one_that_is_empty_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="no documents"):
        Index([])


def test_a_port_that_is_taken_is_an_error(server: Server):
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*--port"):
        Server(Index(DOCUMENTS), port=server.server_address[1])


def test_it_is_started_from_the_command_line(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a wallet"}\n', encoding="utf-8")
    command = [sys.executable, "-m", "whet.envs.retriever"]
    with subprocess.Popen([*command, str(path), "--port", "0"], stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            told = running.stderr.readline()
            found = re.fullmatch(r"1 documents at (http://127\.0\.0\.1:\d+)/retrieve\n", told)
            assert found, told
            with urllib.request.urlopen(f"{found[1]}/health", timeout=5) as response:
                assert json.load(response)["num_documents"] == 1
        finally:
            running.terminate()
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert failed.returncode == 2 and "cannot be read" in failed.stderr
