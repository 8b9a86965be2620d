"""The command line of the fuzzer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, arg

from psmpi.errors import UserError
from psmpi.output import Screen, complain

# Failures: more than SLOW seconds of processor time, or memory of more than LARGE bytes plus the size of the file.
# BATCH: files that one worker process opens.
SLOW, LARGE, BATCH = 10.0, 1 << 30, 200
# Arguments of Python that run the worker.
WORKER = ["-m", "psmpi.testing.fuzz.worker"]
FAILURES = ("traceback", "crash", "slow", "memory")


@dataclass
class Tally:
    """Outcomes of the files of one kind: counts, longest time in seconds, largest growth in bytes, and failures."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    grown: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: str, number: int, text: str, seconds: float, grown: int, size: int) -> None:
        """Count a file. Too much time, or too much memory for its size, makes it a failure whatever its outcome."""
        if seconds > SLOW:
            outcome = "slow"
        elif grown > LARGE + size:
            outcome = "memory"
        self.counts[outcome] += 1
        self.seconds, self.grown = max(self.seconds, seconds), max(self.grown, grown)
        if outcome in FAILURES:
            self.failures.append({"outcome": outcome, "number": number, "text": text})

    def join(self, other: Tally) -> None:
        self.counts += other.counts
        self.seconds, self.grown = max(self.seconds, other.seconds), max(self.grown, other.grown)
        self.failures += other.failures


def fuzz(
    kinds: Positional[Annotated[tuple[str, ...], arg(metavar="KIND")]] = (),
    /,
    count: int = 1000,
    seconds: float = 0.0,
    seed: int = 0,
    first: int = 0,
    jobs: int = 2,
    keep: str = "",
    json: bool = False,
) -> int:
    """Make hostile files, and count how psmpi takes them: as sound, refused with its own error, or wrongly.

    In earnest another process looks at HDF5 files and pickles first: `lost` are those that end that one, of which psmpi
    says so in its own error. Exit status 1 where a file led to a traceback, to a crash of what uses it, or took more
    than 10 s of processor time, or 1 GB more than its size.

    Args:
        kinds: Kinds of files; all if none is given.
        count: Files of each kind.
        seconds: Stop after so many seconds, whatever the count; 0: at the count.
        seed: Seed of the files.
        first: Number of the first file: a failure's, to see it again.
        jobs: Processes at once.
        keep: Folder to leave the files in.
        json: Print JSON.
    """
    from psmpi.testing.fuzz.kinds import KINDS

    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown kind of files {kind!r}: choose {', '.join(KINDS)}")
    if min(count, jobs) < 1 or min(seed, first, seconds) < 0:
        raise UserError("--count and --jobs must be at least 1, and --seed, --first and --seconds at least 0")
    chosen = kinds or tuple(KINDS)
    # Alternate between kinds, so that each has its share of the time.
    parts = [(kind, at) for at in range(first, first + count, BATCH) for kind in chosen]
    tallies = {kind: Tally() for kind in chosen}
    end = time.monotonic() + seconds if seconds else None

    def work(part: tuple[str, int]) -> tuple[str, Tally]:
        kind, at = part
        here = Tally()
        if end is None or time.monotonic() < end:
            _batch(kind, seed, at, min(BATCH, first + count - at), keep, here, end)
        return kind, here

    with ThreadPoolExecutor(jobs) as pool:
        for kind, one in pool.map(work, parts):
            tallies[kind].join(one)
    return _report(tallies, seed, json)


def _batch(kind: str, seed: int, first: int, count: int, keep: str, tally: Tally, end: float | None) -> None:
    """Try files in a worker process. If it dies at a file, count the outcome and continue in a new process."""
    at, stop = first, first + count
    while at < stop:
        command = [sys.executable, *WORKER, kind, *map(str, (seed, at, stop - at))]
        with subprocess.Popen(
            [*command, *([keep] if keep else [])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            at, stage, size = _listen(process, tally, at, end)
        if end is not None and time.monotonic() > end:
            return
        if at < stop and process.returncode:
            # Outside the fuzzer the stage "looking" runs in a separate process, so a crash in it is no failure.
            waits = process.returncode == -signal.SIGALRM
            outcome = "slow" if waits else "lost" if stage == "looking" else "crash"
            tally.add(outcome, at, f"status {process.returncode}, {stage}", 0.0, 0, size)
            at += 1
        elif at < stop:
            raise UserError(f"the worker for files of kind {kind} ended without an error at file {at}")


def _listen(process: subprocess.Popen[str], tally: Tally, at: int, end: float | None) -> tuple[int, str, int]:
    """Read a worker's lines into `tally`; return the number of its current file, the stage and the file's size."""
    assert process.stdout is not None
    stage, size = "", 0
    for line in process.stdout:
        said = json.loads(line)
        if "number" in said:
            at, stage, size = said["number"], "using", said["size"]
        elif "stage" in said:
            stage = said["stage"]
        else:
            tally.add(said["outcome"], at, said["text"], said["seconds"], said["grown"], size)
            at, stage = at + 1, ""
            if end is not None and time.monotonic() > end:
                process.kill()
                break
    process.wait()
    return at, stage, size


def _report(tallies: dict[str, Tally], seed: int, as_json: bool) -> int:
    whole = Tally()
    for one in tallies.values():
        whole.join(one)
    outcomes = ("sound", "refused", "lost", *FAILURES)
    if as_json:
        from psmpi.inspect.output import print_json

        print_json({kind: {**vars(one), "counts": dict(one.counts)} for kind, one in tallies.items()})
    else:
        table = Table()
        for name in ("kind", "files", *outcomes, "longest s", "most MB"):
            table.add_column(name, justify="left" if name == "kind" else "right")
        for kind, one in [*tallies.items(), ("all", whole)]:
            counts = [str(one.counts[outcome]) for outcome in outcomes]
            table.add_row(kind, str(one.counts.total()), *counts, f"{one.seconds:.2f}", f"{one.grown / 1e6:.0f}")
        Screen().print(table)
    for kind, one in tallies.items():
        for failure in one.failures[:20]:
            complain(f"{kind} --seed {seed} --first {failure['number']}: {failure['outcome']}\n{failure['text']}")
    return int(bool(whole.failures))


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 if psmpi accepted or refused every file properly, else 1."""
    from psmpi.command import answer, parsed

    words = sys.argv[1:] if argv is None else argv
    return answer(lambda: int(parsed(fuzz, words, "testing.fuzz")))


if __name__ == "__main__":
    sys.exit(main())
