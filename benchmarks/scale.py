"""A deployment of many engines, simulated event by event: `python -m benchmarks.scale`.

The scheduler, its page cache and the placing of requests are the real ones. A step's time comes from a table,
and the front door is a queue with the CPU time per request and chunk that `benchmarks.front_door` measures.
Requests are `TextWork` in numbers: a prompt of known blocks, then blocks that take a drawn number of steps.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from sfumato.cache.pages import PageCache
from sfumato.core.messages import Usage
from sfumato.core.plan import Cost, Row, RowKind, StepPlan
from sfumato.core.request import Missing, Request, Standing
from sfumato.deploy.placing import Placing
from sfumato.deploy.ticket import Hints
from sfumato.engine.limits import Limits
from sfumato.engine.routing import chain_of
from sfumato.engine.scheduler import Scheduler

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds. A step takes `step` plus `token` for each position that it feeds; door: of one CPU."""

    step: float = 0.010
    token: float = 8e-6
    door_request: float = 0.0077
    door_chunk: float = 0.0002
    num_doors: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests are like. steps_per_block: drawn evenly; their mean and BLOCK give tokens per forward."""

    prompt_len: int = 1024
    shared_len: int = 512
    num_shared: int = 32
    num_blocks: int = 8
    steps_per_block: tuple[int, int] = (4, 12)

    @property
    def mean_steps(self) -> float:
        """Return the denoise steps of one request."""
        return self.num_blocks * sum(self.steps_per_block) / 2


@dataclass(slots=True)
class SimWork:
    """A request's denoise state as numbers; steps: how many each block still takes."""

    prompt: tuple[int, ...]
    steps: list[int]
    cached_len: int = 0
    num_done: int = 0

    def standing(self, request_id: str) -> Standing:
        """Return where it stands: whole known blocks without keys are prefilled, then blocks are denoised."""
        known_len = len(self.prompt) + BLOCK * self.num_done
        missing = None if self.cached_len >= known_len else Missing(self.cached_len, known_len, BLOCK)
        row = Row(
            request_id=request_id,
            kind=RowKind.DENOISE,
            start=known_len,
            end=known_len + BLOCK,
            slot=known_len,
            visible=known_len + BLOCK,
            cost=Cost(tokens=BLOCK, rows=1),
        )
        return Standing(
            request_id=request_id,
            missing=missing,
            denoise=(row,),
            pages_to_progress=(known_len + BLOCK) // BLOCK,
            pages_at_most=(len(self.prompt) + BLOCK * (self.num_done + len(self.steps))) // BLOCK,
            page_size=BLOCK,
            remaining=known_len - self.cached_len + BLOCK * sum(self.steps),
            known_tokens=self.prompt,
            cached_len=self.cached_len,
            block_length=BLOCK,
        )

    def resume_at(self, cached_len: int) -> None:
        """Take so many positions' keys as present."""
        self.cached_len = cached_len

    def advance(self, row: Row) -> bool:
        """Apply a row; return whether a block was finished. Its keys come with its last forward."""
        if row.kind is RowKind.PREFILL:
            self.cached_len = row.end
            return False
        self.steps[0] -= 1
        if self.steps[0]:
            return False
        del self.steps[0]
        self.num_done += 1
        self.cached_len = len(self.prompt) + BLOCK * self.num_done
        return True

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Nothing comes from peers."""

    def usage(self) -> Usage:
        """Nobody asks."""
        return Usage()


@dataclass(slots=True)
class SimRequest:
    """One request from its arrival to its last chunk."""

    id: str
    work: SimWork
    arrived_at: float
    attempts: int = 0
    first_at: float | None = None
    ended_at: float | None = None


@dataclass
class SimEngine:
    """One engine: the real scheduler over its live requests, one step at a time."""

    name: str
    costs: Costs
    clock: Callable[[], float]
    num_pages: int
    live: dict[str, Request] = field(default_factory=dict)
    requests: dict[str, SimRequest] = field(default_factory=dict)
    is_busy: bool = False
    is_gone: bool = False
    num_steps: int = 0
    num_prefilled: int = 0
    busy_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            Limits(max_running_requests=64), PageCache(self.num_pages, BLOCK), self.clock
        )
        self._arrivals = itertools.count()

    def submit(self, request: SimRequest) -> None:
        """Take a request in."""
        number, now = next(self._arrivals), self.clock()
        standing = request.work.standing(request.id)
        # Only the numbers that the scheduler reads are there.
        live = Request(request.id, request.work, standing, number, now)  # type: ignore[arg-type]
        live.waiting_since = now
        self.live[request.id] = live
        self.requests[request.id] = request

    def begin(self) -> tuple[StepPlan, float] | None:
        """Plan a step; return it and its seconds, or None where nothing runs."""
        plan = self.scheduler.plan(self.live)
        if not plan.rows:
            return None
        num_tokens = sum(row.end - row.start for row in plan.rows)
        seconds = self.costs.step + self.costs.token * num_tokens
        self.num_prefilled += sum(row.end - row.start for row in plan.rows if row.kind is RowKind.PREFILL)
        self.is_busy = True
        self.num_steps += 1
        self.busy_seconds += seconds
        self.scheduler.note_step(plan, seconds)
        return plan, seconds

    def finish(self, plan: StepPlan) -> list[tuple[SimRequest, bool]]:
        """Apply a step; return who finished a block, and whether it was the last."""
        self.is_busy = False
        news = []
        for row in plan.rows:
            live = self.live[row.request_id]
            request = self.requests[row.request_id]
            has_block = request.work.advance(row)
            is_over = not request.work.steps
            live.standing = (
                replace(request.work.standing(row.request_id), denoise=())
                if is_over
                else (request.work.standing(row.request_id))
            )
            self.scheduler.share(live)
            if is_over:
                self.scheduler.release(live)
                del self.live[row.request_id], self.requests[row.request_id]
            if has_block:
                news.append((request, is_over))
        return news


class RandomPlacing(Placing):
    """Two drawn replicas, of which the shorter queue decides: Ray's default."""

    def choose(
        self, hints: Hints, names: Sequence[str], queue_len: Callable[[str], int | None]
    ) -> list[list[str]]:
        """Return two of them."""
        return [self._rng.sample(list(names), min(2, len(names)))]


