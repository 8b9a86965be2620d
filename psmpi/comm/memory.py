"""The memory still available to processes: that of the host, and the rest of limits of control groups."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Control groups of version 1 without a limit state about 2^63.
NO_LIMIT = 1 << 60


class Limit(NamedTuple):
    """Bytes left for a set of processes; `key` identifies the set."""

    key: str
    what: str
    nbytes: int


def limits(proc: str = "/proc", groups: str = "/sys/fs/cgroup") -> list[Limit]:
    """The limits of this process: those of its host and of its control groups (versions 1 and 2).

    Each is an upper bound: what the kernel can reclaim counts as free, and so does swap space as far as it may be used.
    Nothing is said of what cannot be known, as outside Linux. A batch system's limit of a job is a control group's.
    """
    host = socket.gethostname()
    free = _numbers(Path(proc, "meminfo"))
    if "MemAvailable:" not in free:
        return []
    swap = free.get("SwapFree:", 0) << 10
    boot = _text(Path(proc, "sys/kernel/random/boot_id")) or host
    rooms = [Limit(boot, f"host {host}", (free["MemAvailable:"] << 10) + swap)]
    for folder in _folders(_text(Path(proc, "self/cgroup")), Path(groups)):
        left = _left(folder, swap)
        if left is not None:
            at = folder.stat()
            rooms.append(Limit(f"{boot} {at.st_dev} {at.st_ino}", f"the control group (cgroup) on host {host}", left))
    return rooms


def _folders(memberships: str, groups: Path) -> Iterator[Path]:
    """Folders of the control groups of a process, and of their parents."""
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for base in (groups / controllers,) if controllers else (groups, groups / "unified"):
            folder = base / path.lstrip("/")
            # A container may see its own group as the root.
            yield from (one for one in (folder, *folder.parents) if one.is_relative_to(base) and one.is_dir())


def _left(folder: Path, swap: int) -> int | None:
    """Bytes left in a control group, given the host's free swap space; None without a limit."""
    limit = _number(folder / "memory.max")
    used = _numbers(folder / "memory.stat")
    if limit is not None:
        more = _number(folder / "memory.swap.max")
        held = used.get("anon", 0) + used.get("shmem", 0)
    else:
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is None:
            return None
        both = _number(folder / "memory.memsw.limit_in_bytes")
        more = None if both is None else both - limit
        held = used.get("total_rss", 0) + used.get("total_shmem", 0)
    return max(0, limit - held) + min(swap, sys.maxsize if more is None else more)


def _number(path: Path) -> int | None:
    """The limit in a file; None if there is none."""
    with suppress(ValueError):
        number = int(_text(path))
        return number if number < NO_LIMIT else None
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Parse lines of a name and a number."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    with suppress(OSError):
        return os.fsdecode(path.read_bytes()).strip()
    return ""
