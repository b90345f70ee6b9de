"""DiffusionGemma's decoder: sliding and full layers, each with an MLP beside experts, run in two ways.

A context token is encoded: causally, with the encoder's layer scalars. A canvas token is denoised: its input
carries what the step before expected of it. Both use the same weights and may share a forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.models.attention import attend
from sfumato.models.batch import Batch
from sfumato.models.experts import Experts
from sfumato.models.language_model import LanguageModel
from sfumato.models.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    Rotary,
    gelu_tanh,
    rms_norm_plain,
    turned,
)
from sfumato.models.packed import BlockedWeight, pack_blocked
from sfumato.models.routing import SoftmaxRouter
from sfumato.models.split import Divisible, HeadSpans, Ranks


@dataclass(frozen=True, slots=True)
class GemmaLayerShape:
    """Sizes of one layer's attention. windowed: a sliding layer; the others have no values of their own."""

    windowed: bool
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class GemmaShape:
    """Sizes of a decoder. window: tokens that a query of a sliding layer sees, itself included.

    turning: the share of a head's dimensions that turn in full layers. soft_cap: bound of the logits.
    """

    layers: tuple[GemmaLayerShape, ...]
    width: int
    num_heads: int
    inner: int
    num_experts: int
    num_chosen: int
    expert_inner: int
    vocab_size: int
    window: int
    sliding_theta: float
    full_theta: float
    turning: float
    norm_eps: float
    soft_cap: float
    tied: bool = True

    @property
    def num_layers(self) -> int:
        """Return how many layers there are."""
        return len(self.layers)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Return (key-value heads, head width) of each layer."""
        return tuple((layer.num_kv_heads, layer.head_dim) for layer in self.layers)


class GemmaAttention(Divisible):
    """Unscaled attention; values are normed without a weight, and in full layers are the raw keys."""

    def __init__(self, shape: GemmaShape, layer: GemmaLayerShape) -> None:
        super().__init__()
        self.head_dim, self.norm_eps = layer.head_dim, shape.norm_eps
        self.num_heads, self.num_kv_heads = shape.num_heads, layer.num_kv_heads
        self.parts = [shape.num_heads, layer.num_kv_heads] + [layer.num_kv_heads] * layer.windowed
        self.qkv = Linear(shape.width, sum(self.parts) * layer.head_dim)
        self.out = Linear(shape.num_heads * layer.head_dim, shape.width)
        self.query_norm = RMSNorm(layer.head_dim, shape.norm_eps, wide=True)
        self.key_norm = RMSNorm(layer.head_dim, shape.norm_eps, wide=True)
        self.ranks: Ranks | None = None

    def divide(self, ranks: Ranks) -> None:
        """Keep a part of the heads."""
        heads = HeadSpans(self.num_heads, self.num_kv_heads, ranks)
        (first, last), (kv_first, kv_last) = heads.query, heads.kv
        num_kv_parts = len(self.parts) - 1
        self.qkv.keep_outputs(*heads.rows(self.head_dim, num_kv_parts=num_kv_parts))
        self.out.keep_inputs(first * self.head_dim, last * self.head_dim)
        self.parts = [last - first] + [kv_last - kv_first] * num_kv_parts
        self.ranks = ranks

    def combine(self, attended: Tensor) -> Tensor:
        """Return the output [N, width] of all heads; attended: [N, H D] of this rank's."""
        return self.out(attended) if self.ranks is None else self.ranks.sum(self.out(attended))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated query [N, H, D], rotated key [N, K, D] and value [N, K, D]."""
        query, key, *rest = self.qkv(x).view(x.shape[0], -1, self.head_dim).split(self.parts, dim=1)
        value = rms_norm_plain(rest[0] if rest else key, self.norm_eps)
        return turned(query, self.query_norm, cos, sin), turned(key, self.key_norm, cos, sin), value


class GemmaRouter(SoftmaxRouter):
    """Probabilities over all experts of a normed and scaled state, with a factor for each expert."""

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__(shape.width, shape.num_experts, shape.num_chosen, is_normalised=True)
        self.scale = nn.Parameter(torch.empty(shape.width), requires_grad=False)
        self.expert_scale = nn.Parameter(torch.empty(shape.num_experts), requires_grad=False)
        self.norm_eps = shape.norm_eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts i64[N, C] and weights f32[N, C] of un-normed states [N, width]."""
        normed = rms_norm_plain(x, self.norm_eps) * self.scale * x.shape[-1] ** -0.5
        chosen, weights = super().forward(normed)
        return chosen, weights * self.expert_scale[chosen]


