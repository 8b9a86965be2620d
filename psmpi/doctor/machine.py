"""Checks of processor, memory, limits, shared memory, leftovers of killed jobs, and SLURM."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from psmpi.comm.memory import Limit, limits
from psmpi.comm.world import cores, quota
from psmpi.doctor.report import Finding, good, warning
from psmpi.errors import counted
from psmpi.launcher import announced_size

# Less free memory, in bytes, gives a warning.
LITTLE = 1 << 30
# Limits of a process: name, flag of ulimit, unit of ulimit, smallest value without a warning, what is limited.
LIMITS = (
    ("RLIMIT_AS", "-v", 1024, 8 << 30, "kB of address space, shared memory and mapped files with it"),
    ("RLIMIT_DATA", "-d", 1024, 4 << 30, "kB of data"),
    ("RLIMIT_FSIZE", "-f", 1024, 1 << 40, "kB of a file, such as a checkpoint"),
    ("RLIMIT_NOFILE", "-n", 1, 256, "open files"),
    ("RLIMIT_CPU", "-t", 1, 1 << 40, "seconds of processor time"),
)
INFINIBAND = Path("/sys/class/infiniband")


def processor() -> Iterator[Finding]:
    """The processor, and the cores that this process may use."""
    usable, total, share = len(cores()), os.cpu_count() or 1, quota()
    text = f"{_model()}, {counted(usable, 'core')} of {total} for this process ({ranges(cores())})"
    yield good("CPU", text + (f", and a container's share of {share}" if share < usable else ""))


def _model(path: str = "/proc/cpuinfo") -> str:
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown processor"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as `0-3,8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def memory(free: Sequence[Limit] | None = None) -> Iterator[Finding]:
    """Free memory of this host, and limits of a process. free: for tests; None: measured."""
    free = limits() if free is None else free
    for limit in free:
        text = f"{limit.nbytes / 1e9:.1f} GB left on {limit.what}"
        if limit.nbytes < LITTLE:
            yield warning("memory", f"{text}: end what else runs there, or ask the batch system for more (--mem)")
        else:
            yield good("memory", text)
    if not free:
        yield warning("memory", "the free memory is not known on this system: check it yourself")
    low = list(_low())
    yield from low
    if not low:
        yield good("limits", "none of ulimit -v, -d, -f, -n, -t is in the way")


def _low() -> Iterator[Finding]:
    for name, flag, unit, least, limited in LIMITS:
        soft, hard = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY and soft < least:
            most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard // unit}"
            fix = f"ulimit {flag} {most}" if hard != soft else "ask the administrator for more"
            yield warning("limits", f"a process has {soft // unit:,} {limited} (ulimit {flag}): {fix}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()) and 0 <= soft < LITTLE:
        yield warning(
            "limits",
            f"locked memory: {soft // 1024} kB (ulimit -l), and messages over the InfiniBand adapter here need it: "
            "ulimit -l unlimited, or ask the administrator for more",
        )


def leftovers(segments: int, nbytes: int, sessions: int, *, started: bool, host: str = "") -> Finding:
    """Leftovers of killed MPI jobs on a host, found before the start of MPI. started: whether MPI has started since."""
    at = f" on {host}" if host else ""
    parts = []
    if segments:
        parts.append(f"{counted(segments, 'segment')} of shared memory, {nbytes / 1e6:.0f} MB")
    if sessions:
        parts.append(f"{counted(sessions, 'session folder')} of Open MPI")
    if not parts:
        return good("leftovers", f"none of this user's killed jobs{at}")
    removal = "this start of MPI has removed them" if started else "the next start of psmpi removes them"
    return warning("leftovers", f"{' and '.join(parts)} of killed jobs{at}: {removal}")


def slurm(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The job as SLURM's variables describe it, compared with this process."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        submit = shutil.which("sbatch")
        yield good("SLURM", f"no job of SLURM{f'; {submit} is here: psmpi submit writes jobs' if submit else ''}")
        return
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS")
    each = _number(environ, "SLURM_CPUS_PER_TASK")
    text = ", ".join(
        f"{environ[name]} {noun}"
        for name, noun in (("SLURM_JOB_NUM_NODES", "node(s)"), ("SLURM_NTASKS", "task(s)"))
        if environ.get(name)
    )
    yield good(
        "SLURM",
        f"job {job}: {text or 'nodes and tasks are not known'}" + (f", {each} core(s) a task" if each else ""),
    )
    if tasks > 1 and announced_size(environ) is None:
        yield warning(
            "SLURM",
            f"the job has {tasks} tasks, and this is one process without a launcher: write srun --mpi=pmi2 (MPICH) or "
            "srun --mpi=pmix (Open MPI) before the command; psmpi submit writes such jobs",
        )
    if each > len(cores()):
        yield warning(
            "SLURM",
            f"{each} cores a task were asked for, and this process may use {len(cores())} ({ranges(cores())}): srun "
            "does not take the number from sbatch: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun",
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    word = environ.get(name, "")
    return int(word) if word.isdigit() else 0
