"""One loop, several modes, on this machine: `python -m benchmarks.modes`.

Three tables. overlap: the engine in this process with depth 0 and depth 1 in turn. ranks: engine processes
that hold a model alone, on all threads, and in two parts on half of them each. pools: one engine against a
prefill and a denoise engine, each way on all threads together, under a stream of long prompts: seconds to
first text of the prompts and pauses of answers that run already. Figures are medians of pairs, ratios are
medians of the pairs' ratios; tokens must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import MASK_ID, SHAPE, fast_dtype, random_loaded
from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.core.messages import StepStats, Submit
from sfumato.engine.build import Loaded, load
from sfumato.engine.frontend import make_spec
from sfumato.engine.pools import start_pools
from sfumato.engine.replicas import Replicas
from tests.models.checkpoints import random_weights, write

TABLES = ("overlap", "ranks", "pools")
OVERLAPS = ("on", "device")
PROMPT_LEN, MAX_TOKENS, BLOCK = 128, 128, 32
# Prompts that arrive while others are answered, and their distance in seconds.
LONG_PROMPT, NUM_LONG, EVERY_SECONDS = 512, 6, 3.0
_SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "vocab_size": SHAPE.vocab_size,
    "hidden_size": SHAPE.width,
    "intermediate_size": SHAPE.inner,
    "num_hidden_layers": SHAPE.num_layers,
    "num_attention_heads": SHAPE.num_heads,
    "num_key_value_heads": SHAPE.num_kv_heads,
    "head_dim": SHAPE.head_dim,
    "rms_norm_eps": SHAPE.norm_eps,
    "rope_theta": SHAPE.rope_theta,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "block_size": BLOCK,
    "mask_token_id": MASK_ID,
    "eos_token_id": MASK_ID - 1,
    "torch_dtype": "float32",
}


def params(max_tokens: int = MAX_TOKENS, steps: int = BLOCK // 4) -> SamplingParams:
    """Return what every request asks for: a fixed number of steps per block."""
    return SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        seed=0,
        algorithm="sdar",
        algorithm_parameters={"remasking_strategy": "low_confidence_static", "denoising_steps": steps},
    )


def prompts(rng: random.Random, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return random prompts."""
    return [[rng.randrange(3, vocab_size - 2) for _ in range(length)] for _ in range(count)]


# Overlap.


def engines_of(loaded: Loaded) -> dict[str, Engine]:
    """Return an engine without and one with each overlap on the same model; all live through all pairs.

    A thread keeps its compiled kernels: in a new one each shape's first step takes milliseconds longer.
    """
    return {
        overlap: Engine.from_loaded(
            dataclasses.replace(loaded, config=msgspec.structs.replace(loaded.config, overlap=overlap))
        )
        for overlap in ("off", *OVERLAPS)
    }


def run_in_process(
    engine: Engine, asked: list[list[int]], max_tokens: int
) -> tuple[float, list[Any], list[StepStats]]:
    """Return output tokens per second, the tokens and the engine's steps."""
    engine.steps.clear()
    started = time.perf_counter()
    choices = engine.generate(list(asked), params(max_tokens, steps=8))
    seconds = time.perf_counter() - started
    tokens = [choice.token_ids for choice in choices]
    return sum(map(len, tokens)) / seconds, tokens, list(engine.steps)


