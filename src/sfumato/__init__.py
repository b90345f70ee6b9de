"""Sfumato: a step-level serving engine for diffusion models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.config import EngineConfig
    from sfumato.engine.engine import Choice, Engine
    from sfumato.engine.frontend import Delta, SamplingParams
    from sfumato.engine.image_engine import Drawing, ImageEngine
    from sfumato.engine.image_params import ImageParams
    from sfumato.engine.limits import Limits
    from sfumato.errors import SfumatoError

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Delta",
    "Drawing",
    "Engine",
    "EngineConfig",
    "ImageEngine",
    "ImageParams",
    "Limits",
    "SamplingParams",
    "SfumatoError",
    "__version__",
]

_HOMES = {
    "Choice": "sfumato.engine.engine",
    "Delta": "sfumato.engine.frontend",
    "Engine": "sfumato.engine.engine",
    "EngineConfig": "sfumato.config",
    "Drawing": "sfumato.engine.image_engine",
    "ImageEngine": "sfumato.engine.image_engine",
    "ImageParams": "sfumato.engine.image_params",
    "Limits": "sfumato.engine.limits",
    "SamplingParams": "sfumato.engine.frontend",
    "SfumatoError": "sfumato.errors",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import sfumato` does not load torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
