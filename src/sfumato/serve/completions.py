"""/v1/completions: texts or token ids in, their continuations out, at once or as they are committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.serve.calls import open_call, respond
from sfumato.serve.gaps import DEFAULT_GAP, check_infill, check_room, without_ends
from sfumato.serve.generation import Call, Collected, Generation, Infill, Piece, canvas_field, collect
from sfumato.serve.logprobs import completion_logprobs
from sfumato.serve.registry import ServedModel
from sfumato.serve.schema import CompletionRequest
from sfumato.serve.scoring import check_echo, echoed_logprobs, prompt_logprobs
from sfumato.serve.streams import CLIENT_GONE, ClientGone, json_response, until_gone

router = APIRouter()


@router.post("/v1/completions")
async def create(request: Request, body: CompletionRequest) -> Response:
    """Continue one or more prompts."""
    call = open_call(request, body, prefix="cmpl")
    if body.suffix:
        check_infill(call.model.name, call.model.traits, "suffix")
        call = replace(call, params=without_ends(call.params, call.model.traits))
    if body.scores_prompt:
        return await respond_scored(request, call, body)
    return await respond(
        request,
        _start(request, call, body),
        chunks=partial(_chunks, call, body) if body.stream else None,
        whole=partial(_whole, call, body),
    )


async def _start(request: Request, call: Call, body: CompletionRequest) -> Generation:
    prompts = await asyncio.gather(*(call.model.encode(prompt) for prompt in body.prompt))
    infills = [await _gap(call, body.suffix, prompts)] * len(prompts) if body.suffix else []
    return await Generation.start(call, request.app.state.metrics, prompts, infills=infills)


async def _gap(call: Call, suffix: str, prompts: Sequence[list[int]]) -> Infill:
    """Return the gap of max_tokens between each prompt and what follows it."""
    num_open = call.params.max_tokens or DEFAULT_GAP
    following = await call.model.encode(suffix, add_special_tokens=False)
    num_tokens = max(map(len, prompts)) + num_open + len(following)
    check_room(call.model.name, call.model.traits, num_tokens, "max_tokens")
    return Infill((*[None] * num_open, *following), num_open)


async def respond_scored(request: Request, call: Call, body: CompletionRequest) -> Response:
    """Answer with the log probabilities of the prompts' tokens too, and perhaps with nothing but them."""
    try:
        return json_response(await until_gone(request, _scored(request, call, body)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _scored(request: Request, call: Call, body: CompletionRequest) -> dict[str, Any]:
    check_echo(call.model)
    prompts = await asyncio.gather(*(call.model.encode(prompt) for prompt in body.prompt))
    scored = await prompt_logprobs(call.model, call.id, prompts, body.logprobs or 0, body.block_length)
    num_choices = len(prompts) * call.params.n
    finished = [Collected(finish_reason="length") for _ in range(num_choices)]
    num_tokens = sum(map(len, prompts))
    usage: dict[str, Any] = {
        "prompt_tokens": num_tokens,
        "completion_tokens": 0,
        "total_tokens": num_tokens,
    }
    if body.max_tokens != 0:
        generation = await Generation.start(call, request.app.state.metrics, prompts, logs_all=True)
        try:
            finished = await collect(generation)
        finally:
            generation.close()
        usage = generation.usage()
    choices = []
    for index, choice in enumerate(finished):
        shown = _choice(call, body, index, choice)
        prompt = scored[index // call.params.n]
        offset = len(_echo(call, body, index))
        moved = [replace(entry, offset=entry.offset + offset) for entry in choice.entries]
        choices.append({**shown, "logprobs": echoed_logprobs(call.model, prompt, moved)})
    return {**call.header("text_completion"), "choices": choices, "usage": usage}


def _whole(
    call: Call, body: CompletionRequest, generation: Generation, finished: list[Collected]
) -> dict[str, Any]:
    choices = [_choice(call, body, index, choice) for index, choice in enumerate(finished)]
    return {**call.header("text_completion"), "choices": choices, "usage": generation.usage()}


def _choice(call: Call, body: CompletionRequest, index: int, choice: Collected) -> dict[str, Any]:
    logprobs = None if body.logprobs is None else completion_logprobs(call.model, choice.entries)
    return {
        "index": index,
        "text": _echo(call, body, index) + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        **({"token_ids": choice.token_ids} if _shows_token_ids(call.model, body) else {}),
    }


def _echo(call: Call, body: CompletionRequest, index: int) -> str:
    """Return the prompt of a choice if it is to be repeated."""
    if not body.echo:
        return ""
    prompt = body.prompt[index // call.params.n]
    if isinstance(prompt, str):
        return prompt
    tokenizer = call.model.tokenizer
    return "" if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=False)


def _shows_token_ids(model: ServedModel, body: CompletionRequest) -> bool:
    """Whether choices carry token ids: on request, and always where there is no text."""
    return bool(body.return_token_ids) or model.tokenizer is None


async def _chunks(
    call: Call, body: CompletionRequest, generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    """Yield what is committed as it comes, then the usage if it is wanted."""
    header = call.header("text_completion")
    if body.wants_usage:
        header["usage"] = None
    if body.echo:
        for index in range(len(generation.choices)):
            yield {**header, "choices": [_chunk_choice(index, _echo(call, body, index))]}
    async for piece in generation.pieces():
        choice = _piece_choice(call, body, piece)
        if choice is not None:
            yield {**header, "choices": [choice]}
    if body.wants_usage:
        yield {**header, "choices": [], "usage": generation.usage()}


def _piece_choice(call: Call, body: CompletionRequest, piece: Piece) -> dict[str, Any] | None:
    """Return a choice with what is new, or None if there is nothing to show."""
    extras: dict[str, Any] = {}
    if piece.canvas is not None:
        extras["canvas"] = canvas_field(call.model, piece.canvas)
    if piece.token_ids and _shows_token_ids(call.model, body):
        extras["token_ids"] = piece.token_ids
    if not (piece.text or piece.entries or extras or piece.finish_reason):
        return None
    choice = _chunk_choice(piece.index, piece.text, piece.finish_reason)
    if body.logprobs is not None and piece.entries:
        choice["logprobs"] = completion_logprobs(call.model, piece.entries)
    return {**choice, **extras}


def _chunk_choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
