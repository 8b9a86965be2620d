"""Submission of jobs that train: `python -m psmpi.submit --ranks 4 --time 04:00:00 -- --dataset mnist --epochs 20`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from psmpi.submit.job import Interface, Job

# Text that marks a script of psmpi, which may be overwritten.
MARK = ". Written by:\n"


@dataclass(frozen=True)
class Submission(Job):
    """Write the script of a job that trains, and submit it to SLURM.

    The options of the training, those of psmpi train, follow after --. Example: psmpi submit --ranks 4 --time 04:00:00
    -- --dataset mnist --epochs 20
    """

    script: str = ""
    """File for the script. If not given: NAME.sh."""
    dry_run: bool = False
    """Print the script, and write and submit nothing."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 error."""
    from psmpi.command import answer

    return answer(lambda: submit(sys.argv[1:] if argv is None else argv))


def submit(argv: Sequence[str]) -> int:
    """Write and submit the script of a job, or print it; return the exit status. UserError or SystemExit for options
    that do not make a job.
    """
    from psmpi.checkpoint import available
    from psmpi.command import parsed
    from psmpi.config import check_ranges
    from psmpi.errors import UserError, expanded
    from psmpi.output import tell
    from psmpi.submit.slurm import Slurm, activation

    for word in argv:
        if "\n" in word or "\r" in word:
            raise UserError(f"{word!r}: options of a job, and of its training, are of one line each")
    at = argv.index("--") if "--" in argv else len(argv)
    own, options = list(argv[:at]), list(argv[at + 1 :])
    try:
        job = parsed(Submission, own, "submit")
    except SystemExit as end:
        if end.code:
            _tell_of_halves(own, options)
        raise
    check_ranges(job)
    job.check()
    _check_training(job, options)
    scheduler = Slurm()
    activate = activation() if job.activate is None else job.activate
    if activate:
        activate = str(expanded(activate, "--activate"))
        # bash would look for a name without a slash on the PATH.
        activate = activate if "/" in activate else f"./{activate}"
    complete = replace(
        job,
        activate=activate,
        mpi=_interface() if job.mpi == "auto" else job.mpi,
    )
    # Without an activation script, the name `python` may mean another Python on the nodes.
    python = "python" if activate or job.activate is not None else sys.executable
    text = scheduler.script(complete, options, shlex.join(["psmpi", "submit", *argv]), python)
    if job.dry_run:
        tell(text.rstrip("\n"))
        return 0
    if activate and not Path(activate).is_file():
        raise UserError(f"--activate {activate}: no such file; name the bin/activate of a virtual environment")
    path = expanded(job.script or f"{job.name}.sh", "--script")
    try:
        if path.exists() and MARK not in path.read_text(errors="replace"):
            raise UserError(f"--script {path} is a file that psmpi has not written: name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--script {path}: {error.strerror}: name a file that can be written") from None
    run = Path("runs") / job.name
    begun = any(available(run / folder) for folder, _ in job.tasks() or [("", [])])
    answer = scheduler.submit(path)
    tell(f"{path}: {answer}; it {'goes on with the run' if begun else 'trains'} in {run}")
    return 0


def _check_training(job: Job, options: Sequence[str]) -> None:
    """Check the options of psmpi train before the job waits in a queue; UserError for a wrong one."""
    from psmpi.config import check, given_names
    from psmpi.data import DATASETS, locate
    from psmpi.errors import UserError
    from psmpi.train import parse

    tasks = job.tasks() or [("", [])]
    option_names, of_tasks = given_names(options, file=False), given_names(tasks[0][1], file=False)
    reserved = (option_names | of_tasks) & {"out", "resume", "threads"}
    if reserved:
        name = sorted(reserved)[0]
        fix = {"threads": "--cores, before --,", "out": "--name, before --,", "resume": "the run directory, runs/NAME,"}
        raise UserError(f"--{name} is the job's own: {fix[name]} says it; leave it out")
    if twice := option_names & of_tasks:
        array = "--grid" if job.grid else "--seeds"
        raise UserError(f"{array} sets --{sorted(twice)[0].replace('_', '-')} of each job: leave it out after --")
    # Jobs that differ only in their seeds are all valid if the first one is.
    for folder, words in tasks[:1] if job.seeds else tasks:
        argv = [*options, "--out", str(Path("runs") / job.name / folder), "--resume", "auto", *words]
        try:
            config = parse(argv)
        except SystemExit as end:
            if end.code:
                _tell_of_halves([], options)
            raise
        check(config, given_names(argv, file=False))
        if job.gpus and config.parallel.backend not in ("auto", "cupy"):
            raise UserError(
                f"--gpus {job.gpus}, and --backend {config.parallel.backend} uses none: give --backend cupy after --, "
                "or leave --gpus out"
            )
        if job.save_before and config.run.save_signal != "USR1":
            raise UserError(
                f"--save-signal {config.run.save_signal}: a job is warned by USR1 before its time limit; leave the "
                "option out, or give --save-signal USR1 where a file or the run has another"
            )
        if not Path(config.data.dataset).suffix and config.data.dataset not in DATASETS:
            # The name is unknown, which is an error. Files are looked up on the nodes only.
            locate(config.data.dataset, None, lambda _: None)


def _tell_of_halves(own: Sequence[str], options: Sequence[str]) -> None:
    """Print a hint for each option that is on the wrong side of --."""
    import dataclasses

    from psmpi.config import Config, given_names
    from psmpi.output import complain

    of_job = {field.name for field in dataclasses.fields(Submission)}
    of_training = {name for section in Config().sections.values() for name in vars(section)} | {"config"}
    for words, known, others, side in (
        (own, of_job, of_training, "training: write it after --"),
        (options, of_training, of_job, "the job: write it before --"),
    ):
        for name in sorted((given_names(words, file=False) - known) & others):
            complain(f"psmpi.submit: --{name.replace('_', '-')} is an option of {side}")


def _interface() -> Interface:
    """The interface by which SLURM starts the ranks of the installed MPI."""
    from psmpi.comm.world import vendor

    return "pmix" if vendor() == "Open MPI" else "pmi2"


if __name__ == "__main__":
    sys.exit(main())
