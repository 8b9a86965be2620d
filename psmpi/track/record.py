"""Protocol of a tracker, which records a run in another format, and the data that a tracker gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

# End of a run: it is done, a signal stopped it and it can be resumed, or an error ended it.
End = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Run:
    """A tracked run: its directory, its settings by name, and the value of --track-dir."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    track_dir: str = ""


class Tracker(Protocol):
    """A record of a run in another format. Its methods may raise any exception; after one they are not called again."""

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue the record after these rows of metrics; later rows of an earlier start are void.

        The method is called again when a run goes back to a checkpoint.
        """

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl; it has to be stored when the method returns."""

    def close(self, end: End) -> None:
        """End the record."""


def numbers(row: Mapping[str, Any], between: str = ".") -> dict[str, float]:
    """Numbers of a row of metrics by name, without its step; those of a table in the row as TABLE.NAME.

    Lists, such as bytes by rank, are left out. between: separator of TABLE and NAME.
    """
    by_name: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            by_name |= {f"{name}{between}{below}": number for below, number in numbers(value, between).items()}
        elif isinstance(value, (int, float)) and name != "step":
            by_name[name] = float(value)
    return by_name
