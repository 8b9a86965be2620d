"""Run psmpi.checkpoint.build, which writes checkpoint files, in a thread instead of a separate process."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import IO, Any, cast

from psmpi.checkpoint.build import serve
from psmpi.checkpoint.spool import Spool


class Builder:
    """Thread that writes checkpoints, with the part of subprocess.Popen's interface that `Spool` uses."""

    def __init__(self, spool: int):
        jobs, self.stdin = _pipe()
        self.stdout, answers = _pipe()
        self.thread = threading.Thread(target=self._work, args=(spool, jobs, answers), name="builder", daemon=True)
        self.thread.start()

    @staticmethod
    def _work(spool: int, jobs: IO[str], answers: IO[str]) -> None:
        with jobs, answers:
            serve(spool, jobs, answers)

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else 0

    def wait(self) -> int:
        self.thread.join()
        return 0

    def kill(self) -> None:
        """Do nothing: a thread cannot be killed, and returns when its job is done."""


def _pipe() -> tuple[IO[str], IO[str]]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "r"), os.fdopen(writing, "w")


class ThreadSpool(Spool):
    """Spool that starts a thread, not a process, to write checkpoints."""

    def launch(self, number: int) -> subprocess.Popen[str]:
        made: Any = Builder(number)
        return cast("subprocess.Popen[str]", made)
