"""Compare the times of transfers with those of bare MPI calls that move as many bytes."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from psmpi.errors import UserError, counted
from psmpi.output import Screen, check_files

if TYPE_CHECKING:
    from psmpi.comm.control import Control

# Least seconds of a measurement: calls are repeated to fill them.
LEAST = 0.02


def comm(
    transfers: tuple[str, ...] = (),
    kilobytes: tuple[float, ...] = (4.0, 400.0, 4000.0),
    pairs: int = 9,
    json: str = "",
) -> int:
    """Time each transfer beside the bare MPI calls that move as many bytes, in turn.

    Run it under mpirun, with a core for each rank. A ratio of 1 means that the transfer costs no more than MPI does.
    Bare calls neither pack nor copy. The ratio so shows the cost of taking rows and columns for a message (subnets),
    and of copying values that a rank both owns and computes with (exchange). Times are those of the slowest rank.

    Args:
        transfers: Names of transfers. If not given: all.
        kilobytes: Approximate bytes that a transfer moves from or to one rank, in kB.
        pairs: Measurements of each, transfer and bare calls in turn.
        json: File for the figures, in JSON.
    """
    from psmpi.bench.moves import DTYPE, MOVES
    from psmpi.comm.control import Control
    from psmpi.comm.world import start

    unknown = [name for name in transfers if name not in MOVES]
    if unknown:
        raise UserError(f"--transfers {' '.join(unknown)}: expected some of {', '.join(MOVES)}")
    if pairs < 2:
        raise UserError(f"--pairs {pairs}: expected 2 or more")
    if not kilobytes or any(not 0.001 <= size <= 1e6 for size in kilobytes):
        raise UserError(f"--kilobytes {' '.join(map(str, kilobytes))}: expected numbers from 0.001 to 1e6")
    check_files(json=json)
    world = start()
    if world.size == 1:
        raise UserError("a transfer needs ranks: run it under mpirun, with 2 ranks or more")
    control, rows = Control(world), list[dict[str, Any]]()
    for name in transfers or MOVES:
        for size in kilobytes:
            move = MOVES[name](world, max(world.size, round(1000 * size / DTYPE.itemsize)))
            for back in (False, True):
                if move.names[back]:
                    row = {"transfer": name, "direction": ("forward", "backward")[back], "calls": move.names[back]}
                    ways = [lambda: move.own(back), lambda: move.bare(back)]  # noqa: B023
                    rows.append({**row, "bytes": move.nbytes(back), **_compare(control, ways, pairs)})
    if control.rank == 0:
        _show(rows, control.size)
        if json:
            Path(json).write_text(jsonlib.dumps({"ranks": control.size, "rows": rows}) + "\n")
    return 0


def _compare(control: Control, ways: list[Callable[[], None]], pairs: int) -> dict[str, Any]:
    """Medians of the microseconds of both ways, and the median and quartiles of their ratios."""
    for way in ways:
        way()
    repeats = max(1, int(LEAST / max(1e-7, _seconds(control, ways[1], 3))))
    times = [[_seconds(control, way, repeats) for way in ways] for _ in range(pairs)]
    low, _, high = quantiles([own / bare for own, bare in times], n=4)
    own, bare = (1e6 * median(of) for of in zip(*times, strict=True))
    return {"us": own, "bare_us": bare, "ratio": median(a / b for a, b in times), "low": low, "high": high}


def _seconds(control: Control, way: Callable[[], None], repeats: int) -> float:
    """Seconds of one call on the slowest rank; collective, with the same result on all ranks."""
    import numpy as np

    control.wait_for_all()
    begun = time.perf_counter()
    for _ in range(repeats):
        way()
    return float(control.rows(np.array([time.perf_counter() - begun])).max()) / repeats


def _show(rows: list[dict[str, Any]], ranks: int) -> None:
    from rich.table import Table

    table = Table(title=f"{counted(ranks, 'rank')}, microseconds a call, medians", title_justify="left")
    for name in ("transfer", "", "bare calls"):
        table.add_column(name)
    for name in ("bytes", "transfer", "bare", "ratio (quartiles)"):
        table.add_column(name, justify="right")
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
        times = (f"{row['us']:,.1f}", f"{row['bare_us']:,.1f}")
        table.add_row(row["transfer"], row["direction"], row["calls"], f"{row['bytes']:,}", *times, spread)
    Screen().print(table)
