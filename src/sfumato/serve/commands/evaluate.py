"""`sfumato eval`: closed-book questions, accuracy against tokens per forward."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sfumato.errors import ConfigError
from sfumato.evaluation.questions import embedded_tasks, read_task
from sfumato.serve.commands import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.evaluation.backend import Backend
    from sfumato.evaluation.report import Report
    from sfumato.evaluation.run import Evaluation, OnProgress
    from sfumato.evaluation.sweep import Setting

_QUESTIONS = "Questions"
_RESULTS = "Results"
# Not an option's default, so that a key in the environment is no error where no server is asked.
_KEY_VARIABLE = "SFUMATO_API_KEY"
_FAILED = 1
# Of each setting; the report names all.
_SHOWN_FAILURES = 5


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="A JSONL file of questions and answers, or a held-out set of the embedded models: "
            f"{', '.join(embedded_tasks())}."
        ),
    ],
    model: options.OneModel = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a Sfumato server at http://host:port/v1 instead.", rich_help_panel="Model"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"The server's key. Default: {_KEY_VARIABLE}.", rich_help_panel="Model"),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            help="Decoding algorithm; repeatable: a curve for each. Default: the model's.",
            rich_help_panel="Decoding",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ALGORITHM.]PARAMETER=VALUES",
            help="Measure at each value, as threshold=0.5,0.7,0.9; repeatable, for one algorithm each.",
            rich_help_panel="Decoding",
        ),
    ] = None,
    algorithm_parameters: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="""Fixed parameters, as '{"max_steps": 8}' or '{"sdar.denoising_steps": 8}'.""",
            rich_help_panel="Decoding",
        ),
    ] = None,
    block_length: options.BlockLength = None,
    max_tokens: options.MaxTokens = None,
    seed: Annotated[
        int, typer.Option(min=0, help="For algorithms that draw.", rich_help_panel="Sampling")
    ] = 0,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="plain, zero-shot-cot or few-shot. Default: few-shot with --shots, else zero-shot-cot "
            "for numbers, plain for texts.",
            rich_help_panel=_QUESTIONS,
            show_default=False,
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Worked examples in front of a question.", rich_help_panel=_QUESTIONS),
    ] = None,
    shots_file: Annotated[
        str | None,
        typer.Option(help="Where they come from, from its beginning.", rich_help_panel=_QUESTIONS),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Ask without the model's chat template.", rich_help_panel=_QUESTIONS),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first N questions only.", rich_help_panel=_QUESTIONS)
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions that are answered at once.", rich_help_panel=_QUESTIONS)
    ] = 16,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds until a question counts as failed.", rich_help_panel=_QUESTIONS),
    ] = 600.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of answers, report.json and the picture. Default: sfumato-eval/TASK-MODEL.",
            rich_help_panel=_RESULTS,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Go on with the answers in the folder, or begin anew.", rich_help_panel=_RESULTS),
    ] = True,
    plot: Annotated[
        bool | None,
        typer.Option(
            help="Draw curve.png and curve.svg. Default: where matplotlib is installed.",
            rich_help_panel=_RESULTS,
            show_default=False,
        ),
    ] = None,
    best_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Percent that a method measured elsewhere reached; the AUP score is relative to the best.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
) -> int:
    """Ask questions with exact answers: accuracy, tokens per forward, tokens/s and AUP, for each setting.

    Every answer is kept as it comes: after Ctrl-C the same command goes on from there.
    """
    from sfumato.evaluation.drawing import can_plot, require_plot
    from sfumato.evaluation.prompts import make_prompter
    from sfumato.evaluation.run import Evaluation
    from sfumato.evaluation.sweep import parse_sweep, plan_curves
    from sfumato.serve.settings_file import parse_parameters

    if plot:
        require_plot()
    asked = read_task(task)
    examples = None if shots_file is None else read_task(shots_file)
    prompter = make_prompter(asked, style=prompt, num_shots=shots, examples=examples, is_raw=raw)
    sweeps = [parse_sweep(text) for text in sweep or ()]
    fixed = parse_parameters("--algorithm-parameters", algorithm_parameters) or {}
    backend = _backend(model, url, api_key, dtype=dtype, device=device, threads=threads)
    card = backend.card
    if not raw and not card.has_chat_template:
        raise ConfigError(f"--model {card.id} has no chat template; ask with --raw")
    evaluation = Evaluation(
        task=asked,
        prompter=prompter,
        curves=tuple(plan_curves(card, algorithm or [], sweeps, fixed)),
        out=out or Path("sfumato-eval") / f"{asked.name}-{Path(card.id).name}",
        limit=limit,
        concurrency=concurrency,
        max_tokens=max_tokens,
        block_length=block_length,
        seed=seed,
        timeout=timeout,
        is_resuming=resume,
        best_accuracy=best_accuracy,
    )
    if plot is None and not can_plot():
        _notice("no picture: matplotlib is not installed (pip install 'sfumato[eval]')")
    report = _run(evaluation, backend)
    return _show(report, evaluation.out, is_drawing=can_plot() if plot is None else plot)


def _backend(
    model: str | None,
    url: str | None,
    api_key: str | None,
    *,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> Backend:
    """Return the server, or an engine in this process. Raises ConfigError for options of the other one."""
    if url is None:
        if api_key is not None:
            raise ConfigError("--api-key is a server's; it needs --url")
        from sfumato.evaluation.in_process import InProcess
        from sfumato.serve.commands.loading import load_model

        # A prompt beyond the context fails with a message of our own; the tokenizer warns trainers.
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        loaded = load_model(model, dtype=dtype, device=device, threads=threads)
        return InProcess(loaded.config.model, loaded)
    for option, value in (("--dtype", dtype), ("--device", device), ("--threads", threads)):
        if value is not None:
            raise ConfigError(f"{option} {value} and --url exclude each other; the server has its own")
    from sfumato.evaluation.address import Address
    from sfumato.evaluation.served import Served

    return Served(Address(url, api_key or os.environ.get(_KEY_VARIABLE) or None), model)


def _run(evaluation: Evaluation, backend: Backend) -> Report:
    """Run with a progress bar; after Ctrl-C say how to go on."""
    from sfumato.evaluation.run import run

    try:
        with _progress(evaluation) as on_progress:
            return run(evaluation, backend, on_progress)
    except KeyboardInterrupt:
        _notice(f"stopped; answers are in {evaluation.out}, the same command goes on from there")
        raise


@contextmanager
def _progress(evaluation: Evaluation) -> Iterator[OnProgress]:
    """Draw a bar per setting on standard error, in a terminal only."""
    errors = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[share]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(setting: Setting, num_done: int, num_correct: int) -> None:
            if setting.label not in bars:
                total = len(evaluation.questions)
                bars[setting.label] = progress.add_task(setting.label, total=total, share="")
            share = f"{100 * num_correct / num_done:.1f} % correct" if num_done else ""
            progress.update(bars[setting.label], completed=num_done, share=share)

        yield on_progress


def _show(report: Report, out: Path, *, is_drawing: bool) -> int:
    """Write the files, print the table, name every failure; return the exit status."""
    from sfumato.evaluation.plot import draw
    from sfumato.evaluation.report import as_tables, write_report

    console = Console()
    paths = [write_report(report, out)]
    if is_drawing:
        paths += draw(report, out)
    console.print(f"{report.task}, {report.model}", style="bold", highlight=False)
    for table in as_tables(report):
        console.print(table)
    if any(point.is_default for point in report.points):
        console.print("* what is served by default", highlight=False, style="dim")
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True, markup=False)
    return _name_failures(report, paths[0])


def _name_failures(report: Report, path: Path) -> int:
    """Say which questions failed and why, the first of each setting; return the exit status."""
    num_failed = sum(point.num_failed for point in report.points)
    if not num_failed:
        return 0
    for curve in report.curves:
        for point in curve.points:
            swept = "" if curve.parameter is None else f" {point.shown_value}"
            for question_id, reason in point.failures[:_SHOWN_FAILURES]:
                _notice(
                    f"question {question_id} failed ({curve.algorithm}{swept}): {' '.join(reason.split())}"
                )
    _notice(
        f"error: {num_failed} questions failed and count as wrong, {path} names all; "
        "the same command asks them again"
    )
    return _FAILED


def _notice(text: str) -> None:
    print(f"sfumato: {text}", file=sys.stderr, flush=True)
