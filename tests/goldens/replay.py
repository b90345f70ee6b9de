"""Runs the requests of one or more cases through an engine and keeps the canvas after each denoise step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Usage
from sfumato.core.plan import Decision, Row
from sfumato.core.protocols import WorkFactory
from sfumato.core.request import Work
from sfumato.core.spec import Decoding, Sampling, TextSpec
from sfumato.engine.build import Loaded, load
from sfumato.engine.engine import Engine
from sfumato.engine.routing import Router
from sfumato.text.canvas import Canvas
from sfumato.text.door import Replay
from sfumato.text.walk import Round, Walk
from sfumato.text.work import TextWork

# Pages for the canvases of all cases of a checkpoint, in bytes.
_KV_BYTES = 64 << 20
# Of requests that arrive at random times, about one in so many turns.
_TURNS_PER_ARRIVAL = 3


class Mismatch(AssertionError):
    """Something that a case records differs from what was replayed."""


@dataclass
class Recording:
    """What one request did: i64 canvases after each denoise step, the tokens it output, how it ended.

    work: the request's work. num_encoded: rows that computed keys of tokens which were known or committed.
    """

    canvases: list[NDArray[np.int64]] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    work: TextWork | None = None
    num_encoded: int = 0

    @property
    def usage(self) -> Usage:
        """Return what the request cost."""
        assert self.work is not None
        return self.work.usage()

    @property
    def final_ids(self) -> list[int]:
        """Return the last canvas."""
        assert self.work is not None
        return [int(token) for token in self.work.canvas.token_ids]


@dataclass(frozen=True)
class Asked:
    """One request of a case."""

    spec: TextSpec
    replay: Replay


@dataclass(frozen=True)
class Checkpoint:
    """What an engine must be started with; None leaves the checkpoint's own value."""

    path: Path
    block_length: int | None = None
    mask_token_id: int | None = None
    eot_token_id: int | None = None


@dataclass(frozen=True)
class Planned:
    """The requests of a case, and how their recordings are verified (raises Mismatch)."""

    checkpoint: Checkpoint
    asked: list[Asked]
    verify: Callable[[list[Recording]], None]


@lru_cache(maxsize=8)
def load_checkpoint(
    path: Path,
    block_length: int | None = None,
    mask_token_id: int | None = None,
    eot_token_id: int | None = None,
    device: str = "cpu",
) -> Loaded:
    """Load a checkpoint in float32."""
    return load(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device=device,
            kv_memory=_KV_BYTES,
            block_length=block_length,
            mask_token_id=mask_token_id,
            eot_token_id=eot_token_id,
        )
    )


def load_for(checkpoint: Checkpoint, tensor_parallel: int = 1, device: str = "cpu") -> Loaded:
    """Load what a case needs, alone or with processes that hold a part each."""
    key = (checkpoint.path, checkpoint.block_length, checkpoint.mask_token_id, checkpoint.eot_token_id)
    if tensor_parallel == 1:
        return load_checkpoint(*key, device)
    return _DIVIDED.load(checkpoint, tensor_parallel)


class _Divided:
    """The models whose ranks run; the oldest are ended first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._loaded: dict[tuple[Checkpoint, int], Loaded] = {}

    def load(self, checkpoint: Checkpoint, tensor_parallel: int) -> Loaded:
        """Return a model, started now or before."""
        key = (checkpoint, tensor_parallel)
        if key not in self._loaded:
            while len(self._loaded) >= self._most:
                self._loaded.pop(next(iter(self._loaded))).close()
            self._loaded[key] = load(
                EngineConfig(
                    model=str(checkpoint.path),
                    dtype="float32",
                    device="cpu",
                    kv_memory=_KV_BYTES,
                    block_length=checkpoint.block_length,
                    mask_token_id=checkpoint.mask_token_id,
                    eot_token_id=checkpoint.eot_token_id,
                    tensor_parallel=tensor_parallel,
                )
            )
        return self._loaded[key]

    def close(self) -> None:
        """End every rank."""
        while self._loaded:
            self._loaded.popitem()[1].close()


_DIVIDED = _Divided(most=3)


def end_ranks() -> None:
    """End the processes of models that were loaded in parts."""
    _DIVIDED.close()


def joint_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Return what serves all of them: their blocks must be whole numbers of its blocks, which are pages."""
    lengths = [checkpoint.block_length for checkpoint in checkpoints if checkpoint.block_length is not None]
    masks = {checkpoint.mask_token_id for checkpoint in checkpoints}
    ends = {checkpoint.eot_token_id for checkpoint in checkpoints if checkpoint.eot_token_id is not None}
    assert len(masks) == 1, f"cases of one checkpoint name the mask ids {masks}"
    return Checkpoint(
        checkpoints[0].path,
        math.gcd(*lengths) if lengths else None,
        masks.pop(),
        ends.pop() if ends else None,
    )


def make_spec(
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    sampling: Sampling | None = None,
    infill: tuple[int | None, ...] | None = None,
) -> TextSpec:
    """Return a spec whose decoding and ends are the replay's; infill makes the canvas exactly as long."""
    return TextSpec(
        prompt_ids=tuple(prompt_ids),
        max_tokens=max_tokens,
        block_length=block_length,
        decoding=Decoding(algorithm="replayed"),
        sampling=sampling or Sampling(),
        infill=infill,
    )


