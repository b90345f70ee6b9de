"""Forwards that are recorded once for each shape and replayed: no launch costs the host anything then.

A recorded forward reads its numbers from a fixed place, and every batch is filled up to one of a few shapes.
What fills up sees nothing, is kept nowhere, and is not read. What a recording is, others decide: on a GPU a
CUDA graph; elsewhere the forward runs again on the fixed place, which proves all but the graph itself.
Letters: N packed tokens, T tiles, P output tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from sfumato.models.batch import Batch, KVStore
from sfumato.models.paged import Numbers, PagedRow, Shape, tile_of, tiles_of, views_of
from sfumato.models.placing import place_into

# Numbers of units of tokens, or of tiles, that shapes have; more run without a recording.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Tokens of a unit: a block, but no more.
_LARGEST_UNIT = 32
# Recordings that are kept; each holds some megabytes of a driver's memory.
_MOST_RECORDINGS = 64


class Recording(Protocol):
    """A forward that has been recorded."""

    def replay(self) -> Tensor:
        """Make the forward of what lies in its fixed place now; return hidden states [N, width].

        The next replay of any recording may write over them.
        """
        ...


# Runs a forward once or more, and returns what replays it.
Record = Callable[[Callable[[], Tensor]], Recording]


class RunAgain:
    """A recording that records nothing: the forward is run again."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._forward = forward

    def replay(self) -> Tensor:
        """Run the forward."""
        return self._forward()


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they never run beside each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor]) -> Recording:
        """Run a forward twice, so that its kernels are there, and capture it.

        It may be run as often as one likes: it writes the same keys and values each time.
        """
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(2):
                    forward()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile; only this one's calls would break the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden = forward()
        return _CudaRecording(graph, hidden)


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, hidden: Tensor) -> None:
        self._graph = graph
        self._hidden = hidden

    def replay(self) -> Tensor:
        """Launch the graph."""
        self._graph.replay()
        return self._hidden


class Graphs:
    """The recorded forwards of one model over one store.

    forward: the model's. most_pages: entries of page tables that a shape's fixed place has room for.
    unit: tokens by which shapes grow, the model's block length as a rule. failure: why none is recorded any
    more.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        store: KVStore,
        record: Record,
        *,
        page_size: int,
        unit: int,
        most_pages: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._store = store
        self._record = record
        self._page_size = page_size
        self._unit = min(unit, _LARGEST_UNIT)
        self._most_pages = most_pages
        self._device = device
        self._places: dict[Shape, Tensor] = {}
        self._recordings: dict[Shape, Recording] = {}
        self.num_replays = 0
        self.failure: str | None = None

    def shape_of(self, rows: Sequence[PagedRow]) -> Shape | None:
        """Return the shape that rows are filled up to; None where they are too many for any."""
        if self.failure is not None:
            return None
        own, tile = sum(row.length for row in rows), tile_of(rows)
        units = _bucket(-(-own // self._unit))
        if units is None or sum(len(row.pages) for row in rows) > self._most_pages:
            return None
        num_tokens = units * self._unit
        num_tiles = _bucket(len(tiles_of(rows, tile, num_tokens - own)))
        if num_tiles is None:
            return None
        shape = Shape(num_tokens, num_tiles, tile)
        return shape if shape in self._places or len(self._places) < _MOST_RECORDINGS else None

    def place(self, shape: Shape, numbers: Numbers) -> Tensor:
        """Put a batch's numbers where the recorded forward of its shape reads them; return that place."""
        if shape not in self._places:
            size = shape.num_numbers + self._most_pages + shape.num_tokens
            self._places[shape] = torch.zeros(size, dtype=torch.int64, device=self._device)
        place = self._places[shape]
        place_into(place, numbers.values)
        return place

    def hidden(self, batch: Batch) -> Tensor:
        """Return hidden states [P, width] of a batch whose numbers have been placed."""
        shape = batch.shape
        assert shape is not None
        assert batch.output_tokens is not None
        if shape not in self._recordings:
            recorded = replace(batch, output_tokens=None, shape=None)
            try:
                self._recordings[shape] = self._record(lambda: self._forward(recorded))
            except RuntimeError as error:
                # Whatever a model does that cannot be recorded, its forward can be run.
                self.failure = f"{type(error).__name__}: {error}"
                print(
                    f"sfumato: forwards run without CUDA graphs: {self.failure}", file=sys.stderr, flush=True
                )
                return self._forward(recorded)[batch.output_tokens]
        self.num_replays += 1
        return self._recordings[shape].replay()[batch.output_tokens]

    def batch(self, shape: Shape, numbers: Numbers) -> Batch:
        """Place a batch's numbers and return it."""
        views = views_of(numbers, self.place(shape, numbers), self._page_size)
        return Batch(
            token_ids=views.token_ids,
            positions=views.positions,
            groups=(),
            store=self._store,
            output_tokens=views.output_tokens,
            paged=views.paged,
            shape=shape,
        )


def _bucket(count: int) -> int | None:
    return next((bucket for bucket in BUCKETS if bucket >= count), None)
