"""A job: its resources and its trainings, as plain data for any batch system."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from psmpi.config.ranges import Least
from psmpi.errors import UserError

# Seconds of a job's time limit: minutes, [hours:]minutes:seconds, or days-hours[:minutes[:seconds]].
LIMIT = re.compile(
    r"(?P<minutes>\d+)|((?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"
)

# Interfaces by which a batch system starts ranks.
Interface = Literal["pmi2", "pmix", "auto"]


@dataclass(frozen=True)
class Job:
    """A job, or an array of jobs, that trains. Words behind -- are options of psmpi train."""

    name: str = "psmpi"
    """Name of the job. Its run directory is runs/NAME; a job of the same name continues the run in it."""
    ranks: Annotated[int, Least(1)] = 2
    """MPI ranks, over all nodes."""
    nodes: Annotated[int, Least(1)] = 1
    """Number of nodes, over which the ranks are spread."""
    cores: Annotated[int, Least(1)] = 1
    """Cores of each rank, and its threads."""
    gpus: Annotated[int, Least(0)] = 0
    """GPUs of a node; 0: none. The ranks of a node take them in turn. The training then needs --backend cupy."""
    memory: str = ""
    """Memory of a node, such as 16G. If not given: the batch system's default."""
    time: str = "01:00:00"
    """Time limit of a start, such as 30 (minutes), 04:00:00 or 2-00:00:00."""
    save_before: Annotated[int, Least(0)] = 120
    """Seconds before the time limit at which the training is stopped and saved. 0: no warning."""
    requeue: bool = False
    """Start again after the time limit, until the training is done."""
    seeds: Annotated[int, Least(0)] = 0
    """Jobs of an array, with seeds 0, 1, ... 0: no array."""
    grid: str = ""
    """TOML file of lists, such as lr = [0.01, 0.001]; an array has a job for each combination."""
    partition: str = ""
    """Partition, or queue. If not given: the batch system's default."""
    account: str = ""
    """Account to charge."""
    ask: tuple[str, ...] = ()
    """Further options of the batch system, such as --mail-type=END."""
    modules: tuple[str, ...] = ()
    """Environment modules to load, such as the site's MPI."""
    activate: str | None = None
    """Script that activates the Python environment, "" for none. If not given: that of the present virtual
    environment."""
    mpi: Interface = "auto"
    """Interface by which the batch system starts ranks.

    auto: the one of the present MPI
    pmi2: for MPICH
    pmix: for Open MPI
    """

    def check(self) -> None:
        """Raise UserError for a job that no batch system could start or that would not be saved in time."""
        if not re.fullmatch(r"[\w.+=-]+", self.name) or self.name.startswith(("-", ".")):
            raise UserError(f"--name {self.name!r}: use letters, digits, '-', '_' and '.', of which it does not begin "
                            "with '-' or '.'")  # fmt: skip
        if self.ranks < self.nodes:
            raise UserError(
                f"--ranks {self.ranks} on --nodes {self.nodes} leaves nodes without a rank: use fewer nodes"
            )
        limit = seconds(self.time)
        if self.save_before and limit <= self.save_before + 60:
            raise UserError(
                f"--time {self.time} is {limit} s, of which the last {self.save_before} are for saving, and the "
                "warning may come a minute early: use a longer --time, or a shorter --save-before"
            )
        if self.requeue and not self.save_before:
            raise UserError("--requeue goes on from what is saved before the time limit: set --save-before")
        if self.seeds and self.grid:
            raise UserError("--seeds and --grid are one array: write seed = [0, 1, ...] into the file of --grid")
        for option in ("memory", "partition", "account"):
            if re.search(r"\s", getattr(self, option)):
                raise UserError(f"--{option} {getattr(self, option)!r}: write it without spaces")
        for word in self.ask:
            if not word.startswith("-"):
                raise UserError(f"--ask {word!r} is no option of the batch system: write it as --ask=--mail-type=END")

    def tasks(self) -> list[tuple[str, list[str]]]:
        """(Folder in the run directory, options of psmpi train) of each job of an array; [] if the job is no array.

        UserError for a grid that is not a table of lists, and for jobs that would share a folder.
        """
        if self.seeds:
            return [(f"seed={seed}", ["--seed", str(seed)]) for seed in range(self.seeds)]
        if not self.grid:
            return []
        from psmpi.config import tables_in

        grid = tables_in(self.grid, "--grid")
        if not grid:
            raise UserError(f"--grid {self.grid}: no settings in it: write lines such as lr = [0.01, 0.001]")
        for key, values in grid.items():
            if isinstance(values, dict):
                raise UserError(f"--grid {self.grid}: [{key}]: settings stand in no table here: leave that line out")
            if not isinstance(values, list) or not values:
                raise UserError(f"--grid {self.grid}: {key} = {values}: write a list of values: {key} = [...]")
        tasks = [_task(pairs) for pairs in _combinations(grid)]
        for _, words in tasks:
            for word in words:
                if not re.fullmatch(r"[\w.+=,:/~@%-]+", word):
                    raise UserError(f"--grid {self.grid}: {word!r}: values are words without spaces and quotes")
        folders: dict[str, list[str]] = {}
        for folder, words in tasks:
            if folders.setdefault(folder, words) is not words:
                raise UserError(
                    f"--grid {self.grid}: {' '.join(folders[folder])} and {' '.join(words)} would share the run "
                    f"directory {folder}: write each value once, and give files names of their own"
                )
        return tasks


def seconds(limit: str) -> int:
    """Seconds of a time limit in the notation of batch systems; UserError for other text."""
    match = LIMIT.fullmatch(limit)
    if match is None:
        raise UserError(f"--time {limit!r}: write minutes, HH:MM:SS or D-HH:MM:SS")
    n = {name: int(digits or 0) for name, digits in match.groupdict().items()}
    minutes = n["minutes"] + 60 * (24 * n["d"] + n["h"] + n["dh"]) + n["m"] + n["dm"]
    return 60 * minutes + n["s"] + n["ds"]


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[list[tuple[str, Any]]]:
    for values in itertools.product(*grid.values()):
        yield list(zip(grid, values, strict=True))


def _task(pairs: Sequence[tuple[str, Any]]) -> tuple[str, list[str]]:
    """Folder and options of a job with these settings and values."""
    words, parts = [], []
    for key, value in pairs:
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        text = "-".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name
        parts.append(f"{key}={text}")
    return re.sub(r"[^\w.+=,-]", "_", ",".join(parts)), words
