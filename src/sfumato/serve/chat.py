"""/v1/chat/completions: messages in, an assistant's message out, at once or as it is committed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from sfumato.errors import RequestError
from sfumato.serve.calls import open_call, respond
from sfumato.serve.errors import bad_request
from sfumato.serve.generation import Call, Collected, Generation, Piece, canvas_field
from sfumato.serve.logprobs import chat_logprobs
from sfumato.serve.schema import ChatRequest
from sfumato.serve.tool_formats import ToolFormat, format_of
from sfumato.serve.tools import CallStream, with_tools

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    call, form = _with_tools(open_call(request, body, prefix="chatcmpl"), body)
    return await respond(
        request,
        _start(request, call, body, form),
        chunks=partial(_chunks, call, body, form) if body.stream else None,
        whole=partial(_whole, call, body, form),
    )


def _with_tools(call: Call, body: ChatRequest) -> tuple[Call, ToolFormat | None]:
    """Return the call with the grammar of its tools, and their form; None without any. Raises ApiError."""
    if not body.callable_functions():
        return call, None
    form = format_of(call.model.need_tokenizer("messages"))
    grammar = body.tools_grammar(form, call.params)
    return replace(call, params=msgspec.structs.replace(call.params, grammar=grammar)), form


async def _start(request: Request, call: Call, body: ChatRequest, form: ToolFormat | None) -> Generation:
    tokenizer = call.model.need_tokenizer("messages")
    messages, tools = with_tools(
        [message.for_template() for message in body.messages],
        body.callable_functions(),
        knows_tools=tokenizer.knows_tools,
    )
    prompt = await call.model.encode_chat(messages, tools)
    try:
        shown = frozenset() if form is None else form.special_tokens
        return await Generation.start(call, request.app.state.metrics, [prompt], shown_tokens=shown)
    except RequestError as error:
        # The engine knows only a prompt; here it came as messages.
        raise bad_request(str(error), "messages" if error.field == "prompt" else error.field) from error


def _whole(
    call: Call,
    body: ChatRequest,
    form: ToolFormat | None,
    generation: Generation,
    finished: list[Collected],
) -> dict[str, Any]:
    choices = [_choice(call, body, form, index, choice) for index, choice in enumerate(finished)]
    return {**_header(call, body, "chat.completion"), "choices": choices, "usage": generation.usage()}


def _header(call: Call, body: ChatRequest, kind: str) -> dict[str, Any]:
    tier = {} if body.service_tier is None else {"service_tier": "default"}
    return {**call.header(kind), **tier}


def _choice(
    call: Call, body: ChatRequest, form: ToolFormat | None, index: int, choice: Collected
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish_reason = choice.finish_reason
    if form is not None:
        text, calls = CallStream(form).push(choice.text, is_last=True)
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(call.model, choice.entries) if body.logprobs else None,
        "finish_reason": finish_reason,
        **({"token_ids": choice.token_ids} if body.return_token_ids else {}),
    }


async def _chunks(
    call: Call, body: ChatRequest, form: ToolFormat | None, generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    """Yield the role of every choice, what is committed, the ends, and the usage if it is wanted."""
    header = _header(call, body, "chat.completion.chunk")
    if body.wants_usage:
        header["usage"] = None
    for index in range(call.params.n):
        opening = {"role": "assistant", "content": "", "refusal": None}
        yield {**header, "choices": [_chunk_choice(index, opening, None)]}
    streams = {} if form is None else {index: CallStream(form) for index in range(call.params.n)}
    async for piece in generation.pieces():
        for choice in _chunk_choices(call, body, piece, streams.get(piece.index)):
            yield {**header, "choices": [choice]}
    if body.wants_usage:
        yield {**header, "choices": [], "usage": generation.usage()}


def _chunk_choices(
    call: Call, body: ChatRequest, piece: Piece, stream: CallStream | None
) -> list[dict[str, Any]]:
    """Return one choice with what is new, if anything is to be shown, and one with the end.

    stream: takes calls out of the text, where there may be any.
    """
    chunks = []
    text, finish_reason = piece.text, piece.finish_reason
    delta: dict[str, Any] = {}
    if stream is not None:
        text, calls = stream.push(text, is_last=finish_reason is not None)
        first = len(stream.calls) - len(calls)
        if calls:
            delta["tool_calls"] = [{"index": first + at, **made} for at, made in enumerate(calls)]
        if stream.calls and finish_reason == "stop":
            finish_reason = "tool_calls"
    extras: dict[str, Any] = {}
    if piece.canvas is not None:
        extras["canvas"] = canvas_field(call.model, piece.canvas)
    if body.return_token_ids and piece.token_ids:
        extras["token_ids"] = piece.token_ids
    if text:
        delta["content"] = text
    if delta or piece.entries or extras:
        choice = _chunk_choice(piece.index, delta, None)
        if body.logprobs and piece.entries:
            choice["logprobs"] = chat_logprobs(call.model, piece.entries)
        chunks.append({**choice, **extras})
    if finish_reason is not None:
        chunks.append(_chunk_choice(piece.index, {}, finish_reason))
    return chunks


def _chunk_choice(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
