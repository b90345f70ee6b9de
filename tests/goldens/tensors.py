"""Comparing the tensors of a replay with recorded ones."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from sfumato.models.batch import KVStore
from tests.goldens.cases import Case
from tests.goldens.replay import Mismatch


def expect_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise Mismatch naming the shapes or the largest difference."""
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}")
    worst = float((found.float() - expected.float()).abs().max())
    if not worst <= tolerance:
        raise Mismatch(f"{what}: off by {worst:.2e}, allowed {tolerance:.0e}")


def expect_recorded(
    case: Case, found: dict[str, Tensor], tolerance: float, *, given: Collection[str]
) -> None:
    """Compare every tensor of a case, except the `given` ones, which are the replay's input."""
    for name, expected in case.tensors.items():
        if name in given:
            continue
        if name not in found:
            raise Mismatch(f"{name}: recorded, but nothing is compared with it")
        expect_close(name, found[name], expected, tolerance)


def named_layers(store: KVStore, length: int) -> dict[str, Tensor]:
    """Return copies of each layer's keys and values [K, length, D] under their names in a case."""
    kinds = {"k": store.keys, "v": store.values}
    return {
        f"kv_layer{layer}_{kind}": tensor[:length].transpose(0, 1).clone()
        for kind, layers in kinds.items()
        for layer, tensor in enumerate(layers)
    }
