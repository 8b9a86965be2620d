"""Measure the times of messages between two ranks of one host, and of two hosts, for the cost model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from psmpi.errors import UserError
from psmpi.output import Screen, check_files

if TYPE_CHECKING:
    from psmpi.comm.control import Control
    from psmpi.cost import Link


def links(save: str = "") -> int:
    """Time messages between two ranks of a host, and of two hosts.

    Run it under mpirun, on two hosts for the link between them. Messages go there and back between rank 0 and the first
    other rank of its host, and of another host.

    Args:
        save: File for the times, which psmpi plan --links reads.
    """
    from psmpi.comm.control import Control
    from psmpi.comm.world import start
    from psmpi.cost.link import save as write

    check_files(save=save)
    control = Control(start())
    if control.size == 1:
        raise UserError("a link has two ends: run it under mpirun, with 2 ranks or more")
    measured = find_links(control)
    if control.rank == 0:
        _show(measured)
        if save:
            write(measured, Path(save))
    return 0


def find_links(control: Control) -> dict[str, Link]:
    """Measure the links "within" a host and "between" hosts, where they exist; collective, the result is on rank 0."""
    from psmpi.comm.watch.flight import bare
    from psmpi.comm.world import host_numbers
    from psmpi.cost import Link

    hosts, measured = host_numbers(control.comm), {}
    for name, same in (("within", True), ("between", False)):
        other = next((rank for rank in range(1, control.size) if (hosts[rank] == hosts[0]) == same), None)
        link = None if other is None else Link.measured(bare(control.comm), 0, other)
        if link is not None:
            measured[name] = link
        control.wait_for_all()
    return measured


def _show(measured: dict[str, Link]) -> None:
    from rich.table import Table

    names = {"within": "between ranks of a host", "between": "between hosts"}
    for name, link in measured.items():
        table = Table(title=names[name], title_justify="left")
        for column in ("bytes", "microseconds", "MB/s"):
            table.add_column(column, justify="right")
        for size, seconds in link.times:
            table.add_row(f"{size:,}", f"{1e6 * seconds:,.1f}", f"{size / seconds / 1e6:,.0f}" if size else "")
        Screen().print(table)
