"""A canvas in the terminal: decided tokens bold, best guesses in a grey that brightens with confidence."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sfumato.core.messages import CanvasView, Usage
from sfumato.engine.engine import Engine, Prompt
from sfumato.engine.frontend import Delta, SamplingParams
from sfumato.errors import EngineError
from sfumato.text.tokenizer import Tokenizer

# The 256-colour greys, dark to light.
_DARKEST, _LIGHTEST = 236, 252
# Shown for end tokens and other tokens without text.
_END = "·"


class CanvasText:
    """The text of one choice while it is denoised; committed text never changes again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._committed = ""
        self._num_tokens = 0
        self._canvas: CanvasView | None = None

    @property
    def committed(self) -> str:
        """Return what can no longer change."""
        return self._committed

    def push(self, delta: Delta) -> None:
        """Take in what a step brought."""
        self._committed += delta.text
        self._num_tokens += len(delta.token_ids)
        self._canvas = None if delta.finish_reason is not None else delta.canvas or self._canvas

    def render(self) -> Text:
        """Return committed text and behind it the open block."""
        text = Text(self._committed)
        canvas = self._canvas
        if canvas is None:
            return text
        cells = zip(canvas.token_ids, canvas.confidence, canvas.undecided, strict=True)
        for position, (token_id, confidence, is_undecided) in enumerate(cells, canvas.start):
            if position < self._num_tokens:
                continue
            piece = self._tokenizer.decode([token_id])
            if piece:
                text.append(piece.replace("\n", "↵"), style=_grey(confidence) if is_undecided else "bold")
            else:
                text.append(_END, style="dim")
        return text


def _grey(confidence: float) -> str:
    share = min(1.0, max(0.0, confidence))
    return f"color({_DARKEST + round(share * (_LIGHTEST - _DARKEST))})"


def draws_live(console: Console) -> bool:
    """Whether a canvas can be drawn there again and again: in a terminal that can move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


def tail(text: Text, console: Console) -> Group:
    """Return as many of the last lines as a terminal shows at once; it cannot draw again what is above."""
    lines = text.wrap(console, console.width)
    return Group(*lines[-max(1, console.height - 1) :])


def show(engine: Engine, prompt: Prompt, params: SamplingParams, console: Console, *, delay: float) -> str:
    """Run one prompt and return its text: drawn live in a terminal, written as it is committed elsewhere.

    delay: seconds to rest after each step that is drawn. Raises EngineError if the request fails.
    """
    if draws_live(console) and engine.tokenizer is not None:
        return _show_live(engine, engine.tokenizer, prompt, params, console, delay=delay)
    text = ""
    for delta in _deltas(engine, prompt, params):
        console.file.write(delta.text)
        console.file.flush()
        text += delta.text
    console.file.write("\n")
    return text


def _show_live(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams,
    console: Console,
    *,
    delay: float,
) -> str:
    canvas, usage = CanvasText(tokenizer), Usage()
    started, rested = time.perf_counter(), 0.0
    # The drawing goes when it ends, and the whole text, however long, takes its place.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for delta in _deltas(engine, prompt, params):
            canvas.push(delta)
            usage = delta.usage
            live.update(tail(canvas.render(), console), refresh=True)
            if delta.finish_reason is None and delay:
                time.sleep(delay)
                rested += delay
    seconds = time.perf_counter() - started - rested
    console.print(canvas.render(), highlight=False)
    console.print(
        f"{usage.completion_tokens} tokens in {usage.nfe} forwards: {usage.tokens_per_forward:.1f} tokens "
        f"per forward, {seconds:.2f} s",
        style="dim",
        highlight=False,
    )
    return canvas.committed


def _deltas(engine: Engine, prompt: Prompt, params: SamplingParams) -> Iterator[Delta]:
    for _, delta in engine.stream(prompt, params):
        if delta.error is not None:
            raise EngineError(delta.error)
        yield delta
