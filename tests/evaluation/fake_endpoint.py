"""An OpenAI-compatible endpoint on this machine that behaves, or misbehaves, as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What to send back: ``text`` as a chat completion, or ``body`` as it is; ``status`` 0 drops the connection."""

    text: str = ""
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


# Called with the request's content and its number, from 0 on.
Behaviour = Callable[[dict[str, Any], int], Answer]


class Endpoint:
    """``requests`` as they came, their ``keys`` and other ``headers``; ``most_at_once`` were under way together."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(handler.headers["Authorization"])
            self.headers.append({k: v for k, v in handler.headers.items() if k.lower() != "authorization"})
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        answer = self.behaviour(request, number)
        time.sleep(answer.delay_s)
        with self._lock:
            self._at_once -= 1
        if answer.status == 0:
            handler.close_connection = True
            return
        body = answer.body if answer.body is not None else completion(answer.text, request["model"])
        handler.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body.encode()))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())


def completion(text: str, model: str) -> str:
    """The answer's form; the served model has a date, and the counts are fixed."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 200, "completion_tokens": 10, "total_tokens": 210}
    return json.dumps({"object": "chat.completion", "model": f"{model}-0125", "choices": [choice], "usage": usage})


@contextmanager
def running(behaviour: Behaviour) -> Iterator[Endpoint]:
    """The endpoint, at ``url`` as long as the block lasts."""
    endpoint = Endpoint(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            endpoint.serve(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
