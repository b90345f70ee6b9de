"""`sfumato bench`: a server under load, latencies against throughput."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sfumato.evaluation.load.arrivals import Load
    from sfumato.evaluation.load.asking import Endpoint
    from sfumato.evaluation.load.benchmark import Benchmark, OnProgress
    from sfumato.evaluation.load.records import Record
    from sfumato.evaluation.load.report import Report
    from sfumato.text.tokenizer import Tokenizer

# Options that take several values in a row.
MANY = ("--rate", "--concurrency", "--goodput")
_LOAD = "Load"
_PROMPTS = "Prompts"
_IMAGES = "Images"
_RESULTS = "Results"
_ENDPOINTS = ("chat", "completions", "images")
_CONCURRENCY = 8
_INPUT_LEN = _OUTPUT_LEN = 128
_IMAGE_WORDS = 16
_MILLISECONDS = 1e-3
_FAILED = 1
# Of each load; the file names all.
_SHOWN_ERRORS = 5


def bench(
    base_url: Annotated[
        str, typer.Option(help="Any OpenAI-compatible server, as http://host:port/v1 (/v1 may be left out).")
    ] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None, typer.Option(envvar="SFUMATO_API_KEY", help="The server's key.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which of the served models. Default: the only one.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help=f"One of {', '.join(_ENDPOINTS)}.")] = "chat",
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="""More fields of every request, as '{"algorithm": "low_confidence"}'."""
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R [R ...]",
            help="Open loop: requests per second, or inf for all at once; several are measured in turn.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            help="Of the gaps (gamma law): 1 is Poisson, less comes in bursts, more is even.",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N [N ...]",
            help="Closed loop: requests that are open all the time; several are measured in turn. With "
            "--rate: how many may be open.",
            rich_help_panel=_LOAD,
            show_default=f"{_CONCURRENCY} without --rate",
        ),
    ] = None,
    num_requests: Annotated[
        int, typer.Option(min=1, help="Requests of each load.", rich_help_panel=_LOAD)
    ] = 100,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before, which are not counted.", rich_help_panel=_LOAD)
    ] = 4,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request has failed.", rich_help_panel=_LOAD)
    ] = 600.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of prompts, lengths and arrivals.", rich_help_panel=_LOAD)
    ] = 0,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="JSONL file of prompts (prompt, question or messages; max_tokens), or an embedded task. "
            "Default: random prompts.",
            rich_help_panel=_PROMPTS,
            show_default=False,
        ),
    ] = None,
    input_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a random prompt.",
            rich_help_panel=_PROMPTS,
            show_default=f"{_INPUT_LEN}; {_IMAGE_WORDS} words for images",
        ),
    ] = None,
    input_spread: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="0.5: evenly between half and one and a half of it.", rich_help_panel=_PROMPTS
        ),
    ] = 0.0,
    output_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of an answer (max_tokens).",
            rich_help_panel=_PROMPTS,
            show_default=f"{_OUTPUT_LEN}; with --dataset the server's",
        ),
    ] = None,
    output_spread: Annotated[
        float, typer.Option(min=0, max=1, help="As --input-spread.", rich_help_panel=_PROMPTS)
    ] = 0.0,
    prefix_len: Annotated[
        int,
        typer.Option(min=0, help="Tokens in front that all prompts share.", rich_help_panel=_PROMPTS),
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Ask for the whole length of an answer.", rich_help_panel=_PROMPTS),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or embedded model that counts tokens. Default: the served model's, if it is here; "
            "else words are counted.",
            rich_help_panel=_PROMPTS,
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="As 512x512. Default: the model's.", rich_help_panel=_IMAGES)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoise steps. Default: the model's.", rich_help_panel=_IMAGES),
    ] = None,
    previews: Annotated[
        int,
        typer.Option(
            min=0, max=3, help="Streamed before the picture; 0 streams nothing.", rich_help_panel=_IMAGES
        ),
    ] = 1,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS [NAME:MS ...]",
            help="Count requests within these limits: ttft:200 tpot:50 e2e:2000.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file of settings, figures and every request.", rich_help_panel=_RESULTS),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture, .png or .svg; needs matplotlib.", rich_help_panel=_RESULTS),
    ] = None,
) -> int:
    """Measure a server under load: latencies, throughput, goodput; one load, or several in turn.

    Latencies count from when a request was due, also where it had to wait to be sent.
    """
    from sfumato.evaluation.address import Address
    from sfumato.evaluation.load.benchmark import Benchmark
    from sfumato.evaluation.load.prompts import Length, Workload, find_tokenizer
    from sfumato.serve.settings_file import parse_parameters

    if endpoint not in _ENDPOINTS:
        raise ConfigError(f"--endpoint {endpoint!r} is not one of {', '.join(_ENDPOINTS)}")
    _check_results(output, plot)
    draws = endpoint == "images"
    if output_len is None and dataset is None and not draws:
        output_len = _OUTPUT_LEN
    workload = Workload(
        dataset=dataset,
        input_length=Length(mean=input_len or (_IMAGE_WORDS if draws else _INPUT_LEN), spread=input_spread),
        output_length=None if output_len is None else Length(mean=output_len, spread=output_spread),
        prefix_len=prefix_len,
    )
    loads, targets = _loads(rate or [], concurrency or [], burstiness), _targets(goodput or [])
    asked = {"size": size, "num_inference_steps": steps} if draws else {"ignore_eos": ignore_eos or None}
    fields: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    fields |= parse_parameters("--extra-body", extra_body) or {}
    address = Address(_with_path(base_url), api_key, "--base-url")
    name = str(address.find_model(model)["id"])
    counter = None if draws else find_tokenizer(tokenizer, name)
    benchmark = Benchmark(
        address=address,
        endpoint=_endpoint(endpoint, name, fields, counter, previews),
        endpoint_name=endpoint,
        model=name,
        loads=loads,
        workload=workload,
        tokenizer=counter,
        num_requests=num_requests,
        num_warmup=warmup,
        timeout=timeout,
        seed=seed,
        targets=targets,
        settings={"extra_body": fields, "previews": previews if draws else None},
    )
    return _show(_run(benchmark), output, plot)


def _with_path(url: str) -> str:
    """Return a server's url with the path that OpenAI's clients expect, where it has none."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def _check_results(output: Path | None, plot: Path | None) -> None:
    """Raise ConfigError, before anything is measured, for what could not be written afterwards."""
    from sfumato.evaluation.drawing import require_plot
    from sfumato.evaluation.load.plot import check_path

    if plot is not None:
        require_plot()
        check_path(plot)
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.parent}")


