"""How long the device takes, what it can do at best, and tables of both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """A device: bytes copied per second (read and written), operations per second of matrix products."""

    name: str
    device: str
    bandwidth: float
    operations: float


@dataclass
class Section:
    """One table of the report, with notes; error: why it is not complete."""

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def markdown(self) -> str:
        """Return it as text."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += ["| " + " | ".join(row) + " |" for row in (self.headings, ["---"] * len(self.headings))]
            lines += ["| " + " | ".join(row) + " |" for row in self.rows]
            lines.append("")
        lines += [f"{note}\n" for note in self.notes]
        if self.error is not None:
            lines += ["This section did not end:", "", "```", self.error.rstrip(), "```", ""]
        return "\n".join(lines)


def seconds_of(act: Callable[[], Any], device: str, *, runs: int = 20, rounds: int = 3) -> float:
    """Return the seconds of one call: the median over rounds of so many calls each, after a warm-up.

    On a GPU events around the calls measure, so that what the host does beside the device is not counted, and
    what keeps the device waiting is.
    """
    for _ in range(3):
        act()
    found = []
    for _ in range(rounds):
        if device == "cpu":
            started = time.perf_counter()
            for _ in range(runs):
                act()
            found.append((time.perf_counter() - started) / runs)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            act()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / runs)
    return statistics.median(found)


def measure(device: str, *, is_tiny: bool) -> Machine:
    """Measure the device: one large copy, and one large product of random bfloat16 numbers."""
    size, side = (1 << 22, 256) if is_tiny else (4 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    bandwidth = 2 * size / seconds_of(lambda: target.copy_(source), device, runs=5)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    operations = 2 * side**3 / seconds_of(lambda: x @ y, device, runs=5)
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return Machine(name, device, bandwidth, operations)
