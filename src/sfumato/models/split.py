"""How layers are divided among ranks: which part of each parameter a rank holds, and where ranks meet.

A layer computes `leave(partial(enter(x)))`. Under tensor parallelism all ranks have the same tokens:
entering does nothing and leaving sums. Where each rank has tokens of its own, entering collects everybody's
and leaving returns the rank's own sums. What moves the tensors is not decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.models.checkpoint_names import Target


class Ranks(Protocol):
    """The ranks that hold one model together, as one of them sees them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def enter(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return what a divided layer computes with, [N', ...] each, for this rank's parts [N, ...]."""
        ...

    def leave(self, partial: Tensor) -> Tensor:
        """Return this rank's rows of the sum of all ranks' partial results [N', width]."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, of one shape."""
        ...

    def join(self, part: Tensor, total: int) -> Tensor:
        """Return all parts [M, total] of the last axis on rank 0, the part itself elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a parameter that a rank holds: spans [start, stop) along an axis, one behind another."""

    axis: int
    spans: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Return how much is held along the axis."""
        return sum(stop - start for start, stop in self.spans)


class Divisible(nn.Module):
    """A module that can be divided among ranks while it is on the meta device.

    cuts: what this rank holds of each of its own parameters that is divided.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cuts: dict[str, Cut] = {}

    def divide(self, ranks: Ranks) -> None:
        """Keep this rank's part. Raises ConfigError naming both numbers where there is none for each."""
        raise NotImplementedError

    def keep(self, name: str, cut: Cut) -> None:
        """Shrink a parameter to its part; values are not kept."""
        whole = self.get_parameter(name)
        shape = list(whole.shape)
        shape[cut.axis] = cut.length
        setattr(self, name, nn.Parameter(whole.new_empty(shape), requires_grad=False))
        self.cuts[name] = cut


class Meeting(Divisible):
    """A layer whose weights may be divided among ranks that each have tokens of their own.

    is_sparse: it is a mixture of experts. A model that has such shares them and leaves the others whole.
    """

    is_sparse = False

    def take_no_part(self) -> None:
        """Meet the others with no tokens of this rank's own."""
        raise NotImplementedError


def span_of(total: int, ranks: Ranks, what: str) -> tuple[int, int]:
    """Return this rank's span of `total` things; the spans of two ranks differ by one at most."""
    if total < ranks.size:
        raise ConfigError(f"{ranks.size} ranks: the model's {total} {what} do not give each rank one")
    return total * ranks.rank // ranks.size, total * (ranks.rank + 1) // ranks.size


def longest_span(total: int, size: int) -> int:
    """Return the length of the longest span among `size` ranks."""
    return -(-total // size)


@dataclass(frozen=True, slots=True)
class HeadSpans:
    """A rank's query heads and key-value heads. Raises ConfigError where the heads do not divide.

    Query head h uses key head h // (H / K) on one rank as on all: a key head that serves the query heads of
    several ranks is on each of them.
    """

    num_heads: int
    num_kv_heads: int
    ranks: Ranks
    query: tuple[int, int] = field(init=False)
    kv: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        size = self.ranks.size
        if self.num_heads % size:
            raise ConfigError(
                f"{size} ranks: the model's {self.num_heads} query heads are not a multiple of {size}"
            )
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"{size} ranks: the model's {self.num_kv_heads} key-value heads are neither a multiple nor a "
                f"divisor of {size}"
            )
        object.__setattr__(self, "query", span_of(self.num_heads, self.ranks, "query heads"))
        object.__setattr__(self, "kv", kv_span(self.num_kv_heads, self.ranks))

    def rows(self, head_dim: int, *, num_kv_parts: int = 2) -> tuple[tuple[int, int], ...]:
        """Return the rows that a fused projection of queries, then num_kv_parts of K heads each, keeps."""
        spans = [(self.query[0] * head_dim, self.query[1] * head_dim)]
        for part in range(num_kv_parts):
            first = (self.num_heads + part * self.num_kv_heads) * head_dim
            spans.append((first + self.kv[0] * head_dim, first + self.kv[1] * head_dim))
        return tuple(spans)


def kv_span(num_kv_heads: int, ranks: Ranks) -> tuple[int, int]:
    """Return this rank's key-value heads: its share, or the one that it has together with other ranks."""
    if num_kv_heads < ranks.size:
        head = ranks.rank * num_kv_heads // ranks.size
        return head, head + 1
    return span_of(num_kv_heads, ranks, "key-value heads")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a checkpoint tensor and its place in a rank's parameter: indices of both."""

    source: tuple[slice, ...]
    place: tuple[int | slice, ...]


def pieces(target: Target, cut: Cut | None) -> list[Piece]:
    """Return what a rank reads of a tensor; empty: nothing."""
    rows = slice(target.start, target.start + target.shape[0])
    entry: tuple[int | slice, ...] = () if target.entry is None else (target.entry,)
    if cut is None:
        return [Piece((slice(None),), (*entry, rows))]
    if target.entry is not None:
        assert cut.axis == 0, "of stacked layers a rank holds whole ones"
        return [
            Piece((slice(None),), (target.entry - start + done, rows))
            for (start, stop), done in zip(cut.spans, _offsets(cut), strict=True)
            if start <= target.entry < stop
        ]
    found = []
    for (start, stop), done in zip(cut.spans, _offsets(cut), strict=True):
        if cut.axis == 1:
            found.append(Piece((slice(None), slice(start, stop)), (rows, slice(done, done + stop - start))))
            continue
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:
            source = slice(first - target.start, last - target.start)
            found.append(Piece((source,), (slice(done + first - start, done + last - start),)))
    return found


def _offsets(cut: Cut) -> list[int]:
    """Return where each span begins in the rank's parameter."""
    offsets, done = [], 0
    for start, stop in cut.spans:
        offsets.append(done)
        done += stop - start
    return offsets


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """Return the cut of every divided parameter by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: cut
        for prefix, module in model.named_modules()
        if isinstance(module, Divisible)
        for name, cut in module.cuts.items()
    }


def embed_part(token_ids: Tensor, part: Tensor, first: int) -> Tensor:
    """Return the embeddings [N, width] of tokens whose rows this rank holds, from `first` on; else zeros."""
    local = token_ids - first
    is_here = (local >= 0) & (local < len(part))
    found = torch.nn.functional.embedding(local.where(is_here, 0), part)
    return found.masked_fill_(~is_here[:, None], 0)
