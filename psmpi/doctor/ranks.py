"""Checks of ranks: their hosts and cores, the same software on all, latency and bandwidth between them."""

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

from psmpi.comm.leftovers import Leftovers
from psmpi.comm.pingpong import ping_pong
from psmpi.doctor import machine
from psmpi.doctor.machine import ranges
from psmpi.doctor.report import Finding, error, good, warning
from psmpi.errors import counted, expanded

if TYPE_CHECKING:
    from psmpi.comm.control import Control

# Up to ALL ranks, all pairs are measured; at most PAIRS pairs; SECONDS for all pairs, at most EACH for one; no further
# pair begins after BOUND seconds.
ALL, PAIRS, SECONDS, EACH, BOUND = 8, 256, 4.0, 0.3, 6.0
# Up to so many pairs have a line each.
SHOWN = 32
# A pair gives a warning if it is this many times slower than the median of its kind.
SLOW = 4.0


@dataclass(frozen=True)
class Place:
    """Description of a rank by itself.

    cores: the cores that it may use, as `0-3,8`; share: number of cores, or a container's quota if smaller; versions,
    kernels: of the software; data: whether --data-dir exists; segments, nbytes, sessions: leftovers of killed jobs.
    """

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
        """The numbers of the cores."""
        cores: set[int] = set()
        for part in self.cores.split(","):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        return frozenset(cores)


@dataclass(frozen=True)
class Pair:
    """Latency in microseconds and bandwidth in GB/s between ranks a and b; nbytes: size of the bandwidth's messages."""

    a: int
    b: int
    same_host: bool
    latency_us: float
    gigabytes_per_second: float
    nbytes: int


def own_place(rank: int, data_dir: str, left: Leftovers) -> Place:
    """The description of this rank; left: leftovers of killed jobs that it saw before the start of MPI."""
    import psmpi
    from psmpi.backend import compiled
    from psmpi.backend.compiled.library import NAMES
    from psmpi.comm.world import cores, quota

    versions = f"psmpi {psmpi.__version__}, Python {platform.python_version()}, NumPy {np.__version__}"
    sees_data = expanded(data_dir or "data", "--data-dir").is_dir()
    kernels = NAMES[compiled.level()] or "NumPy alone"
    own_cores = cores()
    share = min(quota(), len(own_cores))
    return Place(
        rank, socket.gethostname(), ranges(own_cores), share, versions, kernels, sees_data, len(left.segments),
        left.nbytes, len(left.sessions),
    )  # fmt: skip


def gather(control: Control, own: Place) -> list[Place]:
    """The descriptions of all ranks, on rank 0; [] on the others. All ranks make this call."""
    return [Place(**json.loads(text)) for text in control.collect_texts(json.dumps(asdict(own)), most=4000)]


def alike(places: Sequence[Place], data_dir: str) -> Iterator[Finding]:
    """Whether all ranks have the same software and see the folder of data."""
    hosts = sorted({place.host for place in places})
    named = f"{', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''}"
    yield good("ranks", f"{len(places)} on {counted(len(hosts), 'host')} ({named})")
    for name, fix, level in (
        ("versions", "start all by the Python of one environment, on a file system that all hosts see", error),
        ("kernels", "results differ by rounding: psmpi train --backend numpy computes alike everywhere", warning),
    ):
        by_value: dict[str, list[int]] = {}
        for place in places:
            by_value.setdefault(getattr(place, name), []).append(place.rank)
        if len(by_value) > 1:
            parts = [f"{value} on rank(s) {ranges(ranks)}" for value, ranks in by_value.items()]
            yield level("ranks", f"{name} differ, {'; '.join(parts)}: {fix}")
        else:
            yield good("ranks", f"the same {name} everywhere: {next(iter(by_value))}")
    lacking = [place.rank for place in places if not place.data]
    if 0 < len(lacking) < len(places):
        yield error(
            "data",
            f"rank(s) {ranges(lacking)} do not see the folder {data_dir or 'data'}, and others do: let --data-dir name "
            "a folder that all hosts see",
        )


def leftovers(places: Sequence[Place]) -> Iterator[Finding]:
    """Leftovers of killed jobs on each host: the most that a rank saw, since a faster rank may have removed some."""
    for host in dict.fromkeys(place.host for place in places):
        most = max((p for p in places if p.host == host), key=lambda p: (p.segments, p.sessions))
        yield machine.leftovers(most.segments, most.nbytes, most.sessions, started=True, host=host)


