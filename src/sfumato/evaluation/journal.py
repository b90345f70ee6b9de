"""What was answered so far, on disk after every question, so that an interrupted run goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from sfumato.errors import ConfigError


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One finished question with what it cost.

    seconds: from the ask to the reply. wall_seconds: since the record before it in the same run.
    """

    id: str
    prompt_sha256: str
    output: str = ""
    found: str | None = None
    expected: str
    correct: bool = False
    tokens: int = 0
    nfe: int = 0
    denoise_steps: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0
    wall_seconds: float = 0.0
    error: str | None = None

    @property
    def was_spared_prefill(self) -> bool:
        """Whether the prefix cache held the whole prompt, so that no forward was spent on it."""
        return self.cached_tokens > 0 and self.nfe == self.denoise_steps

    @property
    def forwards(self) -> int:
        """Return NFE as it is for a prompt that nobody asked before: a spared prefill is one forward.

        Without this the first setting of a sweep would pay for what all later ones find in the cache.
        """
        return self.nfe + self.was_spared_prefill


class _Header(msgspec.Struct, frozen=True):
    """The first line: everything that makes two runs comparable."""

    settings: dict[str, Any]


class Journal:
    """One JSONL file of one setting, open for more; `records` holds the last one of each question.

    A line that was cut short by a killed process is dropped. A question that failed may be asked again.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """Open or begin a file. Raises ConfigError naming what differs from the run that began it."""
        self.records: dict[str, Record] = {}
        self.path = path
        settings = msgspec.json.decode(msgspec.json.encode(settings))
        try:
            content = path.read_bytes() if resume and path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self._read(whole, settings)
            self._file = path.open("r+b" if content else "wb", buffering=0)
            self._file.seek(len(whole))
            self._file.truncate()
            if not whole:
                self._file.write(msgspec.json.encode(_Header(settings)) + b"\n")
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror}") from error

    def _read(self, content: bytes, settings: dict[str, Any]) -> None:
        lines = content.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                if number == 1:
                    self._compare(msgspec.json.decode(line, type=_Header).settings, settings)
                else:
                    record = msgspec.json.decode(line, type=Record)
                    self.records[record.id] = record
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{self.path} line {number} is not what an evaluation wrote: {error}"
                ) from error

    def _compare(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in [*settings, *found]:
            before, now = found.get(name), settings.get(name)
            if before != now:
                raise ConfigError(
                    f"{self.path} was begun with {name} {before!r}, now it is {now!r}; "
                    "give another --out, or --no-resume to begin anew"
                )

    def add(self, record: Record) -> None:
        """Write a record as one whole line."""
        os.write(self._file.fileno(), msgspec.json.encode(record) + b"\n")
        self.records[record.id] = record

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
