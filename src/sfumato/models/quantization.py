"""What a checkpoint says of its quantization, and what is written into one: the form of compressed-tensors.

Source: `quantization_config` of vLLM's and compressed-tensors' W8A8 checkpoints, with activations that each
token scales for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.errors import CheckpointError

_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
# The form of a checkpoint, ours for it, and the numbers' type in its groups.
_FORMATS = {"int-quantized": ("int8", "int"), "float-quantized": ("fp8", "float")}
# What an exporter may leave as it was: none of it is quantized here either.
_UNTOUCHED = ("lm_head", "re:.*lm_head", "re:.*gate$", "re:.*router.*", "re:.*embed.*")


def saved_quantization(config: Mapping[str, Any]) -> str | None:
    """Return "int8" or "fp8" where a config.json says so, None where it says nothing.

    Raises CheckpointError naming what is not supported.
    """
    asked = config.get("quantization_config")
    if asked is None:
        return None
    _expect("quant_method", asked.get("quant_method"), "compressed-tensors")
    if asked.get("format") not in _FORMATS:
        _expect("format", asked.get("format"), "int-quantized")
    found, numbers = _FORMATS[asked["format"]]
    groups = asked.get("config_groups") or {}
    if len(groups) != 1:
        raise CheckpointError(f"config.json: quantization_config has {len(groups)} config_groups, not one")
    (group,) = groups.values()
    _expect("targets", group.get("targets"), ["Linear"])
    for name, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        for field, value in {**wanted, "type": numbers}.items():
            _expect(f"{name}.{field}", (group.get(name) or {}).get(field), value)
    for name in asked.get("ignore") or []:
        if name not in _UNTOUCHED:
            raise CheckpointError(f"config.json: quantization_config.ignore {name!r} is not supported")
    return found


def quantization_config() -> dict[str, Any]:
    """Return what a saved folder's config.json says."""
    group = {
        "targets": ["Linear"],
        "weights": _WEIGHTS,
        "input_activations": _ACTIVATIONS,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
    }


def _expect(field: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise CheckpointError(
            f"config.json: quantization_config.{field} {found!r} is not supported; {wanted!r} is"
        )
