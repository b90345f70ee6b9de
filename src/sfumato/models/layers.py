"""Layers that the families share: linear with prepacked weights, RMS norm, rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.fp8 import FP8, Fp8Linear
from sfumato.models.int8 import Int8Linear
from sfumato.models.kernels import run_on
from sfumato.models.packed import PackedWeight, pack_weight
from sfumato.models.split import Cut, Divisible, HeadSpans, Meeting, Ranks, span_of


class Packable(Divisible):
    """A module whose weights may be held in eight bits, and reordered once for this machine's kernels."""

    def pack(self) -> None:
        """Reorder the weights and drop the plain copy, where there is such a layout."""
        raise NotImplementedError

    def quantize(self, kind: torch.dtype) -> None:
        """Hold the weights in eight bits with a scale per output, while they are on the meta device.

        kind: int8 or float8_e4m3fn.
        """
        raise NotImplementedError

    def quantize_weight(self, name: str, kind: torch.dtype) -> None:
        """Make a weight [..., O, I] eight bits wide and add its `NAME_scale`, f32[..., O, 1]."""
        weight = self.get_parameter(name)
        narrow = torch.empty(weight.shape, dtype=kind, device=weight.device)
        scale = torch.empty((*weight.shape[:-1], 1), dtype=torch.float32, device=weight.device)
        setattr(self, name, nn.Parameter(narrow, requires_grad=False))
        self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))
        cut = self.cuts.get(name)
        if cut is not None and cut.axis < weight.dim() - 1:
            self.cuts[f"{name}_scale"] = cut


class Linear(Packable):
    """y = x W^T + b, with the weight optionally packed once for the CPU's matrix kernels.

    weight: [out, in]; several checkpoint tensors may be stacked along `out` (fused projections).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: PackedWeight | None = None
        self.narrow: Int8Linear | Fp8Linear | None = None
        self.bias_is_apart = False

    def keep_outputs(self, *spans: tuple[int, int]) -> None:
        """Keep these rows alone: a rank computes some of the outputs."""
        self.keep("weight", Cut(0, spans))
        if self.bias is not None:
            self.keep("bias", Cut(0, spans))

    def keep_inputs(self, start: int, stop: int) -> None:
        """Keep these columns alone: a rank computes a part of a sum, to which the bias is added once."""
        self.keep("weight", Cut(1, ((start, stop),)))
        self.bias_is_apart = True

    def add_bias(self, total: Tensor) -> Tensor:
        """Return the sum of all ranks' parts with the bias."""
        return total if self.bias is None else total + self.bias

    def quantize(self, kind: torch.dtype) -> None:
        """Hold the weight in eight bits."""
        self.quantize_weight("weight", kind)

    def pack(self) -> None:
        """Lay the weight out for a CPU and drop the plain copy; elsewhere only narrow ones are handed on."""
        if self.weight.dtype is torch.int8:
            self.narrow = Int8Linear(self.weight, self.get_parameter("weight_scale"))
        elif self.weight.dtype is FP8:
            self.narrow = Fp8Linear(self.weight, self.get_parameter("weight_scale"))
        else:
            self.packed = pack_weight(self.weight)
        if self.packed is not None or isinstance(self.narrow, Int8Linear):
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias_is_apart else self.bias
        if self.narrow is not None:
            return self.narrow(x, bias)
        if self.packed is not None:
            return self.packed(x, bias)
        return F.linear(x, self.weight, bias)


