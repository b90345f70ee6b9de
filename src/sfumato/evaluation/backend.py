"""What an evaluation needs of a model, in this process or behind a server: its card, and replies to asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from sfumato.core.messages import Usage
from sfumato.core.spec import ParameterValue
from sfumato.engine.frontend import SamplingParams
from sfumato.evaluation.prompts import Prompt


class ParameterCard(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter of a decoding algorithm."""

    name: str
    default: ParameterValue = None


class AlgorithmCard(msgspec.Struct, frozen=True, kw_only=True):
    """A decoding algorithm with what a request may set."""

    name: str
    parameters: tuple[ParameterCard, ...]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a model says about itself; a server's model object has the same fields."""

    id: str
    dtype: str
    device: str
    has_chat_template: bool
    block_length: int
    default_max_tokens: int | None
    default_algorithm: str
    default_algorithm_parameters: dict[str, Any]
    algorithms: tuple[AlgorithmCard, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """One question with everything that is sent for it; params.timeout is set."""

    id: str
    prompt: Prompt
    params: SamplingParams


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer with the engine's own count of its cost, or the error instead; seconds: from ask to reply."""

    id: str
    output: str = ""
    usage: Usage = Usage()
    finish_reason: str | None = None
    seconds: float = 0.0
    error: str | None = None


OnReply = Callable[[Reply], None]


class Backend(Protocol):
    """A model that can be asked."""

    @property
    def card(self) -> ModelCard:
        """What the model says about itself."""
        ...

    @property
    def where(self) -> dict[str, Any]:
        """Which machine or server the figures come from."""
        ...

    def check(self, ask: Ask) -> None:
        """Raise RequestError for an ask that the model refuses, without answering it."""
        ...

    def run(self, asks: Sequence[Ask], on_reply: OnReply, *, concurrency: int) -> None:
        """Answer every ask, so many at once, in any order; an ask that fails gets a reply with its error.

        Raises EngineError where no further ask can be answered.
        """
        ...
