"""Processes that end with the one that started them, and news of those that end too early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class Spawned:
    """Processes that run one module each. A pipe to each stays open while this process lives.

    on_death: called once, from another thread, with the index and exit status of the first that ends before
    `end` was called.
    """

    def __init__(self, module: str, first_lines: Sequence[bytes]) -> None:
        self.on_death: Callable[[int, int], None] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_ending = threading.Event()
        try:
            for line in first_lines:
                self._processes.append(_start(module, line))
        except BaseException:
            self.end()
            raise
        self._watch = threading.Thread(target=self._wait, name="spawned-watch", daemon=True)
        self._watch.start()

    @property
    def pids(self) -> list[int]:
        """Return the process ids."""
        return [process.pid for process in self._processes]

    def dead(self) -> tuple[int, int] | None:
        """Return index and exit status of a process that has ended, or None."""
        for index, process in enumerate(self._processes):
            status = process.poll()
            if status is not None:
                return index, status
        return None

    def _wait(self) -> None:
        while not self._is_ending.wait(_POLL_SECONDS):
            found = self.dead()
            if found is not None:
                if self.on_death is not None and not self._is_ending.is_set():
                    self.on_death(*found)
                return

    def end(self) -> None:
        """Wait a moment for the processes to end by themselves, then kill those that have not."""
        self._is_ending.set()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(module: str, first_line: bytes) -> subprocess.Popen[bytes]:
    # A session of its own, so that Ctrl-C in the terminal reaches only the parent.
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    try:
        process.stdin.write(first_line + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        # It has ended already; the watch says so.
        pass
    return process


def read_first_line() -> bytes:
    """Return the line with which this process was started; bytes behind it stay in the pipe."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise SystemExit(1)
        line += byte
    return bytes(line)


def end_with_parent() -> None:
    """Leave at once when the parent closes its end of stdin, or is gone."""
    # The parent decides when this process ends: a signal to the whole group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