def rms_norm_plain(x: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in float32, without a weight, and cast back."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in float32, cast back, then scale (LLaDA's order)."""
    return rms_norm_plain(x, eps) * weight


def rms_norm_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise and scale in float32, cast once (the flash-attn order that SDAR was trained with)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm; `wide` scales before the cast."""

    def __init__(self, width: int, eps: float, *, wide: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps
        self.is_wide = wide
        self.normalise = rms_norm_wide if wide else rms_norm

    def forward(self, x: Tensor) -> Tensor:
        if run_on(x):
            from sfumato.models.kernels import elementwise

            return elementwise.norm(x, self.weight, self.eps, is_wide=self.is_wide)
        return self.normalise(x, self.weight, self.eps)


def add_norm(x: Tensor, more: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Return x + more, [N, width], and its norm."""
    if run_on(x):
        from sfumato.models.kernels import elementwise

        return elementwise.add_norm(x, more, norm.weight, norm.eps, is_wide=norm.is_wide)
    total = x + more
    return total, norm(total)


class Rotary:
    """Half-split rotary positions over the first `width` dimensions of a head, computed in float32.

    num_turning: of the width / 2 pairs, only the first so many turn; None: all.
    """

    def __init__(self, width: int, theta: float, *, num_turning: int | None = None) -> None:
        self.width = width
        self.theta = theta
        self.num_turning = num_turning

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, f32[N, 1, width], for positions i64[N]."""
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions.device)
        inverse = 1.0 / (self.theta ** (exponent / self.width))
        if self.num_turning is not None:
            inverse[self.num_turning :] = 0.0
        angle = positions.float()[:, None] * inverse
        angle = torch.cat((angle, angle), dim=-1)[:, None, :]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of x: [N, heads, D] by angles f32[N, 1, width], width <= D."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    wide = x.float()
    half = width // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


def turned(x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads x: [N, heads, D], normed if they are, rotated by angles f32[N, 1, width]."""
    if run_on(x):
        from sfumato.models.kernels import elementwise

        if norm is None:
            return elementwise.turn(x, cos, sin)
        return elementwise.turn(x, cos, sin, weight=norm.weight, eps=norm.eps, is_wide=norm.is_wide)
    return rotate(x if norm is None else norm(x), cos, sin)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return activation(gate) * up, [N, I], of x: [N, 2 I], the gate in front."""
    if run_on(x):
        from sfumato.models.kernels import elementwise

        # An activation that has no kernel is computed as it says.
        kind = {F.silu: elementwise.SILU, gelu_tanh: elementwise.GELU_TANH}.get(activation)
        if kind is not None:
            return elementwise.gate(x, kind)
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up


class GatedMLP(Meeting):
    """down(activation(gate x) * up x), gate and up in one matrix product."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * inner)
        self.down = Linear(inner, width)
        self.activation = activation
        self.width, self.inner = width, inner
        self.ranks: Ranks | None = None

    def divide(self, ranks: Ranks) -> None:
        """Keep a part of the inner width."""
        start, stop = span_of(self.inner, ranks, "inner dimensions of an MLP")
        self.gate_up.keep_outputs((start, stop), (self.inner + start, self.inner + stop))
        self.down.keep_inputs(start, stop)
        self.ranks = ranks

    def take_no_part(self) -> None:
        """Meet the others with no tokens."""
        self(self.gate_up.weight.new_empty(0, self.width))

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return self._partial(x)
        return self.ranks.leave(self._partial(*self.ranks.enter(x)))

    def _partial(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation))


class Attention(Divisible):
    """Fused q, k, v projection, optional per-head norms, rotary positions, output projection.

    norm_eps: of the norms over each head of queries and keys; None: no such norms. wide: see RMSNorm.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float | None = None,
        wide: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.out = Linear(num_heads * head_dim, width, bias=out_bias)
        self.query_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps, wide=wide)
        self.key_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps, wide=wide)
        self.ranks: Ranks | None = None

    def divide(self, ranks: Ranks) -> None:
        """Keep a part of the heads."""
        heads = HeadSpans(self.num_heads, self.num_kv_heads, ranks)
        (first, last), (kv_first, kv_last) = heads.query, heads.kv
        self.qkv.keep_outputs(*heads.rows(self.head_dim))
        self.out.keep_inputs(first * self.head_dim, last * self.head_dim)
        self.num_heads, self.num_kv_heads, self.ranks = last - first, kv_last - kv_first, ranks

    def combine(self, attended: Tensor) -> Tensor:
        """Return the output [N, width] of all heads; attended: [N, H D] of this rank's."""
        if self.ranks is None:
            return self.out(attended)
        return self.out.add_bias(self.ranks.sum(self.out(attended)))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated query [N, H, D], rotated key [N, K, D] and value [N, K, D]."""
        fused = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = fused.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return turned(query, self.query_norm, cos, sin), turned(key, self.key_norm, cos, sin), value
