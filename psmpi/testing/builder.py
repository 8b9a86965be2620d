"""Checkpoints made in this process: psmpi.checkpoint.build in a thread instead of a process of its own."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import IO, Any, cast

from psmpi.checkpoint.build import serve
from psmpi.checkpoint.spool import Spool


class Builder:
    """A thread with the part of subprocess.Popen's interface that `Spool` uses."""

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
        """A thread ends with its job."""


def _pipe() -> tuple[IO[str], IO[str]]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "r"), os.fdopen(writing, "w")


class ThreadSpool(Spool):
    """A spool whose checkpoints a thread makes."""

    def launch(self, number: int) -> subprocess.Popen[str]:
        made: Any = Builder(number)
        return cast("subprocess.Popen[str]", made)
