"""Ranks: where they are, which cores they share, whether they have the same software, and what is between them."""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.comm.leftovers import Found
from psmpi.comm.pingpong import ping_pong
from psmpi.doctor import machine
from psmpi.doctor.machine import ranges
from psmpi.doctor.report import Finding, error, good, warning
from psmpi.errors import counted, expanded

if TYPE_CHECKING:
    from psmpi.comm.control import Control

# Ranks of which all pairs are measured; pairs at most; seconds for all of them, for one of them, and after which no
# further pair is begun.
ALL, PAIRS, SECONDS, EACH, BOUND = 8, 256, 4.0, 0.3, 6.0
# Pairs that have a line each.
SHOWN = 32
# How many times slower than the median of its kind a pair is, to be told of.
SLOW = 4.0


@dataclass(frozen=True)
class Place:
    """A rank's account of itself: host, cores as `0-3,8` and how many, its share, versions, whether data are there."""

    rank: int
    host: str
    cores: str
    share: int
    versions: str
    kernels: str
    data: bool
    segments: int
    nbytes: int
    sessions: int

    def numbers(self) -> frozenset[int]:
        """The cores."""
        found: set[int] = set()
        for part in self.cores.split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
        return frozenset(found)


@dataclass(frozen=True)
class Pair:
    """Latency in microseconds and bandwidth in GB/s between two ranks; nbytes: of the messages that gave it."""

    a: int
    b: int
    same_host: bool
    latency_us: float
    gigabytes_per_second: float
    nbytes: int


def own_place(rank: int, data_dir: str, left: Found) -> Place:
    """This rank's account of itself; left: leftovers of killed jobs that it saw before MPI was started."""
    import psmpi
    from psmpi.backend import compiled
    from psmpi.backend.compiled.library import NAMES
    from psmpi.comm.world import cores, quota

    versions = f"psmpi {psmpi.__version__}, Python {platform.python_version()}, NumPy {np.__version__}"
    there = expanded(data_dir or "data", "--data-dir").is_dir()
    kernels = NAMES[compiled.level()] or "NumPy alone"
    mine = cores()
    share = min(quota(), len(mine))
    return Place(
        rank, socket.gethostname(), ranges(mine), share, versions, kernels, there, len(left.segments), left.nbytes,
        len(left.sessions),
    )  # fmt: skip


def gather(control: Control, own: Place) -> list[Place]:
    """Every rank's word, on rank 0; none on the others."""
    return [Place(**json.loads(text)) for text in control.collect_texts(json.dumps(asdict(own)), most=4000)]


def alike(places: Sequence[Place], data_dir: str) -> Iterator[Finding]:
    """Whether ranks have the same software and see the data."""
    hosts = sorted({one.host for one in places})
    named = f"{', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''}"
    yield good("ranks", f"{len(places)} on {counted(len(hosts), 'host')} ({named})")
    for what, fix, level in (
        ("versions", "start all by the Python of one environment, on a file system that all hosts see", error),
        ("kernels", "results differ by rounding: psmpi train --backend numpy computes alike everywhere", warning),
    ):
        told: dict[str, list[int]] = {}
        for one in places:
            told.setdefault(getattr(one, what), []).append(one.rank)
        if len(told) > 1:
            parts = [f"{value} on rank(s) {ranges(ranks)}" for value, ranks in told.items()]
            yield level("ranks", f"{what} differ, {'; '.join(parts)}: {fix}")
        else:
            yield good("ranks", f"the same {what} everywhere: {next(iter(told))}")
    lacking = [one.rank for one in places if not one.data]
    if 0 < len(lacking) < len(places):
        yield error(
            "data",
            f"rank(s) {ranges(lacking)} do not see the folder {data_dir or 'data'}, and others do: let --data-dir name "
            "a folder that all hosts see",
        )


def leftovers(places: Sequence[Place]) -> Iterator[Finding]:
    """Leftovers of killed jobs on each host: a rank that was ahead may have removed it before another one looked."""
    for host in dict.fromkeys(one.host for one in places):
        most = max((one for one in places if one.host == host), key=lambda one: (one.segments, one.sessions))
        yield machine.leftovers(most.segments, most.nbytes, most.sessions, started=True, host=host)


