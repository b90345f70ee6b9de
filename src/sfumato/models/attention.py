"""The one attention function: over pages on a GPU, else grouped scaled-dot-product calls over their slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.batch import AttentionGroup, Batch
from sfumato.models.paged import attend_pages, keep


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Batch,
    layer: int,
    *,
    windowed: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Write this forward's keys and values to the pool, then let each query see its slots.

    query: [N, H, D]; key, value: [N, K, D], rotated. Returns [N, H, D]. Changes the layer's store in place.
    Query head h uses key head h // (H / K). windowed: this is a sliding layer. scale: of the products; None:
    D ** -0.5.
    """
    if batch.paged is not None:
        return _attend_paged(query, key, value, batch, layer, windowed=windowed, scale=scale)
    if batch.store is not None and batch.write_slots is not None and batch.write_tokens is not None:
        batch.store.keys[layer].index_copy_(0, batch.write_slots, key.index_select(0, batch.write_tokens))
        batch.store.values[layer].index_copy_(0, batch.write_slots, value.index_select(0, batch.write_tokens))
    groups = batch.windowed if windowed else batch.groups
    assert groups, "a batch for sliding layers says what their queries see"
    if len(groups) == 1 and isinstance(groups[0].queries, slice):
        return _attend_group(query, key, value, batch, groups[0], layer, scale)
    output = torch.empty_like(query)
    for group in groups:
        output[group.queries] = _attend_group(query[group.queries], key, value, batch, group, layer, scale)
    return output


def _attend_paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Batch,
    layer: int,
    *,
    windowed: bool,
    scale: float | None,
) -> Tensor:
    paged, store = batch.paged, batch.store
    assert paged is not None
    assert store is not None
    keys, values = store.keys[layer], store.values[layer]
    keep(key, value, keys, values, paged.write_slots)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend_pages(query, keys, values, paged, output, windowed=windowed, scale=scale)
    for group in batch.windowed if windowed else batch.groups:
        output[group.queries] = _attend_group(query[group.queries], key, value, batch, group, layer, scale)
    return output


def _attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Batch,
    group: AttentionGroup,
    layer: int,
    scale: float | None,
) -> Tensor:
    if group.from_pool:
        assert batch.store is not None
        key, value = batch.store.keys[layer], batch.store.values[layer]
    key, value = key[group.keys], value[group.keys]
    return sdpa(query, key, value, num_rows=group.num_rows, mask=group.mask, scale=scale)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_rows: int,
    mask: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of R rows at once.

    query: [R * Q, H, D]; key, value: [R * T, K, D]; mask: bool[R, 1, Q, T] or None. Returns [R * Q, H, D].
    Query heads that share a key head are stacked along the query axis, so that no key is repeated.
    """
    kv_heads = key.shape[1]
    shared = query.shape[1] // kv_heads
    grouped = _stacked(query, kv_heads, num_rows)
    key, value = _by_head(key, num_rows), _by_head(value, num_rows)
    if mask is not None and shared > 1:
        mask = mask.repeat(1, 1, shared, 1)
    result = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return _unstacked(result, shared)


def _stacked(query: Tensor, kv_heads: int, num_rows: int) -> Tensor:
    """Return [R * Q, H, D] as [R, K, (H / K) * Q, D]."""
    heads, width = query.shape[1:]
    grouped = query.view(num_rows, -1, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    return grouped.reshape(num_rows, kv_heads, -1, width)


def _unstacked(attended: Tensor, shared: int) -> Tensor:
    """Return [R, K, S * Q, D] as [R * Q, K * S, D]."""
    num_rows, kv_heads, _, width = attended.shape
    apart = attended.view(num_rows, kv_heads, shared, -1, width).permute(0, 3, 1, 2, 4)
    return apart.reshape(-1, kv_heads * shared, width)


def _by_head(keys: Tensor, num_rows: int) -> Tensor:
    """Return [R * T, K, D] as [R, K, T, D]."""
    return keys.view(num_rows, -1, *keys.shape[1:]).transpose(1, 2)
