"""What a request costs on its way through a deployment: `python -m benchmarks.front_door`.

CPU seconds of each kind of process per request and per streamed chunk, read from the processes while
requests run; and what the router takes to choose among 8, 64 and 1,000 replicas, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from sfumato.deploy.placing import Placing
from sfumato.deploy.ticket import Hints
from sfumato.engine.routing import chain_of
from tests.deploy.clusters import Driver, driving

MODEL = "sfumato-tiny-sdar"
DEPLOYMENT: dict[str, Any] = {
    "models": {MODEL: {"dtype": "float32", "threads": 1, "kv-memory": "32M", "replicas": 2}}
}
PARTS = {"proxy": "ray::ProxyActor", "front": ":front", "replicas": f":{MODEL}", "engines": "engine.process"}
NUM_CLIENTS, PROMPT_LEN = 16, 64
# One block of 16 tokens to a chunk.
MAX_TOKENS = 128


def body(rng: random.Random, *, is_stream: bool, max_tokens: int) -> dict[str, Any]:
    """Return one request; a threshold of 0 decides a block in a step, so that the way is most of its cost."""
    prompt = [rng.randrange(5, 190) for _ in range(PROMPT_LEN)]
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": is_stream,
        "algorithm": "low_confidence",
        "algorithm_parameters": {"threshold": 0.0},
    }


async def send(url: str, bodies: Sequence[dict[str, Any]]) -> int:
    """Send all; return how many chunks came."""
    room, chunks = asyncio.Semaphore(NUM_CLIENTS), 0

    async def one(http: httpx.AsyncClient, each: dict[str, Any]) -> None:
        nonlocal chunks
        async with room, http.stream("POST", "/v1/completions", json=each) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                chunks += line.startswith("data: {")

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        await asyncio.gather(*(one(http, each) for each in bodies))
    return chunks


def cpu_seconds(driver: Driver) -> dict[str, float]:
    """Return what each kind of process has used so far."""
    found = dict.fromkeys(PARTS, 0.0)
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        for part, word in PARTS.items():
            try:
                if word in command and str(driver.folder) in str(process.environ()):
                    times = process.cpu_times()
                    found[part] += times.user + times.system
            except psutil.Error:
                continue
    return found


def way_table(num_requests: int) -> Table:
    """Return milliseconds of CPU of each part per request."""
    rng = random.Random(0)
    table = Table(title=f"CPU milliseconds, {num_requests} requests of each kind, {NUM_CLIENTS} at a time")
    kinds = {
        "one block, whole": {"is_stream": False, "max_tokens": 16},
        "eight blocks, whole": {"is_stream": False, "max_tokens": MAX_TOKENS},
        "eight blocks, streamed": {"is_stream": True, "max_tokens": MAX_TOKENS},
    }
    for heading in ("request", "chunks", "requests/s", *PARTS):
        table.add_column(heading, justify="right")
    with driving(DEPLOYMENT) as driver:
        asyncio.run(send(driver.url, [body(rng, is_stream=True, max_tokens=MAX_TOKENS) for _ in range(64)]))
        for name, kind in kinds.items():
            bodies = [body(rng, **kind) for _ in range(num_requests)]  # type: ignore[arg-type]
            before, started = cpu_seconds(driver), time.perf_counter()
            chunks = asyncio.run(send(driver.url, bodies))
            rate = num_requests / (time.perf_counter() - started)
            after = cpu_seconds(driver)
            each = (f"{1000 * (after[part] - before[part]) / num_requests:.2f}" for part in PARTS)
            table.add_row(name, f"{chunks / num_requests:.1f}", f"{rate:.0f}", *each)
    return table


def router_table() -> Table:
    """Return microseconds of a choice, its notes included, by replicas and prompt length."""
    table = Table(title="microseconds to choose a replica and to note it")
    for heading in ("replicas", "prompt tokens", "hashing", "choosing"):
        table.add_column(heading, justify="right")
    for count in (8, 64, 1000):
        for length in (64, 1024, 8192):
            rng = random.Random(0)
            placing, names = Placing(rng), [f"r{number}" for number in range(count)]
            placing.keep(names)
            prefixes = [tuple(rng.randrange(30_000) for _ in range(length)) for _ in range(64)]
            started = time.perf_counter()
            chains = [chain_of(prefix) for prefix in prefixes]
            hashing = (time.perf_counter() - started) / len(prefixes)
            started = time.perf_counter()
            for number in range(1000):
                chain = chains[number % 64]
                hints = Hints(cost=128.0, num_prompt_tokens=length, chain=chain)
                placing.place(str(number), hints, placing.choose(hints, names, lambda name: 0)[0][0])
                placing.end(str(number - 100))
            choosing = (time.perf_counter() - started) / 1000
            table.add_row(str(count), str(length), f"{1e6 * hashing:.0f}", f"{1e6 * choosing:.0f}")
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_door", description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    console = Console(width=110)
    console.print(router_table())
    console.print(way_table(options.requests))


if __name__ == "__main__":
    main()
