"""Forwards that are recorded once for each shape and replayed: no launch costs the host anything then.

A recorded forward reads its numbers from a fixed place, and every batch is filled up to one of a few shapes.
What fills up sees nothing, is kept nowhere, and is not read. What a recording is, others decide: on a GPU a
CUDA graph; elsewhere the forward runs again on the fixed place, which proves all but the graph itself.
Letters: N packed tokens, T tiles, P output tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
# Forwards that are run before one is recorded, so that its kernels are there.
NUM_WARM_UPS = 2


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
    """A recording that records nothing: the forward is run again, after as many runs as a graph needs."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._forward = forward
        for _ in range(NUM_WARM_UPS):
            forward()

    def replay(self) -> Tensor:
        """Run the forward."""
        return self._forward()


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they never run beside each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor]) -> Recording:
        """Run a forward, so that its kernels are there, and capture it.

        It may be run as often as one likes: it writes the same keys and values each time.
        """
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(NUM_WARM_UPS):
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


@dataclass(frozen=True, slots=True)
class Need:
    """What rows need of a shape: tokens, tiles, and the queries of a tile."""

    num_tokens: int
    num_tiles: int
    tile: int


def common_shape(needs: Sequence[Need], unit: int) -> Shape | None:
    """Return the shape that all are filled up to; None where one needs too much for any."""
    units = _bucket(max(-(-need.num_tokens // unit) for need in needs))
    if units is None:
        return None
    num_tokens, tile = units * unit, max(need.tile for need in needs)
    # Of longer tiles a row has no more; those that fill up lie behind.
    most = max(need.num_tiles - (need.num_tokens - num_tokens) // tile for need in needs)
    num_tiles = _bucket(most)
    return None if num_tiles is None else Shape(num_tokens, num_tiles, tile)


class Replays(Protocol):
    """Recorded forwards as a runner uses them: `Graphs`, or those of several ranks."""

    def shape_of(self, rows: Sequence[PagedRow]) -> Shape | None:
        """Return the shape that rows are filled up to; None where none is replayed."""
        ...

    def batch(self, shape: Shape, numbers: Numbers) -> Batch:
        """Place a batch's numbers and return it."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """Return hidden states [P, width]: by replay where a batch has a shape."""
        ...


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
        need = self.need_of(rows)
        return None if need is None else self.shape_for([need])

    def need_of(self, rows: Sequence[PagedRow]) -> Need | None:
        """Return what rows need of a shape; None where they see too many pages, or nothing is recorded."""
        if self.failure is not None or sum(len(row.pages) for row in rows) > self._most_pages:
            return None
        tile = tile_of(rows)
        return Need(sum(row.length for row in rows), len(tiles_of(rows, tile)), tile)

    def shape_for(self, needs: Sequence[Need]) -> Shape | None:
        """Return one shape for all; None where there is none, or as many are recorded as may be."""
        shape = common_shape(needs, self._unit)
        has_room = shape in self._recordings or len(self._recordings) < _MOST_RECORDINGS
        return shape if has_room else None

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the largest shape."""
        return BUCKETS[-1] * self._unit

    @property
    def num_recordings(self) -> int:
        """Return how many forwards are recorded."""
        return len(self._recordings)

    def runs_for(self, shape: Shape) -> int:
        """Return how many forwards `hidden` makes: with a shape that is not recorded yet, several."""
        return 1 if shape in self._recordings else NUM_WARM_UPS + 1

    def place(self, shape: Shape, numbers: Numbers) -> Tensor:
        """Put a batch's numbers where the recorded forward of its shape reads them; return that place."""
        if shape not in self._places:
            size = shape.num_numbers + self._most_pages + shape.num_tokens
            self._places[shape] = torch.zeros(size, dtype=torch.int64, device=self._device)
        place = self._places[shape]
        place_into(place, numbers.values)
        return place

    def hidden(self, batch: Batch) -> Tensor:
        """Return hidden states [P, width]: by replay where a batch has a shape and its numbers are placed."""
        shape = batch.shape
        if shape is None:
            return self._forward(batch)
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
