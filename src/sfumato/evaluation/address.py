"""Where an OpenAI-compatible server is reached: its models, and what it says when it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from sfumato.errors import ConfigError

CONNECT_SECONDS = 10.0


class Problem(msgspec.Struct):
    """A refusal: what is wrong, with which field."""

    message: str
    param: str | None = None


class _Error(msgspec.Struct):
    error: Problem


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, as http://host:port/v1, and the key that it wants.

    option: what the url is called on the command line.
    """

    url: str
    api_key: str | None = None
    option: str = "--url"

    def __str__(self) -> str:
        return f"{self.option} {self.url}"

    @property
    def headers(self) -> dict[str, str]:
        """Return what every request carries."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def join(self, path: str) -> str:
        """Return the address of an endpoint."""
        return f"{self.url.rstrip('/')}/{path}"

    def find_model(self, name: str | None) -> dict[str, Any]:
        """Return what the server says of a model; of its only one where none is named. Raises ConfigError."""
        found = self._models()
        names = [str(each.get("id")) for each in found]
        if name is None and len(names) != 1:
            raise ConfigError(f"{self} serves {', '.join(names) or 'nothing'}; name one with --model")
        if name is not None and name not in names:
            raise ConfigError(f"--model {name!r}: {self} serves {', '.join(names) or 'nothing'}")
        return found[0 if name is None else names.index(name)]

    def _models(self) -> list[dict[str, Any]]:
        url = self.join("models")
        try:
            response = httpx2.get(url, headers=self.headers, timeout=CONNECT_SECONDS)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConfigError(f"{self}: {reason(error)}") from error
        if response.status_code != httpx2.codes.OK:
            raise ConfigError(f"{url} answered {response.status_code}: {problem(response).message}")
        try:
            return msgspec.json.decode(response.content, type=_Models).data
        except msgspec.DecodeError as error:
            raise ConfigError(f"{url} is not an OpenAI server's: {error}") from error


def reason(error: Exception) -> str:
    """Return what went wrong; some errors have no words."""
    return str(error) or type(error).__name__


def problem(response: httpx2.Response) -> Problem:
    """Return a refusal in OpenAI's form, or the bare status where it has another form."""
    try:
        return msgspec.json.decode(response.content, type=_Error).error
    except msgspec.DecodeError:
        return Problem(f"status {response.status_code} {response.reason_phrase}")
