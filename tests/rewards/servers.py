"""A server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], str]


class Server(ThreadingHTTPServer):
    """Answers the n-th request with `answers[n]`, and all later ones with the last: text, or status, headers, body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = ["Score: 7"]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.delay_s = 0.0
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            answer = server.answers[min(len(server.requests), len(server.answers) - 1)]
            server.requests.append((self.path, dict(self.headers), body))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        time.sleep(server.delay_s)
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            answer = 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
        with server.lock:
            server.active -= 1
        status, headers, text = answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...
