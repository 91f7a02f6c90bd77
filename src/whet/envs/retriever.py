"""A search server for one machine: BM25 over a file of documents, asked over HTTP.

    python -m whet.envs.retriever corpus.jsonl --port 8001

Each line of the file is `{"title": ..., "text": ...}`, or `{"contents": ...}`; an `id` is optional. Asked by
`POST /retrieve {"queries": [...], "topk": 3}`; `GET /health` tells how many documents there are.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from whet.errors import ConfigError, DataError, WhetError

logger = logging.getLogger(__name__)

MOST_BYTES = 2**20
MOST_QUERIES = 64
MOST_CHARACTERS = 4000
MOST_DOCUMENTS = 100
IDLE_S = 60.0
"""Seconds after which a connection that says nothing is closed."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text that can be found."""

    id: str
    contents: str


class Index:
    """BM25 over documents (bm25s, its default Lucene variant), English stop words left out.

    Raises ConfigError where bm25s is not installed, DataError without documents.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "the search server needs bm25s; install it with pip install -e '.[search]' in the checkout of whet"
            ) from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
        if not documents:
            raise DataError("there are no documents to search")
        self.documents = tuple(documents)
        self._split = partial(bm25s.tokenize, stopwords="en", show_progress=False)
        self._bm25 = bm25s.BM25()
        self._bm25.index(self._split([document.contents for document in documents]), show_progress=False)

    def find(self, query: str, most: int) -> list[tuple[Document, float]]:
        """The best documents that share a word with the query, and their scores, best first."""
        words = self._split([query], return_ids=False)
        if not words[0]:
            return []
        most = min(most, len(self.documents))
        found, scores = self._bm25.retrieve(words, k=most, show_progress=False)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.documents[position], score) for position, score in pairs if score > 0]


def read_corpus(path: str | Path) -> list[Document]:
    """The documents of a JSONL file. Raises DataError naming the line that is none."""
    documents = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            contents = row["contents"] if "contents" in row else "\n".join((row.get("title") or "", row["text"]))
            documents.append(Document(str(row.get("id", number)), contents.strip()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: {line[:80]!r} is no document; expected an object with text (and title) or contents"
            ) from error
    return documents


class Server(ThreadingHTTPServer):
    """Answers questions to an index at `http://host:port/retrieve`, each in a thread; port 0 takes any that is free.

    Raises ConfigError for an address that cannot be had.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, index: Index, host: str = "127.0.0.1", port: int = 8001) -> None:
        self.index = index
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}/retrieve"


class Refused(ValueError):
    """A request that is not answered; the text says why."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    # Without it a short answer waits for the acknowledgement of its headers.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok", "num_documents": len(self.server.index.documents)})
        else:
            self._answer(404, {"error": f"there is no {self.path}; there are /retrieve and /health"})

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if length > MOST_BYTES:
                self.close_connection = True  # what it goes on to send is not read
                raise Refused(f"the request has {length} bytes, more than {MOST_BYTES}")
            body = self.rfile.read(length)
            if self.path != "/retrieve":
                raise Refused(f"there is no {self.path}; there is /retrieve")
            self._answer(200, retrieve(self.server.index, body))
        except ValueError as error:
            self._answer(400, {"error": str(error)})

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def retrieve(index: Index, body: bytes) -> dict[str, Any]:
    """The answer to a request. Raises Refused for one that is none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is not JSON: {error}") from error
    queries = asked.get("queries") if isinstance(asked, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise Refused('expected {"queries": ["...", ...], "topk": 3}')
    if len(queries) > MOST_QUERIES:
        raise Refused(f"{len(queries)} queries at once, more than {MOST_QUERIES}")
    most = asked.get("topk") or 3
    if type(most) is not int or not 1 <= most <= MOST_DOCUMENTS:
        raise Refused(f"topk is {most!r}, expected a whole number from 1 to {MOST_DOCUMENTS}")
    found = [index.find(query[:MOST_CHARACTERS], most) for query in queries]
    documents = [[({"id": one.id, "contents": one.contents}, score) for one, score in best] for best in found]
    if asked.get("return_scores"):
        return {"result": [[{"document": one, "score": score} for one, score in best] for best in documents]}
    return {"result": [[one for one, _ in best] for best in documents]}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one (default 8001)")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        server = Server(Index(read_corpus(options.corpus)), options.host, options.port)
    except WhetError as error:
        parser.exit(2, f"{error}\n")
    logger.info("%d documents at %s", len(server.index.documents), server.url)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("stopped")


if __name__ == "__main__":
    main()
