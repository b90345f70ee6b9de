"""Starting the ranks that hold one model together: those of tensor parallelism, and those that share weights.

Under tensor parallelism rank 0 leads, with one process for each follower. Followers are spawned here,
or started by somebody else (torchrun) at a rendezvous that the configuration names.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.config import EngineConfig
from sfumato.core.protocols import Runner
from sfumato.engine.sync import Exchange, Peers
from sfumato.errors import ConfigError, EngineError
from sfumato.models.batch import KVStore
from sfumato.models.folder import Folder
from sfumato.models.graphs import Graphs
from sfumato.models.language_model import LanguageModel
from sfumato.models.weights import ProgressCallback, build_on_meta, load_model
from sfumato.parallel.bell import Bell
from sfumato.parallel.groups import START_SECONDS, Group, Rendezvous
from sfumato.parallel.lockstep import LockstepRunner
from sfumato.parallel.meeting import MeetingRanks
from sfumato.parallel.spawn import Spawned
from sfumato.parallel.tensor import Leader, TensorRanks
from sfumato.parallel.voting import VotedGraphs, WholeForward
from sfumato.text.batching import FedRow
from sfumato.text.orders import write_order

FOLLOWER = "sfumato.engine.follower"


def load_leader(
    config: EngineConfig,
    folder: Folder,
    *,
    dtype: torch.dtype,
    device: str,
    on_progress: ProgressCallback | None = None,
) -> Leader:
    """Start the followers, load rank 0's part beside them and wait until all are ready.

    Raises ConfigError where the model does not divide; EngineError where a follower does not get that far.
    """
    size = config.tensor_parallel
    if config.rank:
        raise ConfigError(f"rank {config.rank} of --tensor-parallel {size} follows; only rank 0 has requests")
    ranks = TensorRanks(0, size)
    check_divides(folder, "--tensor-parallel", size, lambda model: model.divide(ranks))
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device} is one device, and {size} ranks need one each; say cuda")
    own_device = device_of_rank(device, config)
    num_threads = threads_of_rank(config)
    if own_device == "cpu":
        torch.set_num_threads(num_threads)
    rendezvous, children = _start_followers(config, device, num_threads)
    try:
        model = load_model(
            folder,
            dtype=dtype,
            device=own_device,
            divide=lambda model: model.divide(ranks),
            on_progress=on_progress,
        )
        ranks.group = meet(rendezvous, config, own_device, children)
    except BaseException:
        children.kill()
        raise
    leader = Leader(model, ranks.group, children)
    children.on_death = leader.lose
    return leader


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """One of several ranks that share weights and have requests of their own.

    exchange: their agreement once a turn. whole: the forward that they record.
    """

    model: LanguageModel
    ranks: MeetingRanks
    bell: Bell
    exchange: Exchange
    whole: WholeForward

    def voted(self, graphs: Graphs | None) -> VotedGraphs | None:
        """Return the recorded forwards that all ranks replay together."""
        return None if graphs is None else VotedGraphs(self.model, self.ranks, graphs, self.whole)

    def joined(self, inner: Runner, graphs: VotedGraphs | None) -> tuple[Runner, Peers]:
        """Return a runner whose forwards keep step with those of the other ranks, and what agrees on them."""
        votes = (lambda plan: False) if graphs is None else graphs.may_replay
        runner = LockstepRunner(inner, self.model, self.ranks, self.bell.explain, graphs)
        return runner, Peers(self.ranks.rank, self.exchange, self.bell, votes)


def load_shared(
    config: EngineConfig,
    folder: Folder,
    *,
    dtype: torch.dtype,
    device: str,
    on_progress: ProgressCallback | None = None,
) -> SharedWeights:
    """Load this rank's part beside the other ranks, which somebody else starts, and wait for them.

    Raises ConfigError where the model does not divide; EngineError where another rank does not come.
    """
    size = config.data_parallel_attention
    ranks = MeetingRanks(config.rank, size)
    check_divides(folder, "--data-parallel-attention", size, lambda model: model.divide_meetings(ranks))
    device = device_of_rank(device, config)
    if device == "cpu":
        torch.set_num_threads(threads_of_rank(config))
    rendezvous = open_rendezvous(config)
    model = load_model(
        folder,
        dtype=dtype,
        device=device,
        divide=lambda model: model.divide_meetings(ranks),
        on_progress=on_progress,
    )
    ranks.group = meet(rendezvous, config, device)
    # Its own, because a forward may be under way while the next turn is agreed on.
    agreeing = Group(
        rendezvous.store,
        name="agreeing",
        rank=config.rank,
        size=size,
        device="cpu",
        seconds=config.rank_timeout,
    )
    bell = Bell.connect(rendezvous.store, config.rank, size)

    def exchange(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        rows = agreeing.all_gather(torch.tensor(numbers, dtype=torch.int64))
        return [tuple(row.tolist()) for row in rows]

    return SharedWeights(model, ranks, bell, exchange, WholeForward(model, ranks))


def _start_followers(config: EngineConfig, device: str, num_threads: int) -> tuple[Rendezvous, Spawned]:
    if config.rendezvous is not None:
        return open_rendezvous(config), Spawned(FOLLOWER, {})
    rendezvous = Rendezvous.host()
    followers = {
        f"tensor-parallel rank {rank} of {config.tensor_parallel}": msgspec.structs.replace(
            config,
            rank=rank,
            rendezvous=rendezvous.address,
            is_rendezvous_open=True,
            num_threads=num_threads,
            device=device_of_rank(device, msgspec.structs.replace(config, rank=rank)),
        )
        for rank in range(1, config.tensor_parallel)
    }
    return rendezvous, Spawned(
        FOLLOWER, {name: msgspec.json.encode(follower) for name, follower in followers.items()}
    )


def open_rendezvous(config: EngineConfig) -> Rendezvous:
    """Return the rendezvous that the configuration names; rank 0 opens it unless somebody else has."""
    assert config.rendezvous is not None
    if config.rank == 0 and not config.is_rendezvous_open:
        return Rendezvous.host_at(config.rendezvous)
    return Rendezvous.join(config.rendezvous, seconds=START_SECONDS)


def meet(rendezvous: Rendezvous, config: EngineConfig, device: str, children: Spawned | None = None) -> Group:
    """Wait until every rank has its part of the model, and connect them."""
    size = config.world_size

    def check() -> None:
        death = None if children is None else children.death()
        if death is not None:
            raise EngineError(f"{death}, before it was ready")

    rendezvous.meet("ready", config.rank, size, check=check, seconds=START_SECONDS)
    return Group(rendezvous.store, rank=config.rank, size=size, device=device, seconds=config.rank_timeout)


def check_divides(folder: Folder, option: str, size: int, divide: Callable[[LanguageModel], None]) -> None:
    """Raise ConfigError naming what of a model does not divide as an option asks, before anything is read."""
    try:
        build_on_meta(folder.config, divide)
    except ConfigError as error:
        raise ConfigError(f"{option} {size}: {error}") from error


def device_of_rank(device: str, config: EngineConfig) -> str:
    """Return the device of a rank: "cuda" gives out each machine's GPUs in order. Raises ConfigError."""
    if device != "cuda":
        return device
    found, size = torch.cuda.device_count(), config.world_size
    # All ranks are here, unless torchrun has put as many on each machine as it has GPUs.
    if size % found and size > found:
        raise ConfigError(f"{size} ranks need one CUDA device each, and this machine has {found}")
    # Replicas that are divided take their GPUs one behind another.
    first = config.replica * size if config.tensor_parallel > 1 else 0
    return f"cuda:{(first + config.rank) % found}"


def threads_of_rank(config: EngineConfig) -> int:
    """Return this rank's share of the CPU threads; ranks that others started know their own number."""
    if config.rendezvous is not None and config.num_threads is not None:
        return config.num_threads
    return max(1, (config.num_threads or torch.get_num_threads()) // config.world_size)


class Announcer:
    """Tells the followers of each forward of one engine, whose keys and values lie in a store of its own."""

    _numbers = itertools.count(1)

    def __init__(self, leader: Leader, store: KVStore, page_size: int) -> None:
        self._leader = leader
        self._store = next(self._numbers)
        self._page_size = page_size
        self._num_slots = store.keys[0].shape[0]
        # Several engines may use one loaded model; what one leaves behind, the next order tells.
        weakref.finalize(self, leader.forgotten.append, self._store)

    def __call__(self, fed: Sequence[FedRow], output_tokens: NDArray[np.int64]) -> None:
        """Describe the forward that the leader is about to make."""
        forgotten, self._leader.forgotten[:] = list(self._leader.forgotten), []
        self._leader.expect(
            write_order(
                fed,
                output_tokens,
                store=self._store,
                page_size=self._page_size,
                num_slots=self._num_slots,
                forgotten=forgotten,
            )
        )
