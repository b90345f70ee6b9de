"""Own the training-time model of both architectures; the package has its own, served one.

Letters: B rows, L positions, D width, H heads, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.plan import Plan

PADDING_COPY = -1
CLEAN_COPY = 0


class Norm(nn.Module):
    """Scale to unit root mean square in float32, then by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Block(nn.Module):
    """One pre-norm transformer layer with rotary positions and a gated feed-forward."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.num_heads, self.head_dim = plan.num_heads, plan.head_dim
        self.attn_norm = Norm(plan.width, plan.rms_eps)
        self.q_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.k_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.v_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.o_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.q_norm = Norm(plan.head_dim, plan.rms_eps) if plan.has_qk_norm else None
        self.k_norm = Norm(plan.head_dim, plan.rms_eps) if plan.has_qk_norm else None
        self.ff_norm = Norm(plan.width, plan.rms_eps)
        self.gate_proj = nn.Linear(plan.width, plan.ff_width, bias=False)
        self.up_proj = nn.Linear(plan.width, plan.ff_width, bias=False)
        self.down_proj = nn.Linear(plan.ff_width, plan.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """Return x: [B, L, D] after attention and feed-forward; bias: [B, 1, L, L] is added to the scores."""
        B, L, D = x.shape
        n = self.attn_norm(x)
        q = self.q_proj(n).view(B, L, self.num_heads, self.head_dim)
        k = self.k_proj(n).view(B, L, self.num_heads, self.head_dim)
        v = self.v_proj(n).view(B, L, self.num_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        # Written out because bf16 scaled_dot_product_attention trains several times slower on the CPU.
        scores = torch.matmul(q, k.transpose(-1, -2)) * (1.0 / math.sqrt(self.head_dim)) + bias
        mixed = torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(B, L, D))
        m = self.ff_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(m)) * self.up_proj(m))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions of the half-split kind in float32; cos, sin: f32[B, 1, L, D/H]."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def rotary_angles(positions: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return cos and sin: f32[B, 1, L, D/H] for positions: i64[B, L]."""
    half = torch.arange(0, plan.head_dim, 2, dtype=torch.float32)
    frequencies = plan.rope_theta ** (-half / plan.head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def attention_bias(copies: Tensor, blocks: Tensor) -> Tensor:
    """Return bool[B, 1, L, L], true where a position must not look, for copies and blocks: i64[B, L].

    Copy 0 is the clean text, copies 1, 2, ... are noisy versions of its end. Clean text sees clean text of
    its own and earlier blocks; a noisy block sees itself and the clean text of earlier blocks
    (arXiv:2503.09573); padding sees padding, so that no row of scores is empty.
    """
    same_copy = copies[:, :, None] == copies[:, None, :]
    same_block = blocks[:, :, None] == blocks[:, None, :]
    sees_clean = (copies[:, None, :] == CLEAN_COPY) & (copies[:, :, None] >= CLEAN_COPY)
    earlier_block = blocks[:, None, :] < blocks[:, :, None]
    return ~((same_copy & same_block) | (sees_clean & earlier_block))[:, None]


class TinyModel(nn.Module):
    """Predict every position's token from all positions it may see, with no shift."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.embedding = nn.Embedding(plan.vocab_size, plan.width)
        self.blocks = nn.ModuleList(Block(plan) for _ in range(plan.num_layers))
        self.final_norm = Norm(plan.width, plan.rms_eps)
        self.head = nn.Linear(plan.width, plan.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * plan.num_layers) if is_residual else 0.02)

    def hidden(self, token_ids: Tensor, positions: Tensor, copies: Tensor, blocks: Tensor) -> Tensor:
        """Return the normed last states: [B, L, D]; all arguments are i64[B, L]."""
        x = self.embedding(token_ids)
        cos, sin = rotary_angles(positions, self.plan)
        hidden_from = attention_bias(copies, blocks)
        bias = torch.zeros(hidden_from.shape, dtype=x.dtype).masked_fill_(hidden_from, -1e4)
        for block in self.blocks:
            x = block(x, cos, sin, bias)
        return self.final_norm(x)

    def compile_blocks(self) -> None:
        """Compile each layer; shapes are few, because batches come in fixed lengths."""
        torch._dynamo.config.cache_size_limit = 64
        for block in self.blocks:
            block.compile(dynamic=False)
