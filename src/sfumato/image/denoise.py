"""One denoise step of many requests: their rows share a forward and nothing else.

B rows: each request's branches one behind the other, each with the request's N images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.image.families.protocol import Family, stacked
from sfumato.image.schedule import step_arguments
from sfumato.image.state import ImageState, Inputs

# Returns the denoiser's answers f32[B, ...] for inputs and the name of one of its experts.
Forward = Callable[[Inputs, str], Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One request's part of a forward."""

    request_id: str
    state: ImageState
    branches: tuple[str, ...]


def answers(
    family: Family,
    parts: Sequence[Part],
    *,
    expert: str,
    num_rows: int | None,
    recorder: Recorder = UNRECORDED,
    run: Forward | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return each request's answers by branch, f32[N, ...], from one forward over all rows.

    num_rows: forwards of exactly so many rows, the last one filled up; then no answer depends on what else is
    in a forward, not even in its last bit. None: one forward of as many rows as there are. run: makes
    forwards in place of the family.
    """
    with recorder.region("inputs"):
        rows = [family.inputs(part.state, branch) for part in parts for branch in part.branches]
        inputs = stacked(rows)
    with recorder.region("forward"):
        output = forward(run or family.forward, inputs, expert, num_rows)
    found: dict[str, dict[str, Tensor]] = {}
    begin = 0
    for part in parts:
        found[part.request_id] = {}
        for branch in part.branches:
            found[part.request_id][branch] = output[begin : begin + part.state.num_images]
            begin += part.state.num_images
    return found


def forward(run: Forward, inputs: Inputs, expert: str, num_rows: int | None) -> Tensor:
    """Run a forward, or several of num_rows rows."""
    if num_rows is None:
        return run(inputs, expert)
    total = len(inputs["sample"])
    pieces = []
    for begin in range(0, total, num_rows):
        count = min(num_rows, total - begin)
        chosen = [begin + index for index in range(count)] + [begin] * (num_rows - count)
        pieces.append(run(_picked(inputs, chosen), expert)[:count])
    return torch.cat(pieces)


def _picked(inputs: Inputs, chosen: Sequence[int]) -> Inputs:
    """Return some rows of inputs, a row as often as it is named."""
    return {
        name: [value[index] for index in chosen] if isinstance(value, list) else value[list(chosen)]
        for name, value in inputs.items()
    }


def step(family: Family, state: ImageState, outputs: Mapping[str, Tensor]) -> ImageState:
    """Combine a request's branches and let its own timestep scheduler take its step.

    Raises ValueError where the model's answer is not finite.
    """
    noise_pred = family.combine(state, dict(outputs))
    if not bool(torch.isfinite(noise_pred).all()):
        raise ValueError(f"the model's answer at step {state.step + 1} is not finite")
    arguments = step_arguments(
        state.timestep_scheduler,
        eta=state.spec.eta,
        generator=state.generators.argument(family.num_stepped(state)),
    )
    latents, estimate = family.step(state, noise_pred, arguments)
    return replace(
        state, latents=latents.float(), noise_pred=noise_pred, estimate=estimate, step=state.step + 1
    )
