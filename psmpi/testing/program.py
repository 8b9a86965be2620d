"""psmpi's programs on ranks that are threads of this process, as they are under mpirun."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from unittest import mock

from psmpi.checkpoint import Lock
from psmpi.comm.world import describe
from psmpi.testing.builder import ThreadSpool
from psmpi.testing.hub import DeadlockError, StoppedError
from psmpi.testing.world import run_ranks

# Columns and lines of what is printed, as where there is no terminal.
TERMINAL = {"COLUMNS": "80", "LINES": "25"}


@dataclass(frozen=True)
class Ended:
    """A program that has ended: its exit status, and what its ranks printed."""

    status: int
    stdout: str
    stderr: str


class FailedError(Exception):
    """A rank ended with this message."""


def train(ranks: int, arguments: Sequence[Any], **options: Any) -> Ended:
    """Run what `mpirun -n ranks python -m psmpi.train arguments` would, see `run_program`."""
    return run_program(ranks, "psmpi.train", arguments, **options)


def run_program(
    ranks: int, module: str, arguments: Sequence[Any], *, cwd: Path | None = None, timeout: float | None = None
) -> Ended:
    """Run `mpirun -n ranks python -m module arguments` in this process, on a world of threads; how it ended.

    module: one whose `main(argv)` gets its communicator from psmpi.comm.world.start, or none at all; of a package its
    __main__. cwd: the folder to run it in. A deadlock is a DeadlockError, more than `timeout` seconds a TimeoutError.

    Folder, streams, environment and threads of linear algebra are afterwards as they were. A rank has nothing that only
    a process has: sys.argv (the command that checkpoints note), signals, exit handlers, memory of its own, MPI's own
    communicators. The process that writes checkpoints is a thread. Warnings go by this process's filters on all ranks.
    """
    from threadpoolctl import threadpool_limits

    main = _main_of(module)
    words = [str(word) for word in arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    failed: dict[int, BaseException] = {}

    def work(world: Any) -> int:
        _own.world = world
        try:
            return main(words)
        except BaseException as error:
            if not isinstance(error, StoppedError):
                failed[world.rank] = error
            raise

    with (
        _inside(cwd),
        mock.patch.dict(os.environ, TERMINAL),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        # Ranks set limits, and put back what they found, in any order.
        threadpool_limits(None),
        _programs(),
    ):
        try:
            status = max(run_ranks(ranks, work, timeout=timeout))
        except (Exception, SystemExit) as error:
            if isinstance(error, DeadlockError) or error is not failed.get(min(failed, default=-1)):
                raise
            status = _tell(error, min(failed), ranks, stderr)
        finally:
            for one in failed.values():
                _forget(one)
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def _main_of(module: str) -> Callable[[list[str]], int]:
    loaded = import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = import_module(f"{module}.__main__")
    main: Callable[[list[str]], int] = loaded.main
    return main


# The communicator of the rank that this thread is.
_own = threading.local()


def _start() -> Any:
    return _own.world


def _run(program: Callable[[], int]) -> int:
    """In the place of psmpi.comm.world.run: what ends a rank ends the others in run_ranks."""
    try:
        return program()
    except DeadlockError:
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        raise FailedError(describe(error)) from error


def _tell(error: BaseException, rank: int, ranks: int, stderr: IO[str]) -> int:
    """Print what a process that ends with this error prints; its exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, FailedError):
        where = f"psmpi, rank {rank} of {ranks} on {socket.gethostname()}" if ranks > 1 else "psmpi"
        print(f"{where}: {error}", file=stderr)
    else:
        traceback.print_exception(error, file=stderr)
    return 1


def _forget(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that one thread at a time is in, and which may call itself."""
    lock = threading.RLock()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with lock:
            return function(*args, **options)

    return call


@contextlib.contextmanager
def _programs() -> Iterator[None]:
    """Let programs find the world of their thread; close what a run that fails leaves open."""
    import tyro

    spools: list[ThreadSpool] = []

    def spool(held: Lock | None = None) -> ThreadSpool:
        spools.append(ThreadSpool(held))
        return spools[-1]

    with (
        # CPython 3.11 counts the depth of a tree once for all threads that parse, and tyro has state of that kind too.
        mock.patch("ast.parse", _one_at_a_time(ast.parse)),
        mock.patch("tyro.cli", _one_at_a_time(tyro.cli)),
        mock.patch("psmpi.comm.world.start", _start),
        mock.patch("psmpi.comm.world.run", _run),
        mock.patch("psmpi.checkpoint.writer.Spool", spool),
    ):
        try:
            yield
        finally:
            for one in spools:
                one.close()


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
