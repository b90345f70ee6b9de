"""/tokenize and /detokenize: text to token ids and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.serve.errors import bad_request
from sfumato.serve.registry import Registry
from sfumato.serve.schema import DetokenizeRequest, TokenizeRequest
from sfumato.serve.streams import json_response

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Return the token ids of a prompt, or of messages through the chat template."""
    registry: Registry = request.app.state.registry
    model = registry.find_or_first(body.model)
    if body.messages is not None and body.prompt is None:
        tokens = await model.encode_chat([message.for_template() for message in body.messages])
    elif body.prompt is not None and body.messages is None:
        is_special = body.add_special_tokens is not False
        tokens = await model.encode(body.prompt, add_special_tokens=is_special)
    else:
        raise bad_request("give either prompt or messages", "prompt")
    strings = [model.piece(token) for token in tokens] if body.return_token_strs else None
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.traits.context_length,
        "tokens": tokens,
        "token_strs": strings,
    }
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Return the text of token ids, special tokens included."""
    registry: Registry = request.app.state.registry
    if body.tokens is None:
        raise bad_request("field 'tokens' is required", "tokens", "missing_field")
    model = registry.find_or_first(body.model)
    return json_response({"prompt": await model.decode(body.tokens)})
