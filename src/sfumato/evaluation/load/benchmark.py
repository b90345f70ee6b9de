"""A whole benchmark: warm-up, then each load of the sweep with prompts of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sfumato.errors import ConfigError
from sfumato.evaluation.address import Address
from sfumato.evaluation.load.arrivals import Load
from sfumato.evaluation.load.asking import Asker, Endpoint
from sfumato.evaluation.load.driving import drive
from sfumato.evaluation.load.prompts import Prompt, Workload
from sfumato.evaluation.load.records import Record
from sfumato.evaluation.load.report import VERSION, Report, Run
from sfumato.evaluation.load.summary import summarize
from sfumato.text.tokenizer import Tokenizer

_WARM_UP = Load(concurrency=8)

# Called with a load and each of its records as it ends.
OnProgress = Callable[[Load, Record], None]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is measured.

    tokenizer: measures random prompts. Each run has a seed of its own, so that no prefix cache knows its
    random prompts. targets: seconds by name, of the goodput. settings: what else goes into the report.
    """

    address: Address
    endpoint: Endpoint
    endpoint_name: str
    model: str
    loads: tuple[Load, ...]
    workload: Workload
    tokenizer: Tokenizer | None
    num_requests: int
    num_warmup: int
    timeout: float
    seed: int
    targets: dict[str, float]
    settings: dict[str, Any]

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Return what a run asks. Raises ConfigError for conversations where only texts can be sent."""
        prompts = self.workload.prompts(count, tokenizer=self.tokenizer, seed=seed)
        if self.endpoint_name != "chat" and not all(isinstance(prompt.content, str) for prompt in prompts):
            raise ConfigError(
                f"--dataset {self.workload.dataset} has messages; --endpoint {self.endpoint_name} takes texts"
            )
        return prompts

    def described(self) -> dict[str, Any]:
        """Return the settings that all runs share."""
        return {
            "base_url": self.address.url,
            "workload": self.workload,
            "counts": "words" if self.tokenizer is None else "tokens",
            "num_requests": self.num_requests,
            "num_warmup": self.num_warmup,
            "timeout": self.timeout,
            "seed": self.seed,
            "targets": self.targets,
            **self.settings,
        }


def run(benchmark: Benchmark, on_progress: OnProgress) -> Report:
    """Run every load, one after another, and return what it showed."""
    return asyncio.run(_run(benchmark, on_progress))


async def _run(benchmark: Benchmark, on_progress: OnProgress) -> Report:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    asker = Asker(benchmark.address, benchmark.endpoint, timeout=benchmark.timeout)
    runs = []
    async with asker.client:
        warm_up = benchmark.prompts(benchmark.num_warmup, benchmark.seed)
        await drive(asker, warm_up, _WARM_UP, seed=benchmark.seed, on_record=lambda record: None)
        for index, load in enumerate(benchmark.loads, 1):
            seed = benchmark.seed + index
            prompts = benchmark.prompts(benchmark.num_requests, seed)
            on_record = lambda record, load=load: on_progress(load, record)
            records = await drive(asker, prompts, load, seed=seed, on_record=on_record)
            summary = summarize(records, benchmark.targets)
            runs.append(Run(load=load, summary=summary, records=tuple(records)))
    return Report(
        version=VERSION,
        model=benchmark.model,
        endpoint=benchmark.endpoint_name,
        started_at=started_at,
        settings=benchmark.described(),
        runs=tuple(runs),
    )
