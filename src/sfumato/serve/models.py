"""/v1/models: what is served, and what a request may choose for it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.core.traits import ImageTraits
from sfumato.serve.controls import image_controls, text_controls
from sfumato.serve.gaps import why_no_infill
from sfumato.serve.image_fields import size_text
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.streams import json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the served models."""
    registry: Registry = request.app.state.registry
    entries = [describe(model) for model in registry.models.values()]
    return json_response({"object": "list", "data": entries})


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    """Describe one model."""
    registry: Registry = request.app.state.registry
    return json_response(describe(registry.find(name)))


def describe(model: ServedModel) -> dict[str, Any]:
    """Return OpenAI's model object with what a client needs to choose parameters by itself."""
    info, traits = model.client.info, model.client.info.traits
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "sfumato",
        "makes": model.makes,
        "family": traits.family,
        "architecture": traits.architecture,
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "device": info.device,
        "num_replicas": len(model.client.clients),
        **(_text_choices(model) if model.makes == "text" else _image_choices(model.image_traits)),
    }


def _text_choices(model: ServedModel) -> dict[str, Any]:
    info, traits = model.client.info, model.traits
    no_infill = why_no_infill(traits)
    return {
        "visibility": traits.visibility,
        "vocab_size": traits.vocab_size,
        "has_tokenizer": info.has_tokenizer,
        "has_chat_template": model.tokenizer is not None and model.tokenizer.has_chat_template,
        "max_model_len": traits.context_length,
        "context_length": traits.context_length,
        "block_length": traits.block_length,
        "fixed_block_length": traits.fixed_block_length,
        "mask_token_id": traits.mask_token_id,
        "eos_token_ids": traits.eos_token_ids,
        "infill": {"is_supported": no_infill is None, "reason": no_infill},
        "controls": text_controls(traits, info.page_size),
        "default_max_tokens": traits.default_max_tokens,
        "default_algorithm": traits.default_algorithm,
        "default_algorithm_parameters": traits.default_parameters,
        "algorithms": [
            {"name": name, "parameters": parameters} for name, parameters in info.algorithms.items()
        ],
    }


def _image_choices(traits: ImageTraits) -> dict[str, Any]:
    return {
        "controls": image_controls(traits),
        "default_size": size_text(traits.default_width, traits.default_height),
        "size_unit": traits.size_unit,
        "default_num_inference_steps": traits.default_steps,
        "default_guidance_scale": traits.default_guidance_scale,
        "default_true_cfg_scale": traits.default_true_cfg_scale,
        "default_scheduler": traits.scheduler,
        "schedulers": traits.schedulers,
        "fields": traits.fields,
        "takes_images": traits.takes_images,
        "has_text": traits.has_text,
        "num_classes": traits.num_classes,
        "max_sequence_length": traits.max_sequence_length,
        "default_num_frames": traits.default_num_frames,
        "frames_unit": traits.frames_unit,
    }
