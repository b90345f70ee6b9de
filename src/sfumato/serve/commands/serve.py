"""`sfumato serve`: models behind the OpenAI API."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from sfumato.config import EngineConfig
from sfumato.engine.profile_config import DEFAULT_START, DEFAULT_STEPS, ProfileConfig
from sfumato.engine.torchrun import is_torchrun, placed
from sfumato.engine.wire import EngineInfo, Loading
from sfumato.errors import ConfigError
from sfumato.serve.commands import options, peer_options
from sfumato.serve.launch import Planned, share_out
from sfumato.serve.settings import ServerSettings
from sfumato.serve.settings_file import ModelSettings, parse_bytes, parse_parameters, read_settings

if TYPE_CHECKING:
    from sfumato.serve.registry import Registry

_ENGINE = "Engine"
_PROFILE = "Profile"
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
# Ended by a signal before anything was served.
_INTERRUPTED = 130


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Embedded names, folders or hub ids (owner/name). Without any: all embedded models.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SFUMATO_API_KEY",
            help="Key that clients must send; repeatable. Without any the door is open.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call a model; once per MODEL, in their order."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings per model, which go before the options here: "
            "models: {NAME: {algorithm: ..., algorithm-parameters: {...}, kv-memory: 1G}}."
        ),
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish after Ctrl-C.")
    ] = 60.0,
    health_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that an engine may take to answer /health.")
    ] = 5.0,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(_LOG_LEVELS)}.")] = "warning",
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    mask_token_id: options.MaskTokenId = None,
    eot_token_id: options.EotTokenId = None,
    context_length: options.ContextLength = None,
    algorithm: options.Algorithm = None,
    algorithm_parameters: options.AlgorithmParameters = None,
    block_length: options.BlockLength = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of KV pages, as 512M or 2G, shared out between the models.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    page_size: Annotated[
        int | None,
        typer.Option(help="Tokens per KV page. Default: the model's block length.", rich_help_panel=_ENGINE),
    ] = None,
    max_running_requests: Annotated[
        int | None,
        typer.Option(
            help="Requests that are denoised at the same time.", rich_help_panel=_ENGINE, show_default="64"
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="separate: a step prefills or denoises; mixed: both in one forward.",
            rich_help_panel=_ENGINE,
            show_default="separate",
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="fair: every request in every step; shortest: least remaining work first.",
            rich_help_panel=_ENGINE,
            show_default="fair",
        ),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="on: a step is planned while the one before runs; device: it is launched before that one's "
            "outcome is read; off; auto: off on a CPU, device on a GPU.",
            rich_help_panel=_ENGINE,
            show_default="auto",
        ),
    ] = None,
    graphs: Annotated[
        str | None,
        typer.Option(
            help="on: steps of one shape are recorded once and replayed (CUDA graphs); off; auto: on a GPU.",
            rich_help_panel=_ENGINE,
            show_default="auto",
        ),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            help="triton: our kernels; flash-attn, flashinfer: what is installed, for steps that are not "
            "recorded; torch; auto: triton on a GPU.",
            rich_help_panel=_ENGINE,
            show_default="auto",
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="int8 (CPU) or fp8 (GPU): weights of all layers in eight bits, made while loading.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    data_parallel: Annotated[
        int | None,
        typer.Option(
            help="Engines per model; a request goes where its prefix is, or to the least busy.",
            rich_help_panel=_ENGINE,
            show_default="1",
        ),
    ] = None,
    data_parallel_attention: Annotated[
        bool | None,
        typer.Option(
            "--data-parallel-attention",
            help="These engines share the weights of the experts, or else of the MLPs, and step together.",
            rich_help_panel=_ENGINE,
            show_default="off",
        ),
    ] = None,
    max_prefill_tokens: Annotated[
        int | None,
        typer.Option(help="Prompt tokens per forward.", rich_help_panel=_ENGINE, show_default="2048"),
    ] = None,
    denoise_every: Annotated[
        int | None,
        typer.Option(
            help="However many prompts wait, at least every so many steps denoises.",
            rich_help_panel=_ENGINE,
            show_default="4",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes, one per GPU, that hold a model together; also under torchrun.",
            rich_help_panel=_ENGINE,
            show_default="1",
        ),
    ] = None,
    rank_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that one such process may keep the others waiting before the engine ends.",
            rich_help_panel=_ENGINE,
            show_default="15",
        ),
    ] = None,
    max_step_rows: options.MaxStepRows = None,
    max_latent_bytes: options.MaxLatentBytes = None,
    deterministic_rows: options.DeterministicRows = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a torch profiler trace of some steps there; opens /start_profile and /stop_profile.",
            rich_help_panel=_PROFILE,
        ),
    ] = None,
    profile_steps: Annotated[
        int, typer.Option(help="How many steps of each engine are recorded.", rich_help_panel=_PROFILE)
    ] = DEFAULT_STEPS,
    profile_start: Annotated[
        int, typer.Option(help="Behind how many others.", rich_help_panel=_PROFILE)
    ] = DEFAULT_START,
    disaggregate: peer_options.Disaggregate = None,
    role: peer_options.Role = "both",
    listen: peer_options.Listen = None,
    peers: peer_options.Peers = None,
    peer_secret: peer_options.PeerSecret = None,
    peer_secret_file: peer_options.PeerSecretFile = None,
    peer_transport: peer_options.PeerTransport = "sockets",
    peer_timeout: peer_options.PeerTimeout = 5.0,
    prefill_timeout: peer_options.PrefillTimeout = 30.0,
) -> int:
    """Serve models behind the OpenAI API: chat, completions, images, videos, streaming.

    Each MODEL runs in an engine process of its own; memory and CPU threads are shared out between them.
    Ctrl-C once finishes what is running, Ctrl-C twice ends it.
    """
    if log_level not in _LOG_LEVELS:
        raise ConfigError(f"--log-level {log_level!r} is not one of {', '.join(_LOG_LEVELS)}")
    general = ModelSettings(
        dtype=dtype,
        device=device,
        page_size=page_size,
        algorithm=algorithm,
        algorithm_parameters=parse_parameters("--algorithm-parameters", algorithm_parameters),
        block_length=block_length,
        mask_token_id=mask_token_id,
        eot_token_id=eot_token_id,
        context_length=context_length,
        policy=policy,
        order=order,
        overlap=overlap,
        graphs=graphs,
        attention_backend=attention_backend,
        quantization=quantization,
        data_parallel=data_parallel,
        data_parallel_attention=data_parallel_attention,
        max_running_requests=max_running_requests,
        max_prefill_tokens=max_prefill_tokens,
        denoise_every=denoise_every,
        max_step_rows=max_step_rows,
        max_latent_bytes=max_latent_bytes,
        deterministic_rows=deterministic_rows,
        tensor_parallel=tensor_parallel,
        rank_timeout=rank_timeout,
    )
    peering = peer_options.peer_config(
        role=role,
        listen=listen,
        peers=peers,
        secret=peer_secret,
        secret_file=peer_secret_file,
        transport=peer_transport,
        silence_seconds=peer_timeout,
        prefill_seconds=prefill_timeout,
    )
    chosen = _plan(models or [], served_model_name or [], general, config)
    recorded = (
        None
        if profile is None
        else ProfileConfig(folder=str(profile.absolute()), num_steps=profile_steps, skip=profile_start)
    )
    pools = peer_options.pool_sizes(disaggregate, peering, len(chosen))
    planned = share_out(
        [each.with_peers(peering, pools).with_profile(recorded) for each in chosen],
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory"),
        num_threads=threads,
    )
    if is_torchrun(os.environ):
        planned = [Planned(placed(_only(planned).config, os.environ), _only(planned).name)]
        if planned[0].config.rank > 0:
            return _follow(planned[0].config)
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(key for key in api_key or () if key),
        health_timeout=health_timeout,
        drain_timeout=drain_timeout,
        log_level=log_level,
        has_profile=recorded is not None,
    )
    return _run(planned, settings)


def _only(planned: Sequence[Planned]) -> Planned:
    """Return the one model that ranks of torchrun's can hold."""
    if len(planned) != 1:
        raise ConfigError(f"torchrun starts the ranks of one model, and {len(planned)} are to be served")
    return planned[0]