class GemmaLayer(nn.Module):
    """Attention, then MLP and experts side by side, each between two norms; the sum is scaled at the end."""

    def __init__(self, shape: GemmaShape, index: int) -> None:
        super().__init__()
        self.index, self.windowed = index, shape.layers[index].windowed
        norm = lambda: RMSNorm(shape.width, shape.norm_eps, wide=True)
        self.attention_norm, self.attention_post_norm = norm(), norm()
        self.attention = GemmaAttention(shape, shape.layers[index])
        self.mlp_norm, self.mlp_post_norm = norm(), norm()
        self.mlp = GatedMLP(shape.width, shape.inner, gelu_tanh)
        self.experts_norm, self.experts_post_norm = norm(), norm()
        self.router = GemmaRouter(shape)
        self.experts = Experts(
            shape.num_experts, shape.width, shape.expert_inner, gelu_tanh, num_chosen=shape.num_chosen
        )
        self.post_norm = norm()
        self.scalar = nn.Parameter(torch.empty(1), requires_grad=False)
        self.context_scalar = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, kept: Tensor | None) -> Tensor:
        """Return the states of all tokens, or of the `kept` ones alone."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        attended = attend(query, key, value, batch, self.index, windowed=self.windowed, scale=1.0).flatten(1)
        is_context = batch.is_context
        if kept is not None:
            x, attended = x[kept], attended[kept]
            is_context = None if is_context is None else is_context[kept]
        x = x + self.attention_post_norm(self.attention.combine(attended))
        dense = self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        routed = self.experts_post_norm(self.experts(self.experts_norm(x), *self.router(x)))
        x = x + self.post_norm(dense + routed)
        if is_context is None:
            return x * self.scalar
        return x * torch.where(is_context[:, None], self.context_scalar, self.scalar)


class SelfConditioning(nn.Module):
    """What a canvas token's input gains from the expected embedding under its step before."""

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.width, shape.norm_eps, wide=True)
        self.mlp = GatedMLP(shape.width, shape.inner, gelu_tanh)

    def forward(self, addend: Tensor) -> Tensor:
        """Return [N, width] of expected embeddings [N, width]; zeros give zeros."""
        return self.mlp(self.norm(addend))


class GemmaDecoder(LanguageModel):
    """Scaled embedding, self-conditioning, layers, final norm and a tied head with bounded logits."""

    shape: GemmaShape
    # Parts of a checkpoint that see images.
    ignored_prefixes = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

    def __init__(self, shape: GemmaShape) -> None:
        super().__init__(shape)
        self.conditioning = SelfConditioning(shape)
        self.layers = nn.ModuleList(GemmaLayer(shape, index) for index in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps, wide=True)
        self.rotaries = {layer: _rotary(shape, layer) for layer in set(shape.layers)}
        self._packed_embedding: BlockedWeight | None = None

    def pack(self) -> None:
        """Pack the weights, and the embedding once more as a matrix: it is also multiplied with."""
        super().pack()
        self._packed_embedding = pack_blocked(self.embedding.T.contiguous())

    @property
    def embedding_scale(self) -> float:
        """Return the root of the width, as precise as the weights are."""
        return float(torch.tensor(math.sqrt(self.shape.width)).to(self.dtype))

    def hidden(self, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Return the normed hidden states [P, width] of the batch's output tokens.

        trace: receives the input of each layer, then the normed output.
        """
        angles = {layer: rotary.angles(batch.positions) for layer, rotary in self.rotaries.items()}
        x = self.embed(batch.token_ids) * self.embedding_scale
        x = self._condition(x, batch)
        for layer, shape in zip(self.layers, self.shape.layers, strict=True):
            if trace is not None:
                trace.append(x)
            kept = batch.output_tokens if layer is self.layers[-1] else None
            x = layer(x, *angles[shape], batch, kept)
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x

    def _condition(self, x: Tensor, batch: Batch) -> Tensor:
        """Turn embeddings [N, width] into the input of the first layer; a context token's stays as it is."""
        if batch.is_context is None:
            gained = x if batch.addend is None else x + self.conditioning(batch.addend.to(x.dtype))
            return rms_norm_plain(gained, self.shape.norm_eps)
        # Waits for a GPU once per forward, and spares a long context the work.
        canvas = torch.nonzero(~batch.is_context).flatten()
        if len(canvas):
            gained = x[canvas]
            if batch.addend is not None:
                gained = gained + self.conditioning(batch.addend[canvas].to(x.dtype))
            x[canvas] = rms_norm_plain(gained, self.shape.norm_eps)
        return x

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """Return the expected embedding [M, width] under probabilities [M, V]."""
        if self._packed_embedding is None:
            return super().soft_embedding(probabilities)
        part = self._packed_embedding(self.own_part(probabilities).to(self.dtype), None)
        return self.summed(part) * self.embedding_scale

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [M, V] of hidden states [M, width], between plus and minus the soft cap."""
        return super().head(hidden).div_(self.shape.soft_cap).tanh_().mul_(self.shape.soft_cap)


def _rotary(shape: GemmaShape, layer: GemmaLayerShape) -> Rotary:
    """Return the positions of a layer: whole heads turn in sliding layers, the first pairs in full ones."""
    if layer.windowed:
        return Rotary(layer.head_dim, shape.sliding_theta)
    num_turning = int(shape.turning * layer.head_dim / 2)
    return Rotary(layer.head_dim, shape.full_theta, num_turning=num_turning)
