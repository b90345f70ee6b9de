"""Prefix routing against Ray's default, through a whole deployment: `python -m benchmarks.routing`.

A trace in which groups of requests share long beginnings, sent by so many clients at a time to three replicas
on this machine; the same trace with both routers, in turn. Two sizes of the caches: one that holds a third of
all beginnings (each replica can hold its share, and no more), one that holds all of them on every replica.
Figures are medians over the pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from tests.deploy.clusters import driving
from tests.models.checkpoints import random_weights, write

NUM_GROUPS, PREFIX_LEN, REST_LEN, MAX_TOKENS, BLOCK = 12, 512, 24, 32, 16
NUM_REPLICAS, NUM_CLIENTS, NUM_REQUESTS = 3, 6, 120
_CONFIG: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "block_size": BLOCK,
    "mask_token_id": 2047,
    "eos_token_id": 2046,
    "torch_dtype": "float32",
}
# Keys and values of one beginning: two tensors of width floats in each layer.
_PREFIX_BYTES = PREFIX_LEN * 2 * 6 * 256 * 4
CACHES = {
    "a third each": NUM_GROUPS * _PREFIX_BYTES * 5 // 12,
    "all on each": NUM_GROUPS * _PREFIX_BYTES * 3 // 2,
}


def trace(seed: int) -> list[list[int]]:
    """Return prompts in the order in which they are sent; some beginnings are asked for more than others."""
    rng = random.Random(seed)
    token = lambda: rng.randrange(3, 2000)
    prefixes = [[token() for _ in range(PREFIX_LEN)] for _ in range(NUM_GROUPS)]
    weights = [1 / (1 + number) ** 0.5 for number in range(NUM_GROUPS)]
    chosen = rng.choices(range(NUM_GROUPS), weights, k=NUM_REQUESTS)
    return [[*prefixes[number], *(token() for _ in range(REST_LEN))] for number in chosen]


async def send(url: str, model: str, prompts: list[list[int]]) -> tuple[list[float], int, float]:
    """Return each request's seconds, the prompt tokens that were cached, and the seconds of all."""
    room, seconds, cached = asyncio.Semaphore(NUM_CLIENTS), [], 0

    async def one(http: httpx.AsyncClient, prompt: list[int]) -> None:
        nonlocal cached
        body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": 0}
        async with room:
            started = time.perf_counter()
            answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            seconds.append(time.perf_counter() - started)
            cached += answer.json()["usage"]["cached_tokens"]

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        started = time.perf_counter()
        await asyncio.gather(*(one(http, prompt) for prompt in prompts))
        return seconds, cached, time.perf_counter() - started


def measure(folder: Path, routing: str, kv_memory: int, prompts: list[list[int]]) -> tuple[float, ...]:
    """Run a trace on a fresh deployment: cached share, requests per second, median and 95% of the seconds."""
    settings = {
        "dtype": "float32",
        "threads": 1,
        "kv-memory": kv_memory,
        "replicas": NUM_REPLICAS,
        "name": "m",
    }
    deployment = {"models": {str(folder): settings}, "routing": routing}
    with driving(deployment) as driver:
        asyncio.run(send(driver.url, "m", [[5] * 40] * 6))
        seconds, cached, total = asyncio.run(send(driver.url, "m", prompts))
    share = cached / sum(map(len, prompts))
    return share, len(prompts) / total, statistics.median(seconds), sorted(seconds)[int(0.95 * len(seconds))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    options = parser.parse_args()
    table = Table(title=f"{NUM_REPLICAS} replicas, {NUM_CLIENTS} clients, medians of {options.pairs} pairs")
    for heading in ("cache holds", "router", "prompt tokens cached", "requests/s", "median s", "95% s"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "sdar"
        write(folder, _CONFIG, random_weights(_CONFIG))
        for name in options.caches:
            found: dict[str, list[tuple[float, ...]]] = {"ray": [], "prefix": []}
            for pair in range(options.pairs):
                for routing in ("ray", "prefix") if pair % 2 else ("prefix", "ray"):
                    found[routing].append(measure(folder, routing, CACHES[name], trace(pair)))
            for routing, runs in found.items():
                share, rate, median, high = (statistics.median(column) for column in zip(*runs, strict=True))
                table.add_row(name, routing, f"{share:.0%}", f"{rate:.2f}", f"{median:.2f}", f"{high:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
