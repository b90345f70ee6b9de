"""Unlike requests together against one after another: `python -m benchmarks.text --tables joint`.

Eight requests arrive at one time. Together: all are submitted at once, under both orders of the scheduler.
One after another: each is submitted when the one before it has ended, as they come (mean of random orders) or
the shortest first; who waits for whom changes no run time, so both come from the same runs. A request's solo
latency is the time that it takes there, its slowdown its latency over that.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from benchmarks.models import SHAPE, fast_dtype, random_loaded
from sfumato import Engine, Limits, SamplingParams
from sfumato.core.spec import ParameterValue
from sfumato.engine.limits import ORDERS

# By family: algorithms in turn, with their parameters and denoise steps per output token. Random weights are
# never sure, so that rules with a threshold decide one position per step.
_Asked = tuple[str, dict[str, ParameterValue], float | None]
ALGORITHMS: dict[str, tuple[_Asked, ...]] = {
    "llada": (
        ("fast_dllm", {"cache": "dual"}, None),
        ("d3llm", {"cache_delay_iter": 1}, None),
        ("llada", {}, 0.25),
    ),
    "sdar": (("sdar", {}, None), ("low_confidence", {}, None), ("dinfer", {}, None)),
}
LENGTHS = (16, 32, 64, 128)
PROMPT_LEN = 64
BLOCK_LENGTH = 16
_NUM_REQUESTS = 8
_NUM_ORDERS = 500
BASE = "one after another, as they come"


@dataclass
class Timeline:
    """One request: seconds from its submission to its first text and to its end, and its tokens."""

    first_text: float = 0.0
    end: float = 0.0
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """What one way of running eight requests gave, seconds and ratios."""

    tokens_per_second: float
    first_text: float
    latency: float
    slowdown: float
    slowdown_p95: float


def run(engine: Engine, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[Timeline]:
    """Submit requests at once and run them to their ends."""
    started = time.perf_counter()
    found = {engine.add_request(prompt, params): Timeline() for prompt, params in asked}
    while engine.has_work:
        for turn in engine.step():
            assert not turn.refusals, turn.refusals
            now = time.perf_counter() - started
            for output in turn.outputs:
                line = found[output.request_id]
                assert output.error is None, output.error
                if output.token_ids and not line.token_ids:
                    line.first_text = now
                line.token_ids.extend(output.token_ids)
                line.end = now
    return list(found.values())


def figures(lines: Sequence[Timeline], solo: Sequence[Timeline]) -> Figures:
    """Sum up one way of running the requests; solo: each of them alone."""
    slowdowns = [line.end / alone.end for line, alone in zip(lines, solo, strict=True)]
    return Figures(
        tokens_per_second=sum(len(line.token_ids) for line in lines) / max(line.end for line in lines),
        first_text=statistics.mean(line.first_text for line in lines),
        latency=statistics.mean(line.end for line in lines),
        slowdown=statistics.mean(slowdowns),
        slowdown_p95=float(np.percentile(slowdowns, 95)),
    )


def in_turn(solo: Sequence[Timeline], order: Sequence[int]) -> list[Timeline]:
    """Return the timelines of requests that wait for one another in this order."""
    waited, lines = 0.0, {}
    for index in order:
        alone = solo[index]
        lines[index] = Timeline(waited + alone.first_text, waited + alone.end, alone.token_ids)
        waited += alone.end
    return [lines[index] for index in range(len(solo))]


def run_pair(
    engines: dict[str, Engine],
    family: str,
    lengths: Sequence[int],
    rng: random.Random,
    *,
    is_joint_first: bool,
) -> dict[str, Figures]:
    """Run the requests all ways on new prompts; raises AssertionError where tokens differ."""
    asked = _requests(family, lengths, rng)
    joint = {order: run(engine, asked) for order, engine in engines.items()} if is_joint_first else {}
    solo = [run(engines["fair"], [one])[0] for one in asked]
    joint = joint or {order: run(engine, asked) for order, engine in engines.items()}
    for order, lines in joint.items():
        for number, (ours, alone) in enumerate(zip(lines, solo, strict=True)):
            assert ours.token_ids == alone.token_ids, f"{order}: request {number} differs from the one alone"
    shortest_first = sorted(range(len(solo)), key=lambda index: solo[index].end)
    return {
        BASE: _mean_of_orders(solo),
        "one after another, shortest first": figures(in_turn(solo, shortest_first), solo),
        "together, fair share": figures(joint["fair"], solo),
        "together, shortest remaining first": figures(joint["shortest"], solo),
    }


def _requests(
    family: str, lengths: Sequence[int], rng: random.Random
) -> list[tuple[list[int], SamplingParams]]:
    """Return as many requests of each length, in random order, algorithms in turn."""
    wanted = [lengths[number % len(lengths)] for number in range(_NUM_REQUESTS)]
    rng.shuffle(wanted)
    asked = []
    for number, max_tokens in enumerate(wanted):
        name, given, steps = ALGORITHMS[family][number % len(ALGORITHMS[family])]
        parameters = given if steps is None else given | {"steps": int(steps * max_tokens)}
        prompt = [rng.randrange(3, SHAPE.vocab_size - 1) for _ in range(PROMPT_LEN)]
        asked.append((prompt, _params(name, parameters, max_tokens)))
    return asked


def _mean_of_orders(solo: Sequence[Timeline]) -> Figures:
    """Return the means over random orders."""
    rng = random.Random(0)
    orders = [rng.sample(range(len(solo)), len(solo)) for _ in range(_NUM_ORDERS)]
    each = [dataclasses.asdict(figures(in_turn(solo, order), solo)) for order in orders]
    return Figures(**{key: statistics.mean(one[key] for one in each) for key in each[0]})


def _params(algorithm: str, parameters: dict[str, ParameterValue], max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        seed=0,
        block_length=BLOCK_LENGTH,
        algorithm=algorithm,
        algorithm_parameters=parameters,
    )


def make_table(families: Sequence[str], lengths: Sequence[int], num_pairs: int, title: str) -> Table:
    """Return medians of pairs; ratios are to one after another as they come, medians of the pairs' ratios."""
    table = Table(title=title)
    headings = ("tok/s", "ratio", "to first text", "ratio", "mean latency", "ratio", "mean slowdown")
    for heading in ("model", "order", *headings, "95th percentile", "ratio"):
        table.add_column(heading, justify="right")
    for family in families:
        engines = {order: _engine(family, order) for order in ORDERS}
        rng = random.Random(0)
        run_pair(engines, family, lengths, rng, is_joint_first=True)
        pairs = [
            run_pair(engines, family, lengths, rng, is_joint_first=bool(n % 2)) for n in range(num_pairs)
        ]
        for order in pairs[0]:
            table.add_row(f"{family}-150m", order, *_cells(pairs, order))
    return table


def _engine(family: str, order: str) -> Engine:
    limits = Limits(max_running_requests=_NUM_REQUESTS, order=order)
    return Engine.from_loaded(random_loaded(family, fast_dtype(), BLOCK_LENGTH, limits))


def _cells(pairs: Sequence[dict[str, Figures]], order: str) -> list[str]:
    """Return the cells of one order; a ratio above 1 means that it is better than one after another."""
    median = lambda key: statistics.median(getattr(pair[order], key) for pair in pairs)
    better = lambda key: statistics.median(
        getattr(pair[BASE], key) / getattr(pair[order], key) for pair in pairs
    )
    return [
        f"{median('tokens_per_second'):.1f}",
        f"{1 / better('tokens_per_second'):.2f}",
        f"{median('first_text'):.2f} s",
        f"{better('first_text'):.2f}",
        f"{median('latency'):.2f} s",
        f"{better('latency'):.2f}",
        f"{median('slowdown'):.2f}",
        f"{median('slowdown_p95'):.2f}",
        f"{better('slowdown_p95'):.2f}",
    ]
