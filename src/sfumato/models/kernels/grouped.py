"""Products of sorted rows with the weights of their experts: each expert's weights are read by few programs.

Rows and weights in eight bits come with scales, which are applied to the sum. Letters: M rows, E experts,
I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _multiply(
    rows,
    weights,
    output,
    ends,
    row_scales,
    scales,
    num_inputs,
    num_outputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    expert, column = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + tl.maximum(expert - 1, 0))
    start = tl.where(expert == 0, 0, start)
    stop = tl.load(ends + expert)
    out = column * OUTPUTS + tl.arange(0, OUTPUTS)
    is_out = out < num_outputs
    weights += expert.to(tl.int64) * num_outputs * num_inputs
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < stop
        at = row.to(tl.int64)
        total = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for begin in range(0, num_inputs, INPUTS):
            into = begin + tl.arange(0, INPUTS)
            is_in = into < num_inputs
            x = tl.load(
                rows + at[:, None] * num_inputs + into[None, :],
                mask=is_row[:, None] & is_in[None, :],
                other=0.0,
            )
            w = tl.load(
                weights + out[:, None] * num_inputs + into[None, :],
                mask=is_out[:, None] & is_in[None, :],
                other=0.0,
            )
            if IS_WIDE:
                x, w = x.to(tl.float32), w.to(tl.float32)
            if HAS_SCALES and not IS_WIDE:
                # Tensor cores add eight-bit products in fewer bits than float32 has: only so many at a time.
                total = tl.dot(x, tl.trans(w), total, max_num_imprecise_acc=INPUTS)
            else:
                total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        if HAS_SCALES:
            of_out = tl.load(scales + expert * num_outputs + out, mask=is_out, other=0.0)
            of_row = tl.load(row_scales + at, mask=is_row, other=0.0)
            total = total * of_out[None, :] * of_row[:, None]
        place = at[:, None] * num_outputs + out[None, :]
        tl.store(output + place, total.to(output.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows, outputs and inputs that a program multiplies at a time; warps and stages."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """Return them as the kernel's arguments."""
        return {"ROWS": self.rows, "OUTPUTS": self.outputs, "INPUTS": self.inputs}

    def options(self) -> dict[str, int]:
        """Return what the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def plan_of(num_rows: int, num_experts: int, itemsize: int) -> Plan:
    """Return the plan for so many rows of all experts together."""
    if itemsize > 2:
        return Plan(16, 32, 32, 4, 2)
    # As many bytes at a time, whatever a number takes.
    if num_rows <= 16 * num_experts:
        # A row or two of each: weights are read once, as fast as they come.
        return Plan(16, 64, 256 // itemsize, 4, 4)
    return Plan(64, 64, 128 // itemsize, 4, 3)


def multiply_sorted(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return [M, O]: rows [ends[e - 1], ends[e]) of [M, I] times the weight [O, I] of expert e; ends: i32[E].

    Rows behind the last end are not written.
    """
    return _launch(rows, weights, ends, None, None, rows.dtype)


def multiply_narrow(
    rows: Tensor, row_scales: Tensor, weights: Tensor, scales: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return [M, O] in `dtype`: the same of f8[M, I] scaled by f32[M, 1], and f8[E, O, I] by f32[E, O, 1]."""
    assert scales.is_contiguous()
    assert row_scales.is_contiguous()
    return _launch(rows, weights, ends, row_scales, scales, dtype)


def _launch(
    rows: Tensor,
    weights: Tensor,
    ends: Tensor,
    row_scales: Tensor | None,
    scales: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    num_experts, num_outputs, num_inputs = weights.shape
    output = torch.empty((len(rows), num_outputs), dtype=dtype, device=rows.device)
    assert weights.is_contiguous()
    rows = rows.contiguous()
    plan = plan_of(len(rows), num_experts, rows.element_size())
    _multiply[(num_experts, triton.cdiv(num_outputs, plan.outputs))](
        rows,
        weights,
        output,
        ends,
        row_scales,
        scales,
        num_inputs,
        num_outputs,
        HAS_SCALES=scales is not None,
        # The interpreter multiplies neither bfloat16 nor eight bits.
        IS_WIDE=not rows.is_cuda,
        **plan.constants(),
        **plan.options(),
    )
    return output
