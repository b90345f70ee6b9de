"""What the loader and the text runner ask of a model, whatever its architecture.

Letters: P output tokens of a batch, M hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.models.batch import Batch
from sfumato.models.layers import Linear, Packable
from sfumato.models.split import Cut, Divisible, Meeting, Ranks, embed_part, kv_span, span_of


class LanguageShape(Protocol):
    """The sizes that every architecture has; tied: the output head is the embedding."""

    @property
    def num_layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tied(self) -> bool: ...

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]: ...


class LanguageModel(Divisible):
    """An embedding, something between, and an output head over packed tokens.

    ignored_prefixes: tensors of a checkpoint that belong to parts which are not built here.
    """

    ignored_prefixes: tuple[str, ...] = ()

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width), requires_grad=False)
        self.output = Linear(shape.width, shape.vocab_size)
        self.ranks: Ranks | None = None
        self.kv_shapes = shape.kv_shapes

    def divide(self, ranks: Ranks) -> None:
        """Keep this rank's part of every layer, of the vocabulary and of the keys and values.

        For ranks that run all forwards together, on the same tokens.
        """
        for module in self.modules():
            if isinstance(module, Divisible) and not isinstance(module, LanguageModel | Linear):
                module.divide(ranks)
        span = span_of(self.shape.vocab_size, ranks, "tokens of the vocabulary")
        self.keep("embedding", Cut(0, (span,)))
        self.output.keep_outputs(span)
        self.kv_shapes = tuple(
            (last - first, width)
            for (first, last), width in ((kv_span(heads, ranks), width) for heads, width in self.kv_shapes)
        )
        self.ranks = ranks

    def meetings(self) -> list[Meeting]:
        """Return the layers whose weights ranks with tokens of their own share, in the order of a forward."""
        every = [module for module in self.modules() if isinstance(module, Meeting)]
        return [layer for layer in every if layer.is_sparse] or every

    def divide_meetings(self, ranks: Ranks) -> None:
        """Keep this rank's part of the layers in which the ranks meet; everything else stays whole."""
        for layer in self.meetings():
            layer.divide(ranks)

    def take_no_part(self, first: int = 0) -> None:
        """Meet the other ranks in every shared layer from the first on, with no tokens of this rank's own."""
        for layer in self.meetings()[first:]:
            layer.take_no_part()

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.embedding.device

    @property
    def embedding_scale(self) -> float:
        """Return what embeddings are multiplied with."""
        return 1.0

    def quantize(self, kind: torch.dtype) -> None:
        """Hold the weights of all layers in eight bits, on the meta device; the head stays as it is."""
        for module in self.modules():
            if isinstance(module, Packable) and module is not self.output:
                module.quantize(kind)

    def pack(self) -> None:
        """Pack every weight for this machine's kernels."""
        for module in self.modules():
            if isinstance(module, Packable):
                module.pack()

    def hidden(self, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Return the normed hidden states [P, width] of the batch's output tokens.

        trace: receives the input of each layer, then the normed output.
        """
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [M, V] of hidden states [M, width], in the weights' dtype."""
        logits: Tensor = self.output(hidden)
        return logits if self.ranks is None else self.ranks.join(logits, self.shape.vocab_size)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings [N, width] of tokens i64[N]."""
        if self.ranks is None:
            return nn.functional.embedding(token_ids, self.embedding)
        (span,) = self.cuts["embedding"].spans
        return self.ranks.sum(embed_part(token_ids, self.embedding, span[0]))

    def own_part(self, probabilities: Tensor) -> Tensor:
        """Return the columns of [M, V] whose embeddings this rank holds."""
        if self.ranks is None:
            return probabilities
        (span,) = self.cuts["embedding"].spans
        return probabilities[:, slice(*span)]

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum of what the ranks hold parts of."""
        return part if self.ranks is None else self.ranks.sum(part)

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """Return the expected embedding [M, width] under probabilities [M, V]."""
        part = self.own_part(probabilities).to(self.dtype) @ self.embedding
        return self.summed(part) * self.embedding_scale
