"""What `sfumato serve` says when its door is open."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from sfumato.core.traits import ImageTraits, ModelTraits
from sfumato.serve.image_fields import size_text
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.settings import ServerSettings

_EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("chat/completions", {"messages": [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]}),
    "image": ("images/generations", {"prompt": "a red circle above a green square"}),
    "class": ("images/generations", {"class_labels": [1]}),
    "video": ("videos", {"prompt": "a red circle that rises", "num_frames": 17}),
}


def print_banner(console: Console, registry: Registry, settings: ServerSettings, port: int) -> None:
    """Say where the server listens, what it serves and how to try it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{port}"
    console.print(f"Sfumato serves at {address}/v1", highlight=False, soft_wrap=True, markup=False)
    console.print(f"Watch it denoise: {address}/", highlight=False, soft_wrap=True, markup=False)
    for model in registry.models.values():
        info = model.client.info
        console.print(
            f"  {model.name}  {info.num_parameters / 1e6:.1f}M parameters, {info.dtype} on {info.device}, "
            f"{_choices(info.traits)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        if info.peer_address is not None:
            console.print(f"  prefills for peers at {info.peer_address}", highlight=False, markup=False)
    console.print("Try it:", highlight=False)
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    example = _example(address, next(iter(registry.models.values())), key)
    console.print(example, highlight=False, soft_wrap=True, markup=False)
    console.file.flush()


def _choices(traits: ModelTraits | ImageTraits) -> str:
    """Return the defaults of a model that matter most."""
    if isinstance(traits, ModelTraits):
        return f"context {traits.context_length}, {traits.default_algorithm}"
    size = size_text(traits.default_width, traits.default_height)
    return f"{size}, {traits.default_steps} steps, {traits.scheduler}"


def _example(address: str, model: ServedModel, key: str) -> str:
    traits = model.client.info.traits
    draws_classes = isinstance(traits, ImageTraits) and traits.num_classes > 0
    path, body = _EXAMPLES["class" if draws_classes else model.makes]
    content = json.dumps({"model": model.name, **body})
    return f"  curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d '{content}'"
