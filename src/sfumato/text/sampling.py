"""Choosing tokens from logits: temperature, top-k, top-p, and noise from a request's random source.

Letters: M positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_filter(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, top_p_first: bool = False
) -> Tensor:
    """Return logits [M, V] divided by the temperature, with what top-k and top-p leave out at -inf.

    top_p_first: top-p before top-k (Dream), else behind it on what top-k left.
    """
    logits = logits / temperature if temperature != 1.0 else logits
    if top_p_first:
        return _keep_best(_keep_mass(logits, top_p), top_k)
    return _keep_mass(_keep_best(logits, top_k), top_p)


def _keep_best(logits: Tensor, top_k: int) -> Tensor:
    """Leave the k best; equal logits at the k-th place all stay."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    kth = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def _keep_mass(logits: Tensor, top_p: float) -> Tensor:
    """Leave the smallest set with this probability, the token that crosses the limit included."""
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
    return logits.masked_fill(dropped, -torch.inf)


def probability_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the softmax probability f32[M] of one token per position."""
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).exp().float()
