"""Run psmpi's programs as under mpirun, with ranks that are threads of this process."""

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

# Width and height of the output: those that programs use where there is no terminal.
TERMINAL = {"COLUMNS": "80", "LINES": "25"}


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a program; the streams hold the lines of all ranks."""

    status: int
    stdout: str
    stderr: str


class FailedError(Exception):
    """Error of a rank, with the message that the program prints."""


def train(ranks: int, arguments: Sequence[Any], **options: Any) -> Ended:
    """Run `mpirun -n ranks python -m psmpi.train arguments` in this process; options are those of `run_program`."""
    return run_program(ranks, "psmpi.train", arguments, **options)


def run_program(
    ranks: int, module: str, arguments: Sequence[Any], *, cwd: Path | None = None, timeout: float | None = None
) -> Ended:
    """Run `mpirun -n ranks python -m module arguments` on threads of this process; return exit status and output.

    module: a module with a function main(argv), or a package with such a __main__. main gets its communicator from
    psmpi.comm.world.start, or uses none. cwd: the folder to run it in. Raise DeadlockError if the ranks deadlock, and
    TimeoutError if they take longer than `timeout` seconds.

    The current folder, the streams, the environment and the thread limits of linear algebra are restored afterwards.
    Ranks share what belongs to a process: sys.argv (which checkpoints record), signals, exit handlers, memory and
    warning filters. They have no MPI communicators. A thread, not a process, writes checkpoints.
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
        # Ranks set thread limits and restore old ones in any order: restore the limits of this process at the end.
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
    """Replace psmpi.comm.world.run: raise an error as FailedError, with which run_ranks ends the other ranks."""
    try:
        return program()
    except DeadlockError:
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        raise FailedError(describe(error)) from error


def _tell(error: BaseException, rank: int, ranks: int, stderr: IO[str]) -> int:
    """Print the message or traceback of an error as a process that ends with it does; return the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, FailedError):
        where = f"psmpi, rank {rank} of {ranks} on {socket.gethostname()}" if ranks > 1 else "psmpi"
        print(f"{where}: {error}", file=stderr)
    else:
        traceback.print_exception(error, file=stderr)
    return 1


def _forget(error: BaseException | None) -> None:
    """Clear the local variables of all frames in an error's tracebacks, so that their memory is freed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that one thread at a time runs it. The function may be recursive."""
    lock = threading.RLock()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with lock:
            return function(*args, **options)

    return call


@contextlib.contextmanager
def _programs() -> Iterator[None]:
    """Within the block, programs use the communicator of their thread. Close the spools that failed runs leave open."""
    import tyro

    spools: list[ThreadSpool] = []

    def spool(held: Lock | None = None) -> ThreadSpool:
        spools.append(ThreadSpool(held))
        return spools[-1]

    with (
        # Neither is thread-safe: CPython 3.11 counts the depth of a syntax tree in one variable for all threads, and
        # tyro has global state as well.
        mock.patch("ast.parse", _one_at_a_time(ast.parse)),
        mock.patch("tyro.cli", _one_at_a_time(tyro.cli)),
        mock.patch("psmpi.comm.world.start", _start),
        mock.patch("psmpi.comm.world.run", _run),
        mock.patch("psmpi.checkpoint.writer.Spool", spool),
        # The process that examines files stays for the next program.
        mock.patch("psmpi.files.examiner.close", lambda: None),
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
