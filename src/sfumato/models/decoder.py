"""The pre-norm decoder that most families share, dense or with experts; a family file says what differs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sfumato.models.attention import attend
from sfumato.models.batch import Batch
from sfumato.models.experts import Experts, SparseMLP
from sfumato.models.language_model import LanguageModel
from sfumato.models.layers import Attention, GatedMLP, RMSNorm, Rotary, add_norm
from sfumato.models.routing import Routing, block_of_tokens


@dataclass(frozen=True, slots=True)
class SparseShape:
    """Sizes of the mixtures of experts that stand in some layers for the MLP.

    inner: of each expert; shared_inner: of the MLP beside them that all tokens use, 0: none.
    """

    layers: frozenset[int]
    num_experts: int
    num_chosen: int
    inner: int
    routing: Routing
    shared_inner: int = 0


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder; qk_norm adds a norm over each head of queries and keys.

    rotary_dim: dimensions of a head that turn; None: all. sparse: which layers have experts; None: no layer.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    rotary_dim: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    wide_norm: bool = False
    tied: bool = False
    sparse: SparseShape | None = None

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Return (key-value heads, head width) of each layer."""
        return ((self.num_kv_heads, self.head_dim),) * self.num_layers


def _make_mlp(shape: DecoderShape, index: int) -> nn.Module:
    sparse = shape.sparse
    if sparse is None or index not in sparse.layers:
        return GatedMLP(shape.width, shape.inner)
    return SparseMLP(
        sparse.routing.make_router(shape.width, sparse.num_experts, sparse.num_chosen),
        Experts(sparse.num_experts, shape.width, sparse.inner, num_chosen=sparse.num_chosen),
        GatedMLP(shape.width, sparse.shared_inner) if sparse.shared_inner else None,
    )


class Layer(nn.Module):
    """h = x + attention(norm x); h + mlp(norm h)."""

    def __init__(self, shape: DecoderShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.attention = Attention(
            shape.width,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            bias=shape.qkv_bias,
            out_bias=shape.out_bias,
            norm_eps=shape.norm_eps if shape.qk_norm else None,
            wide=shape.wide_norm,
        )
        self.mlp_norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.mlp = _make_mlp(shape, index)
        sparse = shape.sparse
        self.routes_blocks = (
            sparse is not None and index in sparse.layers and sparse.routing.block_length is not None
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, kept: Tensor | None, blocks: Tensor | None
    ) -> Tensor:
        """Return the states of all tokens, or of the `kept` ones alone."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        attended = attend(query, key, value, batch, self.index).flatten(1)
        if self.routes_blocks:
            # Tokens that are not wanted take part in their block's choice of experts.
            x, normed = add_norm(x, self.attention.combine(attended), self.mlp_norm)
            x = x + self.mlp(normed, blocks)
            return x if kept is None else x[kept]
        if kept is not None:
            x, attended = x[kept], attended[kept]
        x, normed = add_norm(x, self.attention.combine(attended), self.mlp_norm)
        return x + self.mlp(normed)


class Decoder(LanguageModel):
    """Embedding, layers, final norm and output head."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__(shape)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.rotary = Rotary(shape.rotary_dim or shape.head_dim, shape.rope_theta)
        self.routing_block = None if shape.sparse is None else shape.sparse.routing.block_length

    def hidden(self, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Return the normed hidden states [P, width] of the batch's output tokens.

        trace: receives the input of each layer, then the normed output.
        """
        cos, sin = self.rotary.angles(batch.positions)
        blocks = None
        if self.routing_block is not None:
            blocks = block_of_tokens(batch.positions, self.routing_block)
        x = self.embed(batch.token_ids)
        for index, layer in enumerate(self.layers):
            if trace is not None:
                trace.append(x)
            kept = batch.output_tokens if index == len(self.layers) - 1 else None
            x = layer(x, cos, sin, batch, kept, blocks)
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x
