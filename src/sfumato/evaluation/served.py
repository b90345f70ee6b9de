"""A model behind a Sfumato server: questions go over HTTP, so many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from sfumato.core.messages import Usage
from sfumato.engine.frontend import SamplingParams
from sfumato.errors import ConfigError, EngineDied, RequestError
from sfumato.evaluation.backend import Ask, ModelCard, OnReply, Reply

_CONNECT_SECONDS = 10.0
# Beyond a request's own timeout, which the server keeps and answers to.
_GRACE_SECONDS = 30.0


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    finish_reason: str
    message: _Message | None = None
    text: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: Usage


class _ErrorFields(msgspec.Struct):
    message: str
    param: str | None = None


class _Error(msgspec.Struct):
    error: _ErrorFields


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, as http://host:port/v1, and the key that it wants."""

    url: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Return what every request carries."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def join(self, path: str) -> str:
        """Return the address of an endpoint."""
        return f"{self.url.rstrip('/')}/{path}"


class Served:
    """Asks one model of a server; the only one where none is named."""

    def __init__(self, address: Address, model: str | None) -> None:
        self._address = address
        found = _decode(self._get("models"), _Models, address.join("models")).data
        names = [str(each.get("id")) for each in found]
        if model is None and len(names) != 1:
            raise ConfigError(f"--url {address.url} serves {', '.join(names)}; name one with --model")
        if model is not None and model not in names:
            raise ConfigError(f"--model {model!r}: --url {address.url} serves {', '.join(names)}")
        try:
            self._card = msgspec.convert(found[names.index(model) if model else 0], ModelCard)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--url {address.url} is not a Sfumato server's: {error}") from error

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
            raise EngineDied(f"--url {self._address.url}: {_reason(error)}") from error
        if response.status_code != httpx2.codes.OK:
            problem = _problem(response)
            raise RequestError(problem.message, field=problem.param or "request")

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
            raise EngineDied(f"--url {self._address.url}: {_reason(error)}") from error
        except httpx2.HTTPError as error:
            return Reply(id=ask.id, error=_reason(error), seconds=time.monotonic() - started)
        seconds = time.monotonic() - started
        if response.status_code != httpx2.codes.OK:
            return Reply(id=ask.id, error=_problem(response).message, seconds=seconds)
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

    def _get(self, path: str) -> bytes:
        url = self._address.join(path)
        try:
            response = httpx2.get(url, headers=self._address.headers, timeout=_CONNECT_SECONDS)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConfigError(f"--url {self._address.url}: {_reason(error)}") from error
        if response.status_code != httpx2.codes.OK:
            raise ConfigError(f"{url} answered {response.status_code}: {_problem(response).message}")
        return response.content


def _timeout(ask: Ask) -> httpx2.Timeout:
    seconds = None if ask.params.timeout is None else ask.params.timeout + _GRACE_SECONDS
    return httpx2.Timeout(seconds, connect=_CONNECT_SECONDS)


def _reason(error: Exception) -> str:
    """Return what went wrong; some errors have no words."""
    return str(error) or type(error).__name__


def _problem(response: httpx2.Response) -> _ErrorFields:
    """Return a refusal in OpenAI's form, or the bare status where it has another form."""
    try:
        return msgspec.json.decode(response.content, type=_Error).error
    except msgspec.DecodeError:
        return _ErrorFields(f"status {response.status_code} {response.reason_phrase}")


def _decode(content: bytes, kind: type[_Models], url: str) -> _Models:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{url} is not an OpenAI server's: {error}") from error
