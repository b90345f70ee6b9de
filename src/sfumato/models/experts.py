"""Mixtures of experts: tokens sorted by expert, one matrix product per expert or one grouped one.

Which experts a token uses is `routing.py`'s. Letters: N tokens, C experts per token, E experts of width I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.fp8 import FP8, Fp8Linear, fp8_rows
from sfumato.models.int8 import Int8Linear
from sfumato.models.kernels import run_on
from sfumato.models.layers import GatedMLP, Packable, gated
from sfumato.models.packed import BlockedWeight, pack_blocked
from sfumato.models.split import Cut, Meeting, Ranks, span_of

# From so many rows of each expert on, torch's grouped product keeps a GPU as busy as a kernel of ours.
_ROWS_PER_EXPERT = 64
# Chosen experts that are sorted by comparing each with all others.
_MOST_SORTED = 16384


class Experts(Packable, Meeting):
    """Gated MLPs of one shape, stacked. gate_up: [E, 2 I, width], gate rows first; down: [E, width, I]."""

    is_sparse = True

    def __init__(
        self,
        num_experts: int,
        width: int,
        inner: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        *,
        num_chosen: int,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, width), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_experts, width, inner), requires_grad=False)
        self.num_experts, self.width = num_experts, width
        self.num_chosen = num_chosen
        self.first = 0
        self.ranks: Ranks | None = None
        self.activation = activation
        self.packed: list[tuple[BlockedWeight, BlockedWeight]] = []
        self.narrow: list[tuple[Int8Linear | Fp8Linear, Int8Linear | Fp8Linear]] = []

    def quantize(self, kind: torch.dtype) -> None:
        """Hold the weights of all experts in eight bits."""
        self.quantize_weight("gate_up", kind)
        self.quantize_weight("down", kind)

    def pack(self) -> None:
        """Reorder each expert's weights for oneDNN and drop the plain copies; elsewhere nothing changes.

        Weights in float8 stay where they are, and are what the experts' products share.
        """
        if self.gate_up.dtype in (torch.int8, FP8):
            product = Fp8Linear if self.gate_up.dtype is FP8 else Int8Linear
            gate_up_scale, down_scale = self.get_parameter("gate_up_scale"), self.get_parameter("down_scale")
            self.narrow = [
                (product(gate_up, wide), product(down, narrow))
                for gate_up, wide, down, narrow in zip(
                    self.gate_up, gate_up_scale, self.down, down_scale, strict=True
                )
            ]
            if product is Int8Linear:
                self._drop_plain()
            return
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            packed_gate_up, packed_down = pack_blocked(gate_up), pack_blocked(down)
            if packed_gate_up is None or packed_down is None:
                self.packed = []
                return
            self.packed.append((packed_gate_up, packed_down))
        self._drop_plain()

    def _drop_plain(self) -> None:
        self.gate_up = nn.Parameter(self.gate_up.new_empty(0), requires_grad=False)
        self.down = nn.Parameter(self.down.new_empty(0), requires_grad=False)

    def divide(self, ranks: Ranks) -> None:
        """Keep some of the experts; routers go on to number all of them."""
        span = span_of(self.num_experts, ranks, "experts")
        self.keep("gate_up", Cut(0, (span,)))
        self.keep("down", Cut(0, (span,)))
        self.first, self.num_experts, self.ranks = span[0], span[1] - span[0], ranks

    def take_no_part(self) -> None:
        """Meet the others with no tokens."""
        x = self.gate_up.new_empty(0, self.width)
        weights = torch.empty(0, self.num_chosen, device=x.device)
        self(x, weights.long(), weights)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [N, width] of each token's experts, summed in float32.

        x: [N, width]; chosen: i64[N, C]; weights: f32[N, C].
        """
        if self.ranks is None:
            return self._combined(x, chosen, weights).to(x.dtype)
        partial = self._combined(*self.ranks.enter(x, chosen, weights))
        return self.ranks.leave(partial).to(x.dtype)

    def _combined(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return f32[N, width], what the experts held here add to each token."""
        if self.ranks is not None:
            # Those of other ranks are sorted behind all that are here.
            chosen = chosen - self.first
            is_here = (chosen >= 0) & (chosen < self.num_experts)
            chosen = chosen.where(is_here, self.num_experts)
            weights = weights.masked_fill(~is_here, 0.0)
        if run_on(x) and 0 < chosen.numel() <= _MOST_SORTED:
            from sfumato.models.kernels import routing

            tokens, places, ends = routing.sort_chosen(chosen, self.num_experts)
            return routing.sum_chosen(self.grouped(x[tokens], ends), places, weights, ends)
        sorted_experts, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
        rows = x[order // chosen.shape[1]]
        # Only a grouped product keeps a GPU busy, and it needs no count on the host.
        is_grouped = x.device.type == "cuda" and (not self.narrow or run_on(x))
        computed = self.grouped(rows, ends) if is_grouped else self.one_by_one(rows, ends)
        states = computed.new_zeros(rows.shape) if self.ranks is not None else torch.empty_like(computed)
        states[order[: len(computed)]] = computed
        return (states.view(*chosen.shape, x.shape[1]) * weights.unsqueeze(-1)).sum(1)

    def grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows [ends[e - 1], ends[e]) in two grouped matrix products. ends: i32[E]."""
        if not len(rows):
            return rows
        inner = gated(self._multiplied(rows, "gate_up", ends), self.activation)
        computed = self._multiplied(inner, "down", ends)
        if self.ranks is not None:
            # What the product leaves in rows of no expert is not defined, and may be no number.
            is_beyond = torch.arange(len(rows), device=rows.device) >= ends[-1]
            computed = computed.masked_fill(is_beyond[:, None], 0)
        return computed

    def _multiplied(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        """Return [M, O]: sorted rows [M, I] times the weights [E, O, I] of their experts; ends: i32[E]."""
        weights = self.get_parameter(name)
        if not self.narrow:
            return _multiplied(rows, weights, ends)
        from sfumato.models.kernels.grouped import multiply_narrow

        narrow, scales = fp8_rows(rows)
        return multiply_narrow(narrow, scales, weights, self.get_parameter(f"{name}_scale"), ends, rows.dtype)

    def one_by_one(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows [ends[e - 1], ends[e]), for each expert that has any. ends: i32[E]."""
        if not len(rows):
            return rows
        stops = ends.tolist()
        if not stops[-1]:
            return rows[:0]
        spans = [
            (expert, slice(start, stop))
            for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
            if stop > start
        ]
        widened = torch.cat([self._widen(rows[span], expert) for expert, span in spans])
        inner = gated(widened, self.activation)
        return torch.cat([self._narrow(inner[span], expert) for expert, span in spans])

    def _widen(self, rows: Tensor, expert: int) -> Tensor:
        if self.narrow:
            return self.narrow[expert][0](rows)
        if self.packed:
            return self.packed[expert][0](rows, None)
        return F.linear(rows, self.gate_up[expert])

    def _narrow(self, rows: Tensor, expert: int) -> Tensor:
        if self.narrow:
            return self.narrow[expert][1](rows)
        if self.packed:
            return self.packed[expert][1](rows, None)
        return F.linear(rows, self.down[expert])


def _multiplied(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return [M, O]: sorted rows [M, I] times the weights [E, O, I] of their experts; ends: i32[E].

    torch's own grouped product is made for many rows of each expert, and of bfloat16 alone: of other numbers
    it counts on the host.
    """
    is_large = rows.dtype is torch.bfloat16 and len(rows) > _ROWS_PER_EXPERT * len(weights)
    if run_on(rows) and not is_large:
        from sfumato.models.kernels.grouped import multiply_sorted

        return multiply_sorted(rows, weights, ends)
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


class SparseMLP(nn.Module):
    """Experts that a router chooses for each token, plus an MLP that all tokens share, unscaled."""

    def __init__(self, router: nn.Module, experts: Experts, shared: GatedMLP | None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Return [N, width]. blocks: i64[N], each token's block, where the router chooses per block."""
        chosen, weights = self.router(x) if blocks is None else self.router(x, blocks)
        routed = self.experts(x, chosen, weights)
        return routed if self.shared is None else routed + self.shared(x)