def _follow(config: EngineConfig) -> int:
    """Be a rank without a front door until rank 0's engine has ended."""
    # Imported here, because it loads torch, which the front door does without.
    from sfumato.engine.follower import run_follower

    config.check()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Rank 0 finishes what is running and needs this rank for it; then both end.
        signal.signal(number, signal.SIG_IGN)
    run_follower(config)
    return 0


def _plan(
    models: Sequence[str], names: Sequence[str], general: ModelSettings, config: Path | None
) -> list[Planned]:
    """Return the engines to start: the models named here, else the file's, else the embedded default ones."""
    per_model = {} if config is None else read_settings(config)
    if not models and per_model:
        models = list(per_model)
    if not models:
        # Imported only where it is needed, as it takes a while.
        from sfumato.models.folder import default_models, embedded_pipelines

        has_diffusers = importlib.util.find_spec("diffusers") is not None
        models = [*default_models(), *(embedded_pipelines() if has_diffusers else [])]
    strangers = [model for model in per_model if model not in models]
    if strangers:
        raise ConfigError(
            f"--config {config}: model {strangers[0]!r} is not served (served: {', '.join(models)})"
        )
    if names and len(names) != len(models):
        raise ConfigError(f"{len(names)} --served-model-name for {len(models)} models; give one for each")
    planned = []
    for index, model in enumerate(models):
        settings = per_model.get(model, ModelSettings()).over(general)
        each = settings.planned(model)
        planned.append(dataclasses.replace(each, name=names[index]) if names else each)
    return planned


def _run(planned: Sequence[Planned], settings: ServerSettings) -> int:
    """Serve, with a progress bar while models load and a banner when the door is open."""
    from sfumato.serve.prefill import run_prefill
    from sfumato.serve.server import run_server

    errors = Console(stderr=True)
    # A prompt beyond the context is refused with a message of our own; the tokenizer warns trainers.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    with ExitStack() as stack:
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=errors,
                transient=True,
                disable=not errors.is_terminal,
            )
        )
        bars: dict[str, TaskID] = {
            each.label: progress.add_task(f"loading {each.label}", total=None) for each in planned
        }

        def on_progress(label: str, loading: Loading) -> None:
            total = loading.num_bytes * loading.total // max(1, loading.done)
            progress.update(bars[label], completed=loading.num_bytes, total=total)

        def on_ready(registry: Registry, port: int) -> None:
            from sfumato.serve.commands.banner import print_banner

            progress.stop()
            print_banner(Console(), registry, settings, port)

        def on_prefill(info: EngineInfo) -> None:
            progress.stop()
            print(f"Sfumato prefills {info.name} for peers at {info.peer_address}", flush=True)

        if planned[0].config.peering.role == "prefill":
            prefilling = run_prefill(
                planned[0],
                drain_timeout=settings.drain_timeout,
                on_progress=on_progress,
                on_ready=on_prefill,
            )
            return 0 if asyncio.run(prefilling) else _INTERRUPTED
        has_served = asyncio.run(
            run_server(planned, settings, on_progress=on_progress, on_ready=on_ready, on_notice=_notice)
        )
    return 0 if has_served else _INTERRUPTED


def _notice(text: str) -> None:
    print(f"sfumato: {text}", file=sys.stderr, flush=True)
