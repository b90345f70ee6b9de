"""Tensor parallelism: rank 0 leads every forward, the others hold their part of the model and follow.

A follower has no loop, no scheduler and no request: it waits for a command, makes the same forward from the
same rows, and takes part in what the leader asks of the model afterwards. Commands go over gloo, tensors as
the group sends them.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import EngineError
from sfumato.models.batch import Batch
from sfumato.models.language_model import LanguageModel
from sfumato.models.split import longest_span
from sfumato.parallel.groups import Group

# So many beats may be late before the bound of the group is reached.
_BEATS_PER_BOUND = 5


class TensorRanks:
    """Ranks that run every forward together on the same tokens; the group is there once they have met."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.group: Group | None = None

    def _group(self) -> Group:
        if self.group is None:
            raise EngineError(f"rank {self.rank} of {self.size} was used before the ranks met")
        return self.group

    def enter(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return the parts: everybody has the same tokens."""
        return parts

    def leave(self, partial: Tensor) -> Tensor:
        """Return the sum of all ranks' partial results."""
        return self.sum(partial)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, bitwise the same on every rank; x is used up."""
        return self._group().sum_(x.contiguous())

    def join(self, part: Tensor, total: int) -> Tensor:
        """Return all parts [M, total] of the last axis on rank 0, the part itself elsewhere."""
        widest = longest_span(total, self.size)
        parts = self._group().gather(F.pad(part, (0, widest - part.shape[-1])))
        if not parts:
            return part
        bounds = [total * rank // self.size for rank in range(self.size + 1)]
        widths = [stop - start for start, stop in itertools.pairwise(bounds)]
        return torch.cat([piece[:, :width] for piece, width in zip(parts, widths, strict=True)], dim=-1)


class Forward(msgspec.Struct, frozen=True, tag="forward"):
    """Make the forward that an order describes; what an order is, is not decided here."""

    order: bytes


class Head(msgspec.Struct, frozen=True, tag="head"):
    """Compute the logits of `count` hidden states, which follow."""

    count: int


class Soft(msgspec.Struct, frozen=True, tag="soft"):
    """Compute the expected embeddings under `count` distributions, which follow."""

    count: int


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Nothing runs; say that you are there."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """The leader has stopped."""


Command = Forward | Head | Soft | Beat | End

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class Children(Protocol):
    """Follower processes that the leader has started, if it has."""

    def death_soon(self) -> str | None: ...

    def end(self) -> None: ...

    def kill(self) -> None: ...


class Leader:
    """Rank 0's model for the runner: each call is made by all ranks, in the order of the calls here.

    on_lost: called once, from any thread, with what happened to a rank that is lost.
    forgotten: numbers of stores that no engine uses any more, for the next order.
    """

    def __init__(self, model: LanguageModel, group: Group, children: Children) -> None:
        self.model = model
        self.on_lost: Callable[[str], None] | None = None
        self.forgotten: list[int] = []
        self._group = group
        self._children = children
        self._order: bytes | None = None
        self._lost: str | None = None
        self._lock, self._losing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="follower-beat", daemon=True)
        self._beating.start()
        # The interpreter's way out and gloo's threads do not go together.
        atexit.register(self.close)

    @property
    def device(self) -> torch.device:
        """Return where the leader's part of the weights is."""
        return self.model.device

    def expect(self, order: bytes) -> None:
        """Keep the order that describes the next forward."""
        self._order = order

    def hidden(self, batch: Batch) -> Tensor:
        """Return the hidden states [P, width] of a batch, made from the same rows as the order."""
        order, self._order = self._order, None
        if order is None:
            raise EngineError("a forward of several ranks began without an order for the followers")
        with self._together(Forward(order)):
            return self.model.hidden(batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [M, V] of hidden states [M, width]."""
        with self._together(Head(len(hidden))):
            return self.model.head(self._group.broadcast_(hidden.contiguous()))

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """Return the expected embeddings [M, width] under probabilities [M, V]."""
        with self._together(Soft(len(probabilities))):
            narrow = probabilities.to(self.model.dtype).contiguous()
            return self.model.soft_embedding(self._group.broadcast_(narrow))

    @contextlib.contextmanager
    def _together(self, command: Command) -> Iterator[None]:
        """Do with all ranks what a command says; whatever breaks the group is told by who is gone."""
        with self._lock:
            if self._lost is not None:
                raise EngineError(self._lost)
            try:
                self._group.announce(_encoder.encode(command))
                yield
            except EngineError as error:
                self.lose(self._children.death_soon() or str(error))
                raise EngineError(self._lost) from error

    def lose(self, message: str) -> None:
        """Note that a rank is gone, and end the others: nothing runs any more."""
        with self._losing:
            if self._closing.is_set() or self._lost is not None:
                return
            self._lost = message
        self._children.kill()
        if self.on_lost is not None:
            self.on_lost(message)

    def _beat(self) -> None:
        """Ask the followers from time to time whether they are there; a forward asks by itself."""
        while not self._closing.wait(self._group.seconds / _BEATS_PER_BOUND):
            if not self._lock.acquire(blocking=False):
                continue
            try:
                if self._closing.is_set() or self._lost is not None:
                    return
                self._group.announce(_encoder.encode(Beat()))
                self._group.sum_(torch.ones(1))
            except EngineError as error:
                self.lose(self._children.death_soon() or str(error))
                return
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the followers; nothing can be run afterwards."""
        if self._closing.is_set():
            return
        self._closing.set()
        atexit.unregister(self.close)
        with self._lock:
            if self._lost is None:
                self._lost = "the ranks were closed"
                # Whoever does not listen any more is ended below.
                with contextlib.suppress(EngineError):
                    self._group.announce(_encoder.encode(End()))
        self._beating.join()
        self._children.end()


def follow(model: LanguageModel, group: Group, forward: Callable[[bytes], None]) -> None:
    """Do what the leader commands until it stops. forward: makes the forward of an order.

    Raises EngineError when the leader is gone, or has been silent for longer than the group's bound.
    """
    while not isinstance(command := _decoder.decode(group.listen()), End):
        try:
            _obey(command, model, group, forward)
        except EngineError:
            raise
        except Exception as error:
            # The leader has met the same error in the same place, and has told the request that caused it.
            print(f"rank {group.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _obey(command: Command, model: LanguageModel, group: Group, forward: Callable[[bytes], None]) -> None:
    match command:
        case Forward(order=order):
            forward(order)
        case Head(count=count):
            hidden = torch.empty(count, model.shape.width, dtype=model.dtype, device=model.device)
            model.head(group.broadcast_(hidden))
        case Soft(count=count):
            told = torch.empty(count, model.shape.vocab_size, dtype=model.dtype, device=model.device)
            model.soft_embedding(group.broadcast_(told))
        case Beat():
            group.sum_(torch.ones(1))
