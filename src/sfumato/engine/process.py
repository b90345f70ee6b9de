"""The engine in its own process: the same loop, with its inbox and outbox on ZeroMQ sockets.

Started by `engine/client.py` as `python -m sfumato.engine.process FOLDER`, where the sockets lie in FOLDER,
with its configuration as one line of JSON on stdin. The pipe stays open while the parent lives: its end is
that of this process.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
from zmq.constants import PollEvent, SocketType
from zmq.sugar.context import Context
from zmq.sugar.poll import Poller

from sfumato.config import EngineConfig
from sfumato.core.messages import Message, Turn
from sfumato.core.recording import UNRECORDED
from sfumato.engine.wire import (
    Command,
    EngineInfo,
    Loading,
    PeersCommand,
    ProfileCommand,
    Profiled,
    StartFailure,
    address,
    decode_message,
    encode,
)
from sfumato.errors import ConfigError, EngineError, SfumatoError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    # These load torch, before which this process sets limits that torch reads.
    from sfumato.core.handover import Handover
    from sfumato.core.traits import ModelTraits
    from sfumato.engine.loop import EngineLoop
    from sfumato.engine.profile import Profile
    from sfumato.parallel.bell import Bell

# The last turn must reach the parent before this process goes; one that is gone is waited for no longer.
_LINGER_MILLISECONDS = 2000
# oneDNN keeps a compiled kernel per shape, about 0.3 MiB each, and ideep another record of it: with their own
# limits of 1024 a service with steps of many sizes grows by 700 MiB. Read when torch is loaded.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
# Reported at most once per so many bytes: a large checkpoint has thousands of small tensors.
_PROGRESS_BYTES = 8 << 20


class SocketInbox:
    """Messages from a socket; on_command: takes what is not for the loop."""

    def __init__(self, socket: Any, on_command: Callable[[Command], None], bell: Bell | None = None) -> None:
        self._socket = socket
        self._on_command = on_command
        self._bell = bell

    def filenos(self) -> list[int]:
        """Return what becomes readable when a message may have come, or another rank rings."""
        bells = [] if self._bell is None else [peer.fileno() for peer in self._bell.sockets]
        return [self._socket.fileno(), *bells]

    @property
    def is_called(self) -> bool:
        """Whether another rank has rung for a turn that has not been made here."""
        return self._bell is not None and self._bell.is_rung

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        """Return all messages that are there; sleeps in the kernel where it may wait."""
        timeout = None if wait_seconds is None else math.ceil(wait_seconds * 1000)
        if self._bell is not None:
            sleep(self._socket, self._bell, wait_seconds)
            timeout = 0
        messages: list[Message] = []
        while self._socket.poll(timeout):
            match decode_message(self._socket.recv()):
                case ProfileCommand() | PeersCommand() as command:
                    self._on_command(command)
                case message:
                    messages.append(message)
            timeout = 0
        return messages


def sleep(socket: Any, bell: Bell, seconds: float | None) -> None:
    """Wait until a socket is readable or the bell rings, at most so long; raises what the bell raises."""
    poller = Poller()
    for readable in (socket, *bell.sockets):
        poller.register(readable, PollEvent.POLLIN)
    end = math.inf if seconds is None else time.monotonic() + seconds
    bell.read()
    while not bell.is_rung and not socket.poll(0) and (left := end - time.monotonic()) > 0:
        poller.poll(None if left == math.inf else math.ceil(left * 1000))
        bell.read()


class SocketOutbox:
    """Turns to a socket that queues without bound, so that a slow parent never holds up a step."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def send(self, turn: Turn) -> None:
        """Queue one turn."""
        self._socket.send(encode(turn))


def run_engine(config: EngineConfig, inbox: Any, outbox: Any) -> bool:
    """Load the model, announce it and run the loop; return whether it got that far."""
    from sfumato.image.folder import find_pipeline

    try:
        config.check()
        profile = _open_profile(config)
        path = find_pipeline(config.model)
        if path is not None:
            loop, info, close = _image_engine(config, path, inbox, outbox, profile)
        else:
            loop, info, close = _text_engine(config, inbox, outbox, profile)
    except SfumatoError as error:
        outbox.send(encode(StartFailure(message=str(error))))
        return False
    outbox.send(encode(info))
    loop.run()
    if profile is not None:
        profile.close()
    loop.handover.close()
    close()
    return True


def _open_profile(config: EngineConfig) -> Profile | None:
    """Return the recorder that was asked for. Raises ConfigError."""
    if config.profile is None:
        return None
    from sfumato.engine.profile import Profile
    from sfumato.models.folder import name_of

    replica = f"-{config.replica}" if config.num_replicas > 1 else ""
    return Profile.of(config.profile, f"{name_of(config.model)}{replica}")


class Commands:
    """What the parent says that is not for the loop: recordings of steps, and who the peers are."""

    def __init__(self, profile: Profile | None, outbox: Any) -> None:
        self.handover: Handover | None = None
        self._record = _recording(profile, outbox)

    def __call__(self, command: Command) -> None:
        """Do as the parent says."""
        match command:
            case PeersCommand(peers=peers):
                # Messages are read by the loop, which is there with its links by then.
                assert self.handover is not None
                self.handover.meet(peers)
            case ProfileCommand():
                self._record(command)


