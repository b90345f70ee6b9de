"""How checkpoint tensors map onto a model's parameters: a name, a parameter, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: rows [start, stop) of a parameter; stop None means the whole of it.

    entry: the rows are those of this entry along the parameter's first axis; None: of the parameter itself.
    is_float32: the parameter is kept in float32, whatever the dtype of the model.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    entry: int | None = None
    is_float32: bool = False


def stacked(
    parameter: str, parts: list[tuple[str, int]], tail: tuple[int, ...], entry: int | None = None
) -> dict[str, Target]:
    """Map tensors that are stacked along the first axis of one parameter, or of one entry of it.

    parts: (checkpoint name, rows) in order. tail: the other axes of the parameter or entry.
    """
    targets, start = {}, 0
    for name, rows in parts:
        targets[name] = Target(parameter, (rows, *tail), start, start + rows, entry)
        start += rows
    return targets


def gated_mlp(theirs: str, ours: str, *, width: int, inner: int) -> dict[str, Target]:
    """Map the MLP `theirs` (gate_proj, up_proj, down_proj) onto the GatedMLP `ours`."""
    parts = [(f"{theirs}.{name}.weight", inner) for name in ("gate_proj", "up_proj")]
    return stacked(f"{ours}.gate_up.weight", parts, (width,)) | {
        f"{theirs}.down_proj.weight": Target(f"{ours}.down.weight", (width, inner))
    }


def experts(theirs: str, ours: str, *, num_experts: int, width: int, inner: int) -> dict[str, Target]:
    """Map the MLPs `theirs`.0, `theirs`.1, ... onto the stacked Experts `ours`."""
    found: dict[str, Target] = {}
    for entry in range(num_experts):
        parts = [(f"{theirs}.{entry}.{name}.weight", inner) for name in ("gate_proj", "up_proj")]
        found |= stacked(f"{ours}.gate_up", parts, (width,), entry)
        found[f"{theirs}.{entry}.down_proj.weight"] = Target(f"{ours}.down", (width, inner), entry=entry)
    return found
