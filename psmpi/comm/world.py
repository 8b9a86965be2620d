"""The start of MPI and the end of a job; the only place that uses MPI.COMM_WORLD."""

from __future__ import annotations

import array
import contextlib
import ctypes.util
import errno
import faulthandler
import fcntl
import os
import re
import socket
import sys
import termios
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psmpi import output
from psmpi.comm.leftovers import remove_leftovers
from psmpi.comm.signals import heed_hangups
from psmpi.errors import UserError
from psmpi.launcher import announced_rank, announced_size

if TYPE_CHECKING:
    from psmpi.comm.protocol import Communicator, World

# Installs mpi4py so that it takes the MPI library that it finds, in place of a build for one library.
WHEEL = "pip install --force-reinstall --no-deps --only-binary mpi4py mpi4py"
# Seconds for MPI_Abort to end a job.
PATIENCE = 2.0
# Errors of the file system, which are reported without a traceback.
OUTSIDE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EIO)


def check_launcher(size: int, environ: Mapping[str, str], library: str) -> None:
    """UserError if the launcher started more ranks than this MPI sees: each would take itself for rank 0 of 1."""
    announced = announced_size(environ)
    if announced is not None and size == 1 and announced[1] > 1:
        name, number = announced
        seen = f"the launcher started {number} processes ({name}={number}), but MPI ({library}) sees 1"
        if name == "PMI_SIZE" and re.search(r"MPICH\D*4\.2\.0\b", library):
            raise UserError(
                f"{seen}: MPICH 4.2.0 of Ubuntu 24.04 has this fault under its own mpirun (Launchpad bug 2072338). "
                f"Install another MPI by pip install 'psmpi[mpi]', then {WHEEL}. {_fitting_launcher()}"
            )
        raise UserError(f"{seen}: the launcher belongs to another MPI. {_fitting_launcher()}")


def check_protocol(vendor: str, environ: Mapping[str, str], library: str, pmix: bool) -> None:
    """UserError where MPI, whose vendor is mpi4py's name of it, would not start under this launcher.

    What it then prints explains nothing: MPICH ends the process without PMIx, by which Open MPI's mpirun starts ranks;
    Open MPI looks for help texts of its own under MPICH's. pmix: whether a PMIx library is loaded.
    """
    by_pmix = "PMIX_NAMESPACE" in environ or "OMPI_COMM_WORLD_SIZE" in environ
    announced = "PMI_FD" in environ or "MPIR_CVAR_PMI_VERSION" in environ
    if vendor == "MPICH" and by_pmix and not announced and not pmix:
        launcher = "Open MPI's" if "OMPI_COMM_WORLD_SIZE" in environ else "one that speaks PMIx"
    elif vendor == "Open MPI" and "HYDI_CONTROL_FD" in environ and not by_pmix:
        launcher = "MPICH's"
    else:
        return
    raise UserError(
        f"the launcher is {launcher}, and MPI ({library}) does not start under it: the launcher belongs to another "
        f"MPI. {_fitting_launcher()}"
    )


def lacking_memory(vendor: str, folder: str = "/dev/shm", least: int = 8 << 20) -> str:
    """The reason why MPICH may fail to start here, with an error about memory or by a signal; "" if none is known."""
    if vendor != "MPICH":
        return ""
    fix = "should MPI not start, give the container some (docker run --shm-size=1g), or use Open MPI"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder}, by which MPICH's ranks share memory, cannot be written: {fix}"
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    return f"{folder}, by which MPICH's ranks share memory, has {free >> 10} kB left: {fix}" if free < least else ""


def _fitting_launcher() -> str:
    beside = os.path.dirname(sys.executable)
    where = "lies beside this Python" if os.path.exists(f"{beside}/mpirun") else "belongs to the MPI of this Python"
    return (
        f"Use the mpirun that {where} ({beside}), or on SLURM srun --mpi=pmi2 or --mpi=pmix as your MPI wants it "
        "(`srun --mpi=list`)"
    )


def load() -> Any:
    """Import mpi4py.MPI without a start of MPI. UserError if there is no usable MPI."""
    try:
        import mpi4py

        # MPI starts later, after the check of the launcher.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load MPI ({reason}): install one with pip install 'psmpi[mpi]', or load your site's MPI module"
            f"{loading_advice(error, reason, ctypes.util.find_library('mpich') or '')}"
        ) from None
    return MPI