def _endpoint(
    endpoint: str, model: str, fields: dict[str, Any], tokenizer: Tokenizer | None, previews: int
) -> Endpoint:
    from sfumato.evaluation.load.asking import ImageEndpoint, TextEndpoint

    if endpoint == "images":
        return ImageEndpoint(model, previews, fields)
    return TextEndpoint(model, endpoint == "chat", fields, tokenizer)


def _loads(rates: Sequence[str], concurrencies: Sequence[str], burstiness: float) -> tuple[Load, ...]:
    """Return the loads to measure: several rates or several concurrencies. Raises ConfigError."""
    from sfumato.evaluation.load.arrivals import Load

    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"--burstiness {burstiness:g} must be above 0")
    per_second = [_positive("--rate", text, float) for text in _split(rates)]
    open_at_once = [int(_positive("--concurrency", text, int)) for text in _split(concurrencies)]
    if not per_second:
        return tuple(Load(concurrency=each) for each in open_at_once or [_CONCURRENCY])
    if len(open_at_once) > 1:
        raise ConfigError(
            f"--concurrency {','.join(map(str, open_at_once))} with --rate is a limit of what is open; "
            "give one number"
        )
    limit = open_at_once[0] if open_at_once else None
    return tuple(
        Load(
            is_open=True,
            # JSON has no infinity.
            rate=None if math.isinf(each) else each,
            burstiness=burstiness,
            concurrency=limit,
        )
        for each in per_second
    )


def _targets(texts: Sequence[str]) -> dict[str, float]:
    """Return limits in seconds by name. Raises ConfigError."""
    from sfumato.evaluation.load.summary import TARGETS

    found = {}
    for text in _split(texts):
        name, _, limit = text.partition(":")
        if name not in TARGETS:
            raise ConfigError(f"--goodput {text!r}: {name!r} is not one of {', '.join(TARGETS)}")
        found[name] = _MILLISECONDS * _positive("--goodput", limit, float)
    return found


def _split(texts: Sequence[str]) -> list[str]:
    """Return values that are given one by one, in a row, or with commas."""
    return [value for text in texts for value in text.split(",") if value]


def _positive(option: str, text: str, kind: type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0:
        wanted = "a whole number of at least 1" if kind is int else "a number above 0"
        raise ConfigError(f"{option} {text!r} must be {wanted}")
    return value


def _run(benchmark: Benchmark) -> Report:
    """Run with a progress bar per load on standard error, in a terminal only."""
    from sfumato.evaluation.load.benchmark import run

    with _progress(benchmark) as on_progress:
        return run(benchmark, on_progress)


@contextmanager
def _progress(benchmark: Benchmark) -> Iterator[OnProgress]:
    errors = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        bars: dict[str, TaskID] = {}
        num_failed: dict[str, int] = {}

        def on_progress(load: Load, record: Record) -> None:
            name = load.label
            if name not in bars:
                bars[name] = progress.add_task(name, total=benchmark.num_requests, failed="")
                num_failed[name] = 0
            num_failed[name] += not record.is_ok
            failed = f"{num_failed[name]} failed" if num_failed[name] else ""
            progress.update(bars[name], advance=1, failed=failed)

        yield on_progress


def _show(report: Report, output: Path | None, plot: Path | None) -> int:
    """Print the tables, write the files, name failures; return the exit status: 1 if every request failed."""
    from sfumato.evaluation.load.plot import draw
    from sfumato.evaluation.load.report import run_tables, sweep_table, write_report

    console = Console()
    console.print(f"{report.model}, {report.endpoint}", style="bold", highlight=False)
    for run in report.runs:
        for table in run_tables(report, run):
            console.print(table)
    if len(report.runs) > 1:
        console.print(sweep_table(report))
    if output is not None:
        write_report(report, output)
        console.print(str(output), highlight=False, soft_wrap=True, markup=False)
    if plot is not None:
        draw(report, plot)
        console.print(str(plot), highlight=False, soft_wrap=True, markup=False)
    for run in report.runs:
        for reason, count in list(run.summary.errors.items())[:_SHOWN_ERRORS]:
            _notice(f"{run.load.label}: {count} requests failed: {' '.join(reason.split())}")
    has_answers = any(run.summary.num_failed < run.summary.num_requests for run in report.runs)
    return 0 if has_answers else _FAILED


def _notice(text: str) -> None:
    print(f"sfumato: {text}", file=sys.stderr, flush=True)
