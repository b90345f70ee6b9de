"""Attention by installed libraries, with stand-ins of their published functions, against the torch form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.models import paged as pages
from sfumato.models.attending import Adapter, Pool, adapter_of, is_installed
from sfumato.models.attending.flash_attention import FlashAttention2, FlashAttention3
from sfumato.models.attending.flash_infer import FlashInfer
from sfumato.models.attending.sequences import give_away
from sfumato.models.paged import Paged, PagedRow, attend_pages, numbers_of, views_of
from tests.models import foreign_attention
from tests.models.foreign_attention import CALLS, BatchPrefillWithPagedKVCacheWrapper

CPU = torch.device("cpu")
KINDS: dict[str, tuple[type[Any], int]] = {
    "flash_attn_interface": (FlashAttention3, 8),
    "flash_attn": (FlashAttention2, 256),
    "flashinfer": (FlashInfer, 8),
}


def pool_of(**changes: Any) -> Pool:
    """Return pages that every library takes."""
    kept = {
        "device": CPU,
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "shapes": ((2, 64),) * 3,
        "page_size": 256,
    }
    return Pool(**(kept | changes))


@pytest.fixture(params=KINDS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Adapter, int]:
    """Return each library's name, adapter and page size."""
    name = request.param
    foreign_attention.install(monkeypatch, name)
    monkeypatch.setattr(pages, "run_on", lambda tensor: False)
    make, page_size = KINDS[name]
    return name, make(pool_of(page_size=page_size)), page_size


def row(start: int, first: list[int], end: list[int], table: list[int]) -> PagedRow:
    """Return a row whose queries see [first, end) of these pages."""
    zeros = np.zeros(len(end), dtype=np.int64)
    return PagedRow(start, zeros, zeros, zeros - 1, np.asarray(first), np.asarray(end), np.asarray(table))


def paged_of(rows: list[PagedRow], page_size: int) -> Paged:
    """Return what tokens see, computed by nobody else."""
    numbers = numbers_of(rows, np.zeros(1, dtype=np.int64))
    return views_of(numbers, torch.from_numpy(numbers.values), page_size).paged


