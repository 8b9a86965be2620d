"""SLURM: the script of a job for sbatch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from psmpi.command import python_words
from psmpi.errors import UserError
from psmpi.submit.job import Job

# Most starts of a job that requeues itself: a job that never trains would start again forever.
MOST_STARTS = 1000
WIDTH = 110
# Seconds after the end of the first rank before srun kills the others. Ranks of a stopped run all end with status 85;
# if srun killed one, its exit status would be that of the signal.
PATIENCE = 30
# Variables of sbatch whose names differ from those of their options.
VARIABLES = {"ARRAY": "ARRAY_INX", "MEM": "MEM_PER_NODE", "REQUEUE": "NO_REQUEUE", "TIME": "TIMELIMIT"}
# Prefixes of the variables of a job and its steps.
OF_JOB = ("SLURM_", "SRUN_", "PMI_", "PMIX_")


class Slurm:
    """The batch system SLURM, used by its command sbatch."""

    def script(self, job: Job, options: Sequence[str], command: str, python: str = "python") -> str:
        """Text of a script that trains with these options of psmpi train.

        command: the command line that writes the script; python: name or path of the interpreter.
        """
        tasks = job.tasks()
        directives = {
            "--job-name": job.name,
            "--nodes": job.nodes,
            "--ntasks": job.ranks,
            "--cpus-per-task": job.cores,
            "--gpus-per-node": job.gpus or None,
            "--mem": job.memory,
            "--time": job.time,
            "--partition": job.partition,
            "--account": job.account,
            "--array": f"0-{len(tasks) - 1}" if tasks else None,
            # The signal goes to the ranks, not to this script; SLURM may send it up to a minute early.
            "--signal": f"USR1@{job.save_before}" if job.save_before else None,
            "--output": "%x-%A_%a.out" if tasks else "%x-%j.out",
            "--open-mode": "append",
        }
        lines = [f"#SBATCH {name}={value}" for name, value in directives.items() if value not in (None, "")]
        # --requeue also restarts the job after a node has failed.
        lines += ["#SBATCH --requeue", *(f"#SBATCH {_quoted(option)}" for option in job.ask)]
        parts = [
            "#!/bin/bash\n"
            f"# Train with {job.ranks} rank(s) on {job.nodes} node(s){_series(job, len(tasks))}. Written by:\n"
            f"# {command}\n"
            "# Submit it by sbatch from a folder that all nodes see; further options of psmpi train may follow its "
            "name.\n" + "\n".join(lines),
            # Scripts of modules and environments, such as conda's, use unset variables, so set -u comes later.
            "set -eo pipefail",
            self._environment(job),
            self._task(job, tasks),
            self._train(job, options, bool(tasks), python),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _environment(self, job: Job) -> str:
        lines = [f"module load {shlex.quote(module)}" for module in job.modules]
        if job.activate:
            lines += ["# shellcheck source=/dev/null", f"source {shlex.quote(job.activate)}"]
        lines += [
            "# srun must use the interface of this Python's MPI: srun --mpi=list lists the interfaces.",
            f'export SLURM_MPI_TYPE="${{SLURM_MPI_TYPE:-{job.mpi}}}"',
            "# srun does not inherit --cpus-per-task from a batch script.",
            f"export SRUN_CPUS_PER_TASK={job.cores}",
            "# Lustre and NFS do not always have file locks.",
            "export HDF5_USE_FILE_LOCKING=BEST_EFFORT",
        ]
        if job.gpus:
            lines += [
                "# Each node compiles the kernels once, and keeps them on its own disk.",
                'export CUPY_CACHE_DIR="${TMPDIR:-/tmp}/psmpi-cupy-$UID"',
            ]
        return "\n".join([*lines, "set -u"])

    def _task(self, job: Job, tasks: Sequence[tuple[str, Sequence[str]]]) -> str:
        if not tasks:
            return ""
        words = (" ".join([folder, *options]) for folder, options in tasks)
        listed = "\n".join(f"    {shlex.quote(line)}" for line in words)
        return (
            "# Run directory and options of each job of the array.\n"
            f"tasks=(\n{listed}\n)\n"
            'read -ra task <<< "${tasks[SLURM_ARRAY_TASK_ID]}"'
        )

    def _train(self, job: Job, options: Sequence[str], array: bool, python: str) -> str:
        # The run directory has no job number, so that another job of this name continues the run.
        out = f'"runs/{job.name}/${{task[0]}}"' if array else f"runs/{job.name}"
        number = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if array else '"$SLURM_JOB_ID"'
        words = [*map(shlex.quote, options), "--threads", str(job.cores), "--out", out, "--resume", "auto"]
        words += ['"${task[@]:1}"'] * array + ['"$@"']
        program = map(shlex.quote, [python, *python_words("train")])
        start = ["srun", "--kill-on-bad-exit=0", f"--wait={PATIENCE}", *program]
        command = _wrapped(start, words)
        if not job.requeue:
            return command
        return (
            f"status=0\n{command} || status=$?\n"
            "# 85: stopped by a signal, and saved.\n"
            f'if [ "$status" = 85 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_STARTS} ]; then\n'
            # SLURM_JOB_ID of an array's job may be that of the whole array, which would start again.
            f"    scontrol requeue {number}\n"
            "fi\n"
            'exit "$status"'
        )

    def submit(self, path: Path) -> str:
        """Submit a script; return sbatch's answer. UserError if sbatch is missing or refuses the script."""
        try:
            process = subprocess.run(
                ["sbatch", str(path)], env=submitting(os.environ, path.read_text()), capture_output=True, text=True,
                check=False,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"sbatch cannot be started ({error.strerror}): submit where SLURM is, or look at the script (--dry-run)"
            ) from None
        if process.returncode:
            reason = " ".join(process.stderr.split()) or f"status {process.returncode}"
            raise UserError(f"sbatch does not take {path}: {reason}")
        return process.stdout.strip()


