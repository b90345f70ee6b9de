"""Links over TCP: one thread reads and one writes per connection; a denoise engine connects, and again."""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from sfumato.core.handover import (
    Blocks,
    Done,
    Flushed,
    Layout,
    LinkHeard,
    LinkLost,
    LinkSilent,
    LinkUp,
    PeerEvent,
    PeerMessage,
)
from sfumato.errors import ConfigError, PeerRefused
from sfumato.parallel.frames import Beat, Closed, Connection, Frame, answer, introduce
from sfumato.parallel.handover import Carrier, Mailbox

# Within the time after which a peer counts as silent, it is heard so often.
_BEATS = 5
_CONNECT_SECONDS = 5.0
_RETRY_SECONDS = 1.0
# Threads end when their connection is shut; nobody waits longer for one than this.
_JOIN_SECONDS = 2.0

_Item = tuple[Frame, bytes | bytearray | None]


class SocketLink:
    """One connected peer. Sending queues; a thread of its own waits for the network."""

    def __init__(
        self,
        peer: str,
        connection: Connection,
        carrier: Carrier,
        carrier_peer: str,
        mailbox: Mailbox,
        silence_seconds: float,
    ) -> None:
        self.peer = peer
        self.is_fenced = carrier.is_fenced
        self._connection = connection
        self._carrier = carrier
        self._carrier_peer = carrier_peer
        self._mailbox = mailbox
        self._silence_seconds = silence_seconds
        self._beat_seconds = silence_seconds / _BEATS
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._is_silent = False
        self._writer = threading.Thread(target=self._write, name=f"to {peer}", daemon=True)

    def send(self, message: PeerMessage, payload: bytes | bytearray | None = None) -> None:
        """Queue a message."""
        self._queue.put((message, payload))

    def push(self, blocks: Blocks, pages: Sequence[int], peer_pages: Sequence[int]) -> None:
        """Copy or write keys and values now, and queue the message that tells of them."""
        try:
            payload = self._carrier.push(self._carrier_peer, pages, peer_pages)
        except OSError:
            # The connection ends with it, and the peer may then take its pages back: no write comes after.
            self._carrier.detach(self._carrier_peer)
            self._connection.shut()
            return
        self._queue.put((blocks, payload))

    def live(self, *, prefills: bool) -> None:
        """Read until the connection ends; tell the engine of its beginning, its end and what lies between."""
        self._writer.start()
        self._mailbox.put(PeerEvent(self, LinkUp(prefills=prefills)))
        lost = LinkLost(reason="ended", is_over=True)
        try:
            while True:
                message, payload = self._connection.read(self._note_idle, self._beat_seconds)
                self._note_heard()
                if not isinstance(message, Beat):
                    self._mailbox.put(PeerEvent(self, message, payload))
        except OSError as error:
            lost = LinkLost(reason=str(error), is_over=isinstance(error, Closed))
        finally:
            # What is being written has stopped before the peer sees the end of the connection.
            self._carrier.detach(self._carrier_peer)
            self._connection.shut()
            self._queue.put(None)
            self._writer.join()
            self._connection.close()
            self._mailbox.put(PeerEvent(self, lost))

    def shut(self) -> None:
        """End the connection; `live` returns."""
        self._connection.shut()

    def _note_heard(self) -> None:
        if self._is_silent:
            self._is_silent = False
            self._mailbox.put(PeerEvent(self, LinkHeard()))

    def _note_idle(self) -> None:
        seconds = time.monotonic() - self._connection.heard_at
        if seconds >= self._silence_seconds and not self._is_silent:
            self._is_silent = True
            self._mailbox.put(PeerEvent(self, LinkSilent(seconds=seconds)))

    def _write(self) -> None:
        """Send what is queued; where nothing is, a beat now and then."""
        try:
            while True:
                try:
                    item = self._queue.get(timeout=self._beat_seconds)
                except queue.Empty:
                    item = (Beat(), None)
                if item is None:
                    return
                message, payload = item
                self._connection.write(message, payload)
                if isinstance(message, Done):
                    self._mailbox.put(PeerEvent(self, Flushed(handover_id=message.handover_id)))
        except OSError:
            # The reader notices the same and says why.
            self._connection.shut()


