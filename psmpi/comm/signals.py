"""Signals that ask a run to stop: noted, and met by the run where it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While it is entered, the first of these signals is noted: `name`. A second one does what it did before.

    Handlers are those of the main thread, and to be set after MPI has been started, which sets its own. Elsewhere
    nothing is noted.
    """

    def __init__(self) -> None:
        self.name = ""
        self.before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.before = {one: signal.signal(one, self._note) for one in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for one, handler in self.before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self.before = {}
