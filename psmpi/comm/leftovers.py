"""Shared memory and session folders that killed MPI jobs of this user left on this host, and their removal.

MPICH and Open MPI remove their segments of shared memory when a job ends by itself. Those of a killed job stay, and a
job that SLURM starts again under the same number, on the same host, takes their names: MPICH then fails, or hangs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# MPICH; Open MPI, whose names have the host, the user and the job's number; UCX.
SEGMENT = re.compile(
    r"mpich_shm_[0-9a-f]+_\d+|ucx_shm_posix_[0-9a-f]+|sm_segment\.(?P<host>.+)\.\d+\.(?P<job>[0-9a-f]+)\.\d+"
)
# The session folder of an Open MPI launcher, whose process number it has, and of a single process.
SESSION = re.compile(r"ompi\.(?P<pid>\d+)")
SINGLE = re.compile(r"ompi\.(?P<host>.+)\.\d+")
ANY = re.compile(".*", re.DOTALL)
NUMBER = re.compile(r"[0-9]+")
PROCESSES = "/proc"
# Seconds: a process uses a segment within this time after it has made it.
YOUNG = 2.0


class Leftovers(NamedTuple):
    """Shared memory and session folders that no living process uses."""

    # Path of a segment, number of its job if its name has one, and its file status at the search.
    segments: list[tuple[Path, str | None, os.stat_result]]
    # Session folders of launchers; of single processes the folders of all their jobs.
    sessions: list[Path]
    jobs: list[Path]

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        return sum(status.st_size for _, _, status in self.segments)


def find_leftovers(memory: Path = Path("/dev/shm"), folder: Path | None = None) -> Leftovers:
    """Segments of this user that no living process has; nothing is removed.

    What a living process has just made is none of it. A process of another container that shares /dev/shm is not seen;
    what has another host's name is left out.
    """
    if not os.path.isdir(PROCESSES):
        # Without /proc living processes cannot be recognised.
        return Leftovers([], [], [])
    # /proc shows paths of open files without links.
    memory, folder = memory.resolve(), (folder or Path(tempfile.gettempdir())).resolve()
    segments = [
        (one, of["job"], status) for one, of, status in _own_files(memory, SEGMENT) if _is_this_host(of["host"])
    ]
    sessions = [one for one, _, _ in _own_files(folder, SESSION) if _is_of_this_host(one)]
    single = [one for one, of, _ in _own_files(folder, SINGLE) if _is_this_host(of["host"])]
    if not (segments or sessions):
        return Leftovers([], [], [])
    used = set(_mapped_files())
    # The folder of a single process is called by its process number; the process may have no shared memory.
    jobs = [job for one in single for part, _, _ in _own_files(one) for job, _, _ in _own_files(part, NUMBER)]
    return Leftovers(
        [one for one in segments if str(one[0]) not in used],
        [one for one in sessions if not _living(int(one.name.partition(".")[2]), one, used)],
        jobs,
    )


def remove_leftovers(memory: Path = Path("/dev/shm"), folder: Path | None = None) -> tuple[int, int]:
    """Remove what `find_leftovers` finds; the number of segments removed, and their bytes.

    To be called before MPI starts, by every process: those of a host find their segment by its name, and one that is
    ahead of the others would find that of the dead. What another container's process uses already it goes on using, as
    a file that is removed stays with those that have it open.
    """
    leftovers = find_leftovers(memory, folder)
    count = nbytes = 0
    ended: set[str | None] = set()
    for one, job, status in leftovers.segments:
        # Another rank of this job may have removed the segment and made its own of that name.
        if _same(one, status):
            with contextlib.suppress(OSError):
                one.unlink()
                count, nbytes = count + 1, nbytes + status.st_size
                ended.add(job)
    for session in (*leftovers.sessions, *(job for job in leftovers.jobs if f"{int(job.name):x}" in ended)):
        shutil.rmtree(session, ignore_errors=True)
    return count, nbytes


def _own_files(folder: Path, names: re.Pattern[str] = ANY) -> Iterator[tuple[Path, re.Match[str], os.stat_result]]:
    """Yield this user's files and folders whose names match, that are no links, and are older than YOUNG."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (of := names.fullmatch(entry.name)) is None:
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.getuid() and not entry.is_symlink() and time.time() - status.st_ctime > YOUNG:
                    yield Path(entry.path), of, status


def _same(path: Path, before: os.stat_result) -> bool:
    """Whether the file at `path` is still the one of the search."""
    with contextlib.suppress(OSError):
        now = path.stat(follow_symlinks=False)
        return (now.st_ino, now.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    return False


def _is_this_host(host: str | None) -> bool:
    """Whether a host name is empty or this host's."""
    here = socket.gethostname()
    return host is None or host in (here, here.partition(".")[0])


def _is_of_this_host(session: Path) -> bool:
    """Whether a launcher's session folder is of this host, by the host names inside."""
    names = [one.name.split(".") for one, _, _ in _own_files(session)]
    return any(name[0] == "pmix" and _is_this_host(".".join(name[1:-1])) for name in names if name[-1] == "tool")


def _processes() -> Iterable[int]:
    return (int(name) for name in os.listdir(PROCESSES) if name.isdigit())


def _mapped_files() -> Iterator[str]:
    """Paths of files mapped by living processes."""
    for pid in _processes():
        # The process is another user's, or has ended.
        with contextlib.suppress(OSError), open(f"{PROCESSES}/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                path = line.rstrip("\n").split(maxsplit=5)
                if len(path) == 6 and path[5].startswith("/"):
                    yield path[5]


def _living(pid: int, session: Path, used: Iterable[str]) -> bool:
    """Whether a launcher lives, or ranks use files of its session folder."""
    return os.path.exists(f"{PROCESSES}/{pid}") or any(path.startswith(f"{session}/") for path in used)
