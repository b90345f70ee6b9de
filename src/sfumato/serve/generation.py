"""One API call on the engine: prompts times n choices, their text as it is committed, and what it cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sfumato.core.messages import CanvasView, FinishReason, Output, Submit, Usage
from sfumato.core.spec import Grammar
from sfumato.engine.frontend import Assembler, Delta, SamplingParams, make_spec
from sfumato.engine.outputs import Outputs
from sfumato.errors import RequestError
from sfumato.serve.errors import ApiError, failed, timed_out, unavailable
from sfumato.serve.logprobs import TokenEntry, TokenLog
from sfumato.serve.metrics import Metrics
from sfumato.serve.registry import ServedModel


def _check_grammar(grammar: Grammar) -> None:
    """Raise RequestError for a grammar that cannot be compiled, before an engine sees it."""
    # Imported here: most requests have none.
    from sfumato.text.grammars import compiled

    compiled(grammar)


_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Call:
    """What identifies one API call in its answers."""

    id: str
    endpoint: str
    model: ServedModel
    params: SamplingParams
    created: int

    def header(self, kind: str) -> dict[str, Any]:
        """Return the fields that every answer and every chunk of the call carries."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "seed": self.params.seed,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new for one choice, ready to be put into an API's form."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    entries: list[TokenEntry]
    canvas: CanvasView | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Infill:
    """What is pinned behind a prompt, None where it is open; num_shown: positions that the answer has."""

    tokens: tuple[int | None, ...]
    num_shown: int

    def usage(self, usage: Usage) -> Usage:
        """Count what is pinned as given, not as made."""
        made = self.tokens[: usage.completion_tokens].count(None)
        num_pins = len(self.tokens) - self.tokens.count(None)
        prompt_tokens = usage.prompt_tokens + num_pins
        return msgspec.structs.replace(usage, prompt_tokens=prompt_tokens, completion_tokens=made)

    def shown(self, output: Output, num_before: int) -> Output:
        """Cut an output where the answer ends; num_before: tokens that came earlier."""
        room = max(0, self.num_shown - num_before)
        canvas = output.canvas
        if canvas is not None:
            width = max(0, self.num_shown - canvas.start)
            canvas = msgspec.structs.replace(
                canvas,
                token_ids=canvas.token_ids[:width],
                confidence=canvas.confidence[:width],
                undecided=canvas.undecided[:width],
            )
        return msgspec.structs.replace(
            output,
            token_ids=output.token_ids[:room],
            logprobs=None if output.logprobs is None else output.logprobs[:room],
            canvas=canvas,
            usage=self.usage(output.usage),
        )


@dataclass(slots=True)
class _Choice:
    """One choice while it is open."""

    index: int
    assembler: Assembler
    token_log: TokenLog | None
    infill: Infill | None = None
    num_tokens: int = 0
    usage: Usage = Usage()
    is_queued: bool = True
    last_output: float | None = None