def _recording(profile: Profile | None, outbox: Any) -> Callable[[ProfileCommand], None]:
    """Return what begins and ends recordings as the parent says."""

    def answer(command: ProfileCommand) -> None:
        path, problem = None, None
        try:
            if profile is None:
                raise ConfigError("the engine was started without --profile")
            if command.is_on:
                profile.arm(num_steps=command.num_steps)
            else:
                path = profile.stop()
        except ConfigError as error:
            problem = str(error)
        shown = None if path is None else str(path)
        outbox.send(encode(Profiled(token=command.token, path=shown, problem=problem)))

    return answer


def _text_engine(
    config: EngineConfig, inbox: Any, outbox: Any, profile: Profile | None
) -> tuple[EngineLoop, EngineInfo, Callable[[], None]]:
    """Return a language model's loop, what it says of itself, and what ends it."""
    from sfumato.engine.build import build_loop, load
    from sfumato.engine.recorded import how_forwards_run
    from sfumato.models.weights import build_on_meta, count_parameters

    loaded = load(config, _progress_to(outbox))
    if loaded.device != "cpu":
        how = how_forwards_run(config, loaded.model.device)
        print(f"sfumato: {loaded.folder.name}: {how}", file=sys.stderr, flush=True)
    if loaded.leader is not None:
        loaded.leader.on_lost = _leave
    bell = None if loaded.shared is None else loaded.shared.bell
    commands = Commands(profile, outbox)
    loop, door = build_loop(
        loaded,
        SocketInbox(inbox, commands, bell),
        SocketOutbox(outbox),
        recorder=profile or UNRECORDED,
    )
    commands.handover = loop.handover
    info = EngineInfo(
        name=loaded.folder.name,
        path=str(loaded.folder.path),
        traits=loaded.traits,
        algorithms=_algorithms(loaded.traits),
        has_tokenizer=loaded.folder.has_tokenizer,
        limits=config.limits,
        num_parameters=count_parameters(build_on_meta(loaded.folder.config)[1]),
        num_pages=door.num_pages,
        page_size=door.page_size,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device,
        peer_address=loop.handover.address,
    )
    return loop, info, loaded.close


def _image_engine(
    config: EngineConfig, path: Path, inbox: Any, outbox: Any, profile: Profile | None
) -> tuple[EngineLoop, EngineInfo, Callable[[], None]]:
    """Return an image pipeline's loop, what it says of itself, and what ends it."""
    from sfumato.engine.build import resolve_device
    from sfumato.engine.build_image import build_image_loop, hide_progress_bars, load_pipeline

    hide_progress_bars()
    loaded = load_pipeline(config, path, resolve_device(config.device, config.replica))
    commands = Commands(profile, outbox)
    loop, _ = build_image_loop(
        loaded, SocketInbox(inbox, commands), SocketOutbox(outbox), recorder=profile or UNRECORDED
    )
    commands.handover = loop.handover
    info = EngineInfo(
        name=loaded.name,
        path=loaded.path,
        traits=loaded.traits,
        algorithms={},
        has_tokenizer=False,
        limits=config.limits,
        num_parameters=loaded.num_parameters,
        num_pages=0,
        page_size=0,
        dtype=str(loaded.family.dtype).removeprefix("torch."),
        device=str(loaded.family.device),
        peer_address=loop.handover.address,
    )
    return loop, info, lambda: None


def _algorithms(traits: ModelTraits) -> dict[str, list[dict[str, Any]]]:
    """Describe the algorithms that fit the model: some need a mask token, the others that there is none."""
    from sfumato.text.decoding.registry import ALGORITHMS, algorithm_class, describe

    return {
        name: describe(name) for name in ALGORITHMS if algorithm_class(name).renoises != traits.has_mask_token
    }


def _progress_to(outbox: Any) -> Any:
    reported = 0

    def report(done: int, total: int, num_bytes: int) -> None:
        nonlocal reported
        if done < total and num_bytes - reported < _PROGRESS_BYTES:
            return
        reported = num_bytes
        outbox.send(encode(Loading(done=done, total=total, num_bytes=num_bytes)))

    return report


def _end_with_parent(folder: str) -> None:
    """Wait for the end of stdin, which the parent holds open; then remove its folder and leave at once."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _leave(message: str) -> None:
    """Say what has happened to a part of this engine, which cannot go on without it, and end it."""
    print(f"sfumato: the engine ends: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _read_config() -> EngineConfig:
    """Read the configuration line; bytes behind it stay in the pipe."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise SystemExit(1)
        line += byte
    return msgspec.json.decode(bytes(line), type=EngineConfig)


def main() -> None:
    """Run one engine until its parent stops it or is gone."""
    # The parent decides when an engine ends: a signal to the whole group must not end it undrained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name, value in _KERNEL_CACHES.items():
        os.environ.setdefault(name, value)
    config, folder = _read_config(), sys.argv[1]
    threading.Thread(target=_end_with_parent, args=(folder,), name="parent-watch", daemon=True).start()
    context = Context()
    inbox, outbox = context.socket(SocketType.PULL), context.socket(SocketType.PUSH)
    inbox.set_hwm(0)
    outbox.set_hwm(0)
    inbox.connect(address(folder, "inbox"))
    outbox.connect(address(folder, "outbox"))
    is_clean = False
    try:
        is_clean = run_engine(config, inbox, outbox)
    except EngineError as error:
        _leave(str(error))
    finally:
        inbox.close(linger=0)
        outbox.close(linger=_LINGER_MILLISECONDS)
        context.term()
    # Everything has been sent; the interpreter's own way out, through torch, takes most of a second.
    os._exit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
