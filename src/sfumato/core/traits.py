"""What a model declares about itself; nothing else in the engine asks which model it is."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Visibility(StrEnum):
    """How far a query sees: the end of its block, or the end of the canvas."""

    BLOCK_CAUSAL = "block_causal"
    BIDIRECTIONAL = "bidirectional"


class BlockOrigin(StrEnum):
    """Where blocks are counted from."""

    START = "start"
    PROMPT_END = "prompt_end"


class ModelTraits(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of one loaded model.

    block_length is a default in tokens; a request may choose another where `fixed_block_length` is false.
    `default_algorithm` and `default_parameters` are the family's, before an operator's and a request's.
    """

    family: str
    architecture: str
    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    eot_token_id: int | None
    context_length: int
    block_length: int
    visibility: Visibility
    block_origin: BlockOrigin
    num_layers: int
    num_kv_heads: int
    head_dim: int
    default_algorithm: str
    default_parameters: dict[str, object] = {}
    default_max_tokens: int | None = None
    fixed_block_length: bool = False

    @property
    def has_exact_cache(self) -> bool:
        """Whether keys and values of committed tokens never change, so that they may be kept and shared."""
        return self.visibility is Visibility.BLOCK_CAUSAL

    def kv_bytes_per_token(self, dtype_size: int) -> int:
        """Return the bytes of keys and values that one cached token takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_size
