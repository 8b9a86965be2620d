"""Measure how long each rank computes, optimizes, waits for other ranks and transfers data in a step."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.bench.timeline import KINDS, Operation, Track, chrome_trace, shares, spans_of
from psmpi.comm.watch.flight import BEGUN, BYTES, ENDED, GROUP, NAME, NO_GROUP, NUMBER, PEER, Flight, Record
from psmpi.errors import UserError
from psmpi.output import Screen, check_files, tell

if TYPE_CHECKING:
    from psmpi.comm.control import Control
    from psmpi.config import Config
    from psmpi.layout import Runs
    from psmpi.optim import Optimizer

# Warm-up steps, and round trips of messages by which clocks are compared.
WARM, TRIPS = 10, 20


class Tracing(Flight):
    """A flight recorder that keeps all operations, and for each wait the operation that it waits for."""

    def __init__(self) -> None:
        super().__init__(1)
        self.all_records: list[Record] = []
        # Positions of records by their identity, and for each wait the position of the operation that it waits for.
        self.places: dict[int, int] = {}
        self.since: dict[int, int] = {}

    def begin(self, record: Record) -> Record:
        self.places[id(record)] = len(self.all_records)
        self.all_records.append(record)
        return super().begin(record)

    def begin_wait(self, begun: Record) -> Record:
        record = super().begin_wait(begun)
        self.since[self.places[id(record)]] = self.places[id(begun)]
        return record

    def operations(self, first: int) -> list[Operation]:
        """The operations between ranks, from the record at position `first` on."""
        operations: list[Operation] = []
        places: dict[int, int] = {}
        for place, record in enumerate(self.all_records[first:], first):
            if record[GROUP] == NO_GROUP:
                continue
            group, since = self.groups[record[GROUP]], self.since.get(place, -1)
            places[place] = len(operations)
            operations.append(
                Operation(
                    record[NAME], group.key, group.ranks, record[NUMBER], record[PEER], record[BYTES],
                    record[BEGUN], record[ENDED], places.get(since, -1),
                )
            )  # fmt: skip
        return operations


def step(config: Config, steps: int = 20, trace: str = "", plot: str = "", json: bool = False) -> int:
    """Time steps of a training, and split each rank's time: compute, optimize, wait, transfer.

    Run it under mpirun. An operation between ranks waits until the ranks that it needs have started theirs, and
    transfers from then on; the clocks of hosts are compared first. Figures are means over steps. For a method that
    exchanges once in a round of steps, time some rounds. On a GPU the time is that of the host, which waits where it
    needs results.

    Args:
        steps: Steps to time, after 10 others.
        trace: File for all operations (.json), a Chrome trace for ui.perfetto.dev.
        plot: File for a plot of the shares of the time and a step of median length: .png, .pdf or .svg. Needs
            psmpi[plot].
        json: Print JSON.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.watch.flight import recorded
    from psmpi.comm.world import cores, start
    from psmpi.config import check
    from psmpi.data import Batch
    from psmpi.training.context import Context

    if steps < 1:
        raise UserError(f"--steps {steps}: expected a whole number from 1 up")
    check_files(plot, trace=trace)
    check(config)
    world = start()
    control, flight = Control(world), Tracing()
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    track = Track(world.rank)

    class Timed(Context):
        """A context that records the times in which its optimizers work."""

        def optimizer(self, runs: Runs, counted: bool = False) -> Optimizer:
            made: Any = super().optimizer(runs, counted)
            for name in ("step", "step_piece"):
                if hasattr(made, name):
                    setattr(made, name, _noted(getattr(made, name), track.optimizing))
            optimizer: Optimizer = made
            return optimizer

    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        method = kind(Timed(recorded(world, flight), network, dataset, config, ops))
        settle(world, cores(), method.place().computes_with > 0)
        shift = clock_shift(control)
        for number in range(WARM + steps):
            if number == WARM:
                track.optimizing.clear()
                first, sent = len(flight.all_records), method.counter.sent
                control.wait_for_all()
            begun = time.monotonic()
            flight.step = number
            method.step(Batch(batches.ids(*divmod(number, batches.steps_per_epoch))), rate(0))
            if number >= WARM:
                track.steps.append((begun, time.monotonic()))
        sent = (method.counter.sent - sent) / steps
    track.operations = flight.operations(first)
    role, classes, _ = method.work()
    name = f"rank {world.rank} {role}{f' of {classes}' if classes else ''}"
    texts = collected(control, jsonlib.dumps([name, sent, _moved(track, shift)]))
    if world.rank == 0:
        _report([jsonlib.loads(text) for text in texts], trace, plot, json)
    return 0


def collected(control: Control, text: str) -> list[str]:
    """Return the texts of all ranks, which may have any length, on rank 0, and an empty list elsewhere; collective."""
    data: np.ndarray = np.frombuffer(text.encode(), np.uint8).copy()
    sizes = control.rows(np.array([data.size]))[:, 0].tolist()
    if control.rank:
        control.send_to_first(data)
        return []
    texts = [text]
    for rank, size in enumerate(sizes[1:], 1):
        data = np.empty(size, np.uint8)
        control.receive_from(data, rank)
        texts.append(data.tobytes().decode())
    return texts


