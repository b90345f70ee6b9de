"""A model behind a Sfumato server: questions go over HTTP, so many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import msgspec

from sfumato.core.messages import Usage
from sfumato.engine.frontend import SamplingParams
from sfumato.errors import ConfigError, EngineDied, RequestError
from sfumato.evaluation.address import CONNECT_SECONDS, Address, problem, reason
from sfumato.evaluation.backend import Ask, ModelCard, OnReply, Reply

# Beyond a request's own timeout, which the server keeps and answers to.
_GRACE_SECONDS = 30.0


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    finish_reason: str
    message: _Message | None = None
    text: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: Usage


class Served:
    """Asks one model of a server; the only one where none is named."""

    def __init__(self, address: Address, model: str | None) -> None:
        self._address = address
        found = address.find_model(model)
        try:
            self._card = msgspec.convert(found, ModelCard)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{address} is not a Sfumato server's: {error}") from error

    @property
    def card(self) -> ModelCard:
        """What the model says about itself."""
        return self._card

    @property
    def where(self) -> dict[str, Any]:
        """The server's address; its machine is its own affair."""
        return {"url": self._address.url, "device": self._card.device}

    def check(self, ask: Ask) -> None:
        """Ask for a single token, which the server refuses for the same reasons as the whole ask."""
        wanted = ask.params.max_tokens
        one = msgspec.structs.replace(ask.params, max_tokens=1 if wanted is None else min(1, wanted))
        short = Ask(ask.id, ask.prompt, one)
        path, body = self._body(short)
        try:
            response = httpx2.post(
                self._address.join(path), json=body, headers=self._address.headers, timeout=_timeout(ask)
            )
        except httpx2.HTTPError as error:
            raise EngineDied(f"{self._address}: {reason(error)}") from error
        if response.status_code != httpx2.codes.OK:
            refusal = problem(response)
            raise RequestError(refusal.message, field=refusal.param or "request")

    def run(self, asks: Sequence[Ask], on_reply: OnReply, *, concurrency: int) -> None:
        """Answer every ask, so many at once. Raises EngineDied where nobody listens any more."""
        try:
            asyncio.run(self._run(asks, on_reply, concurrency))
        except BaseExceptionGroup as group:
            # All are of one cause: the group that ends with its first error.
            raise group.exceptions[0] from None

    async def _run(self, asks: Sequence[Ask], on_reply: OnReply, concurrency: int) -> None:
        waiting = iter(asks)
        async with (
            httpx2.AsyncClient(
                headers=self._address.headers, limits=httpx2.Limits(max_connections=concurrency)
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(concurrency, len(asks))):
                group.create_task(self._answer_all(client, waiting, on_reply))

    async def _answer_all(
        self, client: httpx2.AsyncClient, waiting: Iterator[Ask], on_reply: OnReply
    ) -> None:
        for ask in waiting:
            on_reply(await self._answer(client, ask))

    async def _answer(self, client: httpx2.AsyncClient, ask: Ask) -> Reply:
        started = time.monotonic()
        path, body = self._body(ask)
        try:
            response = await client.post(self._address.join(path), json=body, timeout=_timeout(ask))
        except httpx2.ConnectError as error:
            raise EngineDied(f"{self._address}: {reason(error)}") from error
        except httpx2.HTTPError as error:
            return Reply(id=ask.id, error=reason(error), seconds=time.monotonic() - started)
        seconds = time.monotonic() - started
        if response.status_code != httpx2.codes.OK:
            return Reply(id=ask.id, error=problem(response).message, seconds=seconds)
        try:
            completion = msgspec.json.decode(response.content, type=_Completion)
        except msgspec.DecodeError as error:
            return Reply(id=ask.id, error=f"the server's answer cannot be read: {error}", seconds=seconds)
        choice = completion.choices[0]
        return Reply(
            id=ask.id,
            output=choice.message.content if choice.message is not None else choice.text or "",
            usage=completion.usage,
            finish_reason=choice.finish_reason,
            seconds=seconds,
        )

    def _body(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return the endpoint and the body of an ask; what is not set is left to the server."""
        params: SamplingParams = ask.params
        fields = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "algorithm": params.algorithm,
            "algorithm_parameters": params.algorithm_parameters or None,
            "block_length": params.block_length,
            "timeout": params.timeout,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        body["model"] = self._card.id
        if isinstance(ask.prompt, str):
            return "completions", body | {"prompt": ask.prompt}
        return "chat/completions", body | {"messages": ask.prompt}


def _timeout(ask: Ask) -> httpx2.Timeout:
    seconds = None if ask.params.timeout is None else ask.params.timeout + _GRACE_SECONDS
    return httpx2.Timeout(seconds, connect=CONNECT_SECONDS)