def placement(places: Sequence[Place]) -> Iterator[Finding]:
    """Cores of the ranks on each host, with a warning for oversubscription."""
    for host in dict.fromkeys(place.host for place in places):
        on_host = [place for place in places if place.host == host]
        union: frozenset[int] = frozenset().union(*(place.numbers() for place in on_host))
        every = max(place.share for place in on_host) if _limited(on_host) else len(union)
        named = f"{counted(len(on_host), 'rank')} ({ranges([place.rank for place in on_host])}) on {host}"
        if len(on_host) > every:
            yield warning(
                "placement",
                f"{named} share {counted(every, 'core')} ({ranges(sorted(union))}) and wait for each other: start "
                f"{every} there, or allow more cores (srun --cpus-per-task, docker --cpus)",
            )
        else:
            crowded = list(_crowded(on_host))
            yield from crowded
            if not crowded:
                threads = counted(every // len(on_host), "thread")
                yield good("placement", f"{named}: {counted(every, 'core')}, psmpi train makes {threads} a rank")


def _limited(places: Sequence[Place]) -> bool:
    """Whether a quota of processor time gives ranks less than their cores."""
    return any(place.share < len(place.numbers()) for place in places)


def _crowded(places: Sequence[Place]) -> Iterator[Finding]:
    """Warnings for ranks of a host that are bound to the same cores, if these are fewer than the ranks."""
    groups: dict[frozenset[int], list[int]] = {}
    for place in places:
        groups.setdefault(place.numbers(), []).append(place.rank)
    for cores, ranks in groups.items():
        if len(ranks) > len(cores):
            yield warning(
                "placement",
                f"ranks {ranges(ranks)} on {places[0].host} are bound to the same {counted(len(cores), 'core')} "
                f"({ranges(sorted(cores))}), and others stay free: mpirun -bind-to core (MPICH), --bind-to core (Open "
                "MPI) or srun --cpu-bind=cores",
            )


def pairs_of(size: int) -> list[tuple[int, int]]:
    """Pairs of ranks to measure: all pairs up to ALL ranks, else pairs of neighbours, at most PAIRS."""
    if size <= ALL:
        return list(combinations(range(size), 2))
    near = [(rank, rank + 1) for rank in range(size - 1)]
    return [near[k * len(near) // PAIRS] for k in range(PAIRS)] if len(near) > PAIRS else near


def measure(control: Control, hosts: Sequence[int], doing: list[str]) -> list[Pair]:
    """Measure latency and bandwidth, one pair of ranks after the other. All ranks call it and get the result.

    hosts: number of the host of each rank. doing: a list with one text that is set to the present action.
    """
    pairs = pairs_of(control.size)
    paces = np.zeros((len(pairs), 3))
    begun = time.perf_counter()
    for k, (a, b) in enumerate(pairs):
        # One pair at a time: two pairs might share a link.
        late = np.array([float(control.rank == 0 and time.perf_counter() - begun > BOUND)])
        if control.total(late)[0]:
            break
        doing[0] = f"messages between ranks {a} and {b}"
        if control.rank in (a, b):
            pace = ping_pong(control.comm, a, b, min(EACH, SECONDS / len(pairs)))
            if pace is not None:
                paces[k] = pace
    doing[0] = "the end of messages between ranks"
    paces = control.total(paces)
    return [
        Pair(a, b, hosts[a] == hosts[b], round(float(latency), 3), round(float(rate), 4), int(nbytes))
        for (a, b), (latency, rate, nbytes) in zip(pairs, paces, strict=True)
        if nbytes
    ]


def links(measured: Sequence[Pair], size: int, asleep: bool) -> Iterator[Finding]:
    """Latency and bandwidth between ranks, with warnings for pairs that are much slower than the median of their kind.

    asleep: whether ranks sleep while they wait.
    """
    every = len(pairs_of(size))
    if len(measured) < every:
        yield warning(
            "links",
            f"{len(measured)} of {every} pairs were measured within {BOUND:.0f} s: look at fewer ranks, or see that "
            "hosts do nothing else",
        )
    for same, name in ((True, "within a host"), (False, "between hosts")):
        kind = [pair for pair in measured if pair.same_host == same]
        if not kind:
            continue
        latencies, rates = [pair.latency_us for pair in kind], [pair.gigabytes_per_second for pair in kind]
        which = f"{counted(len(kind), 'pair')}{'' if size <= ALL else ' of neighbours'}"
        waits = ", with ranks that sleep while they wait" if asleep else ""
        yield good("latency", f"{_span(latencies)} us {name} ({which}{waits})")
        largest = max(pair.nbytes for pair in kind)
        yield good("bandwidth", f"{_span(rates)} GB/s {name} (messages of {largest:,} bytes)")
        usual = median(latencies), median(rates)
        for pair in kind:
            if pair.latency_us > SLOW * usual[0] or SLOW * pair.gigabytes_per_second < usual[1]:
                yield warning(
                    "links",
                    f"ranks {pair.a} and {pair.b}: {pair.latency_us:.4g} us and {pair.gigabytes_per_second:.3g} GB/s, "
                    f"the median {name} is {usual[0]:.4g} us and {usual[1]:.3g} GB/s: see what else runs there, and "
                    "measure again",
                )


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def tables(places: Sequence[Place], measured: Sequence[Pair]) -> Iterator[Any]:
    """Tables of the placement, with one line for ranks with the same cores, and of up to SHOWN pairs."""
    from rich.table import Table

    table = Table(title="placement", title_justify="left")
    for name in ("ranks", "host", "cores"):
        table.add_column(name)
    alike: dict[tuple[str, str], list[int]] = {}
    for place in places:
        alike.setdefault((place.host, place.cores), []).append(place.rank)
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
        "ranks": [{"rank": place.rank, "host": place.host, "cores": place.cores} for place in places],
        "pairs": [asdict(pair) for pair in measured],
    }