def overlap_table(num_pairs: int) -> Table:
    """Return depth 1 against depth 0: planned ahead, and launched before the outcome is read."""
    table = Table(title=f"overlap, {torch.get_num_threads()} thread(s), medians of {num_pairs} pairs")
    headings = ("model", "requests", "overlap", "off tok/s", "tok/s", "ratio", "host ms/step", "host share")
    for heading in (*headings, "hidden", "forwards", "wasted rows"):
        table.add_column(heading, justify="right")
    tiny = load(EngineConfig(model="sfumato-tiny-sdar", device="cpu", kv_memory=64 << 20))
    large = random_loaded("sdar", fast_dtype(), BLOCK, Limits(max_running_requests=16))
    settings = (("tiny-sdar", tiny, (1, 8, 16), MAX_TOKENS), ("sdar-150m", large, (1, 8), MAX_TOKENS // 2))
    for name, loaded, batches, max_tokens in settings:
        engines = engines_of(loaded)
        for batch in batches:
            rng, pairs = random.Random(batch), []
            for number in range(num_pairs + 1):
                asked = prompts(rng, batch, 48, loaded.traits.vocab_size)
                order = ("off", *OVERLAPS) if number % 2 else (*OVERLAPS, "off")
                found = {mode: run_in_process(engines[mode], asked, max_tokens) for mode in order}
                for mode in OVERLAPS:
                    assert found[mode][1] == found["off"][1], f"overlap {mode} has changed tokens"
                if number:
                    pairs.append(found)
            for mode in OVERLAPS:
                table.add_row(name, str(batch), mode, *_overlap_cells(pairs, mode))
    return table


def _overlap_cells(pairs: Sequence[dict[str, tuple[float, Any, list[StepStats]]]], mode: str) -> list[str]:
    median = statistics.median
    steps, plain = ([step for pair in pairs for step in pair[name][2] if step.rows] for name in (mode, "off"))
    host = sum(step.host_seconds for step in steps)
    device = sum(step.device_seconds for step in steps)
    return [
        f"{median(pair['off'][0] for pair in pairs):.1f}",
        f"{median(pair[mode][0] for pair in pairs):.1f}",
        f"{median(pair[mode][0] / pair['off'][0] for pair in pairs):.2f}",
        f"{1e3 * host / len(steps):.2f}",
        f"{100 * host / (host + device):.1f} %",
        f"{100 * sum(step.hidden_seconds for step in steps) / host:.0f} %",
        f"{len(steps) / len(plain):.2f}x",
        str(sum(step.wasted_rows for pair in pairs for step in pair[mode][2])),
    ]


def run_alone(overlap: str) -> list[float]:
    """Return output tokens per second at 1, 8 and 16 requests of an engine alone in this process."""
    config = EngineConfig(
        model="sfumato-tiny-sdar", device="cpu", kv_memory=64 << 20, overlap=overlap, dtype="float32"
    )
    engine, found = Engine.load(config), []
    for batch in (1, 8, 16):
        rng = random.Random(batch)
        vocab_size = engine.traits.vocab_size
        rates = [run_in_process(engine, prompts(rng, batch, 48, vocab_size), MAX_TOKENS)[0] for _ in range(4)]
        # The first run compiles kernels.
        found.append(statistics.median(rates[1:]))
    engine.close()
    return found


# Engine processes.


@dataclasses.dataclass
class Answer:
    """One request: seconds at which it was sent, and at which tokens came."""

    sent: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> float:
        """Return the seconds to first text."""
        return self.times[0] - self.sent

    @property
    def pause(self) -> float:
        """Return the longest time between two pieces of text."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


async def ask(client: Replicas, name: str, prompt: list[int], given: SamplingParams) -> Answer:
    """Send one request and wait for its end."""
    answer = Answer(sent=time.perf_counter())
    spec = make_spec(prompt, given, client.info.traits)
    async for output in await client.submit([Submit(request_id=name, spec=spec)]):
        assert output.error is None, output.error
        if output.token_ids:
            answer.times.append(time.perf_counter())
            answer.token_ids.extend(output.token_ids)
    return answer


async def rank_pair(folder: Path, batch: int, number: int) -> dict[str, tuple[float, list[list[int]]]]:
    """Return tokens per second and tokens of each way to hold the model."""
    found: dict[str, tuple[float, list[list[int]]]] = {}
    base = _config(folder, max_running_requests=batch)
    num_threads = torch.get_num_threads()
    ways = {
        "one process": msgspec.structs.replace(base, num_threads=num_threads),
        "two ranks": msgspec.structs.replace(base, tensor_parallel=2, num_threads=num_threads),
    }
    for name in sorted(ways, reverse=bool(number % 2)):
        client = await Replicas.start([ways[name]])
        try:
            rng = random.Random(number)
            warm, *asked = prompts(rng, batch + 1, PROMPT_LEN, SHAPE.vocab_size)
            await ask(client, "warm", warm, params(BLOCK))
            started = time.perf_counter()
            calls = [ask(client, f"r{n}", prompt, params(64)) for n, prompt in enumerate(asked)]
            answers = await asyncio.gather(*calls)
            seconds = time.perf_counter() - started
            tokens = [answer.token_ids for answer in answers]
            found[name] = (sum(map(len, tokens)) / seconds, tokens)
        finally:
            await client.stop(drain=False)
            await client.close()
    assert found["one process"][1] == found["two ranks"][1], "tensor parallelism has changed tokens"
    return found


def ranks_table(folder: Path, num_pairs: int) -> Table:
    """Return two ranks against one process."""
    table = Table(
        title=f"tensor parallel, {torch.get_num_threads()} thread(s) in all, medians of {num_pairs} pairs"
    )
    for heading in ("model", "requests", "one process tok/s", "two ranks tok/s", "ratio"):
        table.add_column(heading, justify="right")
    median = statistics.median
    for batch in (1, 8):
        pairs = [asyncio.run(rank_pair(folder, batch, number)) for number in range(num_pairs)]
        table.add_row(
            "sdar-150m, float32",
            str(batch),
            f"{median(pair['one process'][0] for pair in pairs):.1f}",
            f"{median(pair['two ranks'][0] for pair in pairs):.1f}",
            f"{median(pair['two ranks'][0] / pair['one process'][0] for pair in pairs):.2f}",
        )
    return table


async def stream_of_prompts(client: Replicas, seed: int) -> tuple[list[Answer], list[Answer]]:
    """Answer two requests all the time, and long prompts that arrive meanwhile; return both."""
    rng = random.Random(seed)
    await ask(client, "warm", prompts(rng, 1, LONG_PROMPT, SHAPE.vocab_size)[0], params(BLOCK))
    running = [
        asyncio.create_task(ask(client, f"running{n}", prompt, params(128, BLOCK)))
        for n, prompt in enumerate(prompts(rng, 2, 16, SHAPE.vocab_size))
    ]
    arriving = []
    for number, prompt in enumerate(prompts(rng, NUM_LONG, LONG_PROMPT, SHAPE.vocab_size)):
        arriving.append(asyncio.create_task(ask(client, f"long{number}", prompt, params(BLOCK))))
        await asyncio.sleep(EVERY_SECONDS)
    return await asyncio.gather(*arriving), await asyncio.gather(*running)


async def pool_pair(folder: Path, number: int) -> dict[str, tuple[list[Answer], list[Answer]]]:
    """Return the answers of both ways to run the stream."""
    base = msgspec.structs.replace(_config(folder), kv_memory=1 << 30)
    num_threads = torch.get_num_threads()
    half = msgspec.structs.replace(base, num_threads=max(1, num_threads // 2))
    found = {}
    for name in sorted(("one engine", "prefill apart"), reverse=bool(number % 2)):
        if name == "one engine":
            client = await Replicas.start([msgspec.structs.replace(base, num_threads=num_threads)])
        else:
            client = await start_pools([half, half], 1)
        try:
            found[name] = await stream_of_prompts(client, number)
        finally:
            await client.stop(drain=False)
            await client.close()
    for one, other in zip(*found.values(), strict=True):
        assert [a.token_ids for a in one] == [b.token_ids for b in other], "hand-overs have changed tokens"
    return found


def pools_table(folder: Path, num_pairs: int) -> Table:
    """Return a prefill and a denoise engine against one engine."""
    title = (
        f"{NUM_LONG} prompts of {LONG_PROMPT} tokens, one every {EVERY_SECONDS} s, beside two long answers"
    )
    table = Table(title=f"{title}, {torch.get_num_threads()} thread(s) in all, medians of {num_pairs} pairs")
    for heading in ("model", "mode", "to first text", "ratio", "longest pause of an answer", "ratio"):
        table.add_column(heading, justify="right")
    pairs = [asyncio.run(pool_pair(folder, number)) for number in range(num_pairs)]
    first = lambda pair, mode: statistics.mean(answer.first for answer in pair[mode][0])
    pause = lambda pair, mode: max(answer.pause for answer in pair[mode][1])
    median = statistics.median
    for mode in ("one engine", "prefill apart"):
        table.add_row(
            "sdar-150m, float32",
            mode,
            f"{median(first(pair, mode) for pair in pairs):.2f} s",
            f"{median(first(pair, 'one engine') / first(pair, mode) for pair in pairs):.2f}",
            f"{median(pause(pair, mode) for pair in pairs):.2f} s",
            f"{median(pause(pair, 'one engine') / pause(pair, mode) for pair in pairs):.2f}",
        )
    return table


def _config(folder: Path, *, max_running_requests: int = 16) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        kv_memory=512 << 20,
        limits=Limits(max_running_requests=max_running_requests),
    )


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modes", description=__doc__)
    parser.add_argument("--tables", default=",".join(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads in all")
    parser.add_argument("--alone", choices=("off", "on"), help="only this: tiny-sdar with overlap off or on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    machine = platform.processor() or platform.machine()
    console.print(f"{machine}, torch {torch.__version__}, sdar-150m of the first table in {fast_dtype()}")
    if options.alone is not None:
        rates = ", ".join(f"{rate:.0f}" for rate in run_alone(options.alone))
        console.print(
            f"overlap {options.alone}, {options.threads} thread(s): {rates} tok/s at 1, 8, 16 requests"
        )
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "sdar-150m"
        chosen = options.tables.split(",")
        if "overlap" in chosen:
            console.print(overlap_table(options.pairs))
        if "ranks" in chosen or "pools" in chosen:
            write(folder, _SDAR, random_weights(_SDAR))
        if "ranks" in chosen:
            console.print(ranks_table(folder, options.pairs))
        if "pools" in chosen:
            console.print(pools_table(folder, options.pairs))


if __name__ == "__main__":
    main()