def loading_advice(error: Exception, reason: str, mpich: str) -> str:
    """Return the further advice for an MPI library that does not load; "" if there is none.

    error: of the import of mpi4py, whose wheel raises RuntimeError; reason: its text; mpich: name of the file of the
    library that Debian and Ubuntu call libmpich, "" if this host has none.
    """
    built_for = re.search(r"lib\w*mpi\w*\.so\S*", reason)
    if isinstance(error, ImportError) and built_for:
        return (
            f". mpi4py was built from source for {built_for[0].rstrip(':')}, and loads no other library: load the "
            f"module of that MPI, or {WHEEL}"
        )
    if isinstance(error, RuntimeError) and mpich:
        return (
            f". This host has {mpich}, MPICH of Debian or Ubuntu, under a name that mpi4py's wheel does not look for: "
            "to use it, install libmpich-dev, then pip install --force-reinstall --no-deps --no-binary mpi4py mpi4py"
        )
    return ""


def start(tell: Callable[[str], None] = output.complain) -> World:
    """Start MPI and return the communicator of all ranks. UserError where there is no usable MPI.

    `tell` hears of shared memory that is short, or that killed jobs have left.

    Where ranks outnumber the cores of a host, all ranks sleep while they wait, see `patient`. Python's warnings appear
    on rank 0 only.
    """
    with warnings.catch_warnings():
        # The checks here replace mpi4py's warning about another launcher, and say what to do.
        warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
        MPI = load()
        if not MPI.Is_initialized():
            check_protocol(MPI.get_vendor()[0], os.environ, library(), _pmix_loaded())
            lacks = lacking_memory(MPI.get_vendor()[0])
            if lacks and announced_rank(os.environ) == 0:
                tell(f"psmpi: note: {lacks}")
            count, nbytes = remove_leftovers()
            if count:
                tell(
                    f"psmpi: note: removed {count} segment(s) of shared memory, {nbytes / 1e6:.0f} MB, that killed "
                    f"jobs left on {socket.gethostname()}"
                )
            MPI.Init_thread()
            heed_hangups()
    comm = MPI.COMM_WORLD
    check_launcher(comm.size, os.environ, library())
    if comm.rank != 0:
        warnings.simplefilter("ignore")
    from psmpi.comm.patience import patient

    world: World = patient(comm, *host(comm))
    return world


def _pmix_loaded() -> bool:
    try:
        return "libpmix" in Path("/proc/self/maps").read_text()
    except OSError:
        return True


def host(world: Communicator) -> tuple[int, int]:
    """Ranks of `world` on this rank's host, and the cores that they may use, bound or not, all together.

    A container's share of the processor time (cgroup v2) counts as so many cores.
    """
    import numpy as np
    from mpi4py import MPI

    used = np.zeros(8192, np.uint8)
    used[cores()] = 1
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    local.Allreduce(MPI.IN_PLACE, used, MPI.MAX)
    ranks = int(local.size)
    local.Free()
    return ranks, min(int(used.sum()), quota())


def local_rank(world: Communicator) -> int:
    """This rank's number among the ranks of its host."""
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    rank = int(local.rank)
    local.Free()
    return rank


def several_hosts(world: Communicator) -> bool:
    """Whether the ranks are on several hosts."""
    import numpy as np
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    apart = np.array([int(local.size < world.size)])
    local.Free()
    world.Allreduce(MPI.IN_PLACE, apart, MPI.MAX)
    return bool(apart[0])


def host_numbers(world: Communicator) -> list[int]:
    """For each rank the first rank on its host, which numbers the host."""
    import numpy as np
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    own, numbers = np.array([world.rank]), np.empty(world.size, np.int64)
    local.Bcast(own, 0)
    local.Free()
    world.Allgather(own, numbers)
    return [int(number) for number in numbers]


def host_by_host(world: Communicator, work: Callable[[], None]) -> None:
    """Do `work` on the first rank of each host, then on the other ranks."""
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    if local.rank == 0:
        work()
    local.Barrier()
    if local.rank != 0:
        work()
    local.Free()


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def quota(path: str = "/sys/fs/cgroup/cpu.max") -> int:
    """A container's limit of processor time in cores, rounded up; a large number without a limit."""
    try:
        limit, period = Path(path).read_text().split()
        return max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError):
        return sys.maxsize