def drawn_rows(rng: np.random.Generator, page_size: int, num_pages: int) -> list[PagedRow]:
    """Return blocks, several blocks, causal contexts, windows and rows without pages, in any order."""
    rows, total = [], 0
    for kind in rng.permutation(["block", "blocks", "causal", "aligned", "window", "alone", "few"]):
        length = int(rng.integers(33, 90)) if kind in ("blocks", "causal") else int(rng.integers(1, 20))
        last = int(rng.integers(length, num_pages * page_size - 1))
        first, end = np.zeros(length, dtype=np.int64), np.full(length, last)
        if kind in ("blocks", "few"):
            block = 32 if kind == "blocks" else 4
            end = np.minimum((np.arange(last - length, last) // block + 1) * block, last)
        elif kind == "causal":
            end = np.arange(last - length, last) + 1
            first = np.maximum(end - 40, 0)
        elif kind == "aligned":
            first[:] = rng.integers(0, last // page_size + 1) * page_size
            end = np.maximum(end, first + 1)
        elif kind == "window":
            first[:] = rng.integers(0, last)
        table = rng.permutation(num_pages)[: -(-int(end.max()) // page_size)]
        if kind == "alone":
            end, table = np.zeros(length, dtype=np.int64), table[:0]
        rows.append(row(total, first.tolist(), end.tolist(), table.tolist()))
        total += length
    return rows


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_what_it_is_in_torch(library: tuple[str, Adapter, int], seed: int, windowed: bool) -> None:
    name, adapter, page_size = library
    rng = np.random.default_rng(seed)
    num_pages = 12 if page_size == 8 else 3
    rows = drawn_rows(rng, page_size, num_pages)
    paged = paged_of(rows, page_size)
    given = give_away(rows, paged, adapter, has_window=True, device=CPU)
    num_tokens = sum(one.length for one in rows)
    # Queries that lie beside keys and values, as one product makes them.
    query = draw(num_tokens, 8, 16, seed=seed)[:, :4]
    keys, values = (draw(num_pages * page_size, 2, 16, seed=seed + at) for at in (10, 20))
    found, expected = torch.full((2, num_tokens, 4, 16), torch.nan)
    attend_pages(query, keys, values, given, found, windowed=windowed, scale=0.3)
    attend_pages(query, keys, values, paged, expected, windowed=windowed, scale=0.3)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert CALLS[name] == 1


def test_who_goes_and_who_stays(library: tuple[str, Adapter, int]) -> None:
    _, adapter, size = library
    rows = [
        row(0, [0] * 4, [20] * 4, [2, 1, 0]),
        row(4, list(range(32)), list(range(1, 33)), [0, 1, 2, 3]),
        row(36, [0] * 64, [32] * 32 + [64] * 32, list(range(8))),
        row(100, [0] * 3, [0] * 3, []),
        row(103, [5] * 2, [9] * 2, [0, 1]),
        row(105, [size] * 2, [size + 1] * 2, [0, 1]),
        row(107, [0] * 40, [4 * (at // 4 + 1) for at in range(40)], list(range(5))),
    ]
    given = give_away(rows, paged_of(rows, size), adapter, has_window=True, device=CPU)
    assert given.full is not None
    assert given.sliding is not None
    assert given.full.tokens is not None
    assert given.sliding.tokens is not None
    blocks = [*range(4), *range(36, 100)]
    # Causal contexts and short blocks keep their tiles, whose pages lie behind those of the rows before.
    assert given.full.tokens.tolist() == [*blocks, *range(103, 107)]
    assert given.full.tiles.tolist() == [[4, 32, 3], [107, 40, 19]]
    assert given.sliding.tokens.tolist() == [*blocks, *range(105, 107)]
    assert given.sliding.tiles.tolist() == [[4, 32, 3], [103, 2, 15], [107, 40, 19]]


def test_nothing_is_copied_where_everything_goes(library: tuple[str, Adapter, int]) -> None:
    name, adapter, size = library
    rows = [row(0, [0] * 4, [20] * 4, [2, 1, 0]), row(4, [0] * 2, [3] * 2, [1])]
    given = give_away(rows, paged_of(rows, size), adapter, has_window=False, device=CPU)
    assert given.full is not None
    assert given.full.tokens is None
    assert not len(given.full.tiles)
    assert given.sliding is None
    assert name not in CALLS


def test_a_batch_without_sequences_stays_whole(library: tuple[str, Adapter, int]) -> None:
    _, adapter, size = library
    rows = [row(0, [0] * 9, list(range(1, 10)), [0, 1]), row(9, [0], [0], [])]
    paged = paged_of(rows, size)
    assert give_away(rows, paged, adapter, has_window=True, device=CPU) == paged


def test_flashinfer_plans_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.install(monkeypatch, "flashinfer")
    monkeypatch.setattr(pages, "run_on", lambda tensor: False)
    made: list[BatchPrefillWithPagedKVCacheWrapper] = []
    make = BatchPrefillWithPagedKVCacheWrapper.__init__

    def keep(self: BatchPrefillWithPagedKVCacheWrapper, *arguments: Any) -> None:
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "__init__", keep)
    adapter = FlashInfer(pool_of(page_size=8))
    rows = [row(0, [0] * 4, [20] * 4, [2, 1, 0])]
    query, keys = draw(4, 4, 16), draw(24, 2, 16)
    # Launches that begin before the one in front has run take another wrapper's memory.
    for _ in range(3):
        given = give_away(rows, paged_of(rows, 8), adapter, has_window=True, device=CPU)
        for layer in range(4):
            attend_pages(query, keys, keys, given, query.clone(), windowed=bool(layer % 2), scale=0.3)
    assert CALLS == {"flashinfer plan": 6, "flashinfer": 12}
    assert [wrapper.num_plans for wrapper in made] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "installed", "changes", "said"),
    [
        ("flash-attn", [], {}, "flash_attn_interface is not installed; flash_attn is not installed"),
        (
            "flash-attn",
            ["flash_attn"],
            {"page_size": 32},
            "pages of multiples of 256 tokens, and --page-size is 32",
        ),
        ("flash-attn", ["flash_attn_interface"], {"capability": (8, 9)}, "capability 9, and the GPU has 8.9"),
        (
            "flash-attn",
            ["flash_attn"],
            {"shapes": ((2, 256), (2, 512))},
            "heads of 512 are not a multiple of 8",
        ),
        ("flash-attn", ["flash_attn"], {"dtype": torch.float32}, "the model's numbers are float32"),
        (
            "flashinfer",
            ["flashinfer"],
            {"capability": (7, 5)},
            "needs compute capability 8.0, and the GPU has 7.5",
        ),
        ("flashinfer", ["flashinfer"], {"shapes": ((2, 96),)}, "heads of 96 are none of 64, 128, 256"),
        ("flashinfer", ["flashinfer"], {"shapes": ((2, 64), (4, 64))}, "have different heads"),
        ("flashinfer", [], {}, "flashinfer is not installed"),
    ],
)
def test_what_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, installed: list[str], changes: dict[str, Any], said: str
) -> None:
    foreign_attention.install(monkeypatch, *installed)
    with pytest.raises(ConfigError) as refused:
        adapter_of(name, pool_of(**changes))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "installed", "expected"),
    [
        ("flash-attn", ["flash_attn_interface", "flash_attn"], FlashAttention3),
        ("flash-attn", ["flash_attn"], FlashAttention2),
        ("flashinfer", ["flashinfer"], FlashInfer),
    ],
)
def test_what_is_installed_is_tried(
    monkeypatch: pytest.MonkeyPatch, name: str, installed: list[str], expected: type[Any]
) -> None:
    foreign_attention.install(monkeypatch, *installed)
    assert isinstance(adapter_of(name, pool_of()), expected)
    assert CALLS[installed[0]] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="libraries compute on a GPU")
@pytest.mark.parametrize(("name", "page_size"), [("flash-attn", 32), ("flash-attn", 256), ("flashinfer", 32)])
def test_the_real_ones_are_tried_where_they_are(name: str, page_size: int) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    adapter_of(name, pool_of(device=device, capability=capability, page_size=page_size))


def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.install(monkeypatch, "flash_attn_interface")
    seen = foreign_attention._see
    monkeypatch.setattr(foreign_attention, "_see", lambda *arguments: seen(*arguments) * torch.nan)
    with pytest.raises(ConfigError, match="results are nan away"):
        adapter_of("flash-attn", pool_of())

    def fail(*arguments: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(foreign_attention, "_see", fail)
    with pytest.raises(ConfigError, match=r"RuntimeError: no kernel image is available$"):
        adapter_of("flash-attn", pool_of())


def test_what_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol\nmore")

    monkeypatch.setattr("sfumato.models.attending.pool.import_module", fail)
    with pytest.raises(ConfigError, match=r"flashinfer does not load: flashinfer: undefined symbol$"):
        adapter_of("flashinfer", pool_of())


def test_who_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.install(monkeypatch, "flash_attn")
    assert is_installed("flash-attn")
    monkeypatch.undo()
    assert not is_installed("flashinfer")
