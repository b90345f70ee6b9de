"""Processes that end with the one that started them, and news of those that end too early."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.1
# A connection tells of a death a moment before the process can be waited for.
_LAST_WORDS_SECONDS = 0.5
# From <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
_IN_MAIN_THREAD = "--started-in-main-thread"


class Spawned:
    """Processes that run one module each, by what they are called. A pipe to each is open while this lives.

    on_death: called once, from another thread, with what happened to the first that ends before it was told
    to.
    """

    def __init__(self, module: str, first_lines: Mapping[str, bytes]) -> None:
        self.on_death: Callable[[str], None] | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_ending = threading.Event()
        try:
            for name, line in first_lines.items():
                self._processes[name] = _start(module, line)
        except BaseException:
            self.kill()
            raise
        self._watch = threading.Thread(target=self._wait, name="spawned-watch", daemon=True)
        self._watch.start()

    @property
    def pids(self) -> list[int]:
        """Return the process ids."""
        return [process.pid for process in self._processes.values()]

    def death(self) -> str | None:
        """Return what happened to a process that has ended, or None."""
        for name, process in self._processes.items():
            status = process.poll()
            if status is not None:
                how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
                return f"{name} (process {process.pid}) has ended: {how}"
        return None

    def death_soon(self) -> str | None:
        """Return what happened to a process that has just ended, or None if none does in the next moment."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        while self._processes and (found := self.death()) is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS / 10)
        return found if self._processes else None

    def _wait(self) -> None:
        while not self._is_ending.wait(_POLL_SECONDS):
            found = self.death()
            if found is not None:
                if self.on_death is not None and not self._is_ending.is_set():
                    self.on_death(found)
                return

    def end(self) -> None:
        """Wait a moment for the processes to end by themselves, then kill those that have not."""
        self._is_ending.set()
        end = time.monotonic() + _GRACE_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        self.kill()

    def kill(self) -> None:
        """End the processes now, also those that are stopped."""
        self._is_ending.set()
        for process in self._processes.values():
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _start(module: str, first_line: bytes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module]
    if threading.current_thread() is threading.main_thread():
        command.append(_IN_MAIN_THREAD)
    # A session of its own, so that Ctrl-C in the terminal reaches only the parent.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
    assert process.stdin is not None
    try:
        process.stdin.write(first_line + b"\n")
    except BrokenPipeError:
        # It has ended already; the watch says so.
        return process
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
    if sys.platform == "linux" and _IN_MAIN_THREAD in sys.argv:
        # Reaches also a process that is stopped. It is sent when the parent's thread ends, so that only the
        # main thread, which ends with its process, may be waited for.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
