"""Spool file with the elements of a checkpoint, and the process that writes the checkpoint from it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from psmpi.checkpoint.lock import Lock, inherit
from psmpi.launcher import without_launcher


class Spool:
    """An unnamed file, and a process of psmpi.checkpoint.build that reads it and does one job at a time.

    lock: lock of the run directory, which the process holds too.
    """

    def __init__(self, lock: Lock | None = None):
        self.lock = lock
        self.file: IO[bytes] | None = None
        self.process: subprocess.Popen[str] | None = None
        self.noise: IO[bytes] | None = None

    def open(self, place: Path) -> None:
        """Open the spool file in the folder `place` and start the process, unless they exist. OSError if that fails."""
        place.mkdir(parents=True, exist_ok=True)
        if self.process is not None and self.process.poll() is not None:
            self._forget()
        if self.process is not None:
            return
        if self.file is None:
            # The file has no name, so it disappears with its last user, however this run ends.
            self.file = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
        if self.noise is None:
            self.noise = tempfile.TemporaryFile()  # noqa: SIM115
        self.noise.seek(0)
        self.noise.truncate()
        self.process = self.launch(self.file.fileno())

    def launch(self, number: int) -> subprocess.Popen[str]:
        """Start the process that reads the file with descriptor `number`."""
        return subprocess.Popen(
            [sys.executable, "-m", "psmpi.checkpoint.build", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
            pass_fds=(number, *inherit(self.lock)),
            text=True,
            env={**without_launcher(os.environ), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            # A signal that stops the run must not reach the process, which ends by itself at the end of its input.
            start_new_session=True,
        )

    def put(self, elements: np.ndarray, at: int) -> None:
        """Write contiguous elements to byte `at` of the file. OSError if there is no space."""
        assert self.file is not None
        view = memoryview(elements.data).cast("B")
        while view:
            written = os.pwrite(self.file.fileno(), view, at)
            view, at = view[written:], at + written

    def submit(self, job: Mapping[str, Any]) -> None:
        """Send the process a job. OSError if the process has ended."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answered(self, patience: float) -> bool:
        """Whether the process answers, or ends, within `patience` seconds."""
        assert self.process is not None and self.process.stdout is not None
        # poll, since select fails for the large file descriptors of a rank with many connections.
        waiting = select.poll()
        waiting.register(self.process.stdout, select.POLLIN)
        return bool(waiting.poll(1000 * patience))

    def answer(self) -> str:
        """Wait for the answer or the end of the process; return the error of the job, "" for none."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            try:
                return str(json.loads(line))
            except ValueError:
                return f"the process that writes it says {line[:200]!r}"
        status = self._forget()
        end = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the process that writes it ended with {end}{self._reason()}"

    def free(self) -> None:
        """Free the disk space of the file."""
        with contextlib.suppress(OSError):
            if self.file is not None:
                self.file.truncate(0)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End the process and close the files."""
        if self.process is not None:
            assert self.process.stdin is not None
            # The process ends at the end of its input.
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self._forget()
        for file in (self.file, self.noise):
            if file is not None:
                file.close()
        self.file = self.noise = None

    def _forget(self) -> int:
        """Wait for the end of the process; return its exit status."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        status = self.process.wait()
        # Data for a process that has ended cannot be flushed.
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return status

    def _reason(self) -> str:
        """The operating system's error that the process printed, as ": error"; "" for none."""
        if self.noise is None:
            return ""
        self.noise.seek(0)
        text = self.noise.read().decode(errors="replace")
        for mark in ("error message = '", "Error: "):
            _, separator, message = text.partition(mark)
            if separator:
                return ": " + message.splitlines()[0].split("'")[0]
        return ""
