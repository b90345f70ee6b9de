"""Memory over many requests: `python -m benchmarks.soak --requests 10000`.

Prints the resident memory of the process at intervals; it must not grow with the requests.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from sfumato import Engine, SamplingParams


def resident_mib() -> float:
    """Return the process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / (1 << 20)


def main() -> None:
    """Run requests in waves of 16 with random prompts, algorithms and aborts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--model", default="sfumato-tiny-sdar")
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    engine = Engine.load(options.model, kv_memory=32 << 20)
    for done in range(0, options.requests, 16):
        prompts = [[rng.randrange(3, 500) for _ in range(rng.randrange(4, 60))] for _ in range(16)]
        params = [
            SamplingParams(
                max_tokens=rng.randrange(1, 24), temperature=rng.choice([0.0, 0.9]), seed=rng.randrange(99)
            )
            for _ in prompts
        ]
        engine.generate(prompts, params)
        engine.steps.clear()
        if done % (max(1, options.requests // 160) * 16) == 0:
            print(f"{done:6d} requests  {resident_mib():8.1f} MiB", flush=True)
    print(f"{options.requests:6d} requests  {resident_mib():8.1f} MiB")


if __name__ == "__main__":
    main()
