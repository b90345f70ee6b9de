"""Starts `sfumato serve` as people do, and looks after what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from openai import OpenAI

SDAR, LLADA, BARE = "sfumato-tiny-sdar", "sfumato-tiny-llada", "bare"
SD15, SD3, WAN = "sd15-tiny", "sd3-tiny", "wan-tiny"
PIPELINES = {
    name: Path(__file__).resolve().parent.parent / "data" / "goldens" / "images" / "pipelines" / name
    for name in (SD15, SD3, WAN)
}
KEY = "secret-of-the-tests"
START_SECONDS, END_SECONDS = 90.0, 20.0

# One token per step, so that a request lasts for hundreds of steps; token ids show where there is no text.
SLOW = {
    "algorithm": "low_confidence",
    "algorithm_parameters": {"threshold": 2.0},
    "ignore_eos": True,
    "return_token_ids": True,
}


class Server:
    """One running server with its address and the processes under it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.engines = children(process.pid)
        self.http = httpx.Client(base_url=url, timeout=30, headers={"Authorization": f"Bearer {KEY}"})

    def client(self, key: str = KEY) -> OpenAI:
        """Return the official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def gauge(self, name: str, model: str) -> float:
        """Return one series of /metrics."""
        text = self.http.get("/metrics").text
        return float(re.search(rf'^{name}{{model="{model}"}} (\S+)$', text, re.MULTILINE)[1])

    def wait_for(self, name: str, model: str, value: float, *, seconds: float = 5.0) -> bool:
        """Wait until a gauge has a value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.gauge(name, model) == value:
                return True
            time.sleep(0.02)
        return False

    def signal(self, number: int = signal.SIGINT) -> None:
        """Send what Ctrl-C sends."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(END_SECONDS)

    def left_behind(self) -> list[int]:
        """Return the engines that are still there."""
        return [pid for pid in self.engines if is_running(pid)]


@contextmanager
def serving(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server on a free port; its standard error goes to folder/stderr.txt."""
    command = [sys.executable, "-c", "from sfumato.serve.cli import main; main()", "serve"]
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(
            [*command, "--port", "0", "--api-key", KEY, "--threads", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://[\d.:]+", line)
            assert found, f"no address in {line!r}: {(folder / 'stderr.txt').read_text()}"
            server = Server(process, found[0])
            with server.http:
                yield server
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, by whichever of its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (task / "children").read_text().split())
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def bare_checkpoint(folder: Path) -> Path:
    """Return a checkpoint folder without a tokenizer."""
    from sfumato.models.folder import ZOO

    bare = folder / BARE
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(ZOO / SDAR / name, bare / name)
    return bare
