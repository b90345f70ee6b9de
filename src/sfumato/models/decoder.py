"""The dense pre-norm decoder that LLaDA and SDAR share; a family file says what differs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.models.attention import attend
from sfumato.models.batch import Batch
from sfumato.models.layers import Attention, GatedMLP, Linear, RMSNorm, Rotary


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder; qk_norm adds a norm over each head of queries and keys."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    qk_norm: bool = False
    attention_bias: bool = False
    wide_norm: bool = False
    tied: bool = False


class Layer(nn.Module):
    """h = x + attention(norm x); h + mlp(norm h)."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.attention = Attention(
            shape.width,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            bias=shape.attention_bias,
            out_bias=shape.attention_bias,
            norm_eps=shape.norm_eps if shape.qk_norm else None,
        )
        self.mlp_norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.mlp = GatedMLP(shape.width, shape.inner)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer: int, kept: Tensor | None
    ) -> Tensor:
        """Return the states of all tokens, or of the `kept` ones alone."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        attended = attend(query, key, value, batch, layer).flatten(1)
        if kept is not None:
            x, attended = x[kept], attended[kept]
        x = x + self.attention.out(attended)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm and output head over packed tokens."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width), requires_grad=False)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps, wide=shape.wide_norm)
        self.output = Linear(shape.width, shape.vocab_size)
        self.rotary = Rotary(shape.head_dim, shape.rope_theta)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.embedding.device

    def pack(self) -> None:
        """Pack every linear weight for this machine's kernels."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def hidden(self, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Return the normed hidden states [P, width] of the batch's output tokens.

        trace: receives the input of each layer, then the normed output.
        """
        cos, sin = self.rotary.angles(batch.positions)
        x = torch.nn.functional.embedding(batch.token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            if trace is not None:
                trace.append(x)
            kept = batch.output_tokens if index == len(self.layers) - 1 else None
            x = layer(x, cos, sin, batch, index, kept)
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [M, V] of hidden states [M, width], in the weights' dtype."""
        logits: Tensor = self.output(hidden)
        return logits
