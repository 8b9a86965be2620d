"""The processes of ranks: their identity, the stacks of their threads, and their end if they are stopped."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

# Seconds that the launcher gets to kill stopped ranks, and the program that then does.
LATER = 2.0
KILLER = """
import os, sys, time
time.sleep(float(sys.argv[1]))
for pid, start in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[19] == start:
                os.kill(int(pid), 9)
    except OSError:
        pass
"""


class Process(NamedTuple):
    """A rank's process: its host's name, the networks and processes that it shares, its number and start time."""

    host: str
    network: str
    processes: str
    pid: int
    start: str

    @staticmethod
    def own() -> Process:
        boot = _read("/proc/sys/kernel/random/boot_id")
        spaces = []
        for space in ("net", "pid"):
            try:
                spaces.append(f"{boot} {os.readlink(f'/proc/self/ns/{space}')}")
            except OSError:
                spaces.append(socket.gethostname())
        network, processes = spaces
        return Process(socket.gethostname(), network, processes, os.getpid(), start_of(os.getpid()))

    @property
    def lives(self) -> bool:
        """Whether the process lives, as far as this host can tell."""
        return bool(self.start) and start_of(self.pid) == self.start

    def condition(self, other: Process) -> str:
        """The visible condition of another process, in words; "" if it cannot be seen."""
        if self.processes != other.processes or not other.start:
            return ""
        state, start, _ = _fields(other.pid)
        # Z: nobody has taken notice of its end.
        if start != other.start or state in ("X", "Z"):
            return "its process has ended"
        if state in ("T", "t"):
            return f"stopped by a signal (kill -CONT {other.pid} lets it go on)"
        return f"though its process {other.pid} is there: in a library that keeps Python from going on, or swapped out"


def start_of(pid: int) -> str:
    """Start time of a process, which distinguishes it from a later one of the same number; "" if unknown."""
    return _fields(pid)[1]


def _fields(pid: int | str) -> tuple[str, str, str]:
    """State, start time and parent of a process, from /proc."""
    # The name of the program, in brackets, may have blanks.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19], fields[1]) if len(fields) > 19 else ("", "", "")


def wake_children() -> None:
    """Continue stopped children of this process, which end when their input ends."""
    for folder in Path("/proc").glob("[0-9]*"):
        state, _, parent = _fields(folder.name)
        if parent == str(os.getpid()) and state == "T":
            with contextlib.suppress(OSError):
                os.kill(int(folder.name), signal.SIGCONT)


def kill_later(processes: Sequence[Process], seconds: float = LATER) -> None:
    """Kill processes of this host after some seconds, from a process that outlives this one.

    SIGKILL is the only signal that ends a stopped process. The delay lets another process end first, whose status the
    launcher may report.
    """
    words = [word for one in processes for word in (str(one.pid), one.start)]
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", KILLER, str(seconds), *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def show_stacks(rank: int, size: int, host: str) -> None:
    """Print the Python stacks of all threads of this process to standard error, in one piece."""
    from psmpi.comm.world import delivered

    with contextlib.suppress(OSError, ValueError), _nameless() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read().decode(errors="replace").strip().split("\n\n")
        # The main thread, which is the last one, before the others and this one.
        others = [one for one in reversed(stacks) if not one.startswith("Current thread")]
        own = [one for one in stacks if one.startswith("Current thread")]
        text = f"psmpi, rank {rank} of {size} on {host}: what it was doing when --stall-abort ended the job"
        # Past Python's buffers, whose lock the thread that trains may hold.
        number = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.write(number, "\n\n".join([text, *others, *own, ""]).encode())
    delivered(1.0)


def _nameless() -> IO[bytes]:
    """An unnamed file, in memory if possible."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()
