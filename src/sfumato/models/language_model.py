"""What the loader and the text runner ask of a model, whatever its architecture.

Letters: P output tokens of a batch, M hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.models.batch import Batch
from sfumato.models.layers import Linear, Packable


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


class LanguageModel(nn.Module):
    """An embedding, something between, and an output head over packed tokens.

    ignored_prefixes: tensors of a checkpoint that belong to parts which are not built here.
    """

    ignored_prefixes: tuple[str, ...] = ()

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width), requires_grad=False)
        self.output = Linear(shape.width, shape.vocab_size)

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
        return logits

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """Return the expected embedding [M, width] under probabilities [M, V]."""
        return probabilities.to(self.dtype) @ self.embedding * self.embedding_scale