class SocketEndpoint:
    """One engine's end of all its links over TCP.

    secret: both sides prove that they know it. silence_seconds: a peer that says nothing for so long is
    reported as silent.
    """

    def __init__(self, layout: Layout, carrier: Carrier, *, secret: bytes, silence_seconds: float) -> None:
        self.layout = layout
        self.mailbox = Mailbox()
        self.address: str | None = None
        self._carrier = carrier
        self._secret = secret
        self._silence_seconds = silence_seconds
        self._is_closing = threading.Event()
        self._lock = threading.Lock()
        self._links: list[SocketLink] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        # Peers that are connected to, as (host, port), and the secret of each.
        self._wanted: dict[tuple[str, int], bytes] = {}

    def listen(self, host: str, port: int) -> None:
        """Take connections of engines that want this one to prefill. Raises ConfigError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            listener.close()
            raise ConfigError(f"--listen tcp://{host}:{port}: {error}") from error
        self._listener = listener
        shown = f"[{host}]" if ":" in host else host
        self.address = f"tcp://{shown}:{listener.getsockname()[1]}"
        self._start(lambda: self._accept(listener), "accept")

    def connect(self, host: str, port: int) -> None:
        """Connect to an engine that prefills for this one; whenever the connection ends, try again.

        An engine that is not there yet is waited for in the background. Raises PeerRefused if it is there
        and does not fit.
        """
        link = None
        self._wanted[host, port] = self._secret
        try:
            link = self._dial(host, port)
        except OSError as error:
            _notice(f"engine tcp://{host}:{port} is not there yet ({error}); its part is done here")
        self._start(lambda: self._stay_connected(host, port, link), f"{host}:{port}")

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Connect to these (address, shared secret) in the background; end the links to all others."""
        wanted = {split_address(address): secret.encode() for address, secret in peers}
        fresh = wanted.keys() - self._wanted.keys()
        gone = self._wanted.keys() - wanted.keys()
        self._wanted = wanted
        for host, port in fresh:
            self._start(partial(self._stay_connected, host, port, None), f"{host}:{port}")
        names = {f"tcp://{host}:{port}" for host, port in gone}
        with self._lock:
            links = [link for link in self._links if link.peer in names]
        for link in links:
            link.shut()

    def close(self) -> None:
        """End all links and threads."""
        self._is_closing.set()
        if self._listener is not None:
            # Closing alone does not wake a thread in accept.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            links, threads = list(self._links), list(self._threads)
        for link in links:
            link.shut()
        end = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._carrier.close()
        self.mailbox.close()

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"peers {name}", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive() or each.ident is None]
            self._threads.append(thread)
        thread.start()

    def _dial(self, host: str, port: int) -> SocketLink:
        connection = Connection(socket.create_connection((host, port), timeout=_CONNECT_SECONDS))
        try:
            secret = self._wanted.get((host, port), self._secret)
            said = introduce(connection, secret, self.layout, self._carrier.describe())
            return self._link(f"tcp://{host}:{port}", connection, said)
        except BaseException:
            connection.close()
            raise

    def _link(self, peer: str, connection: Connection, said: bytes) -> SocketLink:
        name = self._carrier.attach(said)
        return SocketLink(peer, connection, self._carrier, name, self.mailbox, self._silence_seconds)

    def _stay_connected(self, host: str, port: int, link: SocketLink | None) -> None:
        was_refused, is_first = False, link is None
        while not self._is_closing.is_set() and (host, port) in self._wanted:
            if link is not None:
                was_refused = False
                self._live(link, prefills=True)
                if not self._is_closing.is_set():
                    _notice(f"engine tcp://{host}:{port} has gone; its part is done elsewhere")
            if not is_first and self._is_closing.wait(_RETRY_SECONDS):
                return
            is_first = False
            if (host, port) not in self._wanted:
                return
            try:
                link = self._dial(host, port)
            except PeerRefused as error:
                link = None
                if not was_refused:
                    _notice(f"engine tcp://{host}:{port}: {error}")
                was_refused = True
            except OSError:
                link = None

    def _accept(self, listener: socket.socket) -> None:
        while not self._is_closing.is_set():
            try:
                sock, address = listener.accept()
            except OSError:
                return
            peer = f"tcp://{address[0]}:{address[1]}"
            self._start(lambda sock=sock, peer=peer: self._serve(sock, peer), peer)  # type: ignore[misc]

    def _serve(self, sock: socket.socket, peer: str) -> None:
        connection = Connection(sock)
        try:
            said = answer(connection, self._secret, self.layout, self._carrier.describe())
            link = self._link(peer, connection, said)
        except (OSError, PeerRefused) as error:
            connection.close()
            _notice(f"{peer} was refused: {error}")
            return
        self._live(link, prefills=False)

    def _live(self, link: SocketLink, *, prefills: bool) -> None:
        with self._lock:
            self._links.append(link)
        if self._is_closing.is_set():
            link.shut()
        try:
            link.live(prefills=prefills)
        finally:
            with self._lock:
                self._links.remove(link)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of tcp://HOST:PORT."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def _notice(text: str) -> None:
    print(f"sfumato: {text}", file=sys.stderr, flush=True)
