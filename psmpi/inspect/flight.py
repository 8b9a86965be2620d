"""Command that shows the last operations of each rank at a stall, from the run's flight recorder: flight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from psmpi.comm.watch.stalls import SILENT, Operation, Rank, describe, diagnose, from_table, seconds
from psmpi.comm.watch.watch import FLIGHTS
from psmpi.errors import DamagedError, UserError
from psmpi.files.rows import read_rows
from psmpi.inspect.output import print_json, size_text
from psmpi.output import Screen


def flight(run: Positional[Annotated[Path, arg(metavar="RUN")]], /, last: int = 10, json: bool = False) -> int:
    """Show the last operations of each rank of a stalled run, the rank to wait for, and missing calls.

    Args:
        run: Run directory, or the file flight.jsonl of one.
        last: Operations to show of each rank.
        json: Print JSON.
    """
    if last < 0:
        raise UserError(f"--last {last}: expected 0 or a number of operations")
    ranks, warn, written = read_flights(run / FLIGHTS if run.is_dir() else run)
    finding = diagnose(ranks, warn)
    lines = describe(finding, written) if finding is not None else ["no rank had stood still for long"]
    if json:
        rows = [{**vars(rank), "operations": [at._asdict() for at in _newest(rank, last)]} for rank in ranks]
        return print_json({"written": written, "finding": lines, "ranks": rows})
    screen = Screen()
    for rank in ranks:
        screen.tell(_title(rank))
        if _newest(rank, last):
            screen.print(_table(rank, last))
    screen.tell(f"at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(written))}:")
    for line in lines:
        screen.tell(line)
    return 0


def _newest(rank: Rank, last: int) -> Sequence[Operation]:
    return rank.operations[max(0, len(rank.operations) - last) :]


def _title(rank: Rank) -> str:
    state = f"{rank.state} for {rank.seconds:.1f} s, step {rank.step}, {rank.count:,} operations"
    more = f", the last that is known {rank.doing}" if rank.state == SILENT and rank.doing else ""
    return f"rank {rank.rank} on {rank.host}: {state}{more}"


def _table(rank: Rank, last: int) -> Table:
    table = Table()
    for name in ("begun", "ms", "step"):
        table.add_column(name, justify="right")
    table.add_column("operation", overflow="fold")
    table.add_column("size", justify="right")
    for at in _newest(rank, last):
        table.add_row(
            _clock(at.begun), _took(at), str(at.step), Text(str(at)), size_text(at.nbytes) if at.group else ""
        )
    return table


def _took(at: Operation) -> str:
    return f"{1e3 * (at.ended - at.begun):.3f}" if at.ended else "goes on"


def _clock(seconds: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds % 1 * 1e6):06d}"


def read_flights(path: Path) -> tuple[list[Rank], float, float]:
    """Read flight.jsonl: the ranks, the run's --stall-warn in seconds, and the time of writing (seconds since 1970).

    UserError if the file is missing, DamagedError if it has other contents.
    """
    try:
        tables = list(read_rows(path))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: it is written when ranks stand still for --stall-warn seconds; give the directory "
            "of such a run"
        ) from None
    except ValueError as error:
        raise DamagedError(f"{path} holds no operations of ranks: {error}") from None
    try:
        ranks = [from_table(table) for table in tables]
        if not ranks or [rank.rank for rank in ranks] != list(range(len(ranks))):
            raise ValueError("not one line of each rank, in order")
        return ranks, seconds(tables[0]["warn"]), seconds(tables[0]["written"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} holds no operations of ranks: {error}") from None
