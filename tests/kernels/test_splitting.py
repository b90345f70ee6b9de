"""Attention whose keys are divided among programs, against the torch form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.models import paged as pages
from sfumato.models.kernels import attention
from sfumato.models.kernels.attention import attend_tiles
from sfumato.models.kernels.splitting import num_splits_of
from sfumato.models.paged import Paged, PagedRow, attend_pages
from tests.kernels.test_attention import DEVICE, NUM_PAGES, draw, paged_of, row

LONG = list(range(3, 40))
# Seen by each query: keys of all parts, of some, of one, none.
ROWS = {
    "blocks": [row(0, [0] * 8, [290] * 8, LONG), row(8, [0] * 8, [8] * 8, [1])],
    "a part ends early": [row(0, [0] * 4, [129] * 4, LONG)],
    "ends apart": [row(0, [0] * 6, [0, 1, 128, 130, 200, 296], LONG)],
    "windows": [row(0, [0, 140, 150, 290], [10, 296, 151, 295], LONG), row(4, [16], [24], [0, 1, 2])],
    "nothing": [row(0, [5], [0], [7]), row(1, [0], [150], LONG)],
    "a long row": [row(0, list(range(70)), list(range(226, 296)), LONG)],
}
SHAPES = [(4, 2, 24), (7, 1, 8)] if DEVICE == "cpu" else [(4, 4, 64), (6, 2, 128), (7, 1, 24), (4, 2, 256)]
Attend = Callable[[Tensor, Tensor, Tensor, Paged, bool], Tensor]


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Attend:
    """Return the torch form."""
    monkeypatch.setattr(pages, "run_on", lambda tensor: False)

    def attend(query: Tensor, keys: Tensor, values: Tensor, paged: Paged, windowed: bool) -> Tensor:
        output = torch.full_like(query, torch.nan)
        attend_pages(query, keys, values, paged, output, windowed=windowed, scale=0.3)
        return output

    return attend


def split(
    query: Tensor, keys: Tensor, values: Tensor, paged: Paged, windowed: bool, splits: int | None
) -> Tensor:
    """Return what the kernels compute in so many parts."""
    output = torch.full_like(query, torch.nan)
    attend_tiles(query, keys, values, paged, output, windowed=windowed, scale=0.3, splits=splits)
    return output


def drawn(
    rows: list[PagedRow], heads: int, kv_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Paged]:
    """Return queries, keys, values, and rows with three tokens and some tiles that fill up."""
    num_tokens = sum(one.length for one in rows) + 3
    keys, values = (draw(NUM_PAGES * 8, kv_heads, width, seed=seed) for seed in (2, 3))
    return draw(num_tokens, heads, width, seed=1), keys, values, paged_of(rows, 8, num_tokens, num_tiles=6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("splits", [2, 8])
def test_parts_are_the_whole(
    plainly: Attend, name: str, heads: int, kv_heads: int, width: int, windowed: bool, splits: int
) -> None:
    query, keys, values, paged = drawn(ROWS[name], heads, kv_heads, width)
    found = split(query, keys, values, paged, windowed, splits)
    tolerance = 1e-5 if DEVICE == "cpu" else 2e-4
    torch.testing.assert_close(
        found, plainly(query, keys, values, paged, windowed), atol=tolerance, rtol=tolerance
    )


def test_keys_of_one_part_are_summed_as_without_parts() -> None:
    query, keys, values, paged = drawn([row(0, [0] * 4, [120, 3, 0, 128], LONG)], 4, 2, 16)
    one, parts = (split(query, keys, values, paged, False, splits) for splits in (1, 4))
    assert torch.equal(one, parts)


def test_neighbours_of_one_shape_change_nothing() -> None:
    own, found = row(0, [0] * 4, [280] * 4, LONG), []
    for other in (row(4, [0] * 4, [290] * 4, LONG), row(4, [0] * 4, [2] * 4, [0])):
        query, keys, values, paged = drawn([own, other], 4, 2, 16)
        found.append(split(query, keys, values, paged, False, 4)[:4])
    assert torch.equal(*found)


def test_pages_that_nobody_sees_may_hold_anything() -> None:
    query, keys, values, paged = drawn([row(0, [0, 0], [200, 290], LONG)], 4, 2, 16)
    found = split(query, keys, values, paged, False, 4)
    for tensor in (keys, values):
        tensor[: 3 * 8] = torch.nan
        tensor[3 * 8 + 290 :] = torch.nan
    assert torch.equal(split(query, keys, values, paged, False, 4), found)


def test_what_is_no_number_shows() -> None:
    query, keys, values, paged = drawn([row(0, [0] * 2, [290] * 2, LONG)], 4, 2, 16)
    keys[3 * 8 + 200] = torch.nan
    assert bool(split(query, keys, values, paged, False, 4)[:2].isnan().all())


def test_half_precision_is_rounded_once(plainly: Attend) -> None:
    query, keys, values, paged = drawn(ROWS["blocks"], 4, 2, 16)
    query, keys, values = query.bfloat16(), keys.bfloat16(), values.bfloat16()
    found = split(query, keys, values, paged, False, 4)
    torch.testing.assert_close(found, plainly(query, keys, values, paged, False), atol=2e-2, rtol=2e-2)


def test_few_programs_divide_their_keys() -> None:
    # Of an H200's 132 cores: a block of a model with 32 key heads, one of a model with 8, and many of them.
    assert [num_splits_of(programs, 132) for programs in (1, 8, 32, 66, 128)] == [32, 32, 8, 4, 2]
    assert {num_splits_of(programs, 132) for programs in (133, 200, 10_000)} == {1}
    assert num_splits_of(1, 0) == 1


def test_the_shape_alone_decides(monkeypatch: pytest.MonkeyPatch, plainly: Attend) -> None:
    asked = []
    monkeypatch.setattr(attention, "num_cores_of", lambda keys: 132)
    monkeypatch.setattr(
        attention, "num_splits_of", lambda programs, cores: asked.append((programs, cores)) or 2
    )
    for name in ("blocks", "windows"):
        query, keys, values, paged = drawn(ROWS[name], 6, 2, 16)
        found = split(query, keys, values, paged, False, None)
        torch.testing.assert_close(found, plainly(query, keys, values, paged, False), atol=1e-3, rtol=1e-3)
    # Tiles of 8 and 4 queries: 2 and 4 of a key head's 3 heads are one program.
    assert asked == [(6 * 2 * 2, 132), (6 * 2 * 1, 132)]
