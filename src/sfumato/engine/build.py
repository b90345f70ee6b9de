"""Where the concrete classes are joined: a configuration becomes a model and the loop that serves it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfumato.cache.pages import PageCache
from sfumato.config import EngineConfig, memory_bytes
from sfumato.core.handover import Handover
from sfumato.core.messages import Gauges
from sfumato.core.protocols import Inbox, Outbox, WorkFactory
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request, Status
from sfumato.core.spec import Decoding
from sfumato.core.traits import ModelTraits
from sfumato.engine.ahead import Ahead
from sfumato.engine.attention import attention_for, check_attention
from sfumato.engine.lane import Lane
from sfumato.engine.limits import Limits
from sfumato.engine.loop import EngineLoop
from sfumato.engine.peering import MakeEndpoint, Peering, join_peers, open_peering
from sfumato.engine.peers import NoPeers
from sfumato.engine.prepared import PreparedInbox
from sfumato.engine.ranks import Announcer, SharedWeights, load_leader, load_shared
from sfumato.engine.recorded import graphs_for
from sfumato.engine.scheduler import Scheduler
from sfumato.engine.sync import Alone
from sfumato.errors import ConfigError
from sfumato.models.attending import Attention
from sfumato.models.batch import KVStore
from sfumato.models.folder import Folder, read_folder
from sfumato.models.fp8 import has_fp8
from sfumato.models.graphs import Graphs
from sfumato.models.language_model import LanguageModel
from sfumato.models.packed import has_bfloat16
from sfumato.models.weights import (
    ProgressCallback,
    build_on_meta,
    count_parameters,
    load_model,
    resolve_dtype,
)
from sfumato.parallel.tensor import Leader
from sfumato.text.decoding.registry import make_algorithm
from sfumato.text.door import TextDoor
from sfumato.text.grammars import Grammars
from sfumato.text.runner import Announce, TextModel, TextRunner

# KV memory that an engine takes by itself: this share of a CPU's memory, of a GPU's free memory.
_CPU_SHARE = 0.1
_GPU_SHARE = 0.85
# Of a CPU's memory, for weights in a wider dtype than the checkpoint's.
_WIDE_SHARE = 0.25
# Tokens per page where the context is cached token by token: a prefix is shared by whole pages.
_CAUSAL_PAGE = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory with its folder, traits and configuration."""

    config: EngineConfig
    folder: Folder
    traits: ModelTraits
    model: LanguageModel
    dtype: torch.dtype
    device: str
    leader: Leader | None = None
    shared: SharedWeights | None = None

    def close(self) -> None:
        """End the processes that hold the rest of the model, if there are any."""
        if self.leader is not None:
            self.leader.close()


def load(config: EngineConfig, on_progress: ProgressCallback | None = None) -> Loaded:
    """Read a checkpoint as configured. Raises ConfigError or CheckpointError."""
    config.check()
    if config.deterministic_rows is not None:
        raise ConfigError(
            f"--deterministic-rows {config.deterministic_rows} is for images; {config.model} writes text"
        )
    # Ranks of a replica take GPUs of their own; see `device_of_rank`.
    device = resolve_device(config.device, config.replica if config.tensor_parallel == 1 else 0)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder = read_folder(config.model, config.overrides())
    dtype = choose_dtype(config, folder, device)
    _check_quantization(config, folder, device)
    check_attention(config, device)
    traits = operator_defaults(config, folder.traits)
    leader = shared = None
    if config.tensor_parallel > 1:
        leader = load_leader(config, folder, dtype=dtype, device=device, on_progress=on_progress)
        model = leader.model
    elif config.data_parallel_attention > 1:
        shared = load_shared(config, folder, dtype=dtype, device=device, on_progress=on_progress)
        model = shared.model
    else:
        model = load_model(folder, dtype=dtype, device=device, on_progress=on_progress)
    use_device(model.device)
    return Loaded(
        config=config,
        folder=folder,
        traits=traits,
        model=model,
        dtype=dtype,
        device=str(model.device),
        leader=leader,
        shared=shared,
    )


def _check_quantization(config: EngineConfig, folder: Folder, device: str) -> None:
    """Raise ConfigError where no product takes weights in these eight bits."""
    kind = folder.quantization
    if kind == "int8" and (device != "cpu" or config.data_parallel_attention > 1):
        raise ConfigError(
            "quantization int8 is for CPUs, and does not go with --data-parallel-attention; on a GPU fp8 is"
        )
    if kind == "fp8" and not has_fp8(device):
        raise ConfigError(
            f"quantization fp8 needs a GPU of compute capability 8.9 or later, and the device is {device}; "
            "on a CPU int8 is"
        )
    if kind == "fp8" and config.world_size > 1:
        raise ConfigError("quantization fp8 does not go with --tensor-parallel, --data-parallel-attention")


