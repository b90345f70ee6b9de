"""/v1/infill: gaps in a text are denoised in place, the rest stays pinned.

Every combination of lengths is a request of its own; they are denoised in one batch, and the answer is the
one whose tokens have the best mean log probability.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.errors import RequestError
from sfumato.serve.calls import open_call, respond
from sfumato.serve.errors import bad_request
from sfumato.serve.gaps import check_infill, check_room, without_ends
from sfumato.serve.generation import Call, Collected, Generation, Infill, canvas_field
from sfumato.serve.infill_schema import Gap, InfillRequest
from sfumato.serve.registry import ServedModel
from sfumato.text.tokenizer import TextStream

router = APIRouter()


@router.post("/v1/infill")
async def create(request: Request, body: InfillRequest) -> Response:
    """Fill the gaps of a text."""
    call = open_call(request, body, prefix="infill")
    check_infill(call.model.name, call.model.traits, "model")
    call = replace(call, params=without_ends(call.params, call.model.traits))
    layout = await _Layout.of(call.model, body)
    return await respond(
        request,
        _start(request, call, layout),
        chunks=partial(_chunks, call, body, layout) if body.stream else None,
        whole=partial(_whole, call, layout),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """The text in tokens: what stands before it, its parts, and the lengths that are tried for its gaps."""

    prompt: list[int]
    parts: list[list[int] | Gap]
    lengths: list[tuple[int, ...]]
    texts: list[str | None] = field(default_factory=list)

    @classmethod
    async def of(cls, model: ServedModel, body: InfillRequest) -> _Layout:
        """Tokenise each part by itself, so that a gap never changes the tokens beside it."""
        parts: list[list[int] | Gap] = []
        texts: list[str | None] = []
        for part in body.parts:
            is_text = isinstance(part, str)
            parts.append(await model.encode(part, add_special_tokens=False) if is_text else part)
            texts.append(part if is_text else None)
        prompt = await _prompt(model, body)
        if body.messages is not None:
            # An answer ends behind its last part, as the model knows answers to end.
            parts.append(list(model.traits.eos_token_ids[:1]))
            texts.append("")
        layout = cls(prompt, parts, list(body.lengths()), texts)
        longest = sum(gap.longest for gap in body.gaps)
        num_tokens = len(prompt) + layout.num_pins + longest
        check_room(model.name, model.traits, num_tokens, "parts")
        return layout

    @property
    def num_pins(self) -> int:
        """Return how many tokens are given."""
        return sum(len(part) for part in self.parts if not isinstance(part, Gap))

    def spans(self, lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Yield the start and end of every part, gaps among them, where the gaps have these lengths."""
        start, remaining = 0, iter(lengths)
        for part in self.parts:
            end = start + (next(remaining) if isinstance(part, Gap) else len(part))
            yield start, end
            start = end

    def infill(self, lengths: tuple[int, ...]) -> Infill:
        """Return what is pinned where the gaps have these lengths."""
        tokens: list[int | None] = []
        for part, (start, end) in zip(self.parts, self.spans(lengths), strict=True):
            tokens += [None] * (end - start) if isinstance(part, Gap) else part
        return Infill(tuple(tokens), len(tokens))


async def _prompt(model: ServedModel, body: InfillRequest) -> list[int]:
    """Return the tokens in front of the parts."""
    if body.messages is not None:
        return await model.encode_chat([message.for_template() for message in body.messages])
    if body.prompt is not None:
        return await model.encode(body.prompt)
    return [] if model.tokenizer is None else await model.encode("")


async def _start(request: Request, call: Call, layout: _Layout) -> Generation:
    infills = [layout.infill(lengths) for lengths in layout.lengths]
    prompts = [layout.prompt] * len(infills)
    try:
        return await Generation.start(
            call, request.app.state.metrics, prompts, infills=infills, logs_all=True
        )
    except RequestError as error:
        # The engine knows one canvas with pins; here they came as parts.
        given_as = "parts" if error.field in ("infill", "max_tokens") else error.field
        raise bad_request(str(error), given_as) from error


@dataclass(frozen=True, slots=True)
class _Filled:
    """One combination of lengths, filled."""

    lengths: tuple[int, ...]
    mean_logprob: float
    collected: Collected


