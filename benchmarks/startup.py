"""How soon `sfumato serve` answers, imports included: `python -m benchmarks.startup`.

Each run is a fresh server on a free port that gets one request as soon as it says that it is ready. CPU
seconds are those of all its processes. One more run counts the seconds of imports, as Python's own
`-X importtime` does; their share is of that run's CPU seconds, and too large where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sfumato.models.folder import embedded_models, embedded_pipelines

_SERVE = [sys.executable, "-c", "from sfumato.serve.cli import main; main()", "serve", "--port", "0"]
_ALL = "all"
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Start:
    """Seconds of one start: until the server is ready, until the first answer, of CPU; and of imports."""

    ready: float
    answered: float
    cpu: float
    imports: float = 0.0


def start(models: list[str], arguments: list[str], *, counts_imports: bool = False) -> Start:
    """Start a server, ask its first model once, and end it."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1" if counts_imports else ""}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*_SERVE, *arguments, *models], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        ready = time.perf_counter() - started
        try:
            assert found is not None, "the server did not start"
            _ask(found[0])
            answered = time.perf_counter() - started
        finally:
            process.terminate()
            process.communicate()
        errors.seek(0)
        imports = _import_seconds(errors.read().decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(ready, answered, cpu, imports)


def _ask(url: str) -> None:
    """Ask for as little as the first model can be asked for."""
    with urllib.request.urlopen(f"{url}/models", timeout=_TIMEOUT) as response:
        model: dict[str, Any] = json.load(response)["data"][0]
    body: dict[str, Any] = {"model": model["id"]}
    if model["makes"] == "text":
        path = "chat/completions"
        body |= {"messages": [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]}
    else:
        path = "images/generations"
        body |= {"prompt": "a red circle above a green square"}
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        assert response.status == 200


def _import_seconds(text: str) -> float:
    """Return the sum of all modules' own times, in every process."""
    own = re.findall(r"import time:\s+(\d+) \|", text)
    return sum(map(int, own)) / 1e6


def main() -> None:
    """Print a row per model, and one for all of them together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--models", default="sfumato-tiny-sdar,sfumato-tiny-llada,sfumato-tiny-image,all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", help="of the forwards; default: the server's")
    options = parser.parse_args()
    arguments = [] if options.threads is None else ["--threads", options.threads]
    known = {*embedded_models(), *embedded_pipelines()}
    table = Table(title=f"sfumato serve, medians of {options.runs} starts")
    headings = ("ready", "first answer", "slowest", "CPU", "imports", "share")
    for heading in ("model", *headings):
        table.add_column(heading, justify="right")
    for name in options.models.split(","):
        assert name == _ALL or name in known or Path(name).exists(), name
        models = [] if name == _ALL else [name]
        starts = [start(models, arguments) for _ in range(options.runs)]
        counted = start(models, arguments, counts_imports=True)
        table.add_row(
            "all of them, no MODEL given" if name == _ALL else name,
            f"{statistics.median(each.ready for each in starts):.2f} s",
            f"{statistics.median(each.answered for each in starts):.2f} s",
            f"{max(each.answered for each in starts):.2f} s",
            f"{statistics.median(each.cpu for each in starts):.2f} s",
            f"{counted.imports:.2f} s",
            f"{100 * counted.imports / counted.cpu:.0f} %",
        )
    console = Console(width=120)
    machine = platform.processor() or platform.machine()
    console.print(f"{machine}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")
    console.print(table)


if __name__ == "__main__":
    main()
