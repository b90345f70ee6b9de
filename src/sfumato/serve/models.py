"""/v1/models: what is served, and what a request may choose for it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

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
    info, traits = model.client.info, model.traits
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "sfumato",
        "family": traits.family,
        "architecture": traits.architecture,
        "visibility": traits.visibility,
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "device": info.device,
        "num_replicas": len(model.client.clients),
        "vocab_size": traits.vocab_size,
        "has_tokenizer": info.has_tokenizer,
        "has_chat_template": model.tokenizer is not None and model.tokenizer.has_chat_template,
        "max_model_len": traits.context_length,
        "context_length": traits.context_length,
        "block_length": traits.block_length,
        "fixed_block_length": traits.fixed_block_length,
        "mask_token_id": traits.mask_token_id,
        "eos_token_ids": traits.eos_token_ids,
        "default_max_tokens": traits.default_max_tokens,
        "default_algorithm": traits.default_algorithm,
        "default_algorithm_parameters": traits.default_parameters,
        "algorithms": [
            {"name": name, "parameters": parameters} for name, parameters in info.algorithms.items()
        ],
    }
