"""Log probabilities leave together with their text: behind held-back characters, not behind a stop."""

from __future__ import annotations

import pytest

from sfumato.core.messages import FinishReason, Output, TokenLogprob
from sfumato.engine.frontend import Assembler
from sfumato.models.folder import ZOO
from sfumato.serve.logprobs import TokenEntry, TokenLog
from sfumato.text.tokenizer import Tokenizer

END = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ZOO / "sfumato-tiny-sdar")


def play(
    tokenizer: Tokenizer, tokens: list[int], size: int, *, stop: tuple[str, ...] = ()
) -> tuple[str, list[TokenEntry]]:
    """Commit tokens in groups of a size; return the text and the entries, checking that none runs ahead."""
    assembler, log = Assembler(tokenizer, stop), TokenLog(tokenizer)
    text, entries = "", []
    for start in range(0, len(tokens), size):
        group = tokens[start : start + size]
        is_last = start + size >= len(tokens)
        output = Output(
            request_id="r",
            token_ids=tuple(group),
            logprobs=tuple(TokenLogprob(logprob=-1.0) for _ in group),
            finish_reason=FinishReason.STOP if is_last else None,
        )
        delta = assembler.push(output)
        text += delta.text
        entries += log.push(delta)
        assert all(entry.offset < len(text) for entry in entries)
        if assembler.is_finished:
            break
    return text, entries


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_every_shown_token_is_given_once(tokenizer: Tokenizer, size: int) -> None:
    tokens = tokenizer.encode("Köln, 日本: 12+7=19.")
    text, entries = play(tokenizer, [*tokens, END], size)
    assert text == "Köln, 日本: 12+7=19."
    assert [entry.token_id for entry in entries] == tokens
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_nothing_behind_a_stop_string_is_given(tokenizer: Tokenizer, size: int) -> None:
    tokens = tokenizer.encode("one two three")
    text, entries = play(tokenizer, tokens, size, stop=(" t", "never"))
    assert text == "one"
    assert tokenizer.decode([entry.token_id for entry in entries]).startswith("one")
    assert all(entry.offset < 3 for entry in entries)


def test_without_a_tokenizer_every_token_counts() -> None:
    log, assembler = TokenLog(None), Assembler(None)
    output = Output(request_id="r", token_ids=(5, 6), logprobs=(TokenLogprob(logprob=-1.0),) * 2)
    assert [entry.token_id for entry in log.push(assembler.push(output))] == [5, 6]
