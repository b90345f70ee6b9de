"""Runs a case's requests through an engine, step by step, and keeps the canvas after each denoise step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Usage
from sfumato.core.request import Work
from sfumato.core.spec import Decoding, Sampling, TextSpec
from sfumato.engine.build import Loaded, load
from sfumato.engine.engine import Engine
from sfumato.text.door import Replay
from sfumato.text.work import TextWork

# Pages for the longest canvas of any case, in bytes.
_KV_BYTES = 64 << 20


class Mismatch(AssertionError):
    """Something that a case records differs from what was replayed."""


@dataclass
class Recording:
    """What one request did: i64 canvases after each denoise step, the tokens it output, how it ended."""

    canvases: list[NDArray[np.int64]] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()

    @property
    def final_ids(self) -> list[int]:
        """Return the last canvas."""
        return [int(token) for token in self.canvases[-1]]


@dataclass(frozen=True)
class Asked:
    """One request of a case."""

    spec: TextSpec
    replay: Replay


@lru_cache(maxsize=8)
def load_checkpoint(
    path: Path,
    block_length: int | None = None,
    mask_token_id: int | None = None,
    eot_token_id: int | None = None,
) -> Loaded:
    """Load a checkpoint in float32."""
    return load(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device="cpu",
            kv_memory=_KV_BYTES,
            block_length=block_length,
            mask_token_id=mask_token_id,
            eot_token_id=eot_token_id,
        )
    )


def make_spec(prompt_ids: list[int], *, max_tokens: int, block_length: int, sampling: Sampling) -> TextSpec:
    """Return a spec whose decoding and ends are the replay's."""
    return TextSpec(
        prompt_ids=tuple(prompt_ids),
        max_tokens=max_tokens,
        block_length=block_length,
        decoding=Decoding(algorithm="replayed"),
        sampling=sampling,
    )


def run(loaded: Loaded, asked: list[Asked]) -> list[Recording]:
    """Run all requests together in one engine."""
    engine = Engine.from_loaded(loaded)
    ids = [engine.add_request((), spec=item.spec, replay=item.replay) for item in asked]
    recordings = {request_id: Recording() for request_id in ids}
    works: dict[str, Work] = {}
    make_work = engine.loop.make_work

    def keep_work(request_id: str, spec: TextSpec) -> Work:
        works[request_id] = make_work(request_id, spec)
        return works[request_id]

    engine.loop.make_work = keep_work
    while engine.has_work:
        for turn in engine.step():
            for output in turn.outputs:
                recording = recordings[output.request_id]
                recording.output_ids.extend(output.token_ids)
                recording.finish_reason = output.finish_reason
                if output.error is not None:
                    raise Mismatch(output.error)
        for request_id, work in works.items():
            _note(recordings[request_id], work)
        engine.loop.scheduler.check()
    return [recordings[request_id] for request_id in ids]


def _note(recording: Recording, work: Work) -> None:
    assert isinstance(work, TextWork)
    recording.usage = work.usage()
    if recording.usage.denoise_steps > len(recording.canvases):
        recording.canvases.append(work.canvas.token_ids.copy())


def expect_equal(what: str, found: object, expected: object) -> None:
    """Raise Mismatch with both values."""
    if found != expected:
        raise Mismatch(f"{what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 400 else f"{text[:400]}..."