def submitting(environ: Mapping[str, str], script: str) -> dict[str, str]:
    """Environment to submit a script in, without variables that would override its directives.

    sbatch's own variables take precedence over the directives of a script. All others are passed on to the job: inside
    another job these include variables that tell srun how the other job's steps are bound and distributed.
    """
    directives = {name.upper().replace("-", "_") for name in re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)}
    spoiling = {f"SBATCH_{VARIABLES.get(name, name)}" for name in directives}
    around = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name not in spoiling and not (around and name.startswith(OF_JOB) and name != "SLURM_CONF")
    }


def _quoted(option: str) -> str:
    """An option of sbatch as a directive, with its value in quotes if it contains spaces."""
    name, equals, value = option.partition("=")
    spaced = equals and re.search(r"\s", value) and not re.search(r"\s", name)
    return f"{name}={shlex.quote(value)}" if spaced else option


def _series(job: Job, tasks: int) -> str:
    array = f", {tasks} settings one by one" if job.grid else f", {tasks} seeds" if tasks else ""
    return array + (", beyond the time limit" if job.requeue else "")


def _wrapped(start: Sequence[str], words: Sequence[str]) -> str:
    """A command in lines of about WIDTH characters at most; an option's values stay on its line."""
    lines, groups = [" ".join(start)], list[str]()
    for word in words:
        if word.startswith(("--", '"$')) or not groups:
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    for group in groups:
        if len(lines) > 1 and len(lines[-1]) + len(group) + 3 <= WIDTH:
            lines[-1] += f" {group}"
        else:
            lines.append(f"    {group}")
    return " \\\n".join(lines)


def activation() -> str:
    """Path of the script that activates this Python's virtual environment; "" if there is none."""
    path = Path(sys.prefix) / "bin" / "activate"
    return str(path) if sys.prefix != sys.base_prefix and path.exists() else ""