def choose_dtype(config: EngineConfig, folder: Folder, device: str) -> torch.dtype:
    """Return the dtype of the weights: as configured, or the checkpoint's.

    For "auto" on a CPU that only imitates bfloat16 it is float32, where the weights then fill no more than a
    share of the memory.
    """
    dtype = resolve_dtype(config.dtype, folder.config)
    if config.dtype != "auto" or dtype is not torch.bfloat16 or device != "cpu" or has_bfloat16():
        return dtype
    num_bytes = (4 if folder.quantization is None else 1) * count_parameters(build_on_meta(folder.config)[1])
    return torch.float32 if num_bytes <= _WIDE_SHARE * memory_bytes() else dtype


def resolve_device(name: str, replica: int = 0) -> str:
    """Return "cuda" or "cpu" for "auto"; replicas take a GPU each, in turn.

    Raises ConfigError for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and replica and torch.cuda.is_available():
        return f"cuda:{replica % torch.cuda.device_count()}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA device is available here")
    if name != "cpu" and not name.startswith("cuda"):
        raise ConfigError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N")
    return name


def operator_defaults(config: EngineConfig, traits: ModelTraits) -> ModelTraits:
    """Put the operator's algorithm and parameters in place of the checkpoint's; they are checked at start."""
    from msgspec.structs import replace

    if config.algorithm is None:
        return traits
    make_algorithm(Decoding(algorithm=config.algorithm, parameters=config.parameters))
    return replace(traits, default_algorithm=config.algorithm, default_parameters=dict(config.parameters))


def build_loop(
    loaded: Loaded,
    inbox: Inbox,
    outbox: Outbox,
    *,
    make_endpoint: MakeEndpoint | None = None,
    recorder: Recorder = UNRECORDED,
) -> tuple[EngineLoop, TextDoor]:
    """Join a loaded model with pages, scheduler, runner and loop.

    make_endpoint: links to peers in this process; else those that the configuration names.
    """
    config, traits = loaded.config, loaded.traits
    is_causal = traits.context_granularity == 1
    page_size = config.page_size or (_CAUSAL_PAGE if is_causal else traits.block_length)
    if traits.has_exact_cache and not is_causal and traits.block_length % page_size:
        raise ConfigError(
            f"--page-size {page_size} does not divide the model's block length {traits.block_length}"
        )
    # In front of the pages, which fill what is left of a GPU's memory.
    attention = attention_for(config, loaded.model, loaded.dtype, page_size)
    num_pages = _num_pages(loaded, page_size)
    store = KVStore.allocate(
        shapes=loaded.model.kv_shapes,
        num_slots=num_pages * page_size,
        dtype=loaded.dtype,
        device=loaded.device,
    )
    leader = loaded.leader
    return assemble(
        loaded.model if leader is None else leader,
        traits,
        inbox,
        outbox,
        store=store,
        page_size=page_size,
        num_pages=num_pages,
        limits=config.limits,
        chunk_bytes=config.max_chunk_bytes,
        depth=_depth(config, loaded.device),
        is_ahead=_is_ahead(config, loaded.device),
        announce=None if leader is None else Announcer(leader, store, page_size),
        shared=loaded.shared,
        peering=open_peering(loaded, store, page_size, num_pages, make_endpoint),
        grammars=_grammars(loaded),
        recorder=recorder,
        graphs=graphs_for(
            config,
            loaded.model,
            traits,
            store,
            page_size,
            whole=None if loaded.shared is None else loaded.shared.whole,
        ),
        attention=attention,
    )


def _grammars(loaded: Loaded) -> Grammars | None:
    """Return what makes grammars of a model with a tokenizer."""
    if not loaded.folder.has_tokenizer:
        return None
    traits = loaded.traits
    return Grammars(loaded.folder.path, vocab_size=traits.vocab_size, end_ids=traits.eos_token_ids)


def assemble(
    model: TextModel,
    traits: ModelTraits,
    inbox: Inbox,
    outbox: Outbox,
    *,
    store: KVStore | None,
    page_size: int,
    num_pages: int,
    limits: Limits,
    chunk_bytes: int,
    depth: int = 0,
    is_ahead: bool = False,
    announce: Announce | None = None,
    shared: SharedWeights | None = None,
    peering: Peering | None = None,
    grammars: Grammars | None = None,
    recorder: Recorder = UNRECORDED,
    graphs: Graphs | None = None,
    attention: Attention = Attention(),
    clock: Callable[[], float] = time.monotonic,
) -> tuple[EngineLoop, TextDoor]:
    """Join a model that is there already; tests bring their own model and clock.

    is_ahead: at depth 1 launches begin before the outcome of the one before is read. graphs: recorded
    forwards. attention: what computes it over pages.
    """
    pages = PageCache(num_pages, page_size)
    scheduler = Scheduler(limits, pages, clock, recorder)
    voted = None if shared is None else shared.voted(graphs)
    runner = TextRunner(
        model,
        traits,
        store=store,
        page_size=page_size,
        chunk_bytes=chunk_bytes,
        announce=announce,
        is_lockstep=shared is not None,
        recorder=recorder,
        graphs=graphs if shared is None else voted,
        attention=attention,
    )
    door = TextDoor(
        traits=traits,
        page_size=page_size,
        num_pages=num_pages,
        max_logits_bytes=limits.max_logits_bytes,
        max_score_tokens=limits.max_prefill_tokens,
        grammars=grammars,
    )
    if grammars is not None and inbox.filenos() and shared is None:
        # Messages from elsewhere may wait for a grammar without anybody's waiting for them.
        inbox = PreparedInbox(inbox, grammars)
    handover: Handover = NoPeers()
    make_work: WorkFactory = door
    if peering is not None:
        handover = join_peers(peering, scheduler, pages, traits, clock)
        inbox = peering.inbox(inbox)
        make_work = peering.door(door)

    def gauges(live: dict[str, Request]) -> Gauges:
        running = sum(request.status is not Status.WAITING for request in live.values())
        pool, tally = pages.pool, handover.tally()
        return Gauges(
            waiting=len(live) - running,
            running=running,
            pages_free=pool.num_free,
            pages_leased=pool.num_leased,
            pages_cached=pool.num_cached,
            retractions=scheduler.num_retractions,
            pages_draining=tally.draining_pages,
            arrived=tally.arrived,
            handovers_failed=tally.failed,
        )

    launching, sync = (runner, Alone()) if shared is None else shared.joined(runner, voted)
    loop = EngineLoop(
        inbox=inbox,
        outbox=outbox,
        scheduler=scheduler,
        lanes=(
            Lane(
                launching,
                sync,
                depth=depth,
                prepare=_same_threads(model.device),
                ahead=Ahead(runner, recorder) if is_ahead else None,
                recorder=recorder,
            ),
        ),
        make_work=make_work,
        gauges=gauges,
        handover=handover,
        clock=clock,
    )
    return loop, door


def _depth(config: EngineConfig, device: str) -> int:
    """Return how many steps the loop runs ahead of the outcomes that it knows."""
    if config.overlap == "auto":
        # On a CPU the host's share is so small that hiding it gains nothing (`benchmarks/modes.py`).
        return int(device != "cpu")
    return int(config.overlap != "off")


def _is_ahead(config: EngineConfig, device: str) -> bool:
    """Whether launches begin before the outcome of the one before is read: ranks that follow need it."""
    is_alone = config.tensor_parallel == 1 and config.data_parallel_attention == 1
    return is_alone and (config.overlap == "device" or (config.overlap == "auto" and device != "cpu"))


def _same_threads(device: torch.device) -> Callable[[], None]:
    """Return what gives another thread's forwards this one's number of CPU threads, and its GPU."""
    num_threads = torch.get_num_threads()

    def prepare() -> None:
        torch.set_num_threads(num_threads)
        use_device(device)

    return prepare


def use_device(device: torch.device) -> None:
    """Let this thread's kernels run where their tensors are: Triton asks for the current GPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _num_pages(loaded: Loaded, page_size: int) -> int:
    """Return how many pages the KV memory holds."""
    traits, config = loaded.traits, loaded.config
    numbers = sum(heads * width for heads, width in loaded.model.kv_shapes)
    page_bytes = 2 * loaded.dtype.itemsize * numbers * page_size
    wanted = config.limits.max_running_requests * -(-traits.context_length // page_size)
    if config.kv_memory is not None:
        num_pages = config.kv_memory // page_bytes
        if num_pages < 2:
            raise ConfigError(
                f"--kv-memory {config.kv_memory} holds less than two pages of {page_bytes} bytes"
            )
        return num_pages
    if loaded.device == "cpu":
        # All ranks are on this machine; a GPU is one rank's own.
        num_sharing = max(config.num_replicas, config.data_parallel_attention) * config.tensor_parallel
        room = int(memory_bytes() * _CPU_SHARE)
    else:
        room = int(torch.cuda.mem_get_info(loaded.device)[0] * _GPU_SHARE)
        num_sharing = -(-config.num_replicas // torch.cuda.device_count())
    return max(2, min(wanted, int(room * config.memory_share / num_sharing) // page_bytes))
