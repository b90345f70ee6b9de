"""Layouts of weights for a CPU: whichever is taken, products are the plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sfumato.models import packed
from sfumato.models.packed import AcrossWeight, BlockedWeight, pack_weight

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not there")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int) -> torch.Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 47, 48, 130])
@pytest.mark.parametrize("num_outputs", [96, 1280, 3000])
def test_products_are_the_plain_ones(num_outputs: int, num_rows: int, has_bias: bool) -> None:
    weight, x = draw(num_outputs, 64), draw(num_rows, 64)
    bias = draw(num_outputs) if has_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    for product in (BlockedWeight(weight), AcrossWeight(weight)):
        found = product(x, bias)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("layout", [BlockedWeight, AcrossWeight])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    layout: type[BlockedWeight] | type[AcrossWeight],
) -> None:
    product, x = layout(draw(576, 192)), draw(130, 192)
    together = product(x, None)
    for start, count in ((0, 1), (5, 1), (7, 2), (20, 3), (3, 4), (11, 9), (40, 60)):
        assert torch.equal(product(x[start : start + count], None), together[start : start + count])


@pytest.mark.usefixtures("_one_thread")
def test_the_layout_follows_from_machine_threads_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.backends.cpu
    monkeypatch.setattr(capability, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(packed, "_HEAD_OUTPUTS", 3000)
    if torch.backends.mkl.is_available():
        kinds = [type(pack_weight(draw(outputs, 64))) for outputs in (96, 2000, 3000)]
        assert kinds == [AcrossWeight, AcrossWeight, BlockedWeight]
    torch.set_num_threads(2)
    assert type(pack_weight(draw(96, 64))) is BlockedWeight
    torch.set_num_threads(1)
    monkeypatch.setattr(capability, "get_cpu_capability", lambda: "AVX512")
    assert type(pack_weight(draw(96, 64))) is BlockedWeight
