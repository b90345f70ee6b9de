"""How checkpoint tensors map onto a model's parameters: a name, a parameter, and rows of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: rows [start, stop) of a parameter; stop None means the whole of it."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None


def stacked(parameter: str, parts: list[tuple[str, int]], tail: tuple[int, ...]) -> dict[str, Target]:
    """Map tensors that are stacked along the first axis of one parameter.

    parts: (checkpoint name, rows) in order. tail: the other axes of the parameter.
    """
    targets, start = {}, 0
    for name, rows in parts:
        targets[name] = Target(parameter, (rows, *tail), start, start + rows)
        start += rows
    return targets
