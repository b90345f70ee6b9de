"""`sfumato chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from sfumato.errors import RequestError
from sfumato.serve.commands import options


def chat(
    delay: options.Delay = 0.03,
    model: options.OneModel = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.SeedOption = None,
    algorithm: options.Algorithm = None,
    algorithm_parameters: options.AlgorithmParameters = None,
    block_length: options.BlockLength = None,
) -> None:
    """Talk to a model and watch its answers denoise. /reset forgets the conversation, /quit or Ctrl-D leaves.

    In a pipe every line of standard input is one turn, and only the answers are written.
    """
    from sfumato.engine.frontend import SamplingParams
    from sfumato.serve.commands.canvas import draws_live, show
    from sfumato.serve.commands.loading import load_engine
    from sfumato.serve.settings_file import parse_parameters

    console = Console()
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        algorithm=algorithm,
        algorithm_parameters=parse_parameters("--algorithm-parameters", algorithm_parameters) or {},
        block_length=block_length,
        include_canvas=draws_live(console),
    )
    engine = load_engine(model, dtype=dtype, device=device, threads=threads)
    messages: list[dict[str, Any]] = []
    for line in _lines(console):
        if line == "/quit":
            return
        if line == "/reset":
            messages.clear()
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = show(engine, asked, params, console, delay=delay)
        except RequestError as error:
            if not console.is_terminal:
                raise
            console.print(f"{error}; /reset forgets the conversation", style="red", highlight=False)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def _lines(console: Console) -> Iterator[str]:
    """Yield what the user says, without empty lines, until there is no more."""
    is_prompting = console.is_terminal and sys.stdin.isatty()
    while True:
        if is_prompting:
            console.print("you> ", end="", style="cyan", highlight=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
