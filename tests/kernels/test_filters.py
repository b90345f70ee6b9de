"""What the filter kernel keeps against the sorting torch form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.text.kernels.filters import cut_rows
from sfumato.text.sampling import scale_and_filter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 1500
FILTERS = [
    (0, 1.0, False),
    (1, 1.0, False),
    (50, 1.0, False),
    (0, 0.9, False),
    (0, 0.3, True),
    (0, 0.0, False),
    (20, 0.7, False),
    (20, 0.7, True),
    (3, 0.99, True),
    (SIZE, 0.5, False),
    (SIZE + 9, 1.0, True),
]


def kept(logits: Tensor, temperature: float, asked: list[tuple[int, float, bool]]) -> Tensor:
    """Return bool[M, V], True for what the kernel keeps; `asked`: one per row."""
    count = len(asked)
    scale = torch.full((count,), temperature, device=DEVICE)
    cut, last = cut_rows(
        logits,
        scale,
        torch.tensor([top_k for top_k, _, _ in asked], dtype=torch.int32, device=DEVICE),
        torch.tensor([top_p for _, top_p, _ in asked], device=DEVICE),
        torch.tensor([first for _, _, first in asked], dtype=torch.int32, device=DEVICE),
    )
    scaled = logits.float() / scale[:, None]
    at = torch.arange(logits.shape[1], device=DEVICE)
    return (scaled > cut[:, None]) | ((scaled == cut[:, None]) & (at <= last[:, None]))


def expected(logits: Tensor, temperature: float, asked: list[tuple[int, float, bool]]) -> Tensor:
    """Return what the torch form keeps."""
    rows = [
        scale_and_filter(
            row[None].float(), temperature=temperature, top_k=top_k, top_p=top_p, top_p_first=first
        )
        for row, (top_k, top_p, first) in zip(logits, asked, strict=True)
    ]
    return torch.cat(rows) > -torch.inf


def draw(seed: int) -> Tensor:
    """Return logits for each of the filters."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(FILTERS), SIZE, generator=generator) * 3).to(DEVICE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kept_set_is_that_of_sorting(temperature: float) -> None:
    logits = draw(0)
    assert torch.equal(kept(logits, temperature, FILTERS), expected(logits, temperature, FILTERS))


def test_of_equal_logits_the_first_stay() -> None:
    # Few different values: every limit lies among equals. Powers of two have exact sums.
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 4, (len(FILTERS), SIZE), generator=generator).float()
    logits = (levels * torch.log(torch.tensor(2.0))).to(DEVICE)
    found = kept(logits, 1.0, FILTERS)
    for row, (top_k, top_p, first) in enumerate(FILTERS):
        order = sorted(range(SIZE), key=lambda token, row=row: (-float(levels[row, token]), token))
        if not first:
            order = best(order, levels[row], top_k)
        order = heaviest(order, levels[row], top_p)
        if first:
            order = best(order, levels[row], top_k)
        # Sums of a thousand rounded exponentials may pass the limit a token early or late.
        differing = set(order) ^ set(torch.nonzero(found[row]).flatten().tolist())
        assert len(differing) <= (1 if top_p < 1 else 0), (top_k, top_p, first)


def best(order: list[int], levels: Tensor, top_k: int) -> list[int]:
    """Return what top-k keeps of tokens in their order."""
    if not 0 < top_k < len(order):
        return order
    return [token for token in order if levels[token] >= levels[order[top_k - 1]]]


def heaviest(order: list[int], levels: Tensor, top_p: float) -> list[int]:
    """Return what top-p keeps of tokens in their order."""
    if top_p >= 1.0:
        return order
    total, before, result = float(sum(2 ** levels[token] for token in order)), 0.0, []
    for token in order:
        if before / total > top_p:
            break
        result.append(token)
        before += float(2 ** levels[token])
    return result


def test_what_is_excluded_never_comes_back() -> None:
    logits = draw(1).bfloat16()
    logits[:, ::3] = -torch.inf
    found = kept(logits, 0.9, FILTERS) & (logits > -torch.inf)
    assert torch.equal(found, expected(logits, 0.9, FILTERS))
