"""Launchers of MPI programs (mpirun, srun): the environment variables that they set, and the terminal they print to."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variables with the number of ranks that were started, and with the rank of this process.
LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "FLUX_JOB_SIZE", "MV2_COMM_WORLD_SIZE")

LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "MV2_COMM_WORLD_RANK",
                  "SLURM_PROCID")  # fmt: skip


def announced_size(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The launcher's variable for the number of ranks and its value; None without a launcher."""
    for name in LAUNCHER_SIZES:
        if environ.get(name, "").isdigit():
            return name, int(environ[name])
    # SLURM sets SLURM_NTASKS for the batch shell as well; only a step that srun launched has one process a task.
    if environ.get("SLURM_STEP_NUM_TASKS", "").isdigit() and environ.get("SLURM_PROCID", "").isdigit():
        return "SLURM_STEP_NUM_TASKS", int(environ["SLURM_STEP_NUM_TASKS"])
    return None


def announced_rank(environ: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    for name in LAUNCHER_RANKS:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return 0


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the launcher's variables, for a child process that is not a rank.

    An h5py built with parallel HDF5 imports mpi4py, which must not start MPI in the child process.
    """
    prefixes = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDI_")
    remaining = {name: value for name, value in environ.items() if not name.startswith(prefixes)}
    return {**remaining, "MPI4PY_RC_INITIALIZE": "false"}


def reads_output(environ: Mapping[str, str]) -> bool:
    """Whether a launcher reads what this process prints and passes it on, to a terminal or to a file.

    Open MPI reads the output of a single process too, through a pseudo-terminal. A single process of another launcher
    may be the interactive shell of a SLURM job.
    """
    announced = announced_size(environ)
    return announced is not None and (announced[1] > 1 or announced[0].startswith("OMPI_"))


def ends_ranks(environ: Mapping[str, str]) -> bool:
    """Whether the launcher kills its ranks at Ctrl-C before they can save: Open MPI does so within half a second."""
    announced = announced_size(environ)
    return announced is not None and announced[0].startswith("OMPI_")


def process_number() -> str:
    """The process id of the launcher if it is the parent of this process; else the placeholder PROCESS-OF-MPIRUN."""
    try:
        with open(f"/proc/{os.getppid()}/comm") as file:
            if file.read().strip() in ("mpirun", "mpiexec", "orterun", "prterun"):
                return str(os.getppid())
    except OSError:
        pass
    return "PROCESS-OF-MPIRUN"


def shown_on(number: int) -> str:
    """Path of the terminal on which a launcher shows what this process writes to file descriptor `number`; "": none.

    The search follows the pipes, or Open MPI's pseudo-terminal, from each process to the ancestor that reads them. It
    needs Linux and a launcher on the same host. Where the chain breaks, as with srun, the result is "".
    """
    try:
        link, pid = os.readlink(f"/proc/self/fd/{number}"), os.getppid()
        while pid > 1:
            if _reads(pid, link):
                path = f"/proc/{pid}/fd/{number}"
                link = os.readlink(path)
                if link.startswith("/dev/"):
                    return path if _is_terminal(path) else ""
            with open(f"/proc/{pid}/stat") as file:
                # State and parent follow the name of the process, which may contain any character.
                pid = int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return ""
    return ""


def _reads(pid: int, link: str) -> bool:
    """Whether a process has the other end of a pipe, or of a pseudo-terminal, open (or the same end)."""
    names = os.listdir(f"/proc/{pid}/fd")
    if link.startswith("pipe:"):
        return any(_link(pid, name) == link for name in names)
    if not link.startswith("/dev/pts/"):
        return False
    wanted = f"tty-index:\t{link.removeprefix('/dev/pts/')}"
    for name in names:
        if _link(pid, name).endswith("ptmx"):
            with open(f"/proc/{pid}/fdinfo/{name}") as file:
                if wanted in file.read().splitlines():
                    return True
    return False


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}")
    except FileNotFoundError:
        # The file descriptor was closed after it was listed.
        return ""


def _is_terminal(path: str) -> bool:
    opened = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        return os.isatty(opened)
    finally:
        os.close(opened)


def columns_of(path: str) -> int:
    """Columns of the terminal at a path; 80 if the terminal does not report a width."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            return os.get_terminal_size(opened).columns or 80
        finally:
            os.close(opened)
    except OSError:
        return 80
