"""Joins an image pipeline with the loop: the same scheduler, three lanes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace

from sfumato.cache.pages import PageCache
from sfumato.config import EngineConfig
from sfumato.core.handover import Handover
from sfumato.core.messages import Gauges
from sfumato.core.plan import RowKind, StepPlan
from sfumato.core.protocols import Inbox, Outbox, WorkFactory
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request, Status
from sfumato.core.traits import ImageTraits
from sfumato.engine.image_peers import (
    MakeImageEndpoint,
    image_layout,
    join_image_peers,
    open_image_endpoint,
)
from sfumato.engine.lane import Lane
from sfumato.engine.limits import Limits
from sfumato.engine.loop import EngineLoop
from sfumato.engine.peer_config import HELPING
from sfumato.engine.peering import PeeredInbox, closed_door
from sfumato.engine.peers import NoPeers
from sfumato.engine.recorded import record_for
from sfumato.engine.scheduler import Scheduler
from sfumato.engine.step_times import UNLIMITED
from sfumato.engine.sync import Alone
from sfumato.errors import ConfigError
from sfumato.image.door import ImageDoor
from sfumato.image.families.protocol import Family
from sfumato.image.folder import load_family, read_defaults
from sfumato.image.runner import DecodeRunner, DenoiseRunner, EncodeRunner
from sfumato.models.folder import name_of

# On a CPU two threads that compute at one time slow each other down: what is shorter than a step is run
# between two of them. Everywhere so much is encoded or decoded together.
_SHORT_PIXELS = 128 * 128
# Image requests know how many steps they have left, and steps of a few rows are near the full rate: with less
# of it than text the shortest are done sooner, and no throughput is lost against one request at a time.
_RATE_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """A pipeline in memory with its adapter and traits."""

    config: EngineConfig
    name: str
    path: str
    family: Family
    traits: ImageTraits

    @property
    def num_parameters(self) -> int:
        """Return the parameters of all of its components."""
        models = [
            part for part in self.family.pipeline.components.values() if isinstance(part, torch.nn.Module)
        ]
        return sum(parameter.numel() for model in models for parameter in model.parameters())


def load_pipeline(config: EngineConfig, path: Path, device: str) -> LoadedPipeline:
    """Load a pipeline as configured. Raises ConfigError or CheckpointError."""
    _check(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    name = name_of(config.model)
    family = load_family(path, name=name, dtype=config.dtype, device=device)
    traits = replace(family.traits(), **read_defaults(path))
    return LoadedPipeline(config=config, name=name, path=str(path), family=family, traits=traits)


def hide_progress_bars() -> None:
    """Keep diffusers and transformers from drawing bars on standard error while they load."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        from diffusers.utils.logging import disable_progress_bar
    except ImportError:
        # Loading says what to install.
        return
    disable_progress_bar()


def _check(config: EngineConfig) -> None:
    """Raise ConfigError for what only text models have."""
    asked = {
        "--tensor-parallel": config.tensor_parallel > 1,
        "--data-parallel-attention": config.data_parallel_attention > 1,
        "--algorithm": config.algorithm is not None,
        "--block-length": config.block_length is not None,
        "--page-size": config.page_size is not None,
        "--mask-token-id": config.mask_token_id is not None,
        "--eot-token-id": config.eot_token_id is not None,
        "--context-length": config.context_length is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"{option} is for language models; {config.model} draws images")


def build_image_loop(
    loaded: LoadedPipeline,
    inbox: Inbox,
    outbox: Outbox,
    *,
    make_endpoint: MakeImageEndpoint | None = None,
    clock: Callable[[], float] = time.monotonic,
    recorder: Recorder = UNRECORDED,
) -> tuple[EngineLoop, ImageDoor]:
    """Join a pipeline with scheduler, lanes, peers and loop.

    make_endpoint: links to engines of this process; else those that the configuration names.
    """
    config, family = loaded.config, loaded.family
    # Of images, rows and latents are counted; how many tokens a row has says how long it takes.
    limits: Limits = replace(config.limits, max_step_tokens=UNLIMITED)
    scheduler = Scheduler(
        limits, PageCache(1, 1), clock, recorder, rate_share=_RATE_SHARE, stage_tokens=_SHORT_PIXELS
    )
    door = ImageDoor(
        family,
        max_latent_bytes=limits.max_latent_bytes,
        max_rows=limits.max_step_rows,
        is_deterministic=config.deterministic_rows is not None,
    )
    is_cpu = family.device.type == "cpu"

    def is_short(plan: StepPlan) -> bool:
        return is_cpu and sum(row.cost.tokens for row in plan.rows) <= _SHORT_PIXELS

    threads = partial(torch.set_num_threads, torch.get_num_threads())

    def lane(runner: EncodeRunner | DenoiseRunner | DecodeRunner, kind: RowKind, depth: int) -> Lane:
        is_beside = kind is not RowKind.DENOISE
        return Lane(
            runner,
            Alone(),
            depth=depth,
            prepare=threads,
            kinds=frozenset({kind}),
            is_beside=is_beside,
            is_short=is_short,
            recorder=recorder,
        )

    # The stages come first, so that what they make takes a step in the same turn.
    lanes = (
        lane(EncodeRunner(family, recorder=recorder), RowKind.ENCODE, 1),
        lane(
            DecodeRunner(
                family,
                together_pixels=0 if config.deterministic_rows is not None else _SHORT_PIXELS,
                recorder=recorder,
            ),
            RowKind.DECODE,
            1,
        ),
        lane(
            DenoiseRunner(
                family,
                num_rows=config.deterministic_rows,
                recorder=recorder,
                record=record_for(config, family.device),
            ),
            RowKind.DENOISE,
            int(config.overlap in ("on", "device")),
        ),
    )

    def gauges(live: dict[str, Request]) -> Gauges:
        running = sum(request.status is not Status.WAITING for request in live.values())
        return Gauges(
            waiting=len(live) - running,
            running=running,
            pages_free=0,
            pages_leased=0,
            pages_cached=0,
            retractions=scheduler.num_retractions,
            arrived=handover.tally().arrived,
            handovers_failed=handover.tally().failed,
        )

    handover: Handover = NoPeers()
    make_work: WorkFactory = door
    layout = image_layout(loaded.name, Path(loaded.path), str(family.dtype), config.peering.transport)
    endpoint = open_image_endpoint(config.peering, layout, make_endpoint)
    if endpoint is not None:
        handover = join_image_peers(config.peering, endpoint, door, clock)
        scheduler.takes = handover.takes
        inbox = PeeredInbox(inbox, endpoint.mailbox)
        make_work = closed_door if config.peering.role in HELPING else door
    loop = EngineLoop(
        inbox=inbox,
        outbox=outbox,
        scheduler=scheduler,
        lanes=lanes,
        make_work=make_work,
        gauges=gauges,
        handover=handover,
        clock=clock,
    )
    return loop, door
