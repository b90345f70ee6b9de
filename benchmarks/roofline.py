"""What a machine can do at best, and what forwards need: operations over its rate, bytes over its bandwidth.

The floor of a forward is the larger of both. Only dense decoders are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sfumato.models.batch import Batch
from sfumato.models.decoder import Decoder
from sfumato.models.packed import pack_blocked, pack_weight

# Products that no forward of a benchmark exceeds: rows, inputs, outputs.
_PRODUCTS = ((256, 768, 5120), (512, 768, 5120), (512, 2560, 2560), (1024, 2048, 2048))
_COPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations per second of matrix products, bytes per second of copies (read and written)."""

    operations: float
    bandwidth: float


@cache
def measured(dtype: torch.dtype, num_threads: int) -> Machine:
    """Measure this machine with so many threads; the best of several runs."""
    assert torch.get_num_threads() == num_threads
    rates = []
    for rows, inputs, outputs in _PRODUCTS:
        x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        for packed in (pack_weight(weight), pack_blocked(weight)):
            multiply: Callable[[], Any] = (
                (lambda x=x, weight=weight: x @ weight.T)  # type: ignore[misc]
                if packed is None
                else (lambda x=x, packed=packed: packed(x, None))
            )
            rates.append(2 * rows * inputs * outputs / _best(multiply))
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Machine(max(rates), 2 * _COPY_BYTES / _best(lambda: target.copy_(source)))


def _best(act: Callable[[], Any], runs: int = 7) -> float:
    act()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return min(found)


class Counted:
    """A decoder that adds up the floor of what it is asked to compute."""

    def __init__(self, model: Decoder, machine: Machine) -> None:
        self._model = model
        self._machine = machine
        shape = model.shape
        self._qkv = shape.width * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self._rest = shape.width * shape.num_heads * shape.head_dim + 3 * shape.width * shape.inner
        self._item = model.embedding.element_size()
        self.operations = self.floor_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def reset(self) -> None:
        """Count from nothing."""
        self.operations = self.floor_seconds = 0.0

    def hidden(self, batch: Batch) -> Tensor:
        """Count and compute hidden states."""
        shape = self._model.shape
        num_tokens = len(batch.token_ids)
        num_kept = num_tokens if batch.output_tokens is None else len(batch.output_tokens)
        products = shape.num_layers * num_tokens * self._qkv
        products += ((shape.num_layers - 1) * num_tokens + num_kept) * self._rest
        pairs = seen = 0
        for group in batch.groups:
            queries, keys = (_length(part) for part in (group.queries, group.keys))
            pairs += queries * keys // group.num_rows
            seen += keys
        attended = 2 * pairs * shape.num_heads * shape.head_dim * shape.num_layers
        weights = shape.num_layers * (self._qkv + self._rest)
        cached = 2 * shape.num_layers * (seen + num_tokens) * shape.num_kv_heads * shape.head_dim
        self._add(2 * (products + attended), self._item * (weights + cached))
        return self._model.hidden(batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Count and compute logits."""
        product = self._model.shape.width * self._model.shape.vocab_size
        self._add(2 * len(hidden) * product, self._item * product)
        return self._model.head(hidden)

    def _add(self, operations: float, num_bytes: float) -> None:
        self.operations += operations
        machine = self._machine
        self.floor_seconds += max(operations / machine.operations, num_bytes / machine.bandwidth)


def _length(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else len(part)
