"""Stand-ins for tests: a table-driven model, a manual clock, and a harness that records every plan.

Letters: B block length (4), V vocabulary (64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.messages import Abort, Message, Output, Refusal, Stop, Submit, Turn
from sfumato.core.plan import RowKind, StepPlan, StepResult
from sfumato.core.request import Request, Status
from sfumato.core.spec import Decoding, ParameterValue, Sampling, TextSpec
from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.engine.build import assemble
from sfumato.engine.direct import DirectInbox, DirectOutbox
from sfumato.engine.limits import Limits
from sfumato.engine.loop import EngineLoop
from sfumato.engine.peering import Peering
from sfumato.models.batch import Batch
from sfumato.text.work import TextWork

VOCAB = 64
MASK = 63
EOS = 62
BLOCK = 4

# Position -> the token that the model wants there and how sure it is.
Table = Callable[[int], tuple[int, float]]


def steady(position: int) -> tuple[int, float]:
    """Want a token that tells its position; be surer of positions further left."""
    return 1 + position % 50, 0.9 - 0.01 * (position % BLOCK)


class TableModel:
    """Logits from a table of positions; a batch with token `fail_on` raises, token `nan_on` gives NaN."""

    def __init__(self, table: Table = steady) -> None:
        self.table = table
        self.fail_on: int | None = None
        self.nan_on: int | None = None
        self.device = torch.device("cpu")

    def hidden(self, batch: Batch) -> Tensor:
        """Return f32[P, 2]: token and position of the output tokens."""
        if self.fail_on is not None and bool((batch.token_ids == self.fail_on).any()):
            raise RuntimeError("the fake model was told to fail")
        hidden = torch.stack((batch.token_ids.float(), batch.positions.float()), dim=-1)
        if self.nan_on is not None:
            # Whoever comes behind a bad token in its row has seen it.
            row = torch.cumsum(batch.positions.diff(prepend=batch.positions[:1]) != 1, 0)
            is_bad = batch.token_ids == self.nan_on
            for index in torch.nonzero(is_bad).flatten().tolist():
                hidden[(row == row[index]) & (batch.positions >= batch.positions[index])] = torch.nan
        return hidden if batch.output_tokens is None else hidden[batch.output_tokens]

    def head(self, hidden: Tensor) -> Tensor:
        """Return f32[M, V]: the wanted token at its probability, the rest evenly."""
        logits = torch.zeros(len(hidden), VOCAB)
        for row, position in enumerate(hidden[:, 1].tolist()):
            token, probability = self.table(int(position))
            logits[row] = torch.log(torch.tensor((1 - probability) / (VOCAB - 1)))
            logits[row, token] = torch.log(torch.tensor(probability))
        return logits


class ManualClock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def make_traits(
    visibility: Visibility = Visibility.BLOCK_CAUSAL, *, context_length: int = 256
) -> ModelTraits:
    """Return the traits of the table-driven model."""
    is_causal = visibility is Visibility.BLOCK_CAUSAL
    return ModelTraits(
        family="fake",
        architecture="Fake",
        vocab_size=VOCAB,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        eot_token_id=None,
        context_length=context_length,
        block_length=BLOCK,
        visibility=visibility,
        block_origin=BlockOrigin.START if is_causal else BlockOrigin.PROMPT_END,
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        default_algorithm="low_confidence",
    )


class RecordingRunner:
    """Keeps every plan that is launched."""

    def __init__(self, inner: object, plans: list[StepPlan]) -> None:
        self._inner = inner
        self._plans = plans

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Record and pass on."""
        self._plans.append(plan)
        result: StepResult = self._inner.launch(plan, live)  # type: ignore[attr-defined]
        return result


