"""A recorder that writes torch profiler traces: so many steps of one engine, on all of its threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from sfumato.core.plan import StepPlan
from sfumato.core.recording import NOTHING
from sfumato.engine.profile_config import ProfileConfig
from sfumato.errors import ConfigError

# Launches of these kinds run beside the steps and are not counted.
_BESIDE = ("encode", "decode")


class Profile:
    """Traces in Chrome's form (chrome://tracing, Perfetto), one file each time steps are recorded.

    Steps are counted from the engine's start. Recording begins between two steps, so that what leads to its
    first one is in it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--profile {folder}: {error.strerror}") from error
        self._folder = folder
        self._name = name
        self._num_steps = 0
        # Steps are made in one thread and recordings may be ended from another.
        self._lock = threading.RLock()
        self._begin_at: int | None = None
        self._end_at: int | None = None
        self._first = 0
        self._recording: profile | None = None

    @classmethod
    def of(cls, config: ProfileConfig, name: str) -> Profile:
        """Return a recorder that will record what is configured."""
        made = cls(Path(config.folder), name)
        made.arm(num_steps=config.num_steps, skip=config.skip)
        return made

    def arm(self, *, num_steps: int | None = None, skip: int = 0) -> None:
        """Record steps from now on, behind so many others; without a number, until it is stopped.

        What waited for its first step is called off. Raises ConfigError while steps are recorded.
        """
        with self._lock:
            if self._recording is not None:
                raise ConfigError("a profile is being recorded; stop it first")
            self._begin_at = self._num_steps + skip
            self._end_at = None if num_steps is None else self._begin_at + num_steps
            self._advance()

    def stop(self) -> Path | None:
        """End the recording and return its file; None where nothing was recorded. Raises ConfigError."""
        with self._lock:
            recording, self._recording, self._begin_at = self._recording, None, None
            if recording is None:
                return None
            recording.stop()
            at, count = time.strftime("%Y%m%d-%H%M%S"), self._num_steps - self._first
            path = self._folder / f"{self._name}-{at}-from-{self._first}-steps-{count}.json"
            try:
                recording.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:
                raise ConfigError(f"--profile {path}: {error}") from error
            return path

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """Enclose a launch and count it; begin and end recordings behind it."""
        if plan.kind in _BESIDE:
            yield
            return
        with self.region(f"step {self._num_steps}: {plan.kind}, {len(plan.rows)} rows"):
            yield
        with self._lock:
            self._num_steps += 1
            self._advance()

    def region(self, name: str) -> AbstractContextManager[object]:
        """Enclose a part of a turn."""
        return NOTHING if self._recording is None else record_function(name)

    def close(self) -> None:
        """Write what was recorded of steps that never came to their number."""
        if self._recording is not None:
            self._finish()

    def _advance(self) -> None:
        """Begin or end as many steps have been made by now."""
        if self._recording is not None and self._end_at == self._num_steps:
            self._finish()
        elif self._recording is None and self._begin_at == self._num_steps:
            self._first = self._num_steps
            self._recording = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _has_cuda() else [])],
                acc_events=True,
                # Lanes have threads of their own, and none of them starts or ends all recordings.
                experimental_config=_ExperimentalConfig(profile_all_threads=True),
            )
            self._recording.start()

    def _finish(self) -> None:
        """Write a recording that nobody waits for; a full disk ends it and nothing else."""
        try:
            print(f"sfumato: profile: {self.stop()}", file=sys.stderr, flush=True)
        except ConfigError as error:
            print(f"sfumato: error: {error}", file=sys.stderr, flush=True)


def _has_cuda() -> bool:
    return torch.cuda.is_available()
