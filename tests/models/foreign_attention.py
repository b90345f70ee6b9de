"""Stand-ins for libraries of attention: the functions that they publish, computed in plain torch.

Arguments are those of flash_attn 2.8.3, of its folder `hopper` and of flashinfer 0.7.4, each with its name
and its default; what the real ones demand of shapes, dtypes and strides is asserted.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# Calls by library, of all functions.
CALLS: dict[str, int] = {}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Put the stand-ins of these modules where the real ones would be, and hide the others."""
    published: dict[str, dict[str, Any]] = {
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper},
    }
    CALLS.clear()
    for name, functions in published.items():
        if name not in names:
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
            continue
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def _count(name: str) -> None:
    CALLS[name] = CALLS.get(name, 0) + 1


def _see(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: list[int],
    num_keys: list[int],
    tables: list[list[int]],
    scale: float,
) -> Tensor:
    """Return what each sequence's queries see of the first keys of its pages."""
    assert query.dtype == keys.dtype == values.dtype
    assert keys.ndim == 4
    assert keys.shape == values.shape
    assert query.ndim == 3
    assert query.shape[1] % keys.shape[2] == 0
    assert query.shape[2] == keys.shape[3]
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert starts[0] == 0
    assert starts[-1] == len(query)
    shared = query.shape[1] // keys.shape[2]
    output = torch.full(query.shape, torch.nan, dtype=query.dtype)
    for index, (count, table) in enumerate(zip(num_keys, tables, strict=True)):
        span = slice(starts[index], starts[index + 1])
        assert 0 < count <= len(table) * keys.shape[1]
        assert span.stop > span.start
        key, value = (
            part[table].flatten(0, 1)[:count].repeat_interleave(shared, 1).float() for part in (keys, values)
        )
        weights = (torch.einsum("qhd,khd->hqk", query[span].float(), key) * scale).softmax(-1)
        output[span] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return output


def _integers(tensor: Tensor | None, *shape: int | None) -> list[Any]:
    """Return an i32 tensor's numbers; None: any size."""
    assert tensor is not None
    assert tensor.dtype is torch.int32
    assert tensor.is_contiguous()
    assert len(tensor.shape) == len(shape)
    assert all(size in (None, found) for size, found in zip(shape, tensor.shape, strict=True))
    return list(tensor.tolist())


def _lengths(starts: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(starts)]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Version 3's call for a cache."""
    _count("flash_attn_interface")
    assert not causal
    assert not return_softmax_lse
    assert window_size == (-1, -1)
    assert softmax_scale is not None
    num_keys = _integers(cache_seqlens, None)
    tables = _integers(page_table, len(num_keys), None)
    starts = _integers(cu_seqlens_q, len(num_keys) + 1)
    assert max_seqlen_q == max(_lengths(starts))
    return _see(q, k_cache, v_cache, starts, num_keys, tables, softmax_scale)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Version 2's call for sequences of different lengths."""
    _count("flash_attn")
    assert not causal
    assert not return_attn_probs
    assert window_size == (-1, -1)
    assert softmax_scale is not None
    assert k.shape[1] % 256 == 0
    starts = _integers(cu_seqlens_q, None)
    num_keys = _lengths(_integers(cu_seqlens_k, len(starts)))
    tables = _integers(block_table, len(num_keys), None)
    assert max_seqlen_q == max(_lengths(starts))
    assert max_seqlen_k == max(num_keys)
    return _see(q, k, v, starts, num_keys, tables, softmax_scale)


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's wrapper: what it was made with, and what it was planned for last."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: None = None,
        paged_kv_indptr_buf: None = None,
        paged_kv_indices_buf: None = None,
        paged_kv_last_page_len_buf: None = None,
        custom_mask_buf: None = None,
        mask_indptr_buf: None = None,
        backend: str = "auto",
        jit_args: None = None,
        jit_kwargs: None = None,
        variant_owns_mask: bool = False,
        max_total_num_rows: int | None = None,
    ) -> None:
        assert float_workspace_buffer.dtype is torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "NHD"
        assert not use_cuda_graph
        self.num_plans = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: None = None,
        packed_custom_mask: None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: None = None,
        rope_scale: None = None,
        rope_theta: None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: None = None,
        non_blocking: bool = True,
        prefix_len_ptr: None = None,
        token_pos_in_items_ptr: None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: None = None,
        seq_lens: None = None,
        seq_lens_q: None = None,
        block_tables: None = None,
        max_token_per_sequence: None = None,
        max_sequence_kv: None = None,
        fixed_split_size: None = None,
        disable_split_kv: bool = False,
        uniform_q_len: None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Keep what all layers have in common."""
        _count("flashinfer plan")
        assert not causal
        assert sm_scale is not None
        assert window_left == -1
        # Tensors from which it plans are read on the host.
        assert not qo_indptr.is_cuda
        assert not paged_kv_indptr.is_cuda
        self.starts = _integers(qo_indptr, None)
        ends = _integers(paged_kv_indptr, len(self.starts))
        indices = _integers(paged_kv_indices, ends[-1])
        last = _integers(paged_kv_last_page_len, len(self.starts) - 1)
        assert all(1 <= count <= page_size for count in last)
        self.tables = [indices[first:end] for first, end in pairwise(ends)]
        self.num_keys = [
            (len(table) - 1) * page_size + count for table, count in zip(self.tables, last, strict=True)
        ]
        self.heads = num_qo_heads, num_kv_heads, head_dim_qk
        self.page_size, self.scale = page_size, sm_scale
        self.dtypes = q_data_type, kv_data_type
        self.num_plans += 1

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        q_scale: None = None,
        k_scale: None = None,
        v_scale: None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: None = None,
        kv_cache_sf: None = None,
        skip_softmax_threshold_scale_factor: None = None,
        use_fp16_softmax: None = None,
        uses_spcompress: None = None,
    ) -> Tensor:
        """Compute one layer."""
        _count("flashinfer")
        assert not args
        keys, values = paged_kv_cache
        assert self.heads == (q.shape[1], keys.shape[2], keys.shape[3])
        assert keys.shape[1] == self.page_size
        assert self.dtypes == (q.dtype, keys.dtype)
        return _see(q, keys, values, self.starts, self.num_keys, self.tables, self.scale)
