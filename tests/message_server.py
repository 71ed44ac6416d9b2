"""A service on this machine that messages are posted to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

SECRET = "kEy123abc"
ENOUGH_S = 60.0


class Server(ThreadingHTTPServer):
    """A service that messages are posted to; `answers` are the statuses that it gives, the last one for good."""

    daemon_threads = True

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers) or [200]
        self.messages: Queue[dict] = Queue()
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        """Where it is, with a key in user, path and query."""
        return f"json://user:{SECRET}@127.0.0.1:{self.server_port}/{SECRET}?+X-Token={SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.messages.put(message)
        self.server.may_answer.wait(ENOUGH_S)
        answers = self.server.answers
        self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
        self.end_headers()

    def log_message(self, *arguments) -> None:
        """Say nothing."""


@contextmanager
def serving(*answers: int) -> Iterator[Server]:
    """A server, until the test is over."""
    with Server(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.may_answer.set()
            server.shutdown()
            thread.join()