@dataclass
class Harness:
    """A loop over the table-driven model; checks the laws on pages and live requests after every turn."""

    limits: Limits = field(default_factory=Limits)
    num_pages: int = 256
    page_size: int = BLOCK
    depth: int = 0
    is_ahead: bool = False
    traits: ModelTraits = field(default_factory=make_traits)
    model: TableModel = field(default_factory=TableModel)
    peering: Peering | None = None

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.inbox, self.outbox = DirectInbox(), DirectOutbox()
        self.plans: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Output] = {}
        self.outputs: list[Output] = []
        self.refusals: list[Refusal] = []
        self.turns: list[Turn] = []
        self._pinned: dict[int, tuple[NDArray[np.bool_], NDArray[np.int64]]] = {}
        self.loop: EngineLoop
        self.loop, self.door = assemble(
            self.model,
            self.traits,
            self.inbox,
            self.outbox,
            store=None,
            page_size=self.page_size,
            num_pages=self.num_pages,
            limits=self.limits,
            chunk_bytes=1 << 20,
            depth=self.depth,
            is_ahead=self.is_ahead,
            peering=self.peering,
            clock=self.clock,
        )
        for lane in self.loop.lanes:
            lane.runner = RecordingRunner(lane.runner, self.plans)

    def submit(
        self,
        request_id: str,
        prompt: int | list[int],
        *,
        max_tokens: int = 8,
        threshold: float = 0.95,
        algorithm: str = "low_confidence",
        parameters: dict[str, ParameterValue] | None = None,
        block_length: int = BLOCK,
        sampling: Sampling | None = None,
        stop_token_ids: tuple[int, ...] = (EOS,),
        infill: tuple[int | None, ...] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Queue a request; a prompt given as a number gets that many tokens of its own."""
        if isinstance(prompt, int):
            prompt = [1 + (sum(map(ord, request_id)) * 7 + index) % 50 for index in range(prompt)]
        given = parameters if parameters is not None else {"threshold": threshold}
        spec = TextSpec(
            prompt_ids=tuple(prompt),
            max_tokens=max_tokens,
            block_length=block_length,
            decoding=Decoding(algorithm=algorithm, parameters=given),
            sampling=sampling or Sampling(),
            stop_token_ids=stop_token_ids,
            infill=infill,
        )
        self.send(Submit(request_id=request_id, spec=spec, priority=priority, timeout=timeout))

    def send(self, message: Message) -> None:
        """Queue any message."""
        self.inbox.put(message)

    def abort(self, request_id: str) -> None:
        """Queue an abort."""
        self.send(Abort(request_id=request_id))

    def step(self) -> StepPlan | None:
        """Run one turn, check the laws, and return the plan that ran, if any."""
        before = len(self.plans)
        self.loop.turn()
        for turn in self.outbox.take():
            self.turns.append(turn)
            self.refusals.extend(turn.refusals)
            for output in turn.outputs:
                self.outputs.append(output)
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    assert output.request_id not in self.ended, f"{output.request_id} ended twice"
                    self.ended[output.request_id] = output
        self.check()
        return self.plans[-1] if len(self.plans) > before else None

    def check(self) -> None:
        """Laws 2, 3 and 4: pinned tokens stay, pages add up, and so do requests."""
        self.loop.scheduler.check()
        assert len(self.loop.live) == self.loop.num_accepted - self.loop.num_ended
        # An ended request keeps its pages while a launch of it is in flight.
        leaving = [request for lane in self.loop.lanes for request in lane.requests()]
        holders = {id(request): request for request in (*self.loop.live.values(), *leaving)}
        held = sum(len(request.lease.pages) for request in holders.values() if request.lease)
        held += self.num_draining()
        pool = self.loop.scheduler._pages.pool
        assert pool.num_free + pool.num_leased + pool.num_cached == pool.num_pages
        assert held >= pool.num_leased
        for request in self.loop.live.values():
            assert request.status is not Status.ENDED
            if not isinstance(request.work, TextWork):
                continue
            canvas = self.work(request.id).canvas
            assert not (canvas.pinned & canvas.undecided).any()
            was_pinned, tokens = self._pinned.get(request.arrival, (canvas.pinned, canvas.token_ids))
            assert canvas.pinned[was_pinned].all()
            assert (canvas.token_ids[was_pinned] == tokens[was_pinned]).all()
            self._pinned[request.arrival] = (canvas.pinned.copy(), canvas.token_ids.copy())

    def num_draining(self) -> int:
        """Return pages that no request holds and a peer may still write to."""
        return 0

    def run(self, max_steps: int = 1000) -> None:
        """Step until nothing is live."""
        for _ in range(max_steps):
            self.step()
            if not self.loop.live and not self.inbox._messages:
                return
        raise AssertionError(f"still live after {max_steps} steps: {list(self.loop.live)}")

    def work(self, request_id: str) -> TextWork:
        """Return a live request's work."""
        work = self.loop.live[request_id].work
        assert isinstance(work, TextWork)
        return work

    def kinds(self) -> list[str]:
        """Return the kind of each plan so far."""
        return [plan.kind for plan in self.plans]

    def stop(self, *, drain: bool) -> None:
        """Queue a stop."""
        self.send(Stop(drain=drain))


def rows(plan: StepPlan | None) -> dict[str, list[tuple[str, int, int]]]:
    """Return a plan as request -> (kind, start, end) of its rows."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for row in plan.rows if plan else ():
        found.setdefault(row.request_id, []).append((row.kind.value, row.start, row.end))
    return found


def solo(harness: Harness, submit: Callable[[Harness], None]) -> list[int]:
    """Return the tokens of one request alone on a harness with the same limits and model."""
    alone = Harness(
        limits=msgspec.structs.replace(harness.limits),
        num_pages=harness.num_pages,
        traits=harness.traits,
        model=TableModel(harness.model.table),
    )
    submit(alone)
    alone.run()
    (tokens,) = alone.tokens.values()
    return tokens


PREFILL, DENOISE, COMMIT = RowKind.PREFILL.value, RowKind.DENOISE.value, RowKind.COMMIT.value
