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


class ModelTraits(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """The declaration of one loaded model.

    block_length is a default in tokens; a request may choose another where `fixed_block_length` is false.
    `default_algorithm` and `default_parameters` are the family's, before an operator's and a request's.
    shifts_logits: the hidden state at position i predicts the token at i + 1.
    kv_shapes: (key-value heads, head width) of each layer; empty: num_kv_heads and head_dim in all of them.
    window: tokens that a query of a sliding layer sees, itself included; None: there are no sliding layers.
    context_granularity: 0: the context is cached in whole blocks; 1: causally, token by token, by a separate
    encoding pass. has_mask_token: if not, a canvas starts with random tokens and mask_token_id is -1.
    has_self_conditioning: a forward takes the expected embeddings under the canvas's step before.
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
    shifts_logits: bool = False
    kv_shapes: tuple[tuple[int, int], ...] = ()
    window: int | None = None
    context_granularity: int = 0
    has_mask_token: bool = True
    has_self_conditioning: bool = False

    @property
    def has_exact_cache(self) -> bool:
        """Whether keys and values of committed tokens never change, so that they may be kept and shared."""
        return self.visibility is Visibility.BLOCK_CAUSAL

    @property
    def layer_kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Return (key-value heads, head width) of each layer."""
        return self.kv_shapes or ((self.num_kv_heads, self.head_dim),) * self.num_layers

    def kv_bytes_per_token(self, dtype_size: int) -> int:
        """Return the bytes of keys and values that one cached token takes over all layers."""
        return 2 * dtype_size * sum(heads * width for heads, width in self.layer_kv_shapes)


class ImageTraits(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """The declaration of one loaded image or video pipeline.

    size_unit: height and width in pixels are multiples of it. fields: what a request may say to this family
    beyond what all know. scheduler, schedulers: the pipeline's timestep scheduler, and those that a request
    may choose. num_classes: of a model that draws classes instead of prompts. frames_unit: a video has one
    frame more than a multiple of it. max_sequence_length: text tokens, by default.
    """

    family: str
    architecture: str
    default_height: int
    default_width: int
    size_unit: int
    default_steps: int
    default_guidance_scale: float
    scheduler: str
    schedulers: tuple[str, ...]
    fields: tuple[str, ...]
    default_true_cfg_scale: float = 1.0
    takes_images: bool = False
    is_video: bool = False
    has_text: bool = True
    num_classes: int = 0
    default_num_frames: int = 1
    frames_unit: int = 1
    max_sequence_length: int = 512