class Simulation:
    """Events in the order of their times: arrivals, doors that are free, steps that end, a node's loss."""

    def __init__(
        self, num_engines: int, costs: Costs, shape: Shape, *, seed: int, num_pages: int = 4096
    ) -> None:
        self.now = 0.0
        self.costs, self.shape = costs, shape
        self.rng = random.Random(seed)
        self.placing = Placing(random.Random(seed))
        self.engines = {
            f"e{number}": SimEngine(f"e{number}", costs, lambda: self.now, num_pages)
            for number in range(num_engines)
        }
        self.placing.keep(list(self.engines))
        self.requests: list[SimRequest] = []
        self.num_again = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._doors = [0.0] * costs.num_doors
        self.door_seconds = 0.0
        self._shared = [tuple(self._tokens(shape.shared_len)) for _ in range(shape.num_shared)]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(30_000) for _ in range(count)]

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (when, next(self._numbers), act))

    def through_door(self, seconds: float, act: Callable[[], None]) -> None:
        """Spend a door's CPU, after whatever waits for it already."""
        free = min(range(len(self._doors)), key=self._doors.__getitem__)
        self._doors[free] = max(self._doors[free], self.now) + seconds
        self.door_seconds += seconds
        self.at(self._doors[free], act)

    def run(self, rate: float, seconds: float, lose_at: float | None = None, lose: int = 0) -> None:
        """Let requests arrive at a rate for so long, lose engines at a moment; run until all have ended."""
        arrival = 0.0
        while (arrival := arrival + self.rng.expovariate(rate)) < seconds:
            self.at(arrival, self._arrive)
        if lose_at is not None:
            self.at(lose_at, lambda: self._lose(lose))
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()

    def _arrive(self) -> None:
        shape, number = self.shape, len(self.requests)
        own = self._tokens(shape.prompt_len - shape.shared_len)
        steps = [self.rng.randint(*shape.steps_per_block) for _ in range(shape.num_blocks)]
        work = SimWork((*self.rng.choice(self._shared), *own), steps)
        request = SimRequest(f"r{number}", work, self.now)
        self.requests.append(request)
        self.through_door(self.costs.door_request, lambda: self._send(request))

    def _send(self, request: SimRequest) -> None:
        work = request.work
        hints = Hints(
            cost=float(BLOCK * len(work.steps)),
            num_prompt_tokens=len(work.prompt),
            chain=chain_of(work.prompt),
        )
        alive = [name for name, engine in self.engines.items() if not engine.is_gone]
        queue = lambda name: len(self.engines[name].live)
        first = self.placing.choose(hints, alive, queue)[0]
        name = min(first, key=queue)
        self.placing.place(request.id, hints, name)
        engine = self.engines[name]
        engine.submit(request)
        if not engine.is_busy:
            self._step(engine)

    def _step(self, engine: SimEngine) -> None:
        begun = None if engine.is_gone else engine.begin()
        if begun is not None:
            plan, seconds = begun
            self.at(self.now + seconds, lambda: self._finish(engine, plan))

    def _finish(self, engine: SimEngine, plan: StepPlan) -> None:
        if engine.is_gone:
            return
        for request, is_over in engine.finish(plan):
            if is_over:
                self.placing.end(request.id)
            self.through_door(
                self.costs.door_chunk, lambda each=request, over=is_over: self._told(each, over)
            )  # type: ignore[misc]
        self._step(engine)

    def _told(self, request: SimRequest, is_over: bool) -> None:
        if request.first_at is None:
            request.first_at = self.now
        if is_over:
            request.ended_at = self.now

    def _lose(self, count: int) -> None:
        """Lose engines with all they hold: requests go on elsewhere, behind their finished blocks."""
        for engine in list(self.engines.values())[:count]:
            engine.is_gone = True
            for request in engine.requests.values():
                work = request.work
                delivered = tuple(self._tokens(BLOCK * work.num_done))
                request.work = SimWork((*work.prompt, *delivered), work.steps)
                self.num_again += 1
                self.placing.end(request.id)
                self.through_door(self.costs.door_request, lambda each=request: self._send(each))  # type: ignore[misc]
        self.placing.keep([name for name, engine in self.engines.items() if not engine.is_gone])


