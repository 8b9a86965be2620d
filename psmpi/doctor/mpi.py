"""Checks of the MPI library and the launcher, and whether they match."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence

from psmpi.comm.installed import Launcher, Library, launchers, library, started_by
from psmpi.comm.world import lacking_memory
from psmpi.doctor.report import Finding, good, warning
from psmpi.launcher import announced_size


def installation() -> Iterator[Finding]:
    """The installed MPI library, and the shared memory that it needs. UserError if no library is found."""
    mpi = library()
    whose = f"of the wheel {mpi.wheel}" if mpi.wheel else mpi.path or "whose file is not known"
    yield good("MPI", f"{mpi.name}, {whose}{f' ({mpi.path})' if mpi.wheel else ''}")
    lacks = lacking_memory(mpi.vendor)
    if lacks:
        yield warning("memory", lacks)


def launched(environ: Mapping[str, str], size: int) -> Finding:
    """The launcher that started these ranks. size: number of ranks that MPI sees, which has to match."""
    announced = announced_size(environ)
    if announced is None:
        return good("launcher", f"an unknown one, and MPI sees {size} processes")
    name, number = announced
    program = started_by() or "a launcher"
    if number != size:
        return warning(
            "launcher",
            f"{program} started {number} processes ({name}={number}), and MPI sees {size}: start all of them by one "
            "mpirun or srun",
        )
    return good("launcher", f"{program} started {number} processes ({name}={number}), and MPI sees {size}: it matches")


def lone(mpi: Library, installed: Sequence[Launcher] | None = None) -> Finding:
    """Whether a launcher on this host fits the MPI library, for a process without one. installed: None: search."""
    installed = launchers() if installed is None else installed
    fitting = [launcher for launcher in installed if mpi.vendor in launcher.vendors]
    srun = shutil.which("srun")
    if not installed:
        if srun:
            return good("launcher", f"no mpirun, but {srun}: psmpi submit writes jobs that use it")
        return warning("launcher", "no mpirun and no srun: several ranks need one: pip install 'psmpi[mpi]'")
    first = installed[0]
    if first in fitting:
        where = "" if shutil.which("mpirun") == first.path else ", not on the PATH: type it whole"
        return good("launcher", f"{first.name} matches{where}")
    fix = f"type {fitting[0].path}" if fitting else f"use the mpirun of {mpi.name}, or pip install 'psmpi[mpi]'"
    why = (
        f"is of another MPI than {mpi.name}, under it each rank would be alone"
        if first.vendors
        else "is not known to fit"
    )
    return warning("launcher", f"mpirun on the PATH, {first.name}, {why}: {fix}")
