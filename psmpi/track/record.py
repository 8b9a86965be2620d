"""A tracker is a record of a run in another format; here are its protocol and the data that it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

# How a run ends: all of it is done, it was stopped and can be gone on with, or an error ended it.
End = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Run:
    """A run that is tracked: its directory, its settings by name, and the --track-dir."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    track_dir: str = ""


class Tracker(Protocol):
    """A record of a run in another format. Its methods may raise anything; then it is called no more."""

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin, or go on, after these rows of metrics: later ones of an earlier start are void.

        It is called again where a run goes back to a checkpoint.
        """

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl, to be there when this returns."""

    def close(self, end: End) -> None:
        """End the record."""


def numbers(row: Mapping[str, Any], between: str = ".") -> dict[str, float]:
    """The numbers of a row of metrics by name, but for its step; those of a table in it as TABLE.NAME.

    Lists, such as bytes by rank, are left out.
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{between}{below}": number for below, number in numbers(value, between).items()}
        elif isinstance(value, (int, float)) and name != "step":
            found[name] = float(value)
    return found
