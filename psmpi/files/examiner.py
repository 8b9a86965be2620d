"""A look at a file of a stranger by another process, before this one opens it.

HDF5, and what unpacks pickles, are not made for hostile files: one may make them crash, or take more time or memory
than its size explains. Then the other process is lost, and this one says which file it was.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from psmpi.errors import DamagedError, UserError
from psmpi.files.examining import run_check, size_of
from psmpi.launcher import without_launcher

# Seconds until an answer, beside those that the size of the file explains at so many bytes a second: on a host that has
# much else to do, and a file that waits for another program (a pipe).
PATIENCE, SPEED = 60.0, 5e6
# Where files are looked at: in the other process, in this one (which may crash), or not at all.
_where: ContextVar[str] = ContextVar("where", default="there")


def examine(check: str, path: Path, **options: Any) -> None:
    """Let the other process call the function `module:name` of psmpi with `path` and options (plain data).

    DamagedError or UserError as that raises, and DamagedError where the file makes the process crash, or takes more
    than its size explains.
    """
    where = _where.get()
    if where == "there":
        _examiner.ask(check, path, options)
    elif where == "here":
        run_check(check, path, options)


@contextlib.contextmanager
def examined(where: str) -> Iterator[None]:
    """Let files be looked at `here`, in a process that may be lost; or `not` at all: files that another rank's was."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


class Examiner:
    """The other process, which is started when it is first needed, and again after it was lost."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.owner = 0

    def ask(self, check: str, path: Path, options: dict[str, Any]) -> None:
        """See `examine`."""
        with self.lock:
            # Where HDF5 finds other files follows from these.
            found = {name: value for name, value in os.environ.items() if name.startswith("HDF5_")}
            try:
                folder = os.getcwd()
            except OSError:
                # It was removed.
                folder = "/"
            asked = {"check": check, "path": str(path), "options": options, "folder": folder, "environ": found}
            try:
                answer = self._answer(asked, path)
            except BaseException:
                # An answer that comes later would be taken for the next one's.
                if self.process is not None:
                    self.process.kill()
                    self._forget()
                raise
        if answer["kind"] == "damaged":
            raise DamagedError(answer["text"])
        if answer["kind"] == "user":
            raise UserError(answer["text"])
        if answer["kind"] == "memory":
            raise self._refused(path, "takes more memory to open")

    def _answer(self, asked: dict[str, Any], path: Path) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        if not _ready(process.stdout, PATIENCE + size_of(path) / SPEED):
            raise self._refused(path, "takes more time to open")
        line = process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            if answer["kind"] == "memory":
                # It ends: a library may be left as it should not be.
                self._forget()
            return answer
        status = self._forget()
        if status == -signal.SIGXCPU:
            raise self._refused(path, "takes more time to open")
        if status == -signal.SIGKILL:
            raise self._refused(path, "takes more memory or time to open")
        ended = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise DamagedError(
            f"{path} is damaged, or made to do harm: a process that looked at it ended with {ended}; do not use it"
        )

    @staticmethod
    def _refused(path: Path, fault: str) -> DamagedError:
        return DamagedError(
            f"{path} is damaged, or made to do harm: it {fault} than its {size_of(path):,} bytes explain; do not use it"
        )

    def _running(self) -> subprocess.Popen[bytes]:
        # A process that was made by a fork has not the other end.
        if self.process is not None and (self.owner != os.getpid() or self.process.poll() is not None):
            self._forget()
        if self.process is None:
            self.owner = os.getpid()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "psmpi.files.examining"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                # A signal for the run is none for this process; the end of its input ends it.
                start_new_session=True,
            )
        return self.process

    def _forget(self) -> int:
        """Wait for the end of the process, if it is this one's; its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return process.wait() if self.owner == os.getpid() else 0

    def close(self) -> None:
        """End the process, whose memory is for others; the next look starts another one."""
        with self.lock:
            self._forget()


def _environment() -> dict[str, str]:
    """The environment of the process: no rank, one thread, and this very psmpi, not one in the present folder."""
    here = Path(__file__).parent.parent.parent
    paths = [str(here), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    return {**without_launcher(os.environ), **own, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _ready(stream: IO[bytes], patience: float) -> bool:
    """Whether there is something to read within `patience` seconds."""
    # Not select: it cannot take the large descriptors that a rank with many connections has.
    waiting = select.poll()
    waiting.register(stream, select.POLLIN | select.POLLHUP)
    return bool(waiting.poll(1000 * patience))


_examiner = Examiner()
close = _examiner.close
atexit.register(close)
