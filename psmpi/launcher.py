"""What launchers of MPI programs (mpirun, srun) tell each process they start, by environment variables."""

from __future__ import annotations

from collections.abc import Mapping

# The number of ranks that they started.
LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "FLUX_JOB_SIZE", "MV2_COMM_WORLD_SIZE")

LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "MV2_COMM_WORLD_RANK",
                  "SLURM_PROCID")  # fmt: skip


def announced_size(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The variable and number of ranks that the launcher set, or None where there is no launcher."""
    for name in LAUNCHER_SIZES:
        if environ.get(name, "").isdigit():
            return name, int(environ[name])
    # SLURM sets SLURM_NTASKS for the batch shell as well; only a step that srun launched has one process a task.
    if environ.get("SLURM_STEP_NUM_TASKS", "").isdigit() and environ.get("SLURM_PROCID", "").isdigit():
        return "SLURM_STEP_NUM_TASKS", int(environ["SLURM_STEP_NUM_TASKS"])
    return None


def announced_rank(environ: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, 0 where it gave none."""
    for name in LAUNCHER_RANKS:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return 0


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank: nothing of the launcher.

    An h5py built with parallel HDF5 imports mpi4py, which must not start MPI there.
    """
    prefixes = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDI_")
    kept = {name: value for name, value in environ.items() if not name.startswith(prefixes)}
    return {**kept, "MPI4PY_RC_INITIALIZE": "false"}


def reads_output(environ: Mapping[str, str]) -> bool:
    """Whether a launcher reads what this process prints and passes it on, to a terminal or to a file.

    Open MPI's does, by a pseudo-terminal even where it starts one process alone; a single process of another one may be
    the interactive shell of a SLURM job.
    """
    announced = announced_size(environ)
    return announced is not None and (announced[1] > 1 or announced[0].startswith("OMPI_"))
