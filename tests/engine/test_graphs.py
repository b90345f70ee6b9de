"""Recorded forwards on fixed places, filled up: they give what the forward of the rows alone gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.core.plan import Row, RowKind
from sfumato.engine import recorded
from sfumato.engine.build import Loaded, load
from sfumato.engine.recorded import graphs_for, how_forwards_run
from sfumato.errors import ConfigError
from sfumato.models.batch import KVStore
from sfumato.models.graphs import BUCKETS, Graphs, RunAgain
from sfumato.models.paged import numbers_of, tiles_of
from sfumato.text.batching import FedRow
from sfumato.text.paged_batching import batch_of

GOLDENS = Path(__file__).resolve().parent.parent / "data" / "goldens"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKPOINTS = {
    "llada": "llada/checkpoints/llada-tiny-mha",
    "dream": "dream/checkpoints/dream-tiny-a",
    "llada2": "llada2/checkpoints/llada2-tiny",
    "sdar_moe": "sdar/checkpoints/sdar-moe-tiny",
    "diffusion_gemma": "diffusion_gemma/checkpoints/dgemma-tiny",
}


def load_tiny(name: str, **options: Any) -> Loaded:
    """Load a golden checkpoint in float32."""
    return load(
        EngineConfig(
            model=str(GOLDENS / CHECKPOINTS[name]),
            dtype="float32",
            device=DEVICE,
            kv_memory=4 << 20,
            **options,
        )
    )


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """Return a tiny model of each family that has pages."""
    return load_tiny(request.param)


class World:
    """A store with seeded keys, its recorded forwards, and rows on it."""

    def __init__(self, loaded: Loaded, page_size: int = 8, most_pages: int = 64) -> None:
        self.loaded, self.page_size = loaded, page_size
        self.store = KVStore.allocate(
            shapes=loaded.model.kv_shapes, num_slots=64 * page_size, dtype=loaded.dtype, device=DEVICE
        )
        generator = torch.Generator().manual_seed(0)
        for layer in (*self.store.keys, *self.store.values):
            layer.copy_(torch.randn(layer.shape, generator=generator))
        self.graphs = Graphs(
            loaded.model.hidden,
            self.store,
            RunAgain,
            page_size=page_size,
            unit=8,
            most_pages=most_pages,
            device=loaded.model.device,
        )

    def row(self, start: int, length: int, visible: int | None, pages: list[int]) -> FedRow:
        """Return a row of random tokens."""
        tokens = np.random.default_rng(start + length).integers(0, 60, length)
        row = Row(
            request_id="r",
            kind=RowKind.DENOISE,
            start=start,
            end=start + length,
            slot=start,
            visible=visible,
        )
        return FedRow(row, tokens, pages, block_length=length)

    @torch.inference_mode()
    def hidden(self, fed: list[FedRow], wanted: list[int], *, by_graph: bool) -> torch.Tensor:
        """Return hidden states of packed tokens; the store is as before afterwards."""
        kept = [layer.clone() for layer in (*self.store.keys, *self.store.values)]
        batch = batch_of(
            fed,
            traits=self.loaded.traits,
            output_tokens=np.asarray(wanted),
            store=self.store,
            page_size=self.page_size,
            device=self.loaded.model.device,
            graphs=self.graphs if by_graph else None,
        )
        assert (batch.shape is not None) == by_graph
        found = self.graphs.hidden(batch) if by_graph else self.loaded.model.hidden(batch)
        self.written = [layer.clone() for layer in (*self.store.keys, *self.store.values)]
        for layer, before in zip((*self.store.keys, *self.store.values), kept, strict=True):
            layer.copy_(before)
        return found.clone()


BATCHES: dict[str, list[tuple[int, int, int | None, list[int]]]] = {
    "one block": [(16, 8, None, [3, 1, 7])],
    "three blocks": [(16, 8, None, [3, 1, 7]), (8, 8, None, [2, 9]), (32, 8, None, [20, 21, 22, 23, 30])],
    "unlike rows": [(8, 5, None, [4, 6]), (0, 17, None, [11, 12, 13]), (24, 1, 32, [40, 41, 42, 43])],
    "old keys behind the row": [(8, 8, 40, [5, 6, 7, 8, 9])],
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_filled_up_forward_is_the_forward(loaded: Loaded, name: str) -> None:
    world = World(loaded)
    fed = [world.row(*each) for each in BATCHES[name]]
    wanted = [0, sum(item.length for item in fed) - 1, fed[0].length - 1]
    expected = world.hidden(fed, wanted, by_graph=False)
    written = world.written
    for _ in range(2):
        found = world.hidden(fed, wanted, by_graph=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        for one, other in zip(world.written, written, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_a_shape_serves_whatever_fits_and_forgets_what_was_there(loaded: Loaded) -> None:
    world = World(loaded)
    crowded = [world.row(*each) for each in BATCHES["three blocks"]]
    world.hidden(crowded, [0, 23], by_graph=True)
    fewer = [world.row(8, 8, None, [33, 2]), world.row(0, 8, None, [35]), world.row(16, 6, None, [5, 8, 9])]
    found = world.hidden(fewer, [3, 21], by_graph=True)
    torch.testing.assert_close(found, world.hidden(fewer, [3, 21], by_graph=False), atol=2e-5, rtol=2e-5)
    assert world.graphs.num_replays == 2


def test_what_fits_no_shape_runs_alone() -> None:
    world = World(load_tiny("llada"), most_pages=4)
    small, large = world.row(8, 8, None, [1, 2]), world.row(32, 8, None, [1, 2, 3, 4, 5])
    world.hidden([small], [0], by_graph=True)
    world.hidden([large], [0], by_graph=False)
    batch = batch_of(
        [large],
        traits=world.loaded.traits,
        output_tokens=np.asarray([0]),
        store=world.store,
        page_size=8,
        device=world.loaded.model.device,
        graphs=world.graphs,
    )
    assert batch.shape is None
    assert batch.paged is not None


def test_tiles_cover_every_token_once() -> None:
    world = World(load_tiny("llada"))
    rng = np.random.default_rng(5)
    for _ in range(30):
        lengths = rng.integers(1, 70, rng.integers(1, 6))
        fed = [world.row(0, int(length), None, list(range(9))) for length in lengths]
        batch = batch_of(
            fed,
            traits=world.loaded.traits,
            output_tokens=np.asarray([0]),
            store=world.store,
            page_size=8,
            device=world.loaded.model.device,
            graphs=world.graphs,
        )
        assert batch.paged is not None
        assert batch.shape is not None
        assert batch.shape.num_tokens // 8 in BUCKETS
        covered = np.zeros(batch.shape.num_tokens, dtype=int)
        for start, count, _ in batch.paged.tiles.tolist():
            assert count <= batch.paged.tile
            covered[start : start + count] += 1
        assert (covered == 1).all()


def test_nothing_is_filled_up_where_nothing_is_recorded() -> None:
    numbers = numbers_of([], np.asarray([], dtype=np.int64))
    assert numbers.size == 0
    assert tiles_of([], 8).shape == (0, 3)


@pytest.mark.parametrize("overlap", ["off", "device"])
def test_an_engine_replays_its_steps(overlap: str) -> None:
    loaded = load_tiny("llada2", graphs="off")
    params = SamplingParams(max_tokens=24, temperature=0.7, seed=4, ignore_eos=True)
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7], list(range(1, 30))]
    engine = Engine.from_loaded(loaded)
    expected = [choice.token_ids for choice in engine.generate(prompts, params)]
    config = msgspec.structs.replace(loaded.config, graphs="on", overlap=overlap)
    replaying = Engine.from_loaded(replace(loaded, config=config))
    assert [choice.token_ids for choice in replaying.generate(prompts, params)] == expected
    graphs = replaying.loop.lanes[0].runner._graphs  # type: ignore[attr-defined]
    assert graphs.num_replays > len(replaying.steps) // 2


def test_what_cannot_be_recorded_runs_and_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(load_tiny("llada"))

    def refuse(forward: object) -> RunAgain:
        raise RuntimeError("operation not permitted when stream is capturing")

    world.graphs._record = refuse
    fed = [world.row(16, 8, None, [3, 1, 7])]
    expected = world.hidden(fed, [0, 7], by_graph=False)
    torch.testing.assert_close(world.hidden(fed, [0, 7], by_graph=True), expected, atol=2e-5, rtol=2e-5)
    assert "without CUDA graphs: RuntimeError: operation not permitted" in capsys.readouterr().err
    assert world.graphs.num_replays == 0
    # From now on nothing is filled up.
    torch.testing.assert_close(world.hidden(fed, [0, 7], by_graph=False), expected)
    with pytest.raises(AssertionError):
        world.hidden(fed, [0, 7], by_graph=True)


def test_how_forwards_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = EngineConfig(model="m"), torch.device("cuda", 0)
    said = how_forwards_run(config, torch.device("cpu"))
    assert said == "attention by grouped SDPA, statistics by torch"
    monkeypatch.setattr(recorded, "why_not", lambda device: "triton is not installed")
    assert how_forwards_run(config, gpu).endswith("triton is not installed")
    monkeypatch.setattr(recorded, "why_not", lambda device: None)
    assert how_forwards_run(config, gpu).endswith("steps as CUDA graphs")
    assert how_forwards_run(EngineConfig(model="m", graphs="off"), gpu).endswith("no CUDA graphs")


def test_who_records() -> None:
    loaded = load_tiny("llada")
    make = lambda **changes: graphs_for(
        msgspec.structs.replace(loaded.config, **changes),
        loaded.model,
        loaded.traits,
        KVStore((), ()),
        8,
    )
    assert make(graphs="on") is not None
    assert (make() is not None) == (DEVICE == "cuda")
    assert make(graphs="off") is None
    assert make(graphs="on", tensor_parallel=2) is None
    assert make(graphs="on", data_parallel_attention=2) is not None
    with pytest.raises(ConfigError, match="--graphs"):
        EngineConfig(model="m", graphs="perhaps").check()