def _filled(layout: _Layout, call: Call, finished: list[Collected]) -> list[list[_Filled]]:
    """Return for each choice all that was tried, in the order of the lengths."""
    n = call.params.n
    return [
        [_judge(layout, lengths, finished[at * n + choice]) for at, lengths in enumerate(layout.lengths)]
        for choice in range(n)
    ]


def _judge(layout: _Layout, lengths: tuple[int, ...], collected: Collected) -> _Filled:
    """Take the mean over the tokens of all gaps."""
    gaps = [
        span for part, span in zip(layout.parts, layout.spans(lengths), strict=True) if isinstance(part, Gap)
    ]
    logprobs = [entry.logprob.logprob for start, end in gaps for entry in collected.entries[start:end]]
    return _Filled(lengths, sum(logprobs) / len(logprobs), collected)


def _whole(call: Call, layout: _Layout, generation: Generation, finished: list[Collected]) -> dict[str, Any]:
    choices, candidates = [], []
    for index, tried in enumerate(_filled(layout, call, finished)):
        best = max(tried, key=lambda filled: filled.mean_logprob)
        choices.append({"index": index, **_choice(call, layout, best)})
        for at, filled in enumerate(tried):
            candidates.append(
                {
                    "index": at * call.params.n + index,
                    "choice": index,
                    "lengths": filled.lengths,
                    "mean_logprob": round(filled.mean_logprob, 6),
                    "is_chosen": filled is best,
                }
            )
    usage = _usage(layout, generation)
    return {**call.header("infill"), "choices": choices, "candidates": candidates, "usage": usage}


def _usage(layout: _Layout, generation: Generation) -> dict[str, Any]:
    """Return the usage over all lengths; what is given counts once."""
    usage = generation.usage()
    prompt_tokens = len(layout.prompt) + layout.num_pins
    total = prompt_tokens + usage["completion_tokens"]
    return {**usage, "prompt_tokens": prompt_tokens, "total_tokens": total}


def _choice(call: Call, layout: _Layout, filled: _Filled) -> dict[str, Any]:
    token_ids = filled.collected.token_ids
    stream = None if call.model.tokenizer is None else TextStream(call.model.tokenizer)
    texts, gaps = [], []
    spans = layout.spans(filled.lengths)
    for part, text, (start, end) in zip(layout.parts, layout.texts, spans, strict=True):
        ids = token_ids[start:end]
        # Read in one stream, as spaces depend on what stands before.
        read = "" if stream is None else stream.push(ids, is_last=True)
        texts.append(read if text is None else text)
        if isinstance(part, Gap):
            gaps.append({"text": read, "length": end - start, "token_ids": ids})
    return {
        "text": "".join(texts),
        "gaps": gaps,
        "token_ids": token_ids,
        "mean_logprob": round(filled.mean_logprob, 6),
    }


async def _chunks(
    call: Call, body: InfillRequest, layout: _Layout, generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    """Yield the layouts and canvases if they are wanted, and at the end the whole answer."""
    header = call.header("infill.chunk")
    if body.wants_canvas:
        yield {**header, "choices": [], "candidates": _drawn(call, layout)}
    finished = [Collected() for _ in generation.choices]
    async for piece in generation.pieces():
        finished[piece.index].add(piece)
        if piece.canvas is not None:
            candidate = {"index": piece.index, "canvas": canvas_field(call.model, piece.canvas)}
            yield {**header, "choices": [], "candidates": [candidate]}
    yield {**_whole(call, layout, generation, finished), "object": "infill.chunk"}


def _drawn(call: Call, layout: _Layout) -> list[dict[str, Any]]:
    """Return every candidate's positions: the text of what is pinned, None where a gap is."""
    drawn = []
    for at, lengths in enumerate(layout.lengths):
        pins = layout.infill(lengths).tokens
        tokens = [None if token is None else call.model.piece(token) for token in pins]
        for choice in range(call.params.n):
            index = at * call.params.n + choice
            drawn.append({"index": index, "choice": choice, "lengths": lengths, "tokens": tokens})
    return drawn
