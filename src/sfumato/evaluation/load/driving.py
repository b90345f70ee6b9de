"""Sends requests as a load says: so many at a time, or each when it is due, whatever became of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from msgspec.structs import replace

from sfumato.evaluation.load.arrivals import Load, arrival_times
from sfumato.evaluation.load.asking import Asker
from sfumato.evaluation.load.prompts import Prompt
from sfumato.evaluation.load.records import Record

# Called with each record as it ends.
OnRecord = Callable[[Record], None]


async def drive(
    asker: Asker, prompts: Sequence[Prompt], load: Load, *, seed: int, on_record: OnRecord
) -> list[Record]:
    """Send every prompt and return the records in the order of the prompts, from this run's own start."""
    started = asker.now()
    records: list[Record] = []

    def note(record: Record) -> None:
        own = _since(record, started)
        records.append(own)
        on_record(own)

    async with asyncio.TaskGroup() as group:
        if load.is_open:
            limit = asyncio.Semaphore(load.concurrency) if load.concurrency else nullcontext()
            for index, due in enumerate(arrival_times(load, len(prompts), seed)):
                # The sender never waits for an answer: what is late to be sent is late in its latency too.
                await asyncio.sleep(started + due - asker.now())
                group.create_task(_send(asker, index, prompts[index], started + due, limit, note))
        else:
            waiting = iter(enumerate(prompts))
            for _ in range(min(load.concurrency or 1, len(prompts))):
                group.create_task(_send_all(asker, waiting, note))
    return sorted(records, key=lambda record: record.index)


async def _send(
    asker: Asker,
    index: int,
    prompt: Prompt,
    due: float,
    limit: asyncio.Semaphore | nullcontext[None],
    note: OnRecord,
) -> None:
    async with limit:
        note(await asker.ask(index, prompt, due))


async def _send_all(asker: Asker, waiting: Iterator[tuple[int, Prompt]], note: OnRecord) -> None:
    for index, prompt in waiting:
        note(await asker.ask(index, prompt, asker.now()))


def _since(record: Record, started: float) -> Record:
    """Return a record with its times counted from the start of its run."""
    return replace(
        record,
        due=record.due - started,
        sent=record.sent - started,
        ended=record.ended - started,
        chunks=tuple(chunk - started for chunk in record.chunks),
    )
