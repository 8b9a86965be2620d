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
    """Write the script of a job that trains, and submit it to SLURM.

    The options of the training, those of psmpi train, follow after --. Example: psmpi submit --ranks 4 --time 04:00:00
    -- --dataset mnist --epochs 20
    """

    script: str = ""
    """File for the script. If not given: NAME.sh."""
    dry_run: bool = False
    """Print the script, and write and submit nothing."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error."""
    from psmpi.command import answer

    return answer(lambda: submit(sys.argv[1:] if argv is None else argv))


def submit(argv: Sequence[str]) -> int:
    """Write and submit a job, or print it. UserError, or SystemExit, for options that make none."""
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
        # A name alone bash would look for on the PATH.
        activate = activate if "/" in activate else f"./{activate}"
    complete = replace(
        job,
        activate=activate,
        mpi=_interface() if job.mpi == "auto" else job.mpi,
    )
    # Without a script that makes it, the name may be another Python's there.
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
    said = scheduler.submit(path)
    tell(f"{path}: {said}; it {'goes on with the run' if begun else 'trains'} in {run}")
    return 0


def _check_training(job: Job, options: Sequence[str]) -> None:
    """Meet an option that psmpi train does not know before the job waits in a queue; UserError for it."""
    from psmpi.config import check, given_names
    from psmpi.data import DATASETS, locate
    from psmpi.errors import UserError
    from psmpi.train import parse

    tasks = job.tasks() or [("", [])]
    given, of_tasks = given_names(options, file=False), given_names(tasks[0][1], file=False)
    taken = (given | of_tasks) & {"out", "resume", "threads"}
    if taken:
        name = sorted(taken)[0]
        fix = {"threads": "--cores, before --,", "out": "--name, before --,", "resume": "the run directory, runs/NAME,"}
        raise UserError(f"--{name} is the job's own: {fix[name]} says it; leave it out")
    if twice := given & of_tasks:
        array = "--grid" if job.grid else "--seeds"
        raise UserError(f"{array} says --{sorted(twice)[0].replace('_', '-')} of each job: leave it out behind --")
    # Seeds differ in nothing that could be refused.
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
                f"--gpus {job.gpus}, and --backend {config.parallel.backend} uses none: give --backend cupy behind --, "
                "or leave --gpus out"
            )
        if job.save_before and config.run.save_signal != "USR1":
            raise UserError(
                f"--save-signal {config.run.save_signal}: a job is warned by USR1 before its time limit; leave the "
                "option out, or give --save-signal USR1 where a file or the run has another"
            )
        if not Path(config.data.dataset).suffix and config.data.dataset not in DATASETS:
            # It is not known; whether a file is there is for the nodes to see.
            locate(config.data.dataset, None, lambda _: None)


def _tell_of_halves(own: Sequence[str], options: Sequence[str]) -> None:
    """Say of options that are unknown on one side of -- that they belong on the other."""
    import dataclasses

    from psmpi.config import Config, given_names
    from psmpi.output import complain

    of_job = {one.name for one in dataclasses.fields(Submission)}
    of_training = {name for section in Config().sections.values() for name in vars(section)} | {"config"}
    for words, known, others, side in (
        (own, of_job, of_training, "training: write it behind --"),
        (options, of_training, of_job, "the job: write it before --"),
    ):
        for name in sorted((given_names(words, file=False) - known) & others):
            complain(f"psmpi.submit: --{name.replace('_', '-')} is an option of {side}")


def _interface() -> Interface:
    """The interface by which SLURM starts the ranks of this Python's MPI."""
    from psmpi.comm.world import vendor

    return "pmix" if vendor() == "Open MPI" else "pmi2"


if __name__ == "__main__":
    sys.exit(main())