def capacity(costs: Costs, shape: Shape, batch: int = 64) -> float:
    """Return requests per second of one engine whose steps are full, by arithmetic alone."""
    prefill = (shape.prompt_len - shape.shared_len) * costs.token
    step = costs.step + costs.token * BLOCK * batch
    return 1 / (prefill + shape.mean_steps * step / batch)


def routing_table(seconds: float) -> Table:
    """Return what placing by prefix gains over two drawn replicas, with caches that hold a third of all."""
    table = Table(
        title=f"4 engines whose caches hold a third of all shared beginnings, {seconds:g} s of arrivals"
    )
    headings = ("shared tokens", "load", "router", "prefilled per request", "requests/s", "first s", "95%")
    for heading in (*headings, "whole s", "95%"):
        table.add_column(heading, justify="right")
    costs = Costs(door_request=0.0, door_chunk=0.0)
    for shared, num_pages in ((512, 900), (2048, 1200)):
        shape = Shape(prompt_len=shared + 256, shared_len=shared, num_shared=24)
        for load, (name, kind) in itertools.product(
            (0.5, 0.9), (("ray", RandomPlacing), ("prefix", Placing))
        ):
            simulation = Simulation(4, costs, shape, seed=0, num_pages=num_pages)
            simulation.placing = kind(random.Random(0))
            simulation.placing.keep(list(simulation.engines))
            simulation.run(4 * load * capacity(costs, shape), seconds)
            fed = sum(engine.num_prefilled for engine in simulation.engines.values())
            rate, _, _, *times, _ = _cells(simulation, 0.0)
            per_request = f"{fed / len(simulation.requests):.0f}"
            table.add_row(str(shared), f"{load:.0%}", name, per_request, rate, *times)
    return table


def loss_table(seconds: float) -> Table:
    """Return what the loss of one node of eight engines costs the requests that are there."""
    table = Table(title="16 engines at 40 % of what they can do, 8 of them lost at once")
    for heading in ("lost", "went on elsewhere", "whole s", "95%", "longest"):
        table.add_column(heading, justify="right")
    costs = Costs(num_doors=8)
    for lost in (0, 8):
        simulation = Simulation(16, costs, Shape(), seed=0)
        simulation.run(16 * 0.4 * capacity(costs, Shape()), seconds, lose_at=seconds / 2, lose=lost)
        whole = sorted(each.ended_at - each.arrived_at for each in simulation.requests if each.ended_at)
        cells = (statistics.median(whole), whole[int(0.95 * len(whole))], whole[-1])
        table.add_row(str(lost), str(simulation.num_again), *(f"{cell:.2f}" for cell in cells))
    return table


def main() -> None:
    """Print, for each size and load, what the simulation finds; what routing gains; what a loss costs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--doors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--tables", nargs="+", choices=("sizes", "routing", "loss"), default=["sizes"])
    options = parser.parse_args()
    if "routing" in options.tables:
        Console(width=130).print(routing_table(options.seconds))
    if "loss" in options.tables:
        Console(width=130).print(loss_table(options.seconds))
    if "sizes" not in options.tables:
        return
    shape = Shape()
    table = Table(title=f"{shape}; {options.seconds:g} s of arrivals")
    for heading in (
        "engines",
        "doors",
        "load",
        "requests/s",
        "engines busy",
        "doors busy",
        "first s",
        "95%",
        "whole s",
        "95%",
        "wall s",
    ):
        table.add_column(heading, justify="right")
    for size, doors in itertools.product(options.sizes, options.doors):
        costs = Costs(num_doors=doors)
        most = capacity(costs, shape) * size
        for load in options.loads:
            started = time.perf_counter()
            simulation = Simulation(size, costs, shape, seed=0)
            simulation.run(most * load, options.seconds)
            table.add_row(str(size), str(doors), f"{load:.0%}", *_cells(simulation, started))
    Console(width=130).print(table)


def _cells(simulation: Simulation, started: float) -> list[str]:
    requests = simulation.requests
    first = sorted(each.first_at - each.arrived_at for each in requests if each.first_at is not None)
    whole = sorted(each.ended_at - each.arrived_at for each in requests if each.ended_at is not None)
    assert len(whole) == len(requests)
    busy = sum(engine.busy_seconds for engine in simulation.engines.values())
    return [
        f"{len(requests) / simulation.now:.1f}",
        f"{busy / simulation.now / len(simulation.engines):.0%}",
        f"{simulation.door_seconds / simulation.now / simulation.costs.num_doors:.0%}",
        f"{statistics.median(first):.2f}",
        f"{first[int(0.95 * len(first))]:.2f}",
        f"{statistics.median(whole):.2f}",
        f"{whole[int(0.95 * len(whole))]:.2f}",
        f"{time.perf_counter() - started:.0f}",
    ]


if __name__ == "__main__":
    main()
