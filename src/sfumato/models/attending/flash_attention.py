"""FlashAttention over pages: version 3 where it is installed and a Hopper GPU is there, else version 2.

Their functions are called as flash_attn 2.8.3 and its folder `hopper` publish them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.models.attending.pool import Pool, imported
from sfumato.models.attending.sequences import Adapter, Sequences, starts_of
from sfumato.models.paged import Compute
from sfumato.models.placing import placed

_WIDEST = 256
# Version 2 reads pages of whole multiples of these.
_PAGE = 256


def make_adapter(pool: Pool) -> Adapter:
    """Return what is best of those that can be used. Raises ConfigError where none can."""
    pool.check()
    for _, width in pool.shapes:
        if width > _WIDEST or width % 8:
            raise ConfigError(f"heads of {width} are not a multiple of 8 up to {_WIDEST}")
    reasons = []
    for make in (FlashAttention3, FlashAttention2):
        try:
            return make(pool)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError("; ".join(reasons))


class FlashAttention3:
    """The call for a cache of keys, whose pages may have any size."""

    def __init__(self, pool: Pool) -> None:
        if pool.capability[0] != 9:
            major, minor = pool.capability
            raise ConfigError(f"version 3 is for compute capability 9, and the GPU has {major}.{minor}")
        self._attend: Callable[..., Tensor] = imported("flash_attn_interface").flash_attn_with_kvcache
        self._device = pool.device

    def plan(self, sequences: Sequences) -> Compute:
        """Return what computes these sequences."""
        starts = placed(sequences.starts, self._device)
        num_keys = placed(sequences.num_keys, self._device)
        table = placed(sequences.table(), self._device)
        longest = int(sequences.lengths.max())

        def compute(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            return self._attend(
                query,
                keys,
                values,
                cache_seqlens=num_keys,
                page_table=table,
                cu_seqlens_q=starts,
                max_seqlen_q=longest,
                softmax_scale=scale,
                causal=False,
            )

        return compute


class FlashAttention2:
    """The call for sequences of different lengths."""

    def __init__(self, pool: Pool) -> None:
        if pool.page_size % _PAGE:
            raise ConfigError(
                f"version 2 reads pages of multiples of {_PAGE} tokens, and --page-size is {pool.page_size}"
            )
        self._attend: Callable[..., Tensor] = imported("flash_attn").flash_attn_varlen_func
        self._device = pool.device

    def plan(self, sequences: Sequences) -> Compute:
        """Return what computes these sequences."""
        starts = placed(sequences.starts, self._device)
        key_starts = placed(starts_of(sequences.num_keys), self._device)
        table = placed(sequences.table(), self._device)
        longest, most_keys = int(sequences.lengths.max()), int(sequences.num_keys.max())

        def compute(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            return self._attend(
                query,
                keys,
                values,
                cu_seqlens_q=starts,
                cu_seqlens_k=key_starts,
                max_seqlen_q=longest,
                max_seqlen_k=most_keys,
                softmax_scale=scale,
                causal=False,
                block_table=table,
            )

        return compute
