"""A token's experts chosen, all chosen ones sorted, and their answers summed, one launch each.

Equal scores go to the lower expert, as in `models/routing.py`. Letters: N tokens, E experts, C experts per
token, G groups, M = N C chosen ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LAST = tl.constexpr(2**31 - 1)
# Chosen experts of a program, and those that it compares them with at a time.
_OWN, _OTHERS = 32, 256
_WIDTH = 1024


@triton.jit
def _choose(
    logits,
    bias,
    chosen,
    weights,
    num_experts,
    scale,
    tiny,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    scores = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * num_experts + expert)))
    ranks = scores + tl.load(bias + expert)
    if KEPT < GROUPS:
        own = tl.reshape(ranks, [GROUPS, EXPERTS // GROUPS])
        place = tl.arange(0, EXPERTS // GROUPS)[None, :]
        best = tl.max(own, 1)
        first = tl.min(tl.where(own == best[:, None], place, _LAST), 1)
        if EXPERTS // GROUPS > 1:
            best += tl.max(tl.where(place == first[:, None], float("-inf"), own), 1)
        group = tl.arange(0, GROUPS)
        is_kept = tl.zeros([GROUPS], tl.int32)
        for _ in tl.static_range(KEPT):
            found = tl.min(tl.where(best == tl.max(best, 0), group, _LAST), 0)
            is_kept = tl.where(group == found, 1, is_kept)
            best = tl.where(group == found, float("-inf"), best)
        own = tl.where(is_kept[:, None] > 0, own, float("-inf"))
        ranks = tl.reshape(own, [EXPERTS])
    column = tl.arange(0, COUNT_WIDTH)
    picked = tl.zeros([COUNT_WIDTH], tl.int32)
    values = tl.zeros([COUNT_WIDTH], tl.float32)
    for index in tl.static_range(COUNT):
        found = tl.min(tl.where(ranks == tl.max(ranks, 0), expert, _LAST), 0)
        # Where nothing is a number some expert must do; the request fails for what comes of it.
        found = tl.minimum(found, num_experts - 1)
        picked = tl.where(column == index, found, picked)
        values = tl.where(column == index, tl.sum(tl.where(expert == found, scores, 0.0), 0), values)
        ranks = tl.where(expert == found, float("-inf"), ranks)
    values = values / (tl.sum(values, 0) + tiny) * scale
    is_there = column < COUNT
    tl.store(chosen + token * COUNT + column, picked.to(tl.int64), mask=is_there)
    tl.store(weights + token * COUNT + column, values, mask=is_there)


def can_choose(num_experts: int, num_groups: int) -> bool:
    """Whether `choose` takes so many experts in so many groups: powers of two."""
    return not num_experts & (num_experts - 1) and not num_groups & (num_groups - 1)


def choose(
    logits: Tensor, bias: Tensor, count: int, *, groups: int, kept: int, scale: float, tiny: float
) -> tuple[Tensor, Tensor]:
    """Return experts i64[N, C] and weights f32[N, C] for logits f32[N, E], as `SigmoidRouter` says."""
    num_tokens, num_experts = logits.shape
    chosen = torch.empty((num_tokens, count), dtype=torch.int64, device=logits.device)
    weights = torch.empty((num_tokens, count), dtype=torch.float32, device=logits.device)
    if num_tokens:
        logits = logits.contiguous()
        _choose[(num_tokens,)](
            logits,
            bias,
            chosen,
            weights,
            num_experts,
            scale,
            tiny,
            EXPERTS=num_experts,
            COUNT=count,
            COUNT_WIDTH=triton.next_power_of_2(count),
            GROUPS=groups,
            KEPT=kept,
            num_warps=1,
        )
    return chosen, weights


@triton.jit(do_not_specialize=["num_chosen"], do_not_specialize_on_alignment=["places"])
def _sort(
    chosen,
    tokens,
    places,
    ends,
    num_chosen,
    num_experts,
    COUNT: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_chosen, OWN)
    if program < num_blocks:
        index = program * OWN + tl.arange(0, OWN)
        is_own = index < num_chosen
        expert = tl.load(chosen + index, mask=is_own, other=0).to(tl.int32)
        rank = tl.zeros([OWN], tl.int32)
        for first in range(0, num_chosen, OTHERS):
            other = first + tl.arange(0, OTHERS)
            theirs = tl.load(chosen + other, mask=other < num_chosen, other=2**31 - 1).to(tl.int32)
            is_before = (theirs[None, :] < expert[:, None]) | (
                (theirs[None, :] == expert[:, None]) & (other[None, :] < index[:, None])
            )
            rank += tl.sum(is_before.to(tl.int32), 1)
        tl.store(tokens + rank, (index // COUNT).to(tl.int64), mask=is_own)
        tl.store(places + index, rank.to(tl.int64), mask=is_own)
    else:
        own = (program - num_blocks) * OWN + tl.arange(0, OWN)
        total = tl.zeros([OWN], tl.int32)
        for first in range(0, num_chosen, OTHERS):
            other = first + tl.arange(0, OTHERS)
            theirs = tl.load(chosen + other, mask=other < num_chosen, other=2**31 - 1).to(tl.int32)
            total += tl.sum((theirs[None, :] <= own[:, None]).to(tl.int32), 1)
        tl.store(ends + own, total, mask=own < num_experts)


def sort_chosen(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return chosen experts i64[N, C] in their order: tokens i64[M], places i64[M], ends i32[E].

    tokens: of each sorted row. places: where each chosen one stands among them. ends: of each expert's rows;
    those of experts from num_experts on lie behind. Each is compared with all others, which is little work
    for the thousands that a step has.
    """
    # A router that sorts hands on a part of each row.
    chosen = chosen.contiguous()
    total, count = chosen.numel(), chosen.shape[1]
    tokens, places = torch.empty((2, total), dtype=torch.int64, device=chosen.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    programs = triton.cdiv(total, _OWN) + triton.cdiv(num_experts, _OWN)
    _sort[(programs,)](
        chosen, tokens, places, ends, total, num_experts, COUNT=count, OWN=_OWN, OTHERS=_OTHERS, num_warps=4
    )
    return tokens, places, ends


@triton.jit(do_not_specialize_on_alignment=["places"])
def _sum_chosen(computed, places, weights, output, size, num_there, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_there = at < size
    total = tl.zeros([WIDTH], tl.float32)
    for index in tl.static_range(COUNT):
        place = tl.load(places + token * COUNT + index)
        weight = tl.load(weights + token * COUNT + index)
        # Rows of experts that are not here hold anything.
        is_read = is_there & (tl.broadcast_to(place, [WIDTH]) < tl.load(num_there))
        row = tl.load(computed + place * size + at, mask=is_read, other=0.0)
        total += row.to(tl.float32) * weight
    tl.store(output + token * size + at, total, mask=is_there)


def sum_chosen(computed: Tensor, places: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return f32[N, width], each token's sorted rows [M, width] times its weights f32[N, C]."""
    weights = weights.contiguous()
    num_tokens, count = weights.shape
    size = computed.shape[1]
    output = torch.empty((num_tokens, size), dtype=torch.float32, device=computed.device)
    width = min(_WIDTH, triton.next_power_of_2(size))
    _sum_chosen[(num_tokens, triton.cdiv(size, width))](
        computed,
        places,
        weights,
        output,
        size,
        ends[-1:],
        COUNT=count,
        WIDTH=width,
        num_warps=4,
    )
    return output
