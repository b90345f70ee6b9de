"""Attention over pages against query by query in plain torch, and the write of keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.models import paged as pages
from sfumato.models.kernels.attention import attend_tiles
from sfumato.models.kernels.keeping import keep_rows
from sfumato.models.paged import Paged, PagedRow, attend_pages, keep, numbers_of, views_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_PAGES = 40


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def row(start: int, first: list[int], end: list[int], table: list[int]) -> PagedRow:
    """Return a row whose queries see [first, end) of these pages."""
    length = len(end)
    zeros = np.zeros(length, dtype=np.int64)
    return PagedRow(start, zeros, zeros, zeros - 1, np.asarray(first), np.asarray(end), np.asarray(table))


def paged_of(rows: list[PagedRow], page_size: int, num_tokens: int, num_tiles: int | None = None) -> Paged:
    """Return what kernels are given."""
    numbers = numbers_of(rows, np.zeros(1, dtype=np.int64), num_tokens=num_tokens, num_tiles=num_tiles)
    return views_of(numbers, torch.from_numpy(numbers.values).to(DEVICE), page_size).paged


ROWS = {
    "blocks": [row(0, [0] * 8, [24] * 8, [5, 2, 9]), row(8, [0] * 8, [8] * 8, [1])],
    "causal": [row(0, [0] * 5, [1, 2, 3, 4, 5], [7])],
    "windows": [row(0, [3, 9, 20], [19, 20, 21], [3, 0, 8]), row(3, [16], [24], [6, 1, 4])],
    "a long row": [row(0, [0] * 70, list(range(3, 73)), list(range(20, 30)))],
    "few queries": [row(0, [0, 2], [9, 10], [11, 12]), row(2, [1], [7], [13])],
}


SHAPES = [(4, 2, 24), (7, 1, 8)] if DEVICE == "cpu" else [(4, 4, 64), (6, 2, 128), (7, 1, 24), (4, 2, 256)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("windowed", [False, True])
def test_queries_see_their_keys(name: str, heads: int, kv_heads: int, width: int, windowed: bool) -> None:
    rows, num_tokens = ROWS[name], sum(one.length for one in ROWS[name]) + 3
    paged = paged_of(rows, 8, num_tokens, num_tiles=12)
    fused = draw(num_tokens, heads + 2, width, seed=1)
    query = fused[:, :heads]
    keys, values = (draw(NUM_PAGES * 8, kv_heads, width, seed=seed) for seed in (2, 3))
    found, expected = torch.full((2, num_tokens, heads, width), torch.nan, device=DEVICE)
    attend_tiles(query, keys, values, paged, found, windowed=windowed, scale=0.3)
    for one in rows:
        slots = [page * 8 + at for page in one.pages for at in range(8)]
        for index in range(one.length):
            first = int(one.first[index]) if windowed else 0
            seen = slots[first : int(one.end[index])]
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = keys[seen, kv_head] @ query[one.start + index, head] * 0.3
                expected[one.start + index, head] = scores.softmax(-1) @ values[seen, kv_head]
    expected[-3:] = 0.0
    # Wide heads are multiplied by three tf32 products on a GPU.
    tolerance = 1e-5 if DEVICE == "cpu" else 2e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_form_is_the_kernel(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    rows = ROWS["windows"]
    paged = paged_of(rows, 8, 4)
    query = draw(4, 4, 16, seed=1, dtype=dtype)
    keys, values = (draw(NUM_PAGES * 8, 2, 16, seed=seed, dtype=dtype) for seed in (2, 3))
    found = []
    for runs in (False, True):
        monkeypatch.setattr(pages, "run_on", lambda tensor, runs=runs: runs)
        found.append(torch.zeros_like(query))
        attend_pages(query, keys, values, paged, found[-1], windowed=True, scale=0.25)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found[0], found[1], atol=tolerance, rtol=tolerance)


def test_pages_that_nobody_sees_may_hold_anything() -> None:
    paged = paged_of([row(0, [0, 0], [5, 6], [3])], 8, 2)
    keys, values = (draw(NUM_PAGES * 8, 2, 16, seed=seed) for seed in (2, 3))
    query, found = draw(2, 2, 16, seed=1), torch.empty(2, 2, 2, 16, device=DEVICE)
    attend_tiles(query, keys, values, paged, found[0], windowed=False, scale=0.25)
    for tensor in (keys, values):
        tensor[: 3 * 8] = torch.nan
        tensor[3 * 8 + 6 :] = torch.nan
    attend_tiles(query, keys, values, paged, found[1], windowed=False, scale=0.25)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("runs", [False, True])
def test_keys_and_values_go_to_their_slots(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    monkeypatch.setattr(pages, "run_on", lambda tensor: runs)
    fused = draw(5, 9, 24)
    key, value = fused[:, 3:6], fused[:, 6:]
    keys, values = draw(2, 30, 3, 24, seed=1)
    expected = keys.clone(), values.clone()
    slots = torch.tensor([4, -1, 29, 0, -1], device=DEVICE)
    for index, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot], expected[1][slot] = key[index], value[index]
    keep(key, value, keys, values, slots)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_no_token_is_kept() -> None:
    keep_rows(*draw(2, 0, 2, 16), *draw(2, 8, 2, 16), torch.zeros(0, dtype=torch.long, device=DEVICE))