def _noted(call: Callable[..., Any], into: list[tuple[float, float]]) -> Callable[..., Any]:
    """Wrap a function so that begin and end of each call are added to `into`."""

    def noted(*words: Any, **options: Any) -> Any:
        begun = time.monotonic()
        result = call(*words, **options)
        into.append((begun, time.monotonic()))
        return result

    return noted


def clock_shift(control: Control) -> float:
    """Seconds to add to this rank's clock to get rank 0's, from the shortest of TRIPS round trips; collective."""
    if control.size == 1:
        return 0.0
    shift, comm, buffer = 0.0, control.comm, np.zeros(1)
    for rank in range(1, control.size):
        best = np.inf
        for _ in range(TRIPS):
            if control.rank == 0:
                comm.Recv(buffer, rank)
                buffer[0] = time.monotonic()
                comm.Send(buffer, rank)
            elif control.rank == rank:
                begun = time.monotonic()
                comm.Send(buffer, 0)
                comm.Recv(buffer, 0)
                taken = time.monotonic() - begun
                if taken < best:
                    best, shift = taken, float(buffer[0]) - begun - taken / 2
    return shift


def _moved(track: Track, shift: float) -> dict[str, Any]:
    """A track as plain data for JSON, with times on rank 0's clock."""
    return {
        "rank": track.rank,
        "operations": [[*one[:6], one.begun + shift, one.ended + shift, one.since] for one in track.operations],
        "optimizing": [[a + shift, b + shift] for a, b in track.optimizing],
        "steps": [[a + shift, b + shift] for a, b in track.steps],
    }


def _track(table: dict[str, Any]) -> Track:
    operations = [Operation(name, key, tuple(ranks), *rest) for name, key, ranks, *rest in table["operations"]]
    return Track(table["rank"], operations, [tuple(pair) for pair in table["optimizing"]], table["steps"])


def _report(texts: Sequence[Any], trace: str, plot: str, json: bool) -> None:
    """Print the figures of all ranks, and write the files."""
    names, sent = [name for name, *_ in texts], [nbytes for _, nbytes, _ in texts]
    tracks = [_track(table) for *_, table in texts]
    times = shares(tracks)
    rows: list[dict[str, Any]] = []
    for rank, steps in enumerate(times):
        figures = {f"{kind}_ms": 1e3 * fmean(one[kind] for one in steps) for kind in (*KINDS, "step")}
        rows.append({"rank": rank, "name": names[rank], **figures, "bytes_sent": sent[rank]})
    if trace:
        Path(trace).write_text(jsonlib.dumps(chrome_trace(tracks, dict(enumerate(names)))) + "\n")
    if plot:
        _draw(rows, tracks, times, plot)
    if json:
        tell(jsonlib.dumps({"steps": len(times[0]), "rows": rows}))
        return
    _show(rows, len(times[0]))


def _show(rows: Sequence[dict[str, Any]], steps: int) -> None:
    from rich.table import Table

    table = Table(title=f"milliseconds a step, means of {steps}", title_justify="left")
    table.add_column("rank")
    for name in (*KINDS, "step", "MB sent"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row[f'{kind}_ms']:.3f}" for kind in (*KINDS, "step"))
        table.add_row(row["name"].removeprefix("rank "), *figures, f"{row['bytes_sent'] / 1e6:.3f}")
    Screen().print(table)


def _draw(
    rows: Sequence[dict[str, Any]], tracks: Sequence[Track], times: Sequence[Sequence[dict[str, float]]], path: str
) -> None:
    """Draw the shares of each rank's time, and below them the operations of one step of median length."""
    from matplotlib.figure import Figure

    from psmpi.bench.timeline import Meetings

    colours = dict(zip(KINDS, ("tab:green", "tab:blue", "lightgrey", "tab:orange"), strict=True))
    figure = Figure(figsize=(9, 0.8 * len(rows) + 3), layout="constrained")
    above, below = figure.subplots(2)
    names = [row["name"] for row in rows]
    left = np.zeros(len(rows))
    for kind in KINDS:
        widths = np.array([row[f"{kind}_ms"] for row in rows])
        above.barh(names, widths, left=left, color=colours[kind], label=kind)
        left += widths
    above.invert_yaxis()
    above.legend(ncols=len(KINDS), loc="lower right", bbox_to_anchor=(1, 1))
    above.set_xlabel("ms a step, means")
    lengths = [steps["step"] for steps in times[0]]
    chosen = int(np.argsort(lengths)[len(lengths) // 2])
    meetings, start = Meetings(tracks), min(track.steps[chosen][0] for track in tracks)
    for track, name in zip(tracks, names, strict=True):
        for kind in KINDS:
            spans = [span for span in spans_of(track, chosen, meetings) if span.kind == kind]
            bars = [(1e3 * (span.begun - start), 1e3 * (span.ended - span.begun)) for span in spans]
            below.broken_barh(bars, (names.index(name) - 0.4, 0.8), color=colours[kind])
    below.set_yticks(range(len(names)), names)
    below.invert_yaxis()
    below.set_xlabel(f"ms of step {chosen}")
    figure.savefig(path)
