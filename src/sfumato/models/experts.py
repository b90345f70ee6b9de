"""Mixtures of experts: tokens sorted by expert, one matrix product per expert or one grouped one.

Which experts a token uses is `routing.py`'s. Letters: N tokens, C experts per token, E experts of width I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import GatedMLP, Packable, pack_weight, packed_linear


class Experts(Packable):
    """Gated MLPs of one shape, stacked. gate_up: [E, 2 I, width], gate rows first; down: [E, width, I]."""

    def __init__(
        self, num_experts: int, width: int, inner: int, activation: Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, width), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_experts, width, inner), requires_grad=False)
        self.num_experts = num_experts
        self.activation = activation
        self.packed: list[tuple[Tensor, Tensor]] = []

    def pack(self) -> None:
        """Reorder each expert's weights for oneDNN and drop the plain copies; elsewhere nothing changes."""
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            packed_gate_up, packed_down = pack_weight(gate_up), pack_weight(down)
            if packed_gate_up is None or packed_down is None:
                self.packed = []
                return
            self.packed.append((packed_gate_up, packed_down))
        self.gate_up = nn.Parameter(self.gate_up.new_empty(0), requires_grad=False)
        self.down = nn.Parameter(self.down.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [N, width] of each token's experts, summed in float32.

        x: [N, width]; chosen: i64[N, C]; weights: f32[N, C].
        """
        sorted_experts, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
        rows = x[order // chosen.shape[1]]
        # Only a grouped product keeps a GPU busy, and it needs no count on the host.
        computed = self.grouped(rows, ends) if x.device.type == "cuda" else self.one_by_one(rows, ends)
        states = torch.empty_like(computed)
        states[order] = computed
        return (states.view(*chosen.shape, x.shape[1]) * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows [ends[e - 1], ends[e]) in two grouped matrix products. ends: i32[E]."""
        if not len(rows):
            return rows
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(self.activation(gate) * up, self.down.transpose(1, 2), offs=ends)

    def one_by_one(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows [ends[e - 1], ends[e]), for each expert that has any. ends: i32[E]."""
        if not len(rows):
            return rows
        stops = ends.tolist()
        spans = [
            (expert, slice(start, stop))
            for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
            if stop > start
        ]
        widened = torch.cat([self._widen(rows[span], expert) for expert, span in spans])
        gate, up = widened.chunk(2, dim=-1)
        inner = self.activation(gate) * up
        return torch.cat([self._narrow(inner[span], expert) for expert, span in spans])

    def _widen(self, rows: Tensor, expert: int) -> Tensor:
        if self.packed:
            return packed_linear(rows, self.packed[expert][0], None)
        return F.linear(rows, self.gate_up[expert])

    def _narrow(self, rows: Tensor, expert: int) -> Tensor:
        if self.packed:
            return packed_linear(rows, self.packed[expert][1], None)
        return F.linear(rows, self.down[expert])


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
