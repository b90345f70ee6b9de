"""The kernel that reads rows of logits once against plain torch; interpreted where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.text.kernels.reading import IS_DRAWN, IS_MEASURED_APART, IS_PROCESSED, RowModes, read_rows
from sfumato.text.random_source import CounterSource

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded logits."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


def modes(mode: list[int], temperature: list[float] | None = None, key: Tensor | None = None) -> RowModes:
    """Return how rows are read, without filters."""
    rows = torch.tensor(mode, dtype=torch.int32, device=DEVICE)
    return RowModes(
        mode=rows,
        temperature=torch.tensor(temperature or [1.0] * len(mode), device=DEVICE),
        key=torch.zeros(len(mode), dtype=torch.int64, device=DEVICE) if key is None else key.to(DEVICE),
        cut=None,
        last=None,
        has_processed=any(bits & IS_PROCESSED for bits in mode),
        has_noise=any(bits & IS_DRAWN for bits in mode),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 5000), (3, 1024), (40, 2050), (2, 7)])
def test_plain_rows(dtype: torch.dtype, rows: int, size: int) -> None:
    logits = draw(rows, size).to(dtype)
    found, wide = read_rows(logits, modes([0] * rows)), logits.float()
    # Of equal logits the lowest index is the best; a bfloat16 row has many.
    best = (wide == wide.max(-1, keepdim=True).values).int().argmax(-1)
    assert torch.equal(found.token, best)
    assert torch.equal(found.best, best)
    probabilities = wide.softmax(-1)
    torch.testing.assert_close(found.confidence, probabilities.max(-1).values)
    torch.testing.assert_close(found.logprob, wide.log_softmax(-1).max(-1).values)
    pair = probabilities.topk(2).values
    torch.testing.assert_close(found.margin, pair[:, 0] - pair[:, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.entropy, -(probabilities * wide.log_softmax(-1)).sum(-1))


def test_a_row_may_be_wider_than_it_is_read() -> None:
    logits = draw(3, 2000)
    found = read_rows(logits[:, :1500], modes([0] * 3))
    assert torch.equal(found.token, logits[:, :1500].argmax(-1))


def test_the_noise_is_that_of_the_source() -> None:
    size, positions = 3000, np.asarray([4, 9, 11])
    source = CounterSource(5, choice=1)
    key = torch.from_numpy(source.token_keys(2, 3, positions))
    temperature = [0.7, 1.0, 2.5]
    drawn = IS_PROCESSED | IS_DRAWN
    logits = draw(3, size)
    found = read_rows(logits, modes([drawn, drawn, drawn | IS_MEASURED_APART], temperature, key))
    scaled = logits / torch.tensor(temperature, device=DEVICE)[:, None]
    noise = source.gumbel(2, 3, positions, size).to(DEVICE)
    assert torch.equal(found.token, (scaled + noise).argmax(-1))
    assert torch.equal(found.best, logits.argmax(-1))
    expected = logits.softmax(-1).gather(-1, found.token[:, None])[:, 0]
    expected[2] = scaled[2].softmax(-1)[found.token[2]]
    torch.testing.assert_close(found.confidence, expected)


def test_neighbours_change_nothing() -> None:
    logits = draw(4, 5000)
    key = torch.arange(4)
    mode, temperature = [0, IS_PROCESSED | IS_DRAWN, IS_PROCESSED, 0], [1.0, 0.6, 0.9, 1.0]
    together = read_rows(logits, modes(mode, temperature, key))
    for row in range(4):
        alone = read_rows(logits[row : row + 1], modes([mode[row]], [temperature[row]], key[row : row + 1]))
        assert int(alone.token) == int(together.token[row])
        torch.testing.assert_close(alone.confidence[0], together.confidence[row])
        torch.testing.assert_close(alone.entropy[0], together.entropy[row])


def test_what_is_excluded_adds_nothing_and_what_is_no_number_shows() -> None:
    logits = draw(5, 1100)
    logits[0, :1050] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    found = read_rows(logits, modes([0] * 5))
    assert found.confidence.isfinite().tolist() == [True, False, False, False, True]
    assert int(found.token[0]) == int(logits[0].argmax())
    kept = logits[0, 1050:].log_softmax(-1)
    torch.testing.assert_close(found.entropy[0], -(kept.exp() * kept).sum())
    assert bool((found.token < 1100).all())


def test_no_rows() -> None:
    assert read_rows(draw(0, 10), modes([])).token.shape == (0,)
