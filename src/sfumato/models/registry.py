"""Architecture names and the modules that implement them; adding a model is one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.core.traits import ModelTraits
from sfumato.errors import CheckpointError
from sfumato.models.checkpoint_names import Target

if TYPE_CHECKING:
    # Only a family's module needs torch: whoever looks at a folder's name does not load it.
    from sfumato.models.language_model import LanguageModel

ARCHITECTURES: dict[str, str] = {
    "DiffusionGemmaForBlockDiffusion": "sfumato.models.diffusion_gemma",
    "DreamModel": "sfumato.models.dream",
    "Fast_dLLM_QwenForCausalLM": "sfumato.models.fast_dllm_v2",
    "LLaDA2MoeModelLM": "sfumato.models.llada2",
    "LLaDAMoEModelLM": "sfumato.models.llada_moe",
    "LLaDAModelLM": "sfumato.models.llada",
    "SDARForCausalLM": "sfumato.models.sdar",
    "SDARMoeForCausalLM": "sfumato.models.sdar_moe",
}


class Family(Protocol):
    """What a family's module provides; a shape is the family's own type, made and read by it alone."""

    def shape_from_hf(self, config: Mapping[str, Any]) -> Any: ...

    def traits_from_hf(self, config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits: ...

    def targets(self, shape: Any) -> dict[str, Target]: ...

    def build(self, shape: Any) -> LanguageModel: ...


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family module of a config.json; raises CheckpointError for an unknown architecture."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError("config.json: field 'architectures' is missing")
    for name in names:
        if name in ARCHITECTURES:
            module: Any = importlib.import_module(ARCHITECTURES[name])
            family: Family = module
            return family
    known = ", ".join(sorted(ARCHITECTURES))
    raise CheckpointError(f"config.json: architecture {names[0]!r} is not supported (supported: {known})")