class RecordingWalk:
    """Keeps the canvas after each decision, before the walk goes on."""

    def __init__(self, inner: Walk, recording: Recording) -> None:
        self._inner = inner
        self._recording = recording

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def next_round(self, canvas: Canvas) -> Round | None:
        """Pass on."""
        return self._inner.next_round(canvas)

    def settle(self, canvas: Canvas, decision: Decision, chosen: NDArray[np.int64]) -> bool:
        """Record and pass on."""
        self._recording.canvases.append(canvas.token_ids.copy())
        return self._inner.settle(canvas, decision, chosen)


@dataclass(frozen=True)
class Mode:
    """How the cases are run; the tokens and the counts may not depend on it.

    graphs: "on" replays forwards over pages that are filled up to a few shapes.
    num_replicas: engines among which a router spreads the requests. start: makes one of what was loaded.
    """

    overlap: str = "off"
    graphs: str = "auto"
    num_replicas: int = 1
    tensor_parallel: int = 1
    device: str = "cpu"
    start: Callable[[Loaded], Engine] = Engine.from_loaded

    def engines(self, loaded: Loaded) -> list[Engine]:
        """Start the engines on a model that is in memory."""
        config = msgspec.structs.replace(loaded.config, overlap=self.overlap, graphs=self.graphs)
        return [self.start(replace(loaded, config=config)) for _ in range(self.num_replicas)]


def run(
    loaded: Loaded, asked: list[Asked], seed: int | None = None, mode: Mode | None = None
) -> list[Recording]:
    """Run all requests: all at once, or at random times that the seed decides."""
    engines = (mode or Mode()).engines(loaded)
    try:
        return _run(engines, asked, seed)
    finally:
        for engine in engines:
            engine.close()


def _run(engines: list[Engine], asked: list[Asked], seed: int | None) -> list[Recording]:
    router = Router(len(engines), shares_prefixes=engines[0].traits.has_exact_cache)
    recordings = [Recording() for _ in asked]
    by_id: dict[str, Recording] = {}
    for engine in engines:
        engine.loop.make_work = _recording_works(engine.loop.make_work, by_id)
    rng = random.Random(seed)
    waiting = list(zip(asked, recordings, strict=True))
    rng.shuffle(waiting) if seed is not None else waiting.reverse()
    while waiting or any(engine.has_work for engine in engines):
        is_idle = not any(engine.has_work for engine in engines)
        while waiting and (seed is None or is_idle or rng.random() * _TURNS_PER_ARRIVAL < 1):
            is_idle = False
            item, recording = waiting.pop()
            request_id = f"case-{len(waiting)}"
            by_id[request_id] = recording
            index = router.choose(request_id, item.spec.prompt_ids, item.spec.max_tokens)
            engines[index].add_request((), request_id=request_id, spec=item.spec, replay=item.replay)
        for engine in engines:
            _step(engine, by_id)
    return recordings


def _recording_works(make_work: WorkFactory, by_id: dict[str, Recording]) -> WorkFactory:
    """Return a factory whose works write down what they do."""

    def keep_work(request_id: str, spec: TextSpec) -> Work:
        work = make_work(request_id, spec)
        assert isinstance(work, TextWork)
        recording = by_id[request_id]
        recording.work = work
        work.walk = RecordingWalk(work.walk, recording)  # type: ignore[assignment]
        note = work.context.note

        def count(row: Row) -> None:
            recording.num_encoded += 1
            note(row)

        arrive = work.arrive

        def count_arrival(cached_len: int, nfe: int) -> None:
            # Keys that a peer sent and their ragged rest, which is fed here, were one encoding.
            recording.num_encoded += bool(nfe) and cached_len == work.canvas.block_start
            arrive(cached_len, nfe)

        work.context.note = count  # type: ignore[method-assign]
        work.arrive = count_arrival  # type: ignore[method-assign]
        return work

    return keep_work


def _step(engine: Engine, by_id: dict[str, Recording]) -> None:
    if not engine.has_work:
        return
    for turn in engine.step():
        for refusal in turn.refusals:
            raise Mismatch(f"refused: {refusal.message}")
        for output in turn.outputs:
            recording = by_id[output.request_id]
            recording.output_ids.extend(output.token_ids)
            recording.finish_reason = output.finish_reason
            if output.error is not None:
                raise Mismatch(output.error)
    engine.loop.scheduler.check()


def expect_equal(what: str, found: object, expected: object) -> None:
    """Raise Mismatch with both values."""
    if found != expected:
        raise Mismatch(f"{what}: found {_short(found)}, expected {_short(expected)}")


def expect_canvases(row: str, recording: Recording, expected: list[list[int]]) -> None:
    """Raise Mismatch at the first step whose canvas differs, or where there are more or fewer steps."""
    for step, (found, wanted) in enumerate(zip(recording.canvases, expected, strict=False)):
        expect_equal(f"{row}step {step}: canvas", found.tolist(), wanted)
    expect_equal(f"{row}forwards", len(recording.canvases), len(expected))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 400 else f"{text[:400]}..."
