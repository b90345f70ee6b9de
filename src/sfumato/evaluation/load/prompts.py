"""What is asked: random prompts of a given length, or those of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sfumato.errors import ConfigError
from sfumato.evaluation.questions import embedded_tasks, read_task
from sfumato.models.folder import ZOO, embedded_models
from sfumato.text.tokenizer import Tokenizer

# Without a tokenizer a prompt is so many of these; most vocabularies have each as one token.
_WORDS = (
    "the of and to in that was for it with as his on be at by had not are but from or have an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what "
    "up its about into than them can only other new some could time these two may then do first any my now "
    "such like our over man me even most made after also did many before must through back years where much "
    "your way well down should because each just those people how too little state good very make world "
    "still own see men work long get here between both life being under never day same another know while "
    "last might us great old year off come since against go came right used take three"
)
# Text that is cut at a token's border may be tokenised otherwise; after so many tries it is nearly as long.
_TRIES = 8
# Which of them a line of a file may hold.
_FIELDS = ("prompt", "question", "messages")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: a text or messages, and how many tokens it may be answered with (None: as it comes)."""

    content: str | list[dict[str, Any]]
    max_tokens: int | None


class Length(msgspec.Struct, frozen=True, kw_only=True):
    """How long something is: evenly between (1 - spread) and (1 + spread) times a mean."""

    mean: int
    spread: float = 0.0

    def draw(self, source: random.Random) -> int:
        """Return one length, at least 1."""
        low, high = self.mean * (1 - self.spread), self.mean * (1 + self.spread)
        return max(1, source.randint(round(low), round(high)))


def find_tokenizer(given: str | None, model: str) -> Tokenizer | None:
    """Return the tokenizer that was named, or of a served model whose folder is here; else None.

    Raises ConfigError where one was named and is not there.
    """
    for name in (given, model):
        if name is None:
            continue
        folder = ZOO / name if name in embedded_models() else Path(name).expanduser()
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            return Tokenizer(folder)
        if given is not None:
            embedded = ", ".join(embedded_models())
            raise ConfigError(f"--tokenizer {given!r} is neither a folder with one nor one of {embedded}")
    return None


class RandomText:
    """Texts of a given number of tokens; without a tokenizer, of so many words."""

    def __init__(self, tokenizer: Tokenizer | None, source: random.Random) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._words = _WORDS.split()

    def make(self, length: int) -> str:
        """Return a text of so many tokens, special tokens aside."""
        if not length:
            return ""
        if self._tokenizer is None:
            return " ".join(self._source.choice(self._words) for _ in range(length))
        token_ids = self._pieces(self._tokenizer, length)
        for _ in range(_TRIES):
            text = self._tokenizer.decode(token_ids)
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(token_ids) == length:
                return text
            missing = length - len(token_ids)
            token_ids = [*token_ids[:length], *self._pieces(self._tokenizer, max(0, missing))]
        return self._tokenizer.decode(token_ids)

    def _pieces(self, tokenizer: Tokenizer, count: int) -> list[int]:
        """Draw tokens that are text by themselves: no special ones, no halves of characters."""
        found: list[int] = []
        while len(found) < count:
            token_id = self._source.randrange(tokenizer.vocab_size)
            if tokenizer.decode([token_id]).strip().isalnum():
                found.append(token_id)
        return found


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: random prompts, or those of a file.

    dataset: a JSONL file or an embedded task, in its order and again from its beginning. input_length: of
    random prompts. output_length: where a line of the file says nothing; None leaves it to the server.
    prefix_len: tokens in front that all prompts share.
    """

    dataset: str | None = None
    input_length: Length = Length(mean=128)
    output_length: Length | None = None
    prefix_len: int = 0

    def prompts(self, count: int, *, tokenizer: Tokenizer | None, seed: int) -> list[Prompt]:
        """Return so many prompts; the same seed gives the same.

        Raises ConfigError naming file, line and field.
        """
        source = random.Random(seed)
        text = RandomText(tokenizer, source)
        prefix = text.make(self.prefix_len)
        if self.dataset is None:
            # A tokenizer's own pieces of text need nothing between them.
            gap = " " if prefix and tokenizer is None else ""
            drawn = [text.make(self.input_length.draw(source)) for _ in range(count)]
            return [Prompt(f"{prefix}{gap}{each}", self._output(source)) for each in drawn]
        is_task = self.dataset in embedded_tasks()
        read = _embedded(self.dataset) if is_task else _lines(Path(self.dataset))
        chosen = [read[index % len(read)] for index in range(count)]
        return [
            Prompt(_with_prefix(prefix, each.content), each.max_tokens or self._output(source))
            for each in chosen
        ]

    def _output(self, source: random.Random) -> int | None:
        return None if self.output_length is None else self.output_length.draw(source)


def _with_prefix(prefix: str, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if not prefix:
        return content
    if isinstance(content, str):
        return f"{prefix} {content}"
    return [{"role": "system", "content": prefix}, *content]


def _embedded(task: str) -> Sequence[Prompt]:
    return [Prompt(question.text, None) for question in read_task(task).questions]


def _lines(path: Path) -> Sequence[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--dataset {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset {path}: not UTF-8 text: {error}") from error
    found = [
        _read(line, f"--dataset {path} line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise ConfigError(f"--dataset {path}: no prompt in it")
    return found


def _read(line: str, where: str) -> Prompt:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from error
    given = [name for name in _FIELDS if name in fields]
    if len(given) != 1:
        raise ConfigError(f"{where}: exactly one of the fields {', '.join(_FIELDS)} is needed")
    kind: Any = list[dict[str, Any]] if given[0] == "messages" else str
    try:
        content = msgspec.convert(fields[given[0]], kind)
        max_tokens = msgspec.convert(fields.get("max_tokens"), int | None)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: field {given[0]!r} or 'max_tokens': {error}") from error
    if not content or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(f"{where}: field {given[0]!r} must not be empty, max_tokens at least 1")
    return Prompt(content, max_tokens)
