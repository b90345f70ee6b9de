"""Over HTTP: the same figures as in this process, and every way in which a server can disappoint."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sfumato.engine.frontend import SamplingParams
from sfumato.errors import ConfigError, EngineDied, RequestError
from sfumato.evaluation.address import Address
from sfumato.evaluation.backend import Ask, Reply
from sfumato.evaluation.served import Served
from sfumato.serve.cli import run
from tests.evaluation.scripted import CARD
from tests.serve.running import KEY, SDAR, Server, serving

CHAT = [{"role": "user", "content": "4+3="}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "--dtype", "float32", SDAR) as running:
        yield running


def test_a_served_model_answers(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_API_KEY", KEY)
    options = ["--limit", "6", "--sweep", "confidence_threshold=0.9,2", "--concurrency", "4", "--no-plot"]
    url = ["--url", f"{server.url}/v1"]
    assert run(["eval", "word-problems", *options, *url, "--out", str(tmp_path / "served")]) == 0
    local = ["--threads", "1", "--dtype", "float32", "--out", str(tmp_path / "local")]
    assert run(["eval", "word-problems", *options, *local]) == 0
    capsys.readouterr()
    served, here = (
        msgspec.json.decode((tmp_path / name / "report.json").read_bytes())["curves"][0]["points"]
        for name in ("served", "local")
    )
    for name in ("num_correct", "tpf", "mean_request_tpf", "mean_nfe", "mean_tokens", "num_failed"):
        assert [point[name] for point in served] == [point[name] for point in here]
    assert KEY not in (tmp_path / "served" / "report.json").read_text()


def test_raw_prompts_failures_and_refusals(server: Server) -> None:
    served = Served(Address(f"{server.url}/v1", KEY), SDAR)
    replies: list[Reply] = []
    asks = [
        Ask("raw", "4+3=", SamplingParams(seed=0, max_tokens=4, stop=("\n\nQuestion:",))),
        Ask("long", [{"role": "user", "content": "12+7= " * 400}], SamplingParams(seed=0)),
        Ask("chat", CHAT, SamplingParams(seed=0, timeout=60.0)),
    ]
    served.run(asks, replies.append, concurrency=3)
    by_id = {reply.id: reply for reply in replies}
    assert by_id["raw"].usage.completion_tokens <= 4
    assert by_id["raw"].error is None
    assert "context of 512" in str(by_id["long"].error)
    assert by_id["chat"].output == "4+3=7. The answer is 7."
    assert by_id["chat"].usage.nfe > 0
    with pytest.raises(RequestError, match="confidence_threshold is -1") as caught:
        served.check(Ask("1", CHAT, SamplingParams(algorithm_parameters={"confidence_threshold": -1})))
    assert caught.value.field == "algorithm_parameters.confidence_threshold"
    with pytest.raises(RequestError, match="max_tokens"):
        served.check(Ask("1", CHAT, SamplingParams(max_tokens=0)))


def test_an_address_that_serves_nothing_is_named(server: Server) -> None:
    for address, model, reason in (
        (Address(f"{server.url}/v1", "wrong"), SDAR, "answered 401"),
        (Address(f"{server.url}", KEY), SDAR, "answered 404"),
        (Address(f"{server.url}/v1", KEY), "other", f"--model 'other': .* serves {SDAR}"),
        (Address("nonsense"), SDAR, "--url nonsense"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Served(address, model)


class _Foreign(BaseHTTPRequestHandler):
    """Lists what it is told to and gives everything the same answer."""

    listed: Any = None
    answer: tuple[int, bytes] = (200, b"{}")

    def do_GET(self) -> None:
        self._send(200, msgspec.json.encode(self.listed))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(*self.answer)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Write nothing."""


@contextmanager
def foreign(listed: Any, answer: tuple[int, bytes] = (200, b"{}")) -> Iterator[str]:
    """Run another server and yield its address."""
    handler = type("Handler", (_Foreign,), {"listed": listed, "answer": answer})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def test_other_servers_are_recognised() -> None:
    for listed, reason in (
        ([], "not an OpenAI server's"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, "serves a, b; name one"),
        ({"data": [{"id": "a"}]}, "not a Sfumato server's: .*dtype"),
    ):
        with foreign(listed) as url, pytest.raises(ConfigError, match=reason):
            Served(Address(url), None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"<html>"), "cannot be read"),
        ((200, b'{"choices": []}'), "cannot be read"),
        ((502, b"<html>"), "status 502 Bad Gateway"),
        ((500, b'{"error": {"message": "the request failed"}}'), "the request failed"),
    ],
)
def test_a_broken_answer_is_that_question_s_failure(answer: tuple[int, bytes], reason: str) -> None:
    with foreign({"data": [CARD]}, answer) as url:
        served, replies = Served(Address(url), None), list[Reply]()
        served.run([Ask(name, CHAT, SamplingParams()) for name in "ab"], replies.append, concurrency=2)
    assert sorted(reply.id for reply in replies) == ["a", "b"]
    assert all(reason in str(reply.error) for reply in replies)


def test_a_server_that_is_gone_ends_the_run() -> None:
    with foreign({"data": [CARD]}) as url:
        served = Served(Address(url), None)
    replies: list[Reply] = []
    asks = [Ask(name, CHAT, SamplingParams()) for name in "abc"]
    with pytest.raises(EngineDied, match=url):
        served.run(asks, replies.append, concurrency=2)
    with pytest.raises(EngineDied, match=url):
        served.check(asks[0])
    assert replies == []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ConfigError, match=nobody):
            Served(Address(nobody), None)
