"""`sfumato serve --disaggregate` and pools that are started one by one, through the HTTP front door."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams
from tests.serve.running import END_SECONDS, SDAR, Server, is_running, serving

SECRET = "secret-of-the-pools"
PROMPTS = [f"{'Mia, 34, nurse in Oslo. ' * (1 + index % 4)}{index} + {index * 3} =" for index in range(8)]
PARAMS = SamplingParams(seed=3, max_tokens=12, temperature=0.8, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    engine = Engine.load(SDAR, dtype="float32", num_threads=1)
    return [choice.token_ids for choice in engine.generate(PROMPTS, PARAMS)]


def ask(server: Server, prompt: str) -> list[int]:
    """Return the tokens of one completion."""
    body = {
        "model": SDAR,
        "prompt": prompt,
        "max_tokens": PARAMS.max_tokens,
        "seed": PARAMS.seed,
        "temperature": PARAMS.temperature,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    tokens: list[int] = choice["token_ids"]
    return tokens


def ask_all(server: Server) -> list[list[int]]:
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(lambda prompt: ask(server, prompt), PROMPTS))


def num_steps(server: Server, kind: str) -> float:
    text = server.http.get("/metrics").text
    found = re.search(rf'^sfumato_steps_total{{kind="{kind}",model="{SDAR}"}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def refused(*arguments: str) -> str:
    """Return what a server says that does not start."""
    command = [sys.executable, "-c", "from sfumato.serve.cli import main; main()", "serve", "--port", "0"]
    shown = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode != 0
    assert "Traceback" not in shown.stderr
    return " ".join(shown.stderr.split())


def num_handovers(server: Server, outcome: str) -> float:
    text = server.http.get("/metrics").text
    pattern = rf'^sfumato_handovers{{model="{SDAR}",outcome="{outcome}"}} (\S+)$'
    found = re.search(pattern, text, re.MULTILINE)
    assert found
    return float(found[1])


def assert_becomes(server: Server, status: str) -> None:
    """Wait for a status: that a process has died is noticed a moment later."""
    deadline = time.monotonic() + END_SECONDS
    while (found := server.http.get("/health").json()["status"]) != status:
        assert time.monotonic() < deadline, f"the status is {found}"
        time.sleep(0.05)


def end(server: Server, folder: Path) -> None:
    server.signal()
    assert server.wait() == 0
    assert server.left_behind() == []
    assert "Traceback" not in (folder / "stderr.txt").read_text()


def test_pools_behind_one_front_door(tmp_path: Path, expected: list[list[int]]) -> None:
    arguments = ("--dtype", "float32", "--disaggregate", "1:1", "--peer-timeout", "2", SDAR)
    with serving(tmp_path, *arguments) as server:
        assert len(server.engines) == 2
        assert ask_all(server) == expected
        assert num_steps(server, "prefill") > 0
        assert num_handovers(server, "arrived") > 0
        assert num_handovers(server, "failed") == 0
        assert server.http.get("/health").json()["status"] == "ok"
        # The prefill engine was started first. Without it, prompts are prefilled where they are denoised.
        os.kill(server.engines[0], signal.SIGKILL)
        assert ask_all(server) == expected
        assert_becomes(server, "degraded")
        assert server.wait_for("sfumato_running_requests", SDAR, 0)
        end(server, tmp_path)
    assert "has gone; its part is done elsewhere" in (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="sfumato[nixl] is not installed")
def test_pools_over_nixl(tmp_path: Path, expected: list[list[int]]) -> None:
    arguments = ("--dtype", "float32", "--disaggregate", "1:1", "--peer-transport", "nixl", SDAR)
    with serving(tmp_path, *arguments) as server:
        assert ask_all(server) == expected
        assert num_handovers(server, "arrived") > 0
        assert num_handovers(server, "failed") == 0
        end(server, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("nixl") is not None, reason="sfumato[nixl] is installed")
def test_nixl_that_is_not_installed_is_named() -> None:
    shown = refused("--disaggregate", "1:1", "--peer-transport", "nixl", SDAR)
    assert "--peer-transport nixl needs the extra sfumato[nixl]" in shown


@contextmanager
def prefilling(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a prefill server on a free port; yield its process and address."""
    folder.mkdir()
    command = [sys.executable, "-c", "from sfumato.serve.cli import main; main()", "serve", SDAR]
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(
            [
                *command,
                "--dtype",
                "float32",
                "--threads",
                "1",
                "--role",
                "prefill",
                "--listen",
                "tcp://127.0.0.1:0",
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "SFUMATO_PEER_SECRET": SECRET},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"tcp://[\d.:]+", line)
            assert found, f"no address in {line!r}: {(folder / 'stderr.txt').read_text()}"
            yield process, found[0]
        finally:
            process.kill()


@pytest.mark.slow
def test_pools_that_are_started_one_by_one(
    tmp_path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    with prefilling(tmp_path / "one") as (first, one), prefilling(tmp_path / "two") as (second, two):
        secret = ("--peer-secret-file", str(tmp_path / "secret"))
        arguments = ("--dtype", "float32", "--role", "denoise", "--peers", f"{one},{two}", *secret, SDAR)
        with serving(tmp_path, *arguments) as server:
            assert ask_all(server) == expected
            assert num_steps(server, "prefill") == 0
            first.send_signal(signal.SIGINT)
            assert first.wait(END_SECONDS) == 0
            fresh = "A prompt that nobody has seen before, long enough for some blocks: 1 + 1 ="
            ask(server, fresh)
            assert num_steps(server, "prefill") == 0
            second.kill()
            time.sleep(0.5)
            ask(server, "B" + fresh)
            assert num_steps(server, "prefill") > 0
            end(server, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--disaggregate", "0:1", SDAR), "--disaggregate '0:1' is not PREFILL:DENOISE"),
        (("--disaggregate", "1:1", "--role", "denoise", SDAR), "does not go with --role"),
        (("--disaggregate", "1:1", SDAR, "sfumato-tiny-llada"), "takes one MODEL, not 2"),
        (("--disaggregate", "1:1", "sfumato-tiny-llada"), "attends in both directions"),
        (("--role", "prefill", SDAR), "--role prefill needs --listen"),
        (("--role", "prefill", "--listen", "tcp://127.0.0.1:0", SDAR), "need a shared secret"),
        (("--role", "denoise", "--peer-secret-file", "/nowhere", SDAR), "--peer-secret-file /nowhere"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


@pytest.mark.slow
def test_nothing_outlives_the_front_door(tmp_path: Path) -> None:
    with serving(tmp_path, "--disaggregate", "1:1", SDAR) as server:
        server.process.kill()
        server.wait()
        until = time.monotonic() + 10
        while server.left_behind() and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in server.engines)