def placement(places: Sequence[Place]) -> Iterator[Finding]:
    """The places of ranks, and those that share cores."""
    for host in dict.fromkeys(one.host for one in places):
        here = [one for one in places if one.host == host]
        union: frozenset[int] = frozenset().union(*(one.numbers() for one in here))
        every = max(one.share for one in here) if _limited(here) else len(union)
        there = f"{counted(len(here), 'rank')} ({ranges([one.rank for one in here])}) on {host}"
        if len(here) > every:
            yield warning(
                "placement",
                f"{there} share {counted(every, 'core')} ({ranges(sorted(union))}) and wait for each other: start "
                f"{every} there, or allow more cores (srun --cpus-per-task, docker --cpus)",
            )
        else:
            crowded = list(_crowded(here))
            yield from crowded
            if not crowded:
                threads = counted(every // len(here), "thread")
                yield good("placement", f"{there}: {counted(every, 'core')}, psmpi train makes {threads} a rank")


def _limited(here: Sequence[Place]) -> bool:
    """Whether a share of the processor time leaves ranks less than their cores."""
    return any(one.share < len(one.numbers()) for one in here)


def _crowded(here: Sequence[Place]) -> Iterator[Finding]:
    """Ranks that are bound to the same cores, which are fewer than these ranks."""
    groups: dict[frozenset[int], list[int]] = {}
    for one in here:
        groups.setdefault(one.numbers(), []).append(one.rank)
    for cores, ranks in groups.items():
        if len(ranks) > len(cores):
            yield warning(
                "placement",
                f"ranks {ranges(ranks)} on {here[0].host} are bound to the same {counted(len(cores), 'core')} "
                f"({ranges(sorted(cores))}), and others stay free: mpirun -bind-to core (MPICH), --bind-to core (Open "
                "MPI) or srun --cpu-bind=cores",
            )


def pairs_of(size: int) -> list[tuple[int, int]]:
    """The pairs that are measured: all of few ranks, else neighbours, and of very many some of these."""
    if size <= ALL:
        return list(combinations(range(size), 2))
    near = [(rank, rank + 1) for rank in range(size - 1)]
    return [near[k * len(near) // PAIRS] for k in range(PAIRS)] if len(near) > PAIRS else near


def measure(control: Control, hosts: Sequence[int], doing: list[str]) -> list[Pair]:
    """Messages within one pair of ranks after the other; all ranks make this call, and have what is found.

    hosts: for each rank the number of its host. doing: gets what is being done, for who waits too long.
    """
    pairs = pairs_of(control.size)
    found = np.zeros((len(pairs), 3))
    begun = time.perf_counter()
    for k, (a, b) in enumerate(pairs):
        # No two pairs at a time: they would share what is measured.
        late = np.array([float(control.rank == 0 and time.perf_counter() - begun > BOUND)])
        if control.total(late)[0]:
            break
        doing[0] = f"messages between ranks {a} and {b}"
        if control.rank in (a, b):
            pace = ping_pong(control.comm, a, b, min(EACH, SECONDS / len(pairs)))
            if pace is not None:
                found[k] = pace
    doing[0] = "the end of messages between ranks"
    found = control.total(found)
    return [
        Pair(a, b, hosts[a] == hosts[b], round(float(latency), 3), round(float(rate), 4), int(nbytes))
        for (a, b), (latency, rate, nbytes) in zip(pairs, found, strict=True)
        if nbytes
    ]


def links(measured: Sequence[Pair], size: int, asleep: bool) -> Iterator[Finding]:
    """Measurements between ranks, and the pairs that are far slower than others of their kind."""
    every = len(pairs_of(size))
    if len(measured) < every:
        yield warning(
            "links",
            f"{len(measured)} of {every} pairs were measured within {BOUND:.0f} s: look at fewer ranks, or see that "
            "hosts do nothing else",
        )
    for same, name in ((True, "within a host"), (False, "between hosts")):
        kind = [one for one in measured if one.same_host == same]
        if not kind:
            continue
        latencies, rates = [one.latency_us for one in kind], [one.gigabytes_per_second for one in kind]
        which = f"{counted(len(kind), 'pair')}{'' if size <= ALL else ' of neighbours'}"
        waits = ", with ranks that sleep while they wait" if asleep else ""
        yield good("latency", f"{_span(latencies)} us {name} ({which}{waits})")
        yield good("bandwidth", f"{_span(rates)} GB/s {name} (messages of {max(one.nbytes for one in kind):,} bytes)")
        usual = median(latencies), median(rates)
        for one in kind:
            if one.latency_us > SLOW * usual[0] or SLOW * one.gigabytes_per_second < usual[1]:
                yield warning(
                    "links",
                    f"ranks {one.a} and {one.b}: {one.latency_us:.4g} us and {one.gigabytes_per_second:.3g} GB/s, the "
                    f"median {name} is {usual[0]:.4g} us and {usual[1]:.3g} GB/s: see what else runs there, and look "
                    "again",
                )


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def tables(places: Sequence[Place], measured: Sequence[Pair]) -> Iterator[Any]:
    """Tables of the ranks' places, those with the same cores in a line, and of pairs, where these are not very many."""
    from rich.table import Table

    table = Table(title="placement", title_justify="left")
    for name in ("ranks", "host", "cores"):
        table.add_column(name)
    alike: dict[tuple[str, str], list[int]] = {}
    for one in places:
        alike.setdefault((one.host, one.cores), []).append(one.rank)
    for (host, cores), numbers in alike.items():
        table.add_row(ranges(numbers), host, cores)
    yield table
    if 0 < len(measured) <= SHOWN:
        table = Table(title="messages there and back", title_justify="left")
        for name in ("ranks", "host", "latency, us", "bandwidth, GB/s"):
            table.add_column(name, justify="right" if "," in name else "left")
        for pair in measured:
            same = "same" if pair.same_host else "other"
            table.add_row(f"{pair.a} and {pair.b}", same, f"{pair.latency_us:.2f}", f"{pair.gigabytes_per_second:.3g}")
        yield table


def as_json(places: Sequence[Place], measured: Sequence[Pair]) -> dict[str, Any]:
    """Ranks and pairs as plain data."""
    return {
        "ranks": [{"rank": one.rank, "host": one.host, "cores": one.cores} for one in places],
        "pairs": [asdict(one) for one in measured],
    }
