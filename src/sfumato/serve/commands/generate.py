"""`sfumato generate`: one prompt, one answer, no server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from sfumato.errors import RequestError
from sfumato.serve.commands import options


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer; without it, or for '-', standard input.", show_default=False),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat template.")
    ] = False,
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
    stop: options.StopOption = None,
    ignore_eos: options.IgnoreEos = False,
    algorithm: options.Algorithm = None,
    algorithm_parameters: options.AlgorithmParameters = None,
    block_length: options.BlockLength = None,
) -> None:
    """Answer one prompt: drawn as it denoises in a terminal, only the text in a pipe.

    Grey tokens are the model's best guesses, brighter where it is surer; bold ones are decided.
    """
    from sfumato.engine.frontend import SamplingParams
    from sfumato.serve.commands.canvas import draws_live, show
    from sfumato.serve.commands.loading import load_engine
    from sfumato.serve.settings_file import parse_parameters

    # A shell's newline behind the prompt is not part of it.
    text = sys.stdin.read().removesuffix("\n") if prompt in (None, "-") else prompt
    if not text:
        raise RequestError("the prompt is empty", field="prompt")
    console = Console()
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        algorithm=algorithm,
        algorithm_parameters=parse_parameters("--algorithm-parameters", algorithm_parameters) or {},
        block_length=block_length,
        include_canvas=draws_live(console),
    )
    engine = load_engine(model, dtype=dtype, device=device, threads=threads)
    has_template = engine.tokenizer is not None and engine.tokenizer.has_chat_template
    asked = [{"role": "user", "content": text}] if has_template and not raw else text
    show(engine, asked, params, console, delay=delay)