@dataclass(slots=True)
class Generation:
    """All choices of one call, submitted together; whoever holds it must close it."""

    call: Call
    metrics: Metrics
    num_prompts: int
    outputs: Outputs
    choices: dict[str, _Choice]
    started: float = field(default_factory=time.monotonic)
    _is_open: bool = True

    @classmethod
    async def start(
        cls,
        call: Call,
        metrics: Metrics,
        prompts: Sequence[list[int]],
        *,
        infills: Sequence[Infill] = (),
        logs_all: bool = False,
        shown_tokens: Collection[str] = (),
    ) -> Generation:
        """Submit every choice and wait until the engine has accepted them.

        infills: what is pinned behind each prompt. logs_all: log probabilities of tokens without text too.
        shown_tokens: special tokens that the text shows.
        Raises RequestError or EngineError.
        """
        params, model = call.params, call.model
        submissions, choices = [], {}
        try:
            if params.grammar is not None:
                await asyncio.to_thread(_check_grammar, params.grammar)
            for index in range(len(prompts) * params.n):
                request_id = f"{call.id}-{index}"
                infill = infills[index // params.n] if infills else None
                asked = params if infill is None else _pinned(params, infill)
                spec = make_spec(prompts[index // params.n], asked, model.traits, choice=index % params.n)
                submissions.append(
                    Submit(request_id=request_id, spec=spec, priority=params.priority, timeout=params.timeout)
                )
                token_log = None if params.logprobs is None else TokenLog(model.tokenizer, gives_all=logs_all)
                assembler = Assembler(model.tokenizer, params.stop, shown_tokens)
                choices[request_id] = _Choice(index, assembler, token_log, infill)
            outputs = await model.client.submit(submissions)
        except RequestError:
            metrics.requests.labels(model.name, call.endpoint, "refused").inc(max(1, len(submissions)))
            raise
        return cls(call, metrics, len(prompts), outputs, choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what is committed, over all choices as it comes.

        Raises ApiError if a choice fails; the others are aborted then.
        """
        async for output in self.outputs:
            choice = self.choices[output.request_id]
            if choice.infill is not None:
                output = choice.infill.shown(output, choice.num_tokens)
                choice.num_tokens += len(output.token_ids)
            delta = choice.assembler.push(output)
            choice.usage = delta.usage
            self._observe(choice, delta)
            if delta.met_stop_string:
                self.outputs.abort(output.request_id)
            if delta.finish_reason is not None:
                self._count_end(choice, delta.finish_reason)
                if delta.finish_reason not in _FINISH_REASONS:
                    raise self._as_error(delta)
            entries = choice.token_log.push(delta) if choice.token_log is not None else []
            reason = None if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason]
            yield Piece(choice.index, delta.text, delta.token_ids, entries, delta.canvas, reason)

    def _observe(self, choice: _Choice, delta: Delta) -> None:
        name, now = self.call.model.name, time.monotonic()
        if choice.is_queued and delta.queue_seconds is not None:
            choice.is_queued = False
            self.metrics.queue_seconds.labels(name).observe(delta.queue_seconds)
        if not delta.token_ids:
            return
        if choice.last_output is None:
            self.metrics.first_text_seconds.labels(name).observe(now - self.started)
        else:
            self.metrics.chunk_seconds.labels(name).observe(now - choice.last_output)
        choice.last_output = now

    def _count_end(self, choice: _Choice, end: str) -> None:
        self.metrics.observe_end(
            self.call.model.name, self.call.endpoint, end, choice.usage, time.monotonic() - self.started
        )
        choice.assembler.is_finished = True

    def _as_error(self, delta: Delta) -> ApiError:
        match delta.finish_reason:
            case FinishReason.TIMEOUT:
                return timed_out(self.call.params.timeout)
            case FinishReason.ABORT:
                return unavailable("the server is shutting down; the request was ended")
        if self.call.model.client.is_gone:
            return unavailable(delta.error or "the engine is gone")
        return failed(delta.error or "the request failed in the engine")

    def close(self) -> None:
        """Abort every choice that has not ended."""
        if not self._is_open:
            return
        self._is_open = False
        self.outputs.close()
        for choice in self.choices.values():
            if not choice.assembler.is_finished:
                self._count_end(choice, FinishReason.ABORT)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage with ours beside it; a prompt counts once, however many choices it has."""
        by_index = sorted(self.choices.values(), key=lambda choice: choice.index)
        firsts = [choice.usage for choice in by_index[:: self.call.params.n]]
        each = [choice.usage for choice in by_index]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        cached_tokens = sum(usage.cached_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in each)
        nfe = sum(usage.nfe for usage in each)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "cached_tokens": cached_tokens,
            "denoise_steps": sum(usage.denoise_steps for usage in each),
            "nfe": nfe,
            "tokens_per_forward": round(completion_tokens / nfe, 4) if nfe else 0.0,
        }


@dataclass(slots=True)
class Collected:
    """A finished choice, put together from its pieces."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Take in a piece of this choice."""
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        self.entries.extend(piece.entries)
        self.finish_reason = piece.finish_reason or self.finish_reason


async def collect(generation: Generation) -> list[Collected]:
    """Run a call to its end and return its choices in order. Raises ApiError."""
    finished = [Collected() for _ in generation.choices]
    async for piece in generation.pieces():
        finished[piece.index].add(piece)
    return finished


def _pinned(params: SamplingParams, infill: Infill) -> SamplingParams:
    return msgspec.structs.replace(params, infill=infill.tokens, max_tokens=len(infill.tokens))


def canvas_field(model: ServedModel, canvas: CanvasView) -> dict[str, Any]:
    """Return the open block after a step; start: its first position, counted in output tokens."""
    return {
        "step": canvas.step,
        "start": canvas.start,
        "token_ids": canvas.token_ids,
        "tokens": [model.piece(token_id) for token_id in canvas.token_ids],
        "confidence": canvas.confidence,
        "undecided": canvas.undecided,
    }
