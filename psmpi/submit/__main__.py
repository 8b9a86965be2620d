"""Jobs that train: `python -m psmpi.submit --ranks 4 --time 04:00:00 -- --dataset mnist --epochs 20`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from psmpi.submit.job import Interface, Job

# By it a script is known to be one that may be written anew.
MARK = ". Written by:\n"


@dataclass(frozen=True)
class Submission(Job):
    """Write the script of a job that trains, and submit it to SLURM. Options of psmpi train follow behind --."""

    script: str = ""
    """File that the script is written to; NAME.sh if not given."""
    dry_run: bool = False
    """Print the script, and write and submit nothing."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error."""
    from psmpi.command import answer

    return answer(lambda: submit(sys.argv[1:] if argv is None else argv))


def submit(argv: Sequence[str]) -> int:
    """Write and submit a job, or print it. UserError, or SystemExit, for options that make none."""
    import tyro

    from psmpi.command import program
    from psmpi.config import check_ranges
    from psmpi.errors import UserError, expanded
    from psmpi.output import tell
    from psmpi.submit.slurm import Slurm, activation

    at = argv.index("--") if "--" in argv else len(argv)
    own, options = list(argv[:at]), list(argv[at + 1 :])
    job = tyro.cli(Submission, prog=program("submit"), args=own, config=(tyro.conf.OmitArgPrefixes,))
    check_ranges(job)
    job.check()
    _check_training(job, options)
    scheduler = Slurm()
    complete = replace(
        job,
        activate=activation() if job.activate is None else job.activate,
        mpi=_interface() if job.mpi == "auto" else job.mpi,
    )
    text = scheduler.script(complete, options, shlex.join(["psmpi", "submit", *argv]))
    if job.dry_run:
        tell(text.rstrip("\n"))
        return 0
    path = expanded(job.script or f"{job.name}.sh", "--script")
    if path.exists() and MARK not in path.read_text(errors="replace"):
        raise UserError(f"--script {path} is a file that psmpi has not written: name another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    said = scheduler.submit(path)
    tell(f"{path}: {said}; it trains in {Path('runs') / job.name}")
    return 0


def _check_training(job: Job, options: Sequence[str]) -> None:
    """Meet an option that psmpi train does not know before the job waits in a queue; UserError for it."""
    from psmpi.config import check, given_names
    from psmpi.errors import UserError
    from psmpi.train import parse

    taken = given_names(options, file=False) & {"out", "resume", "threads"}
    if taken:
        name = sorted(taken)[0]
        fix = {"threads": "--cores, before --,", "out": "--name, before --,", "resume": "the run directory, runs/NAME,"}
        raise UserError(f"--{name} is the job's own: {fix[name]} says it; leave it out")
    for folder, words in job.tasks() or [("", [])]:
        out = Path("runs") / job.name / folder
        check(parse([*options, "--out", str(out), "--resume", "auto", *words]))


def _interface() -> Interface:
    """The interface by which SLURM starts the ranks of this Python's MPI."""
    from psmpi.comm.world import vendor

    return "pmix" if vendor() == "Open MPI" else "pmi2"


if __name__ == "__main__":
    sys.exit(main())
