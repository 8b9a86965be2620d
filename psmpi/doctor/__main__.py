"""Report on the system that psmpi runs on: `python -m psmpi.doctor`, also under mpirun."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psmpi.launcher import announced_rank, announced_size

if TYPE_CHECKING:
    from psmpi.comm.leftovers import Leftovers
    from psmpi.comm.protocol import World
    from psmpi.doctor.report import Report

# Most seconds for the start of MPI and the measurements between ranks.
LIMIT = 60.0
# Seconds that a rank without MPI waits before it ends, so that rank 0 can print its report first.
LATE = 10.0


@dataclass(frozen=True)
class Options:
    """Check software, machine, folders and MPI, and print the fix of each problem.

    Under mpirun or srun it also checks the ranks: their hosts, shared cores, and latency and bandwidth between them,
    which takes about 4 seconds. The exit status is 1 after an error, 0 with warnings only.
    """

    data_dir: str = ""
    """Folder of data sets to check. If not given: data."""
    out: str = ""
    """Folder for runs to check. If not given: runs."""
    json: bool = False
    """Print JSON in place of lines."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 good or warnings, 1 error."""
    from psmpi.comm.world import run

    return run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    first = announced_rank(os.environ) == 0
    try:
        options = _parse(argv, first)
    except SystemExit as end:
        if not first:
            # A launcher ends the job at the first failure, so let rank 0 print its message first.
            time.sleep(0.5)
        return 1 if end.code else 0
    return examine(options, first)


def examine(options: Options, first: bool) -> int:
    """Make and print the report; return the exit status. first: whether this process is the one that prints."""
    from psmpi.comm.leftovers import find_leftovers
    from psmpi.doctor.machine import leftovers
    from psmpi.doctor.report import Report
    from psmpi.output import complain, tell

    report, doing, left = Report(shown=first and not options.json), ["the start of MPI"], find_leftovers()
    if first:
        check_process(report, options)
    # The printing process has the shorter limit, so that it reports the time-out first.
    with bounded(report, doing, LIMIT if first else LIMIT + 5, json=first and options.json):
        world = _started(report)
        if world is None and not first:
            # A launcher ends the job at the first failure, so let rank 0 print its report first.
            time.sleep(LATE)
            complain(f"psmpi doctor, on {socket.gethostname()}: {report.findings[-1].text}")
            return 1
        if world is None:
            report.add([leftovers(len(left.segments), left.nbytes, len(left.sessions), started=False)])
            status = 1
        else:
            status = check_ranks(world, report, options, left, doing)
    if first and options.json:
        tell(report.json())
    elif first:
        report.screen.tell(report.summary())
    return status


def _parse(argv: Sequence[str], first: bool) -> Options:
    """Parse the options; only the first process prints help and errors."""
    from psmpi.command import parsed

    with contextlib.ExitStack() as stack:
        if not first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        options: Options = parsed(Options, argv, "doctor")
    return options


def check_process(report: Report, options: Options) -> None:
    """Add the findings of one process, without a start of MPI."""
    from psmpi.doctor import folders, machine, mpi, software
    from psmpi.doctor.report import guarded

    for subject, findings in (
        ("Python", software.python()),
        ("packages", software.packages()),
        ("CPU", machine.processor()),
        ("kernels", software.kernels()),
        ("BLAS", software.linear_algebra()),
        ("GPU", software.gpus()),
        ("memory", machine.memory()),
        ("HDF5", folders.hdf5()),
        ("runs", folders.runs(options.out)),
        ("data", folders.data(options.data_dir)),
        ("SLURM", machine.slurm(os.environ)),
        ("MPI", mpi.installation()),
    ):
        report.add(guarded(subject, findings))


def _started(report: Report) -> World | None:
    """Start MPI; return the communicator of all ranks, or None and add an error if MPI does not start."""
    from psmpi.comm.world import start
    from psmpi.doctor.report import error
    from psmpi.errors import UserError

    if any((finding.level, finding.subject) == ("error", "MPI") for finding in report.findings):
        return None
    try:
        return start()
    except UserError as trouble:
        report.add([error("MPI", str(trouble))])
        return None


def check_ranks(world: World, report: Report, options: Options, left: Leftovers, doing: list[str]) -> int:
    """Add the findings about all ranks; return the exit status, the same on all ranks. All ranks make this call.

    left: leftovers of killed jobs that this process saw before the start of MPI. doing: as in `bounded`.
    """
    from psmpi.comm.control import Control
    from psmpi.comm.installed import library
    from psmpi.comm.patience import Patient
    from psmpi.comm.world import host_numbers
    from psmpi.doctor import mpi, ranks

    control = Control(world)
    doing[0] = "word from all ranks"
    if control.rank == 0:
        lone = control.size == 1 and announced_size(os.environ) is None
        report.add([mpi.lone(library()) if lone else mpi.launched(os.environ, control.size)])
    places = ranks.gather(control, ranks.own_place(control.rank, options.data_dir, left))
    if control.rank == 0:
        report.add(ranks.leftovers(places))
        report.add(ranks.alike(places, options.data_dir) if control.size > 1 else ())
        report.add(ranks.placement(places))
    measured = ranks.measure(control, host_numbers(world), doing) if control.size > 1 else []
    doing[0] = "the end of all ranks"
    if control.rank == 0:
        if control.size > 1:
            report.add(ranks.links(measured, control.size, isinstance(world, Patient)))
            for table in ranks.tables(places, measured):
                report.screen.print(table)
        report.more = ranks.as_json(places, measured)
    return int(control.share_flag(bool(report.status)))


@contextlib.contextmanager
def bounded(report: Report, doing: list[str], seconds: float, *, json: bool) -> Iterator[None]:
    """Run a block; end this process with an error if it takes longer than `seconds`.

    doing: a list with one text, the present action, which the error names.
    """
    timer = threading.Timer(seconds, _give_up, (report, doing, seconds, json))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(report: Report, doing: list[str], seconds: float, json: bool) -> None:
    from psmpi.comm.world import abort
    from psmpi.doctor.report import error
    from psmpi.output import tell

    fix = (
        "use the launcher of this MPI, in an allocation of SLURM srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI); or "
        "set HYDRA_LAUNCHER=fork for ranks of this host"
        if doing[0] == "the start of MPI"
        else "look at these hosts, and at the network between them (firewalls, FI_PROVIDER=tcp with MPICH, "
        "OMPI_MCA_btl_tcp_if_include with Open MPI)"
    )
    report.add([error("MPI", f"{doing[0]} did not end within {seconds:.0f} s: {fix}")])
    if json:
        tell(report.json())
    sys.stdout.flush()
    abort(1)


if __name__ == "__main__":
    sys.exit(main())
