"""Memory over many requests; slow."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.soak import resident_mib
from sfumato import Engine, SamplingParams

SDAR = Path(__file__).resolve().parent.parent / "data" / "goldens" / "sdar" / "checkpoints" / "sdar-tiny"

# What the allocator and kernel caches may still take; a leak of 2 KiB per request would be 20 MiB.
ALLOWED_MIB = 12


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests() -> None:
    engine = Engine.load(str(SDAR), kv_memory=1 << 20, device="cpu")
    rng = random.Random(0)

    def wave() -> None:
        prompts = [[rng.randrange(1, 300) for _ in range(rng.randrange(1, 12))] for _ in range(50)]
        engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True, seed=1))

    # Past the point where the kernel caches hold every shape that the waves have.
    for _ in range(200):
        wave()
    engine.steps.clear()
    before = resident_mib()
    for _ in range(200):
        wave()
        engine.steps.clear()
    assert resident_mib() - before < ALLOWED_MIB
    engine.loop.scheduler.check()
