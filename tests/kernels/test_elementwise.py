"""Norms, rotary positions and gated activations against their torch forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from sfumato.models import layers
from sfumato.models.layers import RMSNorm, Rotary, add_norm, gated, gelu_tanh, turned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def make_norm(width: int, dtype: torch.dtype, *, wide: bool) -> RMSNorm:
    """Return a norm with random weights."""
    norm = RMSNorm(width, 1e-6, wide=wide).to(dtype).to(DEVICE)
    norm.weight.copy_(draw(width, dtype=dtype, seed=9))
    return norm


def expect_close(found: Tensor, expected: Tensor) -> None:
    """Compare; the interpreter cuts bfloat16 off where torch rounds, up to three times in a row."""
    assert found.dtype is expected.dtype
    tolerance = 1e-5 if found.dtype is torch.float32 else 2.5e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_norms(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wide: bool) -> None:
    norm, x = make_norm(48, dtype, wide=wide), draw(5, 60, dtype=dtype)[:, :48]
    monkeypatch.setattr(layers, "run_on", lambda tensor: False)
    expected = norm(x)
    monkeypatch.setattr(layers, "run_on", lambda tensor: True)
    expect_close(norm(x), expected)
    assert norm(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_their_norms(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    norm, x, more = make_norm(48, dtype, wide=True), *(draw(5, 48, dtype=dtype, seed=seed) for seed in (1, 2))
    monkeypatch.setattr(layers, "run_on", lambda tensor: False)
    expected = add_norm(x, more, norm)
    monkeypatch.setattr(layers, "run_on", lambda tensor: True)
    for found, wanted in zip(add_norm(x, more, norm), expected, strict=True):
        expect_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turning", [24, 12])
@pytest.mark.parametrize("wide", [None, False, True])
def test_rotary_heads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, turning: int, wide: bool | None
) -> None:
    heads = draw(4, 7, 24, dtype=dtype)[:, 2:5]
    norm = None if wide is None else make_norm(24, dtype, wide=wide)
    cos, sin = Rotary(turning, 10000.0).angles(torch.tensor([0, 5, 9, 700], device=DEVICE))
    monkeypatch.setattr(layers, "run_on", lambda tensor: False)
    expected = turned(heads, norm, cos, sin)
    monkeypatch.setattr(layers, "run_on", lambda tensor: True)
    expect_close(turned(heads, norm, cos, sin), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [F.silu, gelu_tanh, torch.relu])
def test_gates(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, activation: object) -> None:
    x = draw(3, 2 * 50, dtype=dtype) * 9
    monkeypatch.setattr(layers, "run_on", lambda tensor: False)
    expected = gated(x, activation)  # type: ignore[arg-type]
    monkeypatch.setattr(layers, "run_on", lambda tensor: True)
    expect_close(gated(x, activation), expected)  # type: ignore[arg-type]
