"""Signals that ask a run to stop; the run stops at the next step at which it can be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# SIGHUP: the terminal was closed.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals within so many seconds count as one: launchers pass on what the batch system or terminal sends to all.
ONE = 2.0
# Seconds after a second signal, after which the process is ended: in a library Python runs no signal handler.
GRACE = 5.0


class StopSignals:
    """A block in which the first stop signal is noted as `name`, and a later one has its former effect.

    Enter it in the main thread, which has the handlers, after the start of MPI, which sets its own. In another thread
    nothing is noted. A signal that the process was started to ignore, as SIGHUP under nohup, stays ignored. A helper
    thread ends the process if the main thread cannot: GRACE seconds after a later signal, with status 128 + its number.

    also: name of one more signal, without SIG; message: text for the first signal, on standard error or on `shown`,
    the path of a terminal whose launcher no longer passes output on; one: seconds in place of ONE; ends: whether
    there is the helper thread.
    """

    def __init__(
        self, also: str = "USR1", message: str = "", shown: str = "", one: float | None = None, ends: bool = True
    ) -> None:
        self.ends = ends
        self.name, self.message, self.signalled_at = "", message, 0.0
        self.terminal, self.grace = shown, ONE if one is None else one
        self.signals = (*STOPPING, signal.Signals[f"SIG{also}"])
        self.before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        # The interpreter writes the number of each signal here, even if the main thread is in a library.
        self.pipe: socket.socket | None = None
        self.former_wakeup_fd = -1

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = (one for one in self.signals if signal.getsignal(one) != signal.SIG_IGN)
            self.before = {one: signal.signal(one, self._note) for one in heeded}
            if self.ends:
                self._begin_to_listen()
        return self

    def _begin_to_listen(self) -> None:
        self.pipe, heard = socket.socketpair()
        self.pipe.setblocking(False)
        self.former_wakeup_fd = signal.set_wakeup_fd(self.pipe.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard, set(self.before)), daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()
        if self.pipe is not None:
            signal.set_wakeup_fd(self.former_wakeup_fd)
            self.pipe.close()
            self.pipe = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self.signalled_at = signal.Signals(number).name, time.monotonic()
            if self.message:
                self._tell(f"{self.name}: {self.message}\n".encode())
        elif time.monotonic() - self.signalled_at > self.grace:
            self._restore()
            os.kill(os.getpid(), number)

    def _tell(self, text: bytes) -> None:
        """Write by system calls, since the signal may have interrupted a print."""
        if self.terminal:
            try:
                opened = os.open(self.terminal, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                os.write(opened, b"\n" + text)
                os.close(opened)
                return
            except OSError:
                # The launcher has ended; its output may still be read.
                pass
        with contextlib.suppress(OSError):
            os.write(2, text)

    def _listen(self, heard: socket.socket, heeded: set[signal.Signals]) -> None:
        """The body of the thread, which ends with the pipe, or ends the process after a second signal."""
        first = 0.0
        with heard:
            while byte := heard.recv(1):
                number = byte[0]
                if number not in heeded:
                    continue
                first = first or time.monotonic()
                if time.monotonic() - first > self.grace:
                    if not _closed_by(heard, time.monotonic() + GRACE):
                        os._exit(128 + number)
                    return

    def _restore(self) -> None:
        for one, handler in self.before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self.before = {}


def _closed_by(heard: socket.socket, end: float) -> bool:
    """Wait for the other end of a pipe to close, until `end` of the monotonic clock. Returns whether it has."""
    while (left := end - time.monotonic()) > 0:
        heard.settimeout(left)
        with contextlib.suppress(TimeoutError):
            if not heard.recv(1):
                return True
    return False


def heed_hangups() -> None:
    """Restore the SIGHUP handler of the start of this process, which UCX in MPI libraries replaces."""
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGHUP)
        if before is not None:
            signal.signal(signal.SIGHUP, before)
