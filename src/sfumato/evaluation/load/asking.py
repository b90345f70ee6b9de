"""One request to an OpenAI-compatible server: its stream is read as it comes, with a time for each piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
import msgspec

from sfumato.evaluation.address import Address, problem, reason
from sfumato.evaluation.load.prompts import Prompt
from sfumato.evaluation.load.records import Record
from sfumato.text.tokenizer import Tokenizer

_DONE = "[DONE]"


class Failed(Exception):
    """The server refused, or ended a stream before its end."""


@dataclass(slots=True)
class Answer:
    """What has come of one request so far; chunks: seconds on the clock."""

    chunks: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None


class Endpoint(Protocol):
    """How a kind of request is made, and how its stream is read."""

    @property
    def path(self) -> str:
        """Return the endpoint's path."""
        ...

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return what is sent."""
        ...

    def take(self, event: dict[str, Any], answer: Answer, now: float) -> None:
        """Take one event of the stream in; raises Failed for an error in it."""
        ...

    def count(self, answer: Answer) -> tuple[int | None, str | None]:
        """Return the tokens of an answer whose usage says nothing, and how they were counted."""
        ...


@dataclass(frozen=True, slots=True)
class TextEndpoint:
    """Chat or plain completions, streamed with their usage; extra: goes before what is set here."""

    model: str
    is_chat: bool
    extra: dict[str, Any]
    tokenizer: Tokenizer | None = None

    @property
    def path(self) -> str:
        """Return the endpoint's path."""
        return "chat/completions" if self.is_chat else "completions"

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return what is sent."""
        fields: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.is_chat:
            fields["prompt"] = prompt.content
        elif isinstance(prompt.content, str):
            fields["messages"] = [{"role": "user", "content": prompt.content}]
        else:
            fields["messages"] = prompt.content
        if prompt.max_tokens is not None:
            fields["max_tokens"] = prompt.max_tokens
        return fields | self.extra

    def take(self, event: dict[str, Any], answer: Answer, now: float) -> None:
        """Take one chunk in."""
        answer.usage = event.get("usage") or answer.usage
        for choice in event.get("choices") or ():
            piece = (choice.get("delta") or {}).get("content") if self.is_chat else choice.get("text")
            if piece:
                answer.chunks.append(now)
                answer.text.append(piece)
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason

    def count(self, answer: Answer) -> tuple[int | None, str | None]:
        """Return the tokens of an answer whose usage says nothing, and how they were counted."""
        if self.tokenizer is None:
            return len(answer.chunks), "chunks"
        return len(self.tokenizer.encode("".join(answer.text), add_special_tokens=False)), "tokenizer"


@dataclass(frozen=True, slots=True)
class ImageEndpoint:
    """Pictures from prompts; with previews they are streamed. extra: goes before what is set here."""

    model: str
    num_previews: int
    extra: dict[str, Any]
    path: str = "images/generations"

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return what is sent."""
        fields: dict[str, Any] = {"model": self.model, "prompt": prompt.content}
        if self.num_previews:
            fields |= {"stream": True, "partial_images": self.num_previews}
        return fields | self.extra

    def take(self, event: dict[str, Any], answer: Answer, now: float) -> None:
        """Take an event of a stream in, or the whole answer where none was asked for."""
        kind = str(event.get("type", ""))
        if kind.endswith(".partial_image"):
            answer.chunks.append(now)
        if kind.endswith(".completed") or "data" in event:
            answer.usage = event.get("usage") or {}
            answer.finish_reason = "stop"

    def count(self, answer: Answer) -> tuple[int | None, str | None]:
        """Return nothing: a picture has no tokens to compare."""
        return None, None


class Asker:
    """Sends requests to one endpoint; time is seconds since its first moment, on a monotonic clock."""

    def __init__(self, address: Address, endpoint: Endpoint, *, timeout: float) -> None:
        self._address = address
        self._endpoint = endpoint
        self._timeout = timeout
        self._started = time.perf_counter()
        # However many are open, none waits here for another's connection.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.AsyncClient(headers=address.headers, limits=limits, timeout=None)

    def now(self) -> float:
        """Return the time."""
        return time.perf_counter() - self._started

    async def ask(self, index: int, prompt: Prompt, due: float) -> Record:
        """Send a request now and read its answer; whatever goes wrong is in the record."""
        answer, error, sent = Answer(), None, self.now()
        try:
            async with asyncio.timeout(self._timeout):
                await self._read(prompt, answer)
        except TimeoutError:
            error = f"not answered within {self._timeout:g} seconds"
        except (Failed, httpx2.HTTPError, httpx2.InvalidURL) as failure:
            error = reason(failure)
        ended = self.now()
        reported = answer.usage.get("completion_tokens")
        output_tokens, counted_by = self._endpoint.count(answer) if reported is None else (reported, "usage")
        return Record(
            index=index,
            due=due,
            sent=sent,
            ended=ended,
            chunks=tuple(answer.chunks),
            prompt_tokens=answer.usage.get("prompt_tokens"),
            output_tokens=output_tokens,
            counted_by=counted_by,
            nfe=answer.usage.get("nfe"),
            finish_reason=answer.finish_reason,
            error=error,
        )

    async def _read(self, prompt: Prompt, answer: Answer) -> None:
        body = self._endpoint.body(prompt)
        async with self.client.stream("POST", self._address.join(self._endpoint.path), json=body) as response:
            if response.status_code != httpx2.codes.OK:
                await response.aread()
                raise Failed(problem(response).message)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                self._endpoint.take(_decoded(await response.aread()), answer, self.now())
            else:
                async for event in _events(response):
                    self._endpoint.take(event, answer, self.now())
        if answer.finish_reason is None:
            raise Failed("the answer ended before its end: no finish reason came")


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream until [DONE] or its end. Raises Failed for an error among them."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        content = line.removeprefix("data:").strip()
        if content == _DONE:
            return
        event = _decoded(content)
        if "error" in event:
            found = event["error"]
            raise Failed(str(found.get("message", found) if isinstance(found, dict) else found))
        yield event


def _decoded(content: str | bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise Failed(f"the server's answer cannot be read: {error}") from error
