"""An OpenAI server that answers by a script: streams with known pauses, refusals, streams that break off."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake"
# Long enough to be told from nothing on a busy machine, short enough for many.
PAUSE = 0.02


@dataclass
class Script:
    """What the server does; bodies: what it was sent. fails: tells which requests are refused, by number.

    first_pause, pause: seconds before the first piece of text and before each other one.
    """

    pieces: tuple[str, ...] = ("one ", "two ", "three")
    first_pause: float = PAUSE
    pause: float = PAUSE
    has_usage: bool = True
    breaks_off: bool = False
    error_in_stream: bool = False
    fails: Any = staticmethod(lambda number: False)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an answer, each after its pause."""
        for index, piece in enumerate(self.pieces):
            time.sleep(self.pause if index else self.first_pause)
            if path.endswith("/images/generations"):
                yield {"type": "image_generation.partial_image", "b64_json": "", "partial_image_index": index}
            elif path.endswith("/chat/completions"):
                yield {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            else:
                yield {"choices": [{"index": 0, "text": piece, "finish_reason": None}]}
        if self.error_in_stream:
            yield {"error": {"message": "the engine is gone", "type": "server_error"}}
        if self.breaks_off or self.error_in_stream:
            return
        usage = {"prompt_tokens": 7, "completion_tokens": 12, "nfe": 4} if self.has_usage else None
        if path.endswith("/images/generations"):
            yield {"type": "image_generation.completed", "b64_json": "", "usage": {"nfe": 20}}
        else:
            yield {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]}
            yield {"choices": [], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with script.lock:
            number = len(script.bodies)
            script.bodies.append(body)
            script.keys.append(self.headers["Authorization"])
            script.num_open += 1
            script.most_open = max(script.most_open, script.num_open)
        try:
            if script.fails(number):
                self._answer(400, {"error": {"message": "no such field", "param": "x"}})
            else:
                self._stream()
        except BrokenPipeError:
            # The client waited no longer.
            return
        finally:
            with script.lock:
                script.num_open -= 1

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in self.script.events(self.path):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        if not self.script.breaks_off:
            self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def fake_server(script: Script) -> Iterator[str]:
    """Serve the script; yields the base url."""
    handler = type("Handler", (_Handler,), {"script": script})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
