"""Ray clusters of several nodes on this machine, and what they leave behind: nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serve.running import is_running

# Ray's short socket paths need a short folder; pytest's are too long.
_PARENT = "/tmp"
START_SECONDS = 120.0


class Driver:
    """A process that holds a cluster and takes commands, one line of JSON each."""

    def __init__(self, process: subprocess.Popen[str], url: str, folder: Path) -> None:
        self.process = process
        self.url = url
        self.folder = folder
        self.deployment: dict[str, Any] = {}
        self.http = httpx.Client(base_url=url, timeout=120)

    def do(self, command: str, **arguments: Any) -> Any:
        """Run a command of `driver.py` and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError(f"the driver ended:\n{(self.folder / 'stderr.txt').read_text()[-6000:]}")


@contextmanager
def driving(
    deployment: dict[str, Any], *, num_workers: int = 0, workers: dict[str, str] | None = None
) -> Iterator[Driver]:
    """Run a deployment on a cluster with a head and worker nodes; leave no process and no file behind.

    workers: what kind of node each of them is, by name; else so many of the kind "worker".
    """
    kinds = workers or {f"n{number}": "worker" for number in range(num_workers)}
    folder = Path(tempfile.mkdtemp(prefix="sfr", dir=_PARENT))
    port = free_port()
    # Nodes share a machine here, and their proxies would share a port: who is connected to one that is killed
    # would lose the connection.
    deployment = {**deployment, "http": {"host": "127.0.0.1", "port": port, "proxies": "head"}}
    environment = environment_of(folder)
    before = everything()
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.driver", str(folder), json.dumps(kinds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        driver = Driver(process, f"http://127.0.0.1:{port}", folder)
        try:
            driver.deployment = deployment
            driver.do("deploy", deployment=deployment)
            with driver.http:
                yield driver
            driver.do("stop")
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()
            wait_for_nobody(str(folder), before)
            shutil.rmtree(folder, ignore_errors=True)


def environment_of(folder: Path) -> dict[str, str]:
    """Return an environment in which Ray leaves nothing outside a folder."""
    temporary = folder / "tmp"
    (temporary / "ray").mkdir(parents=True)
    return {
        **os.environ,
        # Its own: without it, Ray draws one and leaves it in the user's home.
        "RAY_AUTH_TOKEN": "0" * 32,
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_USE_GRPC": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }


def everything() -> set[int]:
    """Return all processes."""
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}


def _mentions(pid: int, text: str) -> bool:
    """Whether a process was started with something in its command or its environment."""
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return text.encode() in content


def ours(folder: str, before: set[int]) -> list[int]:
    """Return the processes of a cluster: those that know its folder."""
    return [pid for pid in everything() - before if is_running(pid) and _mentions(pid, folder)]


def wait_for_nobody(folder: str, before: set[int], seconds: float = 20.0) -> None:
    """Wait until no process of a cluster is left. Raises AssertionError naming those that are."""
    end = time.monotonic() + seconds
    while (left := ours(folder, before)) and time.monotonic() < end:
        time.sleep(0.1)
    names = [Path(f"/proc/{pid}/cmdline").read_text()[:200] for pid in left]
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"left behind: {names}"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
