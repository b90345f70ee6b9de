"""Policies on the same trace of arrivals: `python -m benchmarks.policy`.

Requests of random prompt lengths arrive every few steps; prints output tokens per second, mean steps and
seconds from arrival to the first committed token, and the longest pause between a request's tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import fast_dtype, random_loaded
from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.engine.build import Loaded, load


@dataclasses.dataclass
class Trace:
    """What one run of the trace gave."""

    tokens_per_second: float
    first_token_seconds: float
    longest_pause_seconds: float
    num_steps: int


def run(loaded: Loaded, policy: str, num_requests: int, every: int, max_prompt: int) -> Trace:
    """Submit a request every few steps and run them all to their ends."""
    limits = Limits(policy=policy, max_running_requests=8, max_prefill_tokens=256)
    config = msgspec.structs.replace(loaded.config, limits=limits)
    engine = Engine.from_loaded(dataclasses.replace(loaded, config=config))
    rng = random.Random(7)
    params = SamplingParams(max_tokens=64, ignore_eos=True, algorithm="low_confidence", seed=0)
    arrived: dict[str, float] = {}
    last: dict[str, float] = {}
    firsts, pauses = [], []
    started, step, tokens = time.perf_counter(), 0, 0
    while engine.has_work or len(arrived) < num_requests:
        if step % every == 0 and len(arrived) < num_requests:
            prompt = [rng.randrange(3, 500) for _ in range(rng.randrange(16, max_prompt))]
            arrived[engine.add_request(prompt, params)] = time.perf_counter()
        for turn in engine.step():
            now = time.perf_counter()
            for output in turn.outputs:
                if output.token_ids:
                    tokens += len(output.token_ids)
                    if output.request_id in last:
                        pauses.append(now - last[output.request_id])
                    else:
                        firsts.append(now - arrived[output.request_id])
                    last[output.request_id] = now
        step += 1
    seconds = time.perf_counter() - started
    return Trace(tokens / seconds, statistics.mean(firsts), max(pauses), step)


def main() -> None:
    """Print medians of paired runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--models", default="sfumato-tiny-sdar,sdar-150m")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="the same arrivals under both policies, medians")
    for heading in ("model", "policy", "tokens/s", "to first token", "longest pause", "steps"):
        table.add_column(heading, justify="right")
    for name in options.models.split(","):
        is_random = name == "sdar-150m"
        loaded = (
            random_loaded("sdar", fast_dtype(), 32, Limits())
            if is_random
            else load(EngineConfig(model=name, device="cpu", kv_memory=64 << 20))
        )
        num_requests, max_prompt = (12, 256) if is_random else (200, 256)
        traces: dict[str, list[Trace]] = {"separate": [], "mixed": []}
        for _ in range(options.pairs):
            for policy, found in traces.items():
                found.append(run(loaded, policy, num_requests, 4, max_prompt))
        for policy, found in traces.items():
            median = lambda key, runs=found: statistics.median(getattr(trace, key) for trace in runs)
            table.add_row(
                name,
                policy,
                f"{median('tokens_per_second'):.1f}",
                f"{median('first_token_seconds') * 1e3:.0f} ms",
                f"{median('longest_pause_seconds') * 1e3:.0f} ms",
                f"{median('num_steps'):.0f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
