"""Dual cache against the naive whole-canvas loop: `python -m benchmarks.text --tables dual`.

Both decide the same number of positions per step. The naive loop recomputes the canvas; the engine keeps a
block's first keys and values on both sides and must give the tokens of a plain loop that does so, which is
checked in every pair.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence

from rich.table import Table

from benchmarks.models import MASK_ID, SHAPE, fast_dtype, random_loaded, random_model
from benchmarks.naive import NaiveResult, dual_cache_generate, llada_generate
from sfumato import Engine, Limits, SamplingParams
from sfumato.models.decoder import Decoder

PROMPT_LEN = 128
MAX_TOKENS = 128
BLOCK_LENGTH = 32
STEPS = 32

_PARAMS = SamplingParams(
    max_tokens=MAX_TOKENS,
    ignore_eos=True,
    seed=0,
    block_length=BLOCK_LENGTH,
    algorithm="fast_dllm",
    algorithm_parameters={"threshold": None, "steps": STEPS, "cache": "dual"},
)


def run_pair(engine: Engine, plain: Decoder, prompts: Sequence[list[int]]) -> tuple[float, float, int]:
    """Return naive and engine output tokens per second and NFE; the naive loop takes one prompt.

    Raises AssertionError where the first request's tokens are not those of the dual-cache loop.
    """
    started = time.perf_counter()
    llada_generate(plain, prompts[0], **_loop_options())
    naive = MAX_TOKENS / (time.perf_counter() - started)
    started = time.perf_counter()
    choices = engine.generate(list(prompts), _PARAMS)
    fast = len(prompts) * MAX_TOKENS / (time.perf_counter() - started)
    expected = reference(plain, prompts[0])
    assert choices[0].token_ids == expected.canvas[PROMPT_LEN:].tolist(), "not the dual-cache loop's tokens"
    assert choices[0].usage.nfe == expected.num_forwards
    return naive, fast, choices[0].usage.nfe


def reference(plain: Decoder, prompt: list[int]) -> NaiveResult:
    """Run the plain dual-cache loop."""
    return dual_cache_generate(plain, prompt, **_loop_options())


def _loop_options() -> dict[str, int]:
    return {"mask_id": MASK_ID, "steps": STEPS, "gen_length": MAX_TOKENS, "block_length": BLOCK_LENGTH}


def make_table(batches: Sequence[int], num_pairs: int, title: str) -> Table:
    """Return medians of pairs after a warm-up."""
    table = Table(title=title)
    for heading in ("model", "requests", "naive tok/s", "dual cache tok/s", "ratio", "NFE", "TPF"):
        table.add_column(heading, justify="right")
    engine = Engine.from_loaded(
        random_loaded("llada", fast_dtype(), BLOCK_LENGTH, Limits(max_running_requests=max(batches)))
    )
    plain = random_model(SHAPE, fast_dtype(), pack=False)
    for batch in batches:
        rng = random.Random(batch)
        make = lambda rng=rng, batch=batch: [
            [rng.randrange(3, MASK_ID) for _ in range(PROMPT_LEN)] for _ in range(batch)
        ]
        engine.generate(make(), _PARAMS)
        pairs = [run_pair(engine, plain, make()) for _ in range(num_pairs)]
        naive = statistics.median(pair[0] for pair in pairs)
        fast = statistics.median(pair[1] for pair in pairs)
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        nfe = pairs[-1][2]
        table.add_row(
            "llada-150m",
            str(batch),
            f"{naive:.1f}",
            f"{fast:.1f}",
            f"{ratio:.2f}",
            str(nfe),
            f"{MAX_TOKENS / nfe:.2f}",
        )
    return table
