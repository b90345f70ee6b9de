"""What stages of an image request read and make, as bytes between processes: safetensors, no pickle.

An encoding is made from the spec alone; it brings conditioning, first latents and where the generators stand.
A decoding reads latents and brings pictures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sfumato.core.plan import RowKind
from sfumato.errors import RequestError
from sfumato.image.families.protocol import Family
from sfumato.image.state import Generators, ImageState, Inputs
from sfumato.image.work import PREVIEW, Decoded

_LATENTS, _IMAGES, _GENERATOR, _INPUT = "latents", "images", "generator", "input"


def pack_asked(state: ImageState, kind: RowKind, branch: str) -> bytes:
    """Return what a stage reads besides the spec."""
    if kind is RowKind.ENCODE:
        return b""
    latents = state.estimate if branch == PREVIEW else state.latents
    assert latents is not None
    return save({_LATENTS: latents.cpu().contiguous()})


def unpack_asked(state: ImageState, kind: RowKind, payload: bytes) -> ImageState:
    """Return a state that has just begun with what a stage reads. Raises RequestError."""
    if kind is RowKind.ENCODE:
        return state
    latents = _load(payload).get(_LATENTS)
    if latents is None:
        raise RequestError("a decoding came without latents", field="latents")
    return replace(state, latents=latents, estimate=latents, step=state.num_steps)


def pack_outcome(outcome: ImageState | Decoded) -> bytes:
    """Return what a stage has made."""
    if isinstance(outcome, Decoded):
        return save({_IMAGES: outcome.images.cpu().contiguous()})
    assert outcome.latents is not None
    tensors = {_LATENTS: outcome.latents}
    tensors |= {
        f"{_GENERATOR}.{index}": generator.get_state()
        for index, generator in enumerate(outcome.generators.each)
    }
    for branch, inputs in outcome.conditioning.items():
        for name, value in inputs.items():
            if isinstance(value, list):
                tensors |= {f"{_INPUT}/{branch}/{name}/{place:04d}": item for place, item in enumerate(value)}
            else:
                tensors[f"{_INPUT}/{branch}/{name}"] = value
    # Copies: rows may share one encoding, which the format does not allow.
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})


def unpack_outcome(
    family: Family, state: ImageState, kind: RowKind, branch: str, payload: bytes
) -> ImageState | Decoded:
    """Return the outcome of a stage for the state that asked for it. Raises RequestError."""
    tensors = _load(payload)
    try:
        if kind is RowKind.DECODE:
            return Decoded(tensors[_IMAGES], is_preview=branch == PREVIEW)
        states = [tensors[f"{_GENERATOR}.{index}"] for index in range(len(state.generators.each))]
        latents = tensors[_LATENTS].to(family.device)
    except KeyError as error:
        raise RequestError(f"a peer's outcome lacks {error}", field="peer") from error
    generators = Generators(())
    generators.__setstate__(states)
    return replace(
        state, conditioning=_inputs(tensors, family.device), latents=latents, generators=generators
    )


def _inputs(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Inputs]:
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(tensors):
        place = name.split("/")
        if place[0] != _INPUT:
            continue
        inputs = found.setdefault(place[1], {})
        tensor = tensors[name].to(device)
        if len(place) == 4:
            inputs.setdefault(place[2], []).append(tensor)
        else:
            inputs[place[2]] = tensor
    return found


def _load(payload: bytes) -> dict[str, Tensor]:
    try:
        return load(bytes(payload))
    except (SafetensorError, ValueError) as error:
        raise RequestError(f"a peer sent what is no safetensors: {error}", field="peer") from error
