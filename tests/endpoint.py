"""An OpenAI-compatible endpoint in a thread, for tests of what asks a language model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Self

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def answered(content: str | None, finish: str = "stop") -> Reply:
    """The reply of a language model that says ``content``."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


class Endpoint(HTTPServer):
    """Gives the ``replies`` that were prepared in turn, and after them what :meth:`reply` gives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []  # path, authorization, body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, question: str) -> Reply:
        """The reply to a first message."""
        raise AssertionError(f"no reply was prepared to {question}")

    @contextmanager
    def serving(self) -> Iterator[Self]:
        with self:
            threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
            yield self
            self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        replies = self.server.replies
        status, headers, content = replies.pop(0) if replies else self.server.reply(body["messages"][0]["content"])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