def library() -> str:
    """Name and version of the MPI in use."""
    from mpi4py import MPI

    return str(MPI.Get_library_version().splitlines()[0].strip("\x00 "))


def run(program: Callable[[], int]) -> int:
    """Run `program` and return its exit status; an exception ends the whole job with this rank's message.

    A UserError is printed as its message, anything else with its traceback, both to stderr. Under MPI the other ranks
    are aborted, so that none waits for a rank that is gone. Where nobody reads the output any more, that is no message.
    """
    with output.prepared():
        try:
            return output.finish(program())
        except output.ClosedError:
            return _end_unread()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            message = describe(error)
        return _end(message)


def _end_unread() -> int:
    """End the job without a message, since the output is closed."""
    comm = _running()
    if comm is not None and comm.size > 1:
        comm.Abort(output.CLOSED)
    output.finish(0)
    return output.CLOSED


def _end(message: str) -> int:
    """End the job with a message."""
    comm = _running()
    if comm is None or comm.size == 1:
        # All processes of another MPI's launcher come here; the first one prints the message.
        if announced_rank(os.environ) == 0:
            output.complain(f"psmpi: {message}")
        else:
            # Some launchers end the job at the first failure: wait until the message is printed.
            time.sleep(0.5)
        return output.finish(1)
    # Several ranks may meet one error, such as a damaged file: the first to print it ends the others.
    time.sleep(min(0.5 * comm.rank, 3.0))
    where = f"rank {comm.rank} of {comm.size} on {socket.gethostname()}"
    try:
        output.complain(f"psmpi, {where}: {message}")
        delivered()
    finally:
        comm.Abort(1)
    return 1


def end(error: BaseException) -> None:
    """End the job with an error of this rank alone; returns on a single rank."""
    comm = _running()
    if comm is not None and comm.size > 1:
        _end(describe(error))


def abort(status: int) -> None:
    """End the job at once, from any thread, whatever the main thread does.

    By MPI where it takes calls of several threads: launchers then report this status, and not that of ranks that they
    kill.
    """
    # faulthandler ends the process from a thread of C, which needs no lock of Python.
    with contextlib.suppress(RuntimeError, ValueError, OSError):
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__ or sys.stderr)
    comm = _running()
    if comm is not None and comm.size > 1:
        from mpi4py import MPI

        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            comm.Abort(status)
    os._exit(status)


def describe(error: BaseException) -> str:
    """The message of an error that ends a rank."""
    if isinstance(error, (UserError, FloatingPointError)):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}"
    if isinstance(error, OSError) and error.filename and error.errno in OUTSIDE:
        return f"error: {error.filename}: {error.strerror}: name another place, or see to it that this user may use it"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "psmpi").startswith("psmpi"):
        return (
            f"error: {sys.executable} has no module {error.name}: start psmpi by the Python of the environment that it "
            "is installed in, or install it again (pip install psmpi)"
        )
    if isinstance(error, MemoryError):
        return f"error: out of memory ({error}): use a smaller --batch-size or more ranks"
    return "".join(traceback.format_exception(error)).rstrip()


def delivered(patience: float = 2.0) -> None:
    """Wait until the launcher has read standard error: at an abort it drops what it has not read."""
    end = time.monotonic() + patience
    with contextlib.suppress(OSError, ValueError):
        while time.monotonic() < end:
            unread = array.array("i", [0])
            fcntl.ioctl(sys.stderr.fileno(), termios.FIONREAD, unread)
            if unread[0] == 0:
                break
            time.sleep(0.01)
    # The launcher has read it, but must still pass it on.
    time.sleep(0.1)


def vendor() -> str:
    """mpi4py's name of the MPI of this Python, as "MPICH" or "Open MPI", without starting it; "" if there is none."""
    try:
        return str(load().get_vendor()[0])
    except UserError:
        return ""


def _running() -> Communicator | None:
    """The communicator of all ranks if MPI has been started, else None."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return None
    world: Communicator = module.COMM_WORLD
    return world
