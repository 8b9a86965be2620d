"""Examination of a stranger's file by another process, before this process opens it.

HDF5 and unpicklers are not made for hostile files: such a file may make them crash, or take more time or memory than
its size explains. Then only the other process is lost, and this process reports the file.
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

# Seconds to wait for an answer, besides one second for each SPEED bytes of the file. The host may be busy, and a pipe
# waits for another program.
PATIENCE, SPEED = 60.0, 5e6
# Process that examines files: "there", the other one; "here", this one, which may crash; or "not" at all.
_where: ContextVar[str] = ContextVar("where", default="there")


def examine(check: str, path: Path, **options: Any) -> None:
    """Call the function `module:name` of psmpi with `path` and options (plain data) in the other process.

    The function's DamagedError or UserError is raised here. DamagedError too if the file makes the process crash, or
    takes more time or memory than its size explains.
    """
    where = _where.get()
    if where == "there":
        _examiner.ask(check, path, options)
    elif where == "here":
        run_check(check, path, options)


@contextlib.contextmanager
def examined(where: str) -> Iterator[None]:
    """Run a block that examines files "here", in a process that may crash, or "not", if another rank examines them."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


class Examiner:
    """The other process; it is started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.owner = 0

    def ask(self, check: str, path: Path, options: dict[str, Any]) -> None:
        """See `examine`."""
        with self.lock:
            # These variables decide where HDF5 finds other files.
            variables = {name: value for name, value in os.environ.items() if name.startswith("HDF5_")}
            try:
                folder = os.getcwd()
            except OSError:
                # The present folder was removed.
                folder = "/"
            request = {"check": check, "path": str(path), "options": options, "folder": folder, "environ": variables}
            try:
                answer = self._answer(request, path)
            except BaseException:
                # A late answer would be taken for the answer to the next request.
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

    def _answer(self, request: dict[str, Any], path: Path) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        if not _ready(process.stdout, PATIENCE + size_of(path) / SPEED):
            raise self._refused(path, "takes more time to open")
        line = process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            if answer["kind"] == "memory":
                # The process ends after this answer, since a library may be in an undefined state.
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
        # After a fork the process belongs to the parent.
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
                # Signals for the run must not reach the process, which ends by itself at the end of its input.
                start_new_session=True,
            )
        return self.process

    def _forget(self) -> int:
        """Close the process and wait for its end, if this process started it; return its exit status, else 0."""
        process, self.process = self.process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return process.wait() if self.owner == os.getpid() else 0

    def close(self) -> None:
        """End the process to free its memory; the next examination starts another one."""
        with self.lock:
            self._forget()


def _environment() -> dict[str, str]:
    """Environment of the process: no rank, one thread, this installation of psmpi, not one in the present folder."""
    root = Path(__file__).parent.parent.parent
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    return {**without_launcher(os.environ), **own, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _ready(stream: IO[bytes], patience: float) -> bool:
    """Whether a stream has data, or ends, within `patience` seconds."""
    # poll, since select fails for the large file descriptors of a rank with many connections.
    waiting = select.poll()
    waiting.register(stream, select.POLLIN | select.POLLHUP)
    return bool(waiting.poll(1000 * patience))


_examiner = Examiner()
close = _examiner.close
atexit.register(close)
