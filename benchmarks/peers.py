"""The engine against installed peers on the same weights: `python -m benchmarks.peers`.

Theirs, ours with equal tokens, and ours as served run in turn in one process; a peer gets all requests as one
batch. Figures are medians, ratios are medians of the pairs' ratios; a token that differs ends the command.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table

PROMPT_LEN = 128
MAX_TOKENS = 128
# By package: the class that runs it, and what must be importable.
PEERS = {
    "transformers": ("benchmarks.peer_transformers:TransformersPeer", "transformers.models.diffusion_gemma"),
    "diffusers": ("benchmarks.peer_diffusers:DiffusersPeer", "diffusers.pipelines.llada2"),
}


class Peer(Protocol):
    """One package, its model and the engine on the same weights; prompts are equally long."""

    name: str
    vocab_size: int
    max_tokens: int

    def prepare(self, prompts: Sequence[list[int]]) -> None: ...

    def run_theirs(self, prompts: Sequence[list[int]]) -> list[list[int]]: ...

    def run_ours(self, prompts: Sequence[list[int]]) -> list[list[int]]: ...

    def run_served(self, prompts: Sequence[list[int]]) -> list[list[int]]: ...


def timed(
    run: Callable[[Sequence[list[int]]], list[list[int]]], prompts: Sequence[list[int]]
) -> tuple[float, list[list[int]]]:
    """Return output tokens per second and the tokens."""
    started = time.perf_counter()
    found = run(prompts)
    return sum(map(len, found)) / (time.perf_counter() - started), found


def measure(peer: Peer, batch: int, num_pairs: int, table: Table) -> None:
    """Run pairs after a warm-up and add a row of medians; raises AssertionError where tokens differ."""
    rng, rates = random.Random(batch), []
    for number in range(num_pairs + 1):
        prompts = [[rng.randrange(3, peer.vocab_size) for _ in range(PROMPT_LEN)] for _ in range(batch)]
        peer.prepare(prompts)
        theirs, expected = timed(peer.run_theirs, prompts)
        ours, found = timed(peer.run_ours, prompts)
        served, _ = timed(peer.run_served, prompts)
        for row, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
            assert mine == wanted, f"{peer.name}: request {row} of {batch} has other tokens"
        if number:
            rates.append((theirs, ours, served))
    median = statistics.median
    table.add_row(
        peer.name,
        str(batch),
        f"{median(rate[0] for rate in rates):.1f}",
        f"{median(rate[1] for rate in rates):.1f}",
        f"{median(rate[1] / rate[0] for rate in rates):.2f}",
        f"{median(rate[2] for rate in rates):.1f}",
        f"{median(rate[2] / rate[0] for rate in rates):.2f}",
    )


def main() -> None:
    """Print one table for all peers that are installed, and a line for each that is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--batches", default="1", help="requests at once")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    ending = f"{options.threads} thread(s), medians of {options.pairs} pairs"
    table = Table(title=f"engine / peer on the same weights, {ending}")
    headings = ("peer", "requests", "peer tok/s", "engine tok/s", "ratio", "served tok/s", "ratio")
    for heading in headings:
        table.add_column(heading, justify="right")
    console = Console(width=120)
    batches = [int(batch) for batch in options.batches.split(",")]
    versions = [f"torch {torch.__version__}"]
    for package in options.peers.split(","):
        made, needed = PEERS[package]
        try:
            importlib.import_module(needed)
        except ImportError as error:
            console.print(f"{package}: skipped, {needed} cannot be imported ({error})")
            continue
        versions.append(f"{package} {importlib.metadata.version(package)}")
        module, _, name = made.partition(":")
        peer: Peer = getattr(importlib.import_module(module), name)(max(batches), MAX_TOKENS)
        for batch in batches:
            measure(peer, batch, options.pairs, table)
    console.print(f"{platform.processor() or platform.machine()}, {', '.join(versions)}")
    console.print(table)


if __name__ == "__main__":
    main()
