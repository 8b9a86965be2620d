"""Processor, memory, limits, shared memory, what killed jobs have left, and SLURM."""

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

# Free memory below which little can be trained, in bytes, and of /dev/shm.
LITTLE = 1 << 30
# Limits of a process that are in the way below so much: name, flag of ulimit, its unit in bytes or 1, at least, what.
LIMITS = (
    ("RLIMIT_AS", "-v", 1024, 8 << 30, "kB of address space, shared memory and mapped files with it"),
    ("RLIMIT_DATA", "-d", 1024, 4 << 30, "kB of data"),
    ("RLIMIT_FSIZE", "-f", 1024, 1 << 40, "kB of a file, such as a checkpoint"),
    ("RLIMIT_NOFILE", "-n", 1, 256, "open files"),
    ("RLIMIT_CPU", "-t", 1, 1 << 40, "seconds of processor time"),
)
INFINIBAND = Path("/sys/class/infiniband")


def processor() -> Iterator[Finding]:
    """The processor, and how much of it this process may use."""
    mine, all_of_them, share = len(cores()), os.cpu_count() or 1, quota()
    text = f"{_model()}, {counted(mine, 'core')} of {all_of_them} for this process ({ranges(cores())})"
    yield good("CPU", text + (f", and a container's share of {share}" if share < mine else ""))


def _model(path: str = "/proc/cpuinfo") -> str:
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown processor"


def ranges(numbers: Sequence[int]) -> str:
    """Growing numbers as `0-3,8`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def memory(found: Sequence[Limit] | None = None) -> Iterator[Finding]:
    """Memory that processes of this host can still have, and limits of a process."""
    found = limits() if found is None else found
    for one in found:
        text = f"{one.nbytes / 1e9:.1f} GB left on {one.what}"
        if one.nbytes < LITTLE:
            yield warning("memory", f"{text}: end what else runs there, or ask the batch system for more (--mem)")
        else:
            yield good("memory", text)
    if not found:
        yield warning("memory", "what is left is not known on this system: see to it yourself")
    low = list(_low())
    yield from low
    if not low:
        yield good("limits", "none of ulimit -v, -d, -f, -n, -t is in the way")


def _low() -> Iterator[Finding]:
    for name, flag, unit, least, what in LIMITS:
        soft, hard = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY and soft < least:
            most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard // unit}"
            fix = f"ulimit {flag} {most}" if hard != soft else "ask the administrator for more"
            yield warning("limits", f"a process has {soft // unit:,} {what} (ulimit {flag}): {fix}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()) and 0 <= soft < LITTLE:
        yield warning(
            "limits",
            f"locked memory: {soft // 1024} kB (ulimit -l), and messages over the InfiniBand adapter here need it: "
            "ulimit -l unlimited, or ask the administrator for more",
        )


def leftovers(segments: int, nbytes: int, sessions: int, *, started: bool, host: str = "") -> Finding:
    """Leftovers of killed MPI jobs on a host before this start; started: whether MPI was started since."""
    at = f" on {host}" if host else ""
    parts = []
    if segments:
        parts.append(f"{counted(segments, 'segment')} of shared memory, {nbytes / 1e6:.0f} MB")
    if sessions:
        parts.append(f"{counted(sessions, 'session folder')} of Open MPI")
    if not parts:
        return good("leftovers", f"none of this user's killed jobs{at}")
    done = "this start of MPI has removed them" if started else "the next start of psmpi removes them"
    return warning("leftovers", f"{' and '.join(parts)} of killed jobs{at}: {done}")


def slurm(environ: Mapping[str, str]) -> Iterator[Finding]:
    """SLURM's word on the job, beside what is there."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        submit = shutil.which("sbatch")
        yield good("SLURM", f"no job of SLURM{f'; {submit} is here: psmpi submit writes jobs' if submit else ''}")
        return
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS")
    each = _number(environ, "SLURM_CPUS_PER_TASK")
    text = ", ".join(
        f"{environ[name]} {what}"
        for name, what in (("SLURM_JOB_NUM_NODES", "node(s)"), ("SLURM_NTASKS", "task(s)"))
        if environ.get(name)
    )
    yield good(
        "SLURM",
        f"job {job}: {text or 'nothing told of nodes and tasks'}" + (f", {each} core(s) a task" if each else ""),
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
